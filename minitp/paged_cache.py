"""Keys and values of many sequences in blocks of one pool, so that none reserves memory for its longest self.

(Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, 2023, section 4.)
"""

from minitp.kv_cache import make_storage


class BlockPool:
    """Memory for the keys and values of many sequences on one rank, in blocks of `block_size` positions.

    Position p of a sequence is row `block_table[p // block_size] * block_size + p % block_size`.
    """

    def __init__(self, xp, dtype, layers, kv_heads, head_dim, blocks, block_size=16, kv_dtype="auto"):
        self.xp, self.block_size = xp, block_size
        self.storage = make_storage(xp, dtype, layers, (kv_heads, blocks * block_size, head_dim), kv_dtype)

    @property
    def nbytes(self):
        """Bytes reserved on this rank."""
        return sum(stored.nbytes for pair in self.storage for stored in pair)


class PagedCache:
    """One sequence's keys and values, in blocks of a pool.

    Whoever schedules the sequences says which blocks: `block_table` must have room for a step's positions
    before the step. Sequences that begin alike may share full blocks, for these are never written again.

    Parameters
    ----------
    pool : BlockPool
    block_table : list of int
        Grows with the sequence.
    length : int
        Positions that are already there, in shared blocks.
    """

    def __init__(self, pool, block_table, length=0):
        self.pool, self.block_table, self.length = pool, block_table, length
        self._slots = None  # of this pass: (its first position, rows that are written, rows that are read)

    def append(self, layer, k, v, first=0):
        """As KVCache.append; what it returns is a copy."""
        if self._slots is None or self._slots[0] != self.length:
            stop = self.length + k.shape[1]
            self._slots = self.length, self.slots(self.length, stop), self.slots(first, stop)
        _, new, read = self._slots
        pair = self.pool.storage[layer]
        for stored, x in zip(pair, (k, v), strict=True):
            stored.write(new, x)
        return pair[0].gather(read), pair[1].gather(read)  # [K_r, S, d] each

    def advance(self, tokens):
        """The step of `tokens` positions is complete in every layer."""
        self.length += tokens

    def slots(self, start, stop):
        """The pool's rows of positions start .. stop - 1: int [stop - start]."""
        size = self.pool.block_size
        if stop > len(self.block_table) * size:
            raise IndexError(f"position {stop - 1} in {len(self.block_table)} blocks of {size}")
        xp = self.pool.xp
        return slot_mapping(xp.asarray(self.block_table), xp.arange(start, stop), size)  # [n]


def slot_mapping(block_table, positions, block_size):
    """The pool's rows of positions int [n], for a block table int [blocks]: int [n]."""
    return block_table[positions // block_size] * block_size + positions % block_size  # [n]
