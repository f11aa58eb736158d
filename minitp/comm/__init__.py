"""Communication between ranks: the same collectives over every transport.

base.py            the collectives: all_reduce, all_gather, broadcast, allgather_object, agree
single.py          one rank
threads.py         ranks as threads of one process: `run_threads`
mpi.py             ranks as MPI processes that send messages
shared_memory.py   ranks as MPI processes on one host
hierarchical.py    ranks on several hosts: shared memory within each host, messages between hosts
groups.py          several replica groups in one MPI world
wait.py            waiting for other ranks: without occupying a core, and with a time limit

The transports between GPUs are in `cuda`: comm.py, nccl.py, peer.py. `launch/transport.py` selects the one
that --comm asks for.
"""

from minitp.comm.threads import run_threads

__all__ = ["run_threads"]
