"""Starting ranks, and being one.

run.py          the launcher: starts the ranks of a command and waits for their end
supervisor.py   the ranks as the launcher has them: started with mpirun, watched, talked to, and ended
rank.py         a rank's own process, from its start to its exit code
devices.py      which GPU is whose
transport.py    what --comm chooses
"""
