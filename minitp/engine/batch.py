"""The units of scheduling: sequences, and the batches that the scheduler sends to all ranks."""

from dataclasses import dataclass, field
from typing import NamedTuple

from minitp.sampling import PENDING


@dataclass(eq=False)
class Sequence:
    """A request that is waiting or running, with its tokens and blocks."""

    number: int  # ascending in the order of arrival
    request: object  # request.Request
    token_ids: list
    num_computed_tokens: int = 0  # tokens from the start whose keys and values are in the blocks
    block_table: list = field(default_factory=list)
    block_keys: list = field(default_factory=list)  # one key for each full block
    in_flight: int = 0  # scheduled batches that contain it and have not been accepted
    stopped: bool = False

    @property
    def num_uncomputed_tokens(self):
        """The number of tokens still to compute; above one while the prompt is not finished."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_ready(self):
        """True unless the next batch must wait for the host's choice, or for the end that is in flight."""
        if not self.in_flight:
            return True
        ended = self.token_ids[-1] == PENDING and len(self.token_ids) >= self.request.positions
        return not (ended or self.request.needs_host)


class ScheduledChunk(NamedTuple):
    """The tokens of a sequence, from `start` to `stop`, in a batch that has not been accepted."""

    sequence: Sequence
    start: int
    stop: int
    num_scored: int  # positions of the prompt whose logits score its next token
    is_last: bool  # no token was known to come after `stop`


@dataclass
class ScheduledBatch:
    """The work of one forward pass, the same on every rank.

    Attributes
    ----------
    chunks : list of (number, tokens, new_blocks)
        For each sequence, the tokens that go through the model and the blocks allocated for them.
    started : list of (number, block_table, length)
        Sequences that start running, with the cached blocks that they reuse.
    finished : list of int
        Sequences that have stopped running since the last batch.
    logits_at : list of int
        The rows, among all tokens of the batch, that get logits: for each sequence, the positions that score
        its prompt, and the last one if it gets a new token.
    choices : list of (number, draw) or None
        For each row of `logits_at`: the sequence for which a GPU chooses a token, and a uniform random
        number; None if the host needs the logits.
    sampling : dict of int to (params, prompt_ids, new_ids, room)
        The sampling of the sequences in `started` for which a GPU chooses tokens; see cuda.lanes.Lanes.start.
    """

    chunks: list
    started: list
    finished: list
    logits_at: list
    choices: list
    sampling: dict
