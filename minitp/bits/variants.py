"""The runs of one prompt whose bits are compared, on one number of ranks.

    prefill              the whole prompt in one pass, alone: the reference
    again.1, ..          the same run again
    batch                the prompt next to other sequences, in a paged cache as in `serve`
    chunk.0, chunk.1     the prompt in two passes
    token.0, token.1     the prompt one token per pass, as in decoding
    batch.token.0, ..    the same next to other sequences

Of a long prompt, only the last tokens go through the model one by one.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minitp.bits.recording import PassRows, RankRecording, own_index, pass_names
from minitp.check.passes import chunk_stops
from minitp.paged_cache import PagedCache
from minitp.trace.record import Recorder
from minitp.util.format import counted

BLOCK_SIZE = 16  # slots in a block of the paged cache
MOST_DECODED = 8  # tokens that go through the model one by one


@dataclass(frozen=True)
class Variant:
    """Two runs of the prompt, a and b, as recorded by this rank; b is the run that the table names.

    Attributes
    ----------
    title : str
    a, b : RankRecording
    repeated : bool
        Whether b is the same run as a.
    """

    title: str
    a: RankRecording
    b: RankRecording
    repeated: bool = False


class Variants:
    """The runs of a prompt on a model; all ranks run them together.

    Parameters
    ----------
    model : Model
    ids : list of int
        The prompt.
    step_file : StepFile
        The file that gets this rank's steps.
    progress : tqdm
        The bar that shows the title of a run and counts the layers.
    """

    def __init__(self, model, ids, step_file, progress):
        self.model, self.ids, self.step_file, self.progress = model, ids, step_file, progress
        self.windows = list(model.config.windows)

    def run(self, batch, repeats):
        """Run all variants, with `batch` sequences and `repeats` repetitions, and yield each Variant.

        The steps of a variant are kept only until the next one.
        """
        tokens = len(self.ids)
        stops = [0, tokens]
        self.progress.set_description("the prompt alone")
        alone = self._record(["prefill"], stops)
        title = "the same run again" + (f", {counted(repeats, 'time')}" if repeats > 1 else "")
        for number in range(1, repeats + 1):
            yield from self._variant(title, alone, [f"again.{number}"], stops, repeated=True)
        if batch > 1:
            title = f"in a batch of {counted(batch, 'sequence')}"
            yield from self._variant(title, alone, ["batch"], stops, batch)
        if tokens == 1:
            return
        stops = [0, *chunk_stops(tokens)]
        yield from self._variant("in two chunks", alone, ["chunk.0", "chunk.1"], stops)
        stops = range(max(0, tokens - MOST_DECODED), tokens + 1)
        title = "one token per pass"
        self.progress.set_description(title)
        one_by_one = self._record([f"token.{position}" for position in stops[:-1]], stops)
        with self._temporary():
            yield Variant(title, alone, one_by_one)
        if batch > 1:
            names = [f"batch.token.{position}" for position in stops[:-1]]
            yield from self._variant(f"{title}, in a batch of {batch}", one_by_one, names, stops, batch)

    def _variant(self, title, a, names, stops, count=1, repeated=False):
        """Yield the Variant of a run; the parameters are those of `_record`."""
        self.progress.set_description(title)
        with self._temporary():
            yield Variant(title, a, self._record(names, stops, count), repeated)

    @contextmanager
    def _temporary(self):
        """Forget at the end of a `with` block which steps were written in it."""
        nbytes = self.step_file.nbytes
        yield
        self.step_file.truncate(nbytes)

    def _record(self, names, stops, count=1):
        """Run the prompt as one of `count` sequences, and record its passes.

        Parameters
        ----------
        names : list of str
            The name of each pass.
        stops : list of int
            The position of the first pass, and the stop of each. The positions before the first pass have
            the keys and values of one pass over the prompt alone.
        count : int
            The number of sequences.
        """
        model, own = self.model, own_index(count)
        vocab, caches = model.config.vocab_size, new_caches(model, count, stops[-1])
        sequences = [[(token + 1 + n) % vocab for token in self.ids] for n in range(count)]
        sequences[own] = self.ids
        if stops[0]:
            for ids, cache in zip(sequences, caches, strict=True):
                model.forward(ids, cache, None)
                cache.length = stops[0]
        recording = RankRecording(self.step_file, [], model.comm.size, self.windows, self.progress.update)
        recorder = Recorder(model.device, None, recording.write)
        for name, (start, stop) in zip(names, pairwise(stops), strict=True):
            rows = stop - start
            recording.passes.append(PassRows(name, start, stop, rows * count))
            recorder.begin(*pass_names(name, count), rows=[rows] * count, logit_rows=[1] * count)
            parts = [(ids[start:stop], cache) for ids, cache in zip(sequences, caches, strict=True)]
            last = model.device.xp.asarray(np.arange(1, count + 1) * rows - 1)  # [count]
            model.forward_batch(parts, slice(None) if count == 1 else last, recorder)
        return recording


def temporary_nbytes(source, tokens):
    """Return the most bytes that all ranks together keep in temporary files: the steps of three runs.

    They are the reference, another run, and the blocks of that run by themselves.
    """
    c, plan = source.config, source.plan
    scores = 2 * c.num_attention_heads * tokens  # elements of scores and probs in a row
    heads = (3 * c.num_attention_heads + 6 * c.num_key_value_heads) * c.head_dim
    mlp = (c.num_experts_per_tok or 3) * c.intermediate_size
    on_all_ranks = plan.tp * 8 * c.hidden_size  # norms, outputs and residuals
    logits = (1 + plan.tp) * c.vocab_size
    return 3 * 4 * tokens * (plan.layers * (scores + heads + mlp + on_all_ranks) + logits)


def new_caches(model, count, positions):
    """Return the caches of `count` sequences: for one its own memory, for several the blocks of a pool."""
    if count == 1:
        return [model.new_cache(positions)]
    per_sequence = -(-positions // BLOCK_SIZE)
    pool = model.new_pool(count * per_sequence, BLOCK_SIZE)
    return [PagedCache(pool, list(range(n, count * per_sequence, count))) for n in range(count)]
