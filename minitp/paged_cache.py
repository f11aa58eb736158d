"""The paged KV cache: many sequences share one pool of blocks, and get more blocks as they grow.

(Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, 2023, section 4.)
"""

from minitp.kv_cache import make_storage


class BlockPool:
    """Memory for the keys and values of many sequences on one rank, in blocks of `block_size` slots.

    Position p of a sequence is in slot `block_table[p // block_size] * block_size + p % block_size`.
    """

    def __init__(self, xp, dtype, layers, kv_heads, head_dim, blocks, block_size=16, kv_dtype="auto"):
        self.xp, self.block_size = xp, block_size
        self.storage = make_storage(xp, dtype, layers, (kv_heads, blocks * block_size, head_dim), kv_dtype)

    @property
    def nbytes(self):
        """The number of bytes reserved on this rank."""
        return sum(stored.nbytes for pair in self.storage for stored in pair)


class PagedCache:
    """The keys and values of one sequence, in blocks of a pool.

    The scheduler allocates the blocks: before a pass, `block_table` must have slots for all its positions.
    Sequences with a common prefix may share full blocks, because a full block is never written again.

    Parameters
    ----------
    pool : BlockPool
    block_table : list of int
        The blocks of this sequence, in order. The scheduler appends to the list as the sequence grows.
    length : int
        The number of positions that are already stored, in shared blocks.
    """

    def __init__(self, pool, block_table, length=0):
        self.pool, self.block_table, self.length = pool, block_table, length
        self._pass_slots = {}  # (first, stop) -> slots of these positions, in the current pass

    def append(self, layer, k, v, first=0):
        """Append and return keys and values as KVCache.append does; the result is a copy."""
        stop = self.length + k.shape[1]
        to_write, to_read = (self._slots_in_pass(start, stop) for start in (self.length, first))  # [n], [S]
        pair = self.pool.storage[layer]
        for stored, x in zip(pair, (k, v), strict=True):
            stored.write(to_write, x)
        return pair[0].gather(to_read), pair[1].gather(to_read)  # [K_r, S, d] each

    def advance(self, tokens):
        """End a pass: add `tokens`, the number of positions that every layer has appended, to `length`."""
        self.length += tokens
        self._pass_slots = {}

    def _slots_in_pass(self, start, stop):
        """Return `slots`, computed once per pass and window: layers may have different windows."""
        if (start, stop) not in self._pass_slots:
            self._pass_slots[start, stop] = self.slots(start, stop)
        return self._pass_slots[start, stop]

    def check_room(self, stop):
        """Raise IndexError unless the block table has slots for all positions before `stop`."""
        if stop > (allocated := len(self.block_table) * self.pool.block_size):
            raise IndexError(f"position {stop - 1} has no slot: the block table has only {allocated} slots")

    def slots(self, start, stop):
        """Return the slots of positions start .. stop - 1, int [stop - start]."""
        self.check_room(stop)
        xp, size = self.pool.xp, self.pool.block_size
        return slot_mapping(xp.asarray(self.block_table), xp.arange(start, stop), size)  # [n]


def slot_mapping(block_table, positions, block_size):
    """Return the slot of each position, int [n], for `positions` int [n] and `block_table` int [blocks]."""
    return block_table[positions // block_size] * block_size + positions % block_size  # [n]
