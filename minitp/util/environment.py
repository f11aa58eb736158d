"""Ranks, cores, memory, GPUs and BLAS threads, as known before NumPy and MPI are imported."""

import importlib.util
import os
import platform
import re
from glob import glob
from pathlib import Path

from minitp.errors import InputError
from minitp.util.format import counted

SOCKET_VARIABLE = "MINITP_SUPERVISOR"  # the supervisor's socket, for a rank that the launcher has started
ALONE_VARIABLE = "MINITP_ALONE"  # set for a single rank, which the launcher starts without mpirun
REPLICA_VARIABLE = "MINITP_REPLICA"  # "1/3" in the second of three jobs that the launcher has started
CUPY_EXTRA = "pip install 'minitp[cuda12]' (or cuda13, for a driver of CUDA 13)"
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def number_in(environment, *names):
    """Return the number in the first of these variables that is set and not empty, or None."""
    for name in names:
        if value := environment.get(name):
            if not re.fullmatch("[0-9]+", value):
                raise InputError(f"{name}={value}: expected a number; unset the variable")
            return int(value)
    return None


def world_size(environment):
    """Return the number of ranks that mpirun or srun says it started, or None outside MPI.

    An interactive shell under Slurm is a job step with one task, and so is a script that `srun` runs once.
    These are no MPI world. `mpirun -n 1` is one: MPICH's also sets MPI_LOCALNRANKS.
    """
    size = number_in(environment, "PMI_SIZE")
    if size is not None and (size > 1 or environment.get("MPI_LOCALNRANKS")):
        return size
    if size := number_in(environment, "OMPI_COMM_WORLD_SIZE"):
        return size
    tasks = number_in(environment, "SLURM_STEP_NUM_TASKS") or 1
    return tasks if tasks > 1 else None


def env_rank(environment):
    """Return this process's rank from the environment, without asking MPI."""
    return number_in(environment, "PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID") or 0


def local_ranks(environment, world):
    """Return the number of ranks on this host."""
    return number_in(environment, "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE") or world


def cores():
    """Return the number of cores that this process may use: its CPU set, within a container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return bound
    return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))


def memory():
    """Return the bytes of memory that this process may use: all of the machine's, or a container's limit."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return machine if limit == "max" else min(machine, int(limit))


def home_directory(variable):
    """Return the user's home directory; without one, raise InputError that names a variable to set."""
    try:
        return Path.home()
    except RuntimeError:
        raise InputError(
            f"there is no home directory: HOME is not set, and no user has the number {os.getuid()}; "
            f"set HOME, or set {variable} to a directory"
        ) from None


def ranks_wanted(tp, device="auto", replicas=1):
    """Return the number of ranks of each replica that --tp asks for.

    "auto" means one rank per GPU (unless `device` is cpu), or without GPUs one per physical core, at most 4.
    Replicas divide the GPUs or cores.
    """
    if tp == "auto":
        on_gpus = device != "cpu" and gpus()
        return max(1, on_gpus // replicas) if on_gpus else min(max(1, physical_cores() // replicas), 4)
    if not re.fullmatch("-?[0-9]{1,9}", tp):
        raise InputError(f"--tp {tp}: expected a number of ranks, or auto")
    if int(tp) < 1:
        raise InputError(f"--tp {tp}: expected at least 1 rank")
    return int(tp)


def check_world(tp, world, replicas=1):
    """Reject --tp and --replicas that do not fit the number of ranks started by mpirun or srun."""
    started = f"but MPI started {counted(world, 'rank')}"
    if tp != "auto" and ranks_wanted(tp) * replicas != world:
        if replicas == 1:
            raise InputError(f"--tp {tp}, {started}; omit --tp")
        needed = counted(ranks_wanted(tp) * replicas, "rank")
        raise InputError(f"--tp {tp} --replicas {replicas} need {needed}, {started}; omit --tp")
    if world % replicas:
        raise InputError(
            f"--replicas {replicas}, {started}, which cannot be divided into {replicas} equal groups; start "
            f"a multiple of {replicas}"
        )


def replica_of(environment):
    """Return (index, count) of this rank's job among the jobs that the launcher has started, one a replica.

    Ranks of one job are (0, 1), even if an MPI world contains several replica groups.
    """
    index, _, count = environment.get(REPLICA_VARIABLE, "0/1").partition("/")
    return int(index), int(count)


def check_cupy(device):
    """Refuse --device cuda without CuPy, before any rank starts."""
    if device == "cuda" and importlib.util.find_spec("cupy") is None:
        raise InputError(f"--device cuda needs CuPy: {CUPY_EXTRA}")


def gpus():
    """Return the number of GPUs that CuPy could use, without importing CuPy, which takes a second."""
    if importlib.util.find_spec("cupy") is None:
        return 0
    present = len(glob("/dev/nvidia[0-9]*")) or int(os.path.exists("/dev/dxg"))  # the latter under WSL
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, len([n for n in visible.split(",") if n.strip()]))


def physical_cores():
    """Return the number of usable cores, not counting hyper-threads, if Linux reports it; else `cores()`."""
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
    """Divide the cores of a host among its ranks; this has an effect only before NumPy is imported.

    Variables that the user has set are kept. If the user has set OMP_NUM_THREADS, the others are not set,
    because each BLAS prefers its own variable.
    """
    if environment.get("OMP_NUM_THREADS"):
        return
    threads = environment.get("SLURM_CPUS_PER_TASK") or str(max(1, cores() // ranks))
    for name in BLAS_THREADS:
        environment[name] = environment.get(name) or threads
