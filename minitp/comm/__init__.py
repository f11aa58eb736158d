"""How ranks meet: the same collectives over every transport.

base.py            the collectives: all_reduce, all_gather, broadcast, exchange, agree
single.py          one rank
threads.py         ranks as threads of one process: `run_threads`
mpi.py             ranks as MPI processes, by messages
shared_memory.py   ranks as MPI processes of one host
hierarchical.py    ranks on several hosts: shared memory within each, messages between them
wait.py            how a rank waits: without keeping a core, and not for ever

Ranks on GPUs meet through `cuda`: comm.py, nccl.py, peer.py. What --comm chooses is in `launch/transport.py`.
"""

from minitp.comm.threads import run_threads

__all__ = ["run_threads"]
