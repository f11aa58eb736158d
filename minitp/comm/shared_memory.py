"""Collectives through memory that all ranks of a host can see: no message, no copy, no kernel on the way.

    rank 0                      rank 1
    +-------+-------+--------+  +-------+-------+--------+
    | slot  | slot  | number |  | slot  | slot  | number |     one MPI window, a segment each
    +-------+-------+--------+  +-------+-------+--------+

In the n-th meeting each rank writes what it has to say into its slot n mod 2, then n into its number, waits
until all numbers have reached n, and reads all slots. Who writes for meeting n + 2 has seen everybody's
number reach n + 1, and so knows that everybody has read the slots of meeting n. Hence two slots in turn, and
a meeting needs no second barrier.
"""

import pickle

import numpy as np

from minitp.comm.mpi import MpiComm

SLOT_BYTES = 1 << 21  # more goes in several meetings
LINE_BYTES = 128  # apart from each other, so that writing a number takes no cache line from somebody else
LENGTH_BYTES = 8  # before an object


class SharedMemoryComm(MpiComm):
    """Ranks as MPI processes of one host.

    `all_reduce`, `all_gather` and `broadcast` go through shared memory; `allgather_object` sleeps while it
    waits, as in MpiComm. Measured beside MPI in docs/performance.md.

    Parameters
    ----------
    node : mpi4py.MPI.Comm
        Ranks of one host.
    """

    def __init__(self, node):
        super().__init__(world=node)
        self._window = self._mpi.Win.Allocate_shared(2 * SLOT_BYTES + LINE_BYTES, 1, comm=node)
        segments = [np.frombuffer(self._window.Shared_query(r)[0], np.uint8) for r in range(self.size)]
        self._slots = [[s[i * SLOT_BYTES : (i + 1) * SLOT_BYTES] for s in segments] for i in (0, 1)]
        self._numbers = [memoryview(s[2 * SLOT_BYTES :]).cast("q") for s in segments]
        self._meetings = 0
        self._numbers[self.rank][0] = 0
        self._window.Lock_all()  # to be allowed to Sync
        node.Barrier()

    def close(self):
        """MPICH may hang at the end of a process if a window is left."""
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
        first = self._meet()[0]
        missing = int.from_bytes(first[:LENGTH_BYTES].tobytes(), "little")
        found = [first[LENGTH_BYTES : LENGTH_BYTES + missing].tobytes()]
        while (missing := missing - len(found[-1])) > 0:
            rest = _put(rest, self._next_slot())
            found.append(self._meet()[0][:missing].tobytes())
        return pickle.loads(b"".join(found)) if self.rank else value

    def _gather_and_combine(self, x, sizes, combine):
        flat = np.ascontiguousarray(x).reshape(-1)
        room = SLOT_BYTES // x.dtype.itemsize
        if max(sizes) <= room:
            return combine(self._exchange_piece(flat, sizes))
        parts = [np.empty(size, x.dtype) for size in sizes]
        for start in range(0, max(sizes), room):
            lengths = [min(room, max(0, size - start)) for size in sizes]
            pieces = self._exchange_piece(flat[start : start + room], lengths)
            for part, piece in zip(parts, pieces, strict=True):
                part[start : start + len(piece)] = piece
        return combine(parts)

    def _exchange_piece(self, flat, sizes):
        """Views of everybody's elements in the slots; they hold until the next meeting but one."""
        self._next_slot().view(flat.dtype)[: len(flat)] = flat
        slots = self._meet()
        return [slot.view(flat.dtype)[:size] for slot, size in zip(slots, sizes, strict=True)]

    def _next_slot(self):
        """Where this rank may write before the next meeting: uint8 [SLOT_BYTES]."""
        return self._slots[(self._meetings + 1) % 2][self.rank]

    def _meet(self):
        """Wait until all ranks are here; return all slots, in rank order."""
        self._meetings += 1
        self._window.Sync()  # what was written is there before the number says so
        self._numbers[self.rank][0] = self._meetings
        for rank, number in enumerate(self._numbers):
            if number[0] < self._meetings:
                wait = self.new_wait(lambda late=rank: [late])
                while number[0] < self._meetings:
                    wait.pause()
        self._window.Sync()
        return self._slots[self._meetings % 2]


def _put(data, slot):
    """Write as much of `data` as there is room for; return the rest."""
    count = min(len(data), len(slot))
    slot[:count] = np.frombuffer(data, np.uint8, count)
    return data[count:]
