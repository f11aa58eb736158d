"""Collectives through memory that all ranks of a host share, without messages.

    rank 0                      rank 1
    +-------+-------+--------+  +-------+-------+--------+
    | slot  | slot  | number |  | slot  | slot  | number |     one MPI window, one segment per rank
    +-------+-------+--------+  +-------+-------+--------+

In the n-th round each rank writes its data into its slot n mod 2 and then n into its number, waits until all
numbers have reached n, and reads all slots.

Two slots per rank are enough, and a round needs no second barrier. A rank writes the data of round n + 2 into
the slot of round n only after all numbers have reached n + 1, so all ranks have finished reading that slot.
"""

import pickle

import numpy as np

from minitp.comm.mpi import MpiComm

SLOT_BYTES = 1 << 21  # larger data takes several rounds
LINE_BYTES = 128  # space for a number, so that it shares no cache line with data of another rank
LENGTH_BYTES = 8  # the length of a pickled object, written before it


class SharedMemoryComm(MpiComm):
    """Ranks as MPI processes on one host.

    `all_reduce`, `all_gather` and `broadcast` go through shared memory. `allgather_object` sends messages, as
    in MpiComm, and sleeps while it waits. docs/performance.md compares the times with those of MPI.

    Parameters
    ----------
    node : mpi4py.MPI.Comm
        The communicator of the ranks on this host.
    group : groups.Group or None
        See MpiComm.
    """

    transport = "shm"

    def __init__(self, node, group=None):
        super().__init__(world=node, group=group)
        self._window = self._mpi.Win.Allocate_shared(2 * SLOT_BYTES + LINE_BYTES, 1, comm=node)
        segments = [np.frombuffer(self._window.Shared_query(r)[0], np.uint8) for r in range(self.size)]
        self._slots = [[s[i * SLOT_BYTES : (i + 1) * SLOT_BYTES] for s in segments] for i in (0, 1)]
        self._numbers = [memoryview(s[2 * SLOT_BYTES :]).cast("q") for s in segments]
        self._round = 0
        self._numbers[self.rank][0] = 0
        self._window.Lock_all()  # MPI allows Sync only within a lock
        node.Barrier()

    def close(self):
        """Free the window; MPICH may hang at exit if a window is left."""
        super().close()
        self._slots = self._numbers = None
        self._window.Unlock_all()
        self._window.Free()

    def broadcast(self, value):
        rest = memoryview(pickle.dumps(value)) if self.rank == 0 else b""
        slot = self._next_slot()
        if self.rank == 0:
            slot[:LENGTH_BYTES] = np.frombuffer(len(rest).to_bytes(LENGTH_BYTES, "little"), np.uint8)
            rest = _put(rest, slot[LENGTH_BYTES:])
        first = self._end_round()[0]
        missing = int.from_bytes(first[:LENGTH_BYTES].tobytes(), "little")
        pieces = [first[LENGTH_BYTES : LENGTH_BYTES + missing].tobytes()]
        while (missing := missing - len(pieces[-1])) > 0:
            rest = _put(rest, self._next_slot())
            pieces.append(self._end_round()[0][:missing].tobytes())
        return pickle.loads(b"".join(pieces)) if self.rank else value

    def _gather_and_combine(self, x, sizes, combine):
        flat = np.ascontiguousarray(x).reshape(-1)
        slot_size = SLOT_BYTES // x.dtype.itemsize  # elements per slot
        if max(sizes) <= slot_size:
            return combine(self._exchange_piece(flat, sizes))
        parts = [np.empty(size, x.dtype) for size in sizes]
        for start in range(0, max(sizes), slot_size):
            lengths = [min(slot_size, max(0, size - start)) for size in sizes]
            pieces = self._exchange_piece(flat[start : start + slot_size], lengths)
            for part, piece in zip(parts, pieces, strict=True):
                part[start : start + len(piece)] = piece
        return combine(parts)

    def _exchange_piece(self, flat, sizes):
        """Return views of all ranks' elements in the slots; they are valid until this rank's next round."""
        self._next_slot().view(flat.dtype)[: len(flat)] = flat
        slots = self._end_round()
        return [slot.view(flat.dtype)[:size] for slot, size in zip(slots, sizes, strict=True)]

    def _next_slot(self):
        """Return the slot that this rank writes to in the next round, uint8 [SLOT_BYTES]."""
        return self._slots[(self._round + 1) % 2][self.rank]

    def _end_round(self):
        """Wait until all ranks have written in this round; return the slots of all ranks, in rank order."""
        self._round += 1
        self._window.Sync()  # the slot must be visible to the other ranks before the number is
        self._numbers[self.rank][0] = self._round
        for rank, number in enumerate(self._numbers):
            if number[0] < self._round:
                wait = self.new_wait(lambda late=rank: [late])
                while number[0] < self._round:
                    wait.pause()
        self._window.Sync()
        return self._slots[self._round % 2]


def _put(data, slot):
    """Write as much of `data` as fits into the slot; return the rest."""
    count = min(len(data), len(slot))
    slot[:count] = np.frombuffer(data, np.uint8, count)
    return data[count:]
