"""Who uses which block of a pool. Rank 0 alone keeps these books; the other ranks get block tables."""

from minitp.engine.prefix_cache import PrefixCache


class BlockAllocator:
    """Hands out block numbers and counts their users; full blocks are shared through a PrefixCache.

    Parameters
    ----------
    blocks, block_size : int

    Attributes
    ----------
    users : list of int
        How many sequences use each block.
    """

    def __init__(self, blocks, block_size):
        self.blocks, self.block_size = blocks, block_size
        self.prefixes = PrefixCache()
        self._empty = list(reversed(range(blocks)))
        self.users = [0] * blocks

    @property
    def available(self):
        """Blocks that `take` can still hand out."""
        return len(self._empty) + len(self.prefixes)

    def take(self, count):
        """`count` blocks for one user, contents forgotten; None if there are not so many."""
        if count > self.available:
            return None
        taken = [self._empty.pop() if self._empty else self.prefixes.evict() for _ in range(count)]
        for block in taken:
            self.users[block] = 1
        return taken

    def find(self, keys):
        """The blocks known by the first of these keys, one after the other, for one more user of each."""
        found = self.prefixes.find(keys)
        for block in found:
            self.users[block] += 1
        return found

    def release(self, block_table):
        """One user less of each of these blocks."""
        for block in reversed(block_table):  # so that of a prefix the end is evicted before the beginning
            self.users[block] -= 1
            if self.users[block] == 0 and not self.prefixes.keep(block):
                self._empty.append(block)
