"""Start ranks, and run as one of them.

run.py          the launcher: start the ranks of a command and wait until they end
heartbeat.py    ranks that stand still
supervisor.py   the ranks as child processes: start them with mpirun, watch them, talk to them, end them
folder.py       the folder of a job, for its socket and output
mpirun.py       the mpirun that the launcher starts, and its environment
signals.py      SIGTERM and Ctrl-C
rank.py         the process of one rank, from its start to its exit code
devices.py      one GPU for each rank
transport.py    the Comm that --comm selects
"""
