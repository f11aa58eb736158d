"""The choice of a replica for a request: the one with the fewest waiting tokens, or with the prompt's prefix.

A request's *waiting tokens* are the prompt tokens that its replica must still compute, and the new tokens
that it may still generate. Prompt tokens that are probably in the replica's prefix cache do not count, and
after the first output the whole prompt is computed.

A replica whose cache probably has more of the prompt than that of the least loaded replica gets the request,
as long as it has at most that number of waiting tokens more, plus one batch. So a conversation stays where it
is, and a prefix that all requests share is soon in every cache.
"""

from collections import OrderedDict
from dataclasses import dataclass


class ReplicaLoad:
    """The waiting tokens of a replica, and the blocks of the prompts that it has received.

    Parameters
    ----------
    num_blocks, block_size : int
        The size of the replica's pool. No more keys are remembered than there are blocks.

    Attributes
    ----------
    waiting : int
        The waiting tokens of all unfinished requests.
    added : int
        The number of requests so far.
    """

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.waiting = self.added = 0
        self._keys = OrderedDict()  # block keys, the least recently used first

    def cached_tokens(self, keys):
        """Return the number of tokens in the first of these blocks that are probably cached."""
        known = 0
        for key in keys:
            if key not in self._keys:
                break
            known += 1
        return known * self.block_size

    def remember(self, keys):
        """Note that the blocks with these keys will be in the cache."""
        for key in reversed(keys):  # so that the end of a prompt is forgotten before its beginning
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self.num_blocks:
            self._keys.popitem(last=False)


@dataclass(eq=False)
class WaitingTokens:
    """The waiting tokens of one request, which are removed from its replica's load as they are computed."""

    load: ReplicaLoad
    prompt: int
    new: int

    def add(self):
        """Add the request to the load."""
        self.load.waiting += self.prompt + self.new
        self.load.added += 1

    def count(self, tokens):
        """Remove the prompt and this number of new tokens."""
        tokens = min(tokens, self.new)
        self.load.waiting -= self.prompt + tokens
        self.prompt, self.new = 0, self.new - tokens

    def finish(self):
        """Remove what is left."""
        self.count(self.new)


def choose_load(loads, keys, slack):
    """Return the ReplicaLoad that gets a request whose prompt has these block keys.

    Parameters
    ----------
    loads : list of ReplicaLoad
    keys : list of bytes
    slack : int
        The number of waiting tokens, in addition to the cached ones, by which a replica with more of the
        prefix may exceed the least loaded one.
    """
    least = min(loads, key=lambda load: (load.waiting, load.added))
    most = max(loads, key=lambda load: (load.cached_tokens(keys), -load.waiting, -load.added))
    gain = most.cached_tokens(keys) - least.cached_tokens(keys)
    return most if gain > 0 and most.waiting - least.waiting <= gain + slack else least
