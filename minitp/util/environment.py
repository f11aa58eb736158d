"""The facts that are known before numpy and MPI are imported: ranks, cores, threads."""

import importlib.util
import os
import platform
import re
from glob import glob
from pathlib import Path

from minitp.errors import InputError

SOCKET_VARIABLE = "MINITP_SUPERVISOR"  # where a rank that the launcher has started finds it
ALONE_VARIABLE = "MINITP_ALONE"  # of a single rank of the launcher's, which needs no mpirun
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def world_size(environment):
    """The number of ranks that mpirun or srun says it started, or None outside MPI."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        if name in environment:
            return int(environment[name])
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    return tasks if tasks > 1 else None  # an interactive shell under Slurm is a step of one task


def env_rank(environment):
    """Return this process's rank, from the launcher's variables."""
    names = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
    return next((int(environment[name]) for name in names if name in environment), 0)


def local_ranks(environment, world):
    """Return the number of ranks on this host."""
    names = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return next((int(environment[name]) for name in names if name in environment), world)


def cores():
    """Cores that this process may use: what it is bound to, and at most a container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return bound
    return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))


def memory():
    """Bytes of memory that this process may use: the machine's, and at most a container's limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return machine if limit == "max" else min(machine, int(limit))


def ranks_wanted(tp, device="auto"):
    """Return the number of ranks that --tp asks for.

    "auto" is a rank per GPU, unless --device says cpu, and without GPUs a rank per physical core, up to 4.
    """
    if tp == "auto":
        return (device != "cpu" and gpus()) or min(physical_cores(), 4)
    if not re.fullmatch("-?[0-9]{1,9}", tp):
        raise InputError(f"--tp {tp}: expected a number of ranks, or auto")
    if int(tp) < 1:
        raise InputError(f"--tp {tp}: expected at least 1 rank")
    return int(tp)


def check_world(tp, world):
    """Refuse a --tp that is not the number of ranks which mpirun or srun has started; auto is any number."""
    if tp != "auto" and ranks_wanted(tp) != world:
        raise InputError(f"--tp {tp} contradicts the MPI world of {world} ranks; leave --tp out")


def gpus():
    """Return the number of GPUs that CuPy could use, without importing CuPy, which takes a second."""
    if importlib.util.find_spec("cupy") is None:
        return 0
    there = len(glob("/dev/nvidia[0-9]*")) or int(os.path.exists("/dev/dxg"))  # the latter under WSL
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if allowed is None else min(there, len([one for one in allowed.split(",") if one.strip()]))


def physical_cores():
    """Cores without their hyper-threads, as far as Linux tells."""
    try:
        blocks = Path("/proc/cpuinfo").read_text().split("\n\n")
    except OSError:
        return cores()
    fields = [dict(line.split(":", 1) for line in block.splitlines() if ":" in line) for block in blocks]
    pairs = [{name.strip(): value.strip() for name, value in field.items()} for field in fields]
    distinct = {(p["physical id"], p["core id"]) for p in pairs if "core id" in p and "physical id" in p}
    return min(len(distinct) or cores(), cores())


def cpu_name():
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def divide_cores(environment):
    """Limit this rank's BLAS threads to its share of the host's cores, if this process is an MPI rank."""
    world = world_size(environment)
    if world is not None:
        limit_blas_threads(environment, local_ranks(environment, world))


def limit_blas_threads(environment, ranks):
    """Share the cores among the ranks of a host. Works only before numpy is imported; the user's own wins.

    Beside the user's OMP_NUM_THREADS none is set: each BLAS would heed its own variable before that.
    """
    if "OMP_NUM_THREADS" in environment:
        return
    threads = environment.get("SLURM_CPUS_PER_TASK", str(max(1, cores() // ranks)))
    for name in BLAS_THREADS:
        environment.setdefault(name, threads)
