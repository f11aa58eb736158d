"""The comparison of replicas: all have run the same tokens, so rank r of each must have the same bits."""

import hashlib
from dataclasses import dataclass
from itertools import zip_longest

from minitp.util.format import counted


@dataclass(frozen=True)
class ReplicaDifference:
    """The first step whose bits differ between replica 0 and another replica, on the same rank of both."""

    replica: int
    rank: int
    name: str

    def __str__(self):
        return f"replica {self.replica} differs from replica 0: first step {self.name}, rank {self.rank}"


def replica_difference(comm, step_file):
    """Return the ReplicaDifference of the earliest step, or None; the ranks of all groups call this.

    Parameters
    ----------
    comm : Comm
        The Comm of this rank's group.
    step_file : StepFile
        The file with the steps that this rank has recorded.
    """
    if comm.all_groups.size == comm.size:
        return None
    hashes = comm.all_groups.allgather_object(
        [(name, bits_hash(step_file, name)) for name in step_file.names]
    )
    found = []
    for number, other in enumerate(hashes[comm.size :], start=comm.size):
        replica, rank = divmod(number, comm.size)
        pairs = zip_longest(hashes[rank], other)
        for step, (first, second) in enumerate(pairs):
            if first != second:
                found.append((step, ReplicaDifference(replica, rank, (first or second)[0])))
                break
    return min(found, key=lambda each: each[0])[1] if found else None


def bits_hash(step_file, name):
    """Return a hash of a recorded array with its dtype and shape."""
    array = step_file.read(name)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).digest()


def replicas_verdict(comm, result, said):
    """Return (text, ok) for all replicas; `said` is the verdict on this rank's own replica."""
    each = comm.all_groups.allgather_object((result.ok, said))[:: comm.size]
    wrong = [f"replica {replica}: {text}" for replica, (ok, text) in enumerate(each) if not ok]
    if wrong:
        return "\n".join(wrong), False
    if result.replica_difference is not None:
        return f"{said}, but {result.replica_difference}", False
    return f"{said}; {counted(len(each), 'replica')} with the same bits", True
