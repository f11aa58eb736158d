"""Helpers for all rooms.

environment.py   ranks, cores, memory and GPUs, as known before NumPy and MPI are imported
format.py        numbers, sizes and tables as text
suggest.py       suggestions for mistyped names
stdout.py        standard output
files.py         reading of files, and why one cannot be read
shares.py        the shares of --split
dev_shm.py       /dev/shm, the shared memory of the ranks on a host
run_module.py    a module, run in another process
this_run.py      facts about this run, for traces and reports
"""
