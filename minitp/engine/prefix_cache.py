"""The prefix cache: full blocks of the KV cache, looked up by their tokens and all tokens before them."""

import hashlib
from collections import OrderedDict

import numpy as np


class PrefixCache:
    """An index of full blocks by key, including blocks that no sequence uses anymore.

    A sequence that begins with the same tokens reuses these blocks instead of computing them again. An unused
    block keeps its content until its memory is needed; the least recently used one is evicted first.
    """

    def __init__(self):
        self._block_of, self._key_of = {}, {}
        self._evictable = OrderedDict()  # unused blocks, the least recently used first

    def __len__(self):
        """Return the number of blocks that can be evicted."""
        return len(self._evictable)

    def lookup(self, keys):
        """Return the blocks of `keys`, in order, up to the first key that is not cached."""
        cached = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._evictable.pop(block, None)
            cached.append(block)
        return cached

    def register(self, block, key):
        """Let `lookup` return the full block `block` for `key`, unless another block already has that key."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def make_evictable(self, block):
        """Keep the content of a block without references; return False if the block is not registered."""
        if block not in self._key_of:
            return False
        self._evictable[block] = None
        return True

    def evict(self):
        """Forget the content of the least recently used block and return the block."""
        block, _ = self._evictable.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block


def block_keys(token_ids, block_size, before=()):
    """Return a key for each full block of a sequence, a hash of all tokens up to the block's end.

    `before` has the keys of the sequence's first blocks, which are not computed again.
    """
    keys = list(before)
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = np.asarray(token_ids[start : start + block_size], np.int64)
        keys.append(hashlib.sha256((keys[-1] if keys else b"") + tokens.tobytes()).digest())
    return keys
