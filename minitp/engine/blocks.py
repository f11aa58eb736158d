"""The allocator of the pool's blocks. Only rank 0 has one; the other ranks receive block tables."""

from minitp.engine.prefix_cache import PrefixCache


class BlockAllocator:
    """An allocator of block numbers that counts references; full blocks are shared through a PrefixCache.

    Parameters
    ----------
    num_blocks, block_size : int

    Attributes
    ----------
    ref_count : list of int
        The number of sequences that use each block.
    """

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.prefixes = PrefixCache()
        self._free_blocks = list(reversed(range(num_blocks)))
        self.ref_count = [0] * num_blocks

    @property
    def num_free_blocks(self):
        """The number of blocks that `allocate` can still return."""
        return len(self._free_blocks) + len(self.prefixes)

    def allocate(self, count):
        """Return `count` blocks with one reference each, or None if too few are free."""
        if count > self.num_free_blocks:
            return None
        blocks = [
            self._free_blocks.pop() if self._free_blocks else self.prefixes.evict() for _ in range(count)
        ]
        for block in blocks:
            self.ref_count[block] = 1
        return blocks

    def lookup(self, keys):
        """Return the cached blocks of the longest known prefix of `keys`, each with one more reference."""
        cached = self.prefixes.lookup(keys)
        for block in cached:
            self.ref_count[block] += 1
        return cached

    def free(self, block_table):
        """Drop one reference to each of these blocks."""
        for block in reversed(block_table):  # so that the end of a prefix is evicted before its beginning
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0 and not self.prefixes.make_evictable(block):
                self._free_blocks.append(block)
