"""Who uses which block of a pool. Rank 0 alone keeps these books; the other ranks get block tables."""

import hashlib
from collections import OrderedDict

import numpy as np


class BlockAllocator:
    """Hands out block numbers, counts their users, and finds blocks again by the tokens that they hold.

    A full block that nobody uses any more keeps its content until its memory is needed: a sequence that
    begins with the same tokens takes it over and need not compute them. The one that was left longest ago is
    evicted first.

    Parameters
    ----------
    blocks, block_size : int
    """

    def __init__(self, blocks, block_size):
        self.blocks, self.block_size = blocks, block_size
        self._empty = list(reversed(range(blocks)))
        self._users = [0] * blocks
        self._block_of, self._key_of = {}, {}  # of the full blocks that are known by their content
        self._left = OrderedDict()  # of these, the ones without users; the one left longest ago first

    @property
    def available(self):
        """Blocks that `take` can still hand out."""
        return len(self._empty) + len(self._left)

    def take(self, count):
        """`count` blocks for one user, contents forgotten; None if there are not so many."""
        if count > self.available:
            return None
        return [self._take_one() for _ in range(count)]

    def _take_one(self):
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._left.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._users[block] = 1
        return block

    def find(self, keys):
        """The blocks known by the first of these keys, one after the other, for one more user of each."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._left.pop(block, None)
            self._users[block] += 1
            found.append(block)
        return found

    def remember(self, block, key):
        """From now on `block`, which is full, is found by `key`; unless another block is."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def release(self, block_table):
        """One user less of each of these blocks."""
        for block in reversed(block_table):  # so that of a prefix the end is evicted before the beginning
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._key_of:
                self._left[block] = None
            else:
                self._empty.append(block)


def block_keys(token_ids, block_size, before=()):
    """Keys of the full blocks of a sequence, each of all tokens up to its end.

    `before` are the keys of its first blocks, which are not computed again.
    """
    keys = list(before)
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = np.asarray(token_ids[start : start + block_size], np.int64)
        keys.append(hashlib.sha256((keys[-1] if keys else b"") + tokens.tobytes()).digest())
    return keys
