"""Slurm on the two hosts of hosts.py: a controller on host-a, and a daemon on each host.

    python tests/support/slurm_hosts.py srun --mpi=pmi2 -N 2 -n 4 -O minitp generate "Once upon a time"

runs a command on host-a. Needs what hosts.py needs, and Debian's slurm-wlm and munge.
"""

import shutil
from pathlib import Path

import hosts

SETTINGS = """\
ClusterName=two
SlurmctldHost=host-a
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/run/slurm/slurmctld.log
SlurmdLogFile=/run/slurm/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
NodeName=host-a,host-b CPUs=2
PartitionName=all Nodes=ALL Default=YES OverSubscribe=FORCE:8
"""
START_MUNGE = """
mkdir -p /run/munge /run/slurm/state /run/slurm/spool
cd /run/munge
munged --force --key-file "$1/munge.key" --log-file $PWD/log --seed-file $PWD/seed --pid-file $PWD/pid
"""


def missing():
    """Return why this machine cannot run Slurm, or None."""
    programs = ("munged", "slurmctld", "slurmd", "srun", "salloc")
    absent = [program for program in programs if shutil.which(program) is None]
    return hosts.missing() or (f"no {absent[0]}: apt install slurm-wlm munge" if absent else None)


def start(pair, folder):
    """Start Slurm; return NAME=VALUE of the variable by which its commands find it."""
    conf, key = Path(folder) / "slurm.conf", Path(folder) / "munge.key"
    conf.write_text(SETTINGS)
    (conf.parent / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key.write_bytes(bytes(range(128)))
    key.chmod(0o600)
    for host in pair:
        host.run("bash", "-ec", START_MUNGE, "bash", folder, check=True)
    pair[0].run("slurmctld", "-f", conf, check=True)
    for host in pair:
        host.run("slurmd", "-f", conf, "-N", host.name, check=True)
    variable = f"SLURM_CONF={conf}"
    hosts.wait_for(lambda: pair[0].run("env", variable, "sinfo", "-h", "-o", "%D %T").stdout == "2 idle\n")
    return variable


if __name__ == "__main__":
    hosts.run_as_command(missing(), lambda pair: ("env", start(pair, pair[0].folder)))
