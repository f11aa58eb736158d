"""The mpirun that the launcher starts, and its environment."""

import os
import re
import shutil
import sys
from pathlib import Path

from minitp.errors import RankError
from minitp.util import dev_shm
from minitp.util.environment import REPLICA_VARIABLE, limit_blas_threads, number_in

# By default Open MPI refuses to run as root or with more ranks than cores, binds each rank to a core, and
# lets waiting ranks keep their cores busy. The names differ between versions 4 and 5; other MPIs ignore them.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}

# All ranks must be on this host, where the supervisor's socket is, even if a batch system has allocated more.
THIS_HOST = {
    "HYDRA_RMK": "user",
    "HYDRA_LAUNCHER": "fork",
    "OMPI_MCA_plm": "isolated",
    "OMPI_MCA_ras": "^slurm,tm,lsf,gridengine",
    "PRTE_MCA_plm": "^slurm,lsf,tm",
    "PRTE_MCA_ras": "^slurm,lsf,pbs,gridengine",
}

# Variables that place a process in an MPI world, and that would place our ranks in it, too. A shell under
# PMIx or a job step of Slurm has some. Variables with which users tune an MPI are not among them.
WORLD = re.compile(
    "PMI2?_"  # PMI_RANK, PMI_SIZE, PMI_FD, ..
    "|PMIX_(?!MCA_)"
    "|HYDI_|HYDRA_HOST_FILE$|MPI_LOCAL(NRANKS|RANKID)$"  # MPICH
    "|OMPI_(COMM_WORLD|UNIVERSE|APP_CTX|FIRST_RANKS|NUM_APP_CTX|MCA_ess|MCA_orte_(ess|hnp_uri|local_daemon))"
    "|PRTE_(?!MCA_|ALLOW_)"
    "|SLURM_(PROCID|LOCALID|NODEID|GTIDS|TASK_PID|STEP|SRUN|PMI)"
    "|PALS_"  # HPE's launcher
)


def find_mpirun():
    """Return the mpirun next to this Python, whose MPI mpi4py also uses, or else the one in the PATH."""
    adjacent = Path(sys.executable).parent / "mpirun"
    found = str(adjacent) if adjacent.exists() else shutil.which("mpirun") or shutil.which("mpiexec")
    if found is None:
        raise RankError("no mpirun found; pip install 'minitp[mpi]', install another MPI, or use --tp 1")
    return found


def mpi_environment(size, replica=(0, 1)):
    """Return the environment for an mpirun of `size` ranks on this host that divide its cores.

    `replica` is the index of this job and the number of such jobs, which divide the cores, too.
    """
    own = {name: value for name, value in os.environ.items() if not WORLD.match(name)}
    environment = {**OPEN_MPI, **own, **THIS_HOST}
    limit_blas_threads(environment, size * replica[1])
    index, count = replica
    environment[REPLICA_VARIABLE] = f"{index}/{count}"
    if dev_shm.is_small():
        environment.setdefault("UCX_TLS", "^posix")  # UCX would crash if its files do not fit
    return environment


def warn_of_other_nodes(environment):
    """Warn if a batch system has allocated several nodes, since all ranks start on this one."""
    nodes = number_in(environment, "SLURM_JOB_NUM_NODES") or 1
    if nodes > 1:
        print(
            f"minitp: warning: all ranks start on this host, one of the {nodes} nodes of the allocation; "
            "to use them all, run srun -K --mpi=pmi2 minitp ... or mpirun minitp ... without --tp",
            file=sys.stderr,
        )
