"""Prefix caching: full blocks of the cache, found again by the tokens that they hold."""

import hashlib
from collections import OrderedDict

import numpy as np


class PrefixCache:
    """Which full blocks hold which tokens, those included that nobody uses any more.

    A sequence that begins with the same tokens takes such blocks over and need not compute them. A block
    without users keeps its content until its memory is needed; the one left longest ago is evicted first.
    """

    def __init__(self):
        self._block_of, self._key_of = {}, {}
        self._left = OrderedDict()  # blocks without users; the one left longest ago first

    def __len__(self):
        """Blocks that can be evicted."""
        return len(self._left)

    def find(self, keys):
        """The blocks known by the first of these keys, one after the other, up to one that is not known."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._left.pop(block, None)
            found.append(block)
        return found

    def remember(self, block, key):
        """From now on `block`, which is full, is found by `key`; unless another block is."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def keep(self, block):
        """Whether a block whose last user has left is kept for what it holds."""
        if block not in self._key_of:
            return False
        self._left[block] = None
        return True

    def evict(self):
        """The block that was left longest ago, its content forgotten."""
        block, _ = self._left.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block


def block_keys(token_ids, block_size, before=()):
    """Keys of the full blocks of a sequence, each of all tokens up to its end.

    `before` are the keys of its first blocks, which are not computed again.
    """
    keys = list(before)
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = np.asarray(token_ids[start : start + block_size], np.int64)
        keys.append(hashlib.sha256((keys[-1] if keys else b"") + tokens.tobytes()).digest())
    return keys
