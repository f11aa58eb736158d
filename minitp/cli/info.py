"""`minitp info`: versions and hardware, for a bug report.

This command must work even if nothing else does. So each fact is collected independently and is replaced by
the reason if it cannot be found. Because MPI and CUDA may crash or hang, separate processes query them, in
parallel. This module imports nothing that may be missing.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from minitp import __version__
from minitp.cli.command import OneProcess
from minitp.cli.info_text import text
from minitp.cli.options import add_json
from minitp.errors import one_line
from minitp.launch.mpirun import find_mpirun
from minitp.loading import demo
from minitp.util.environment import BLAS_THREADS, cores, cpu_name, memory, physical_cores, world_size
from minitp.util.run_module import RUN_MODULE
from minitp.util.stdout import write_out

LIMIT_S = 10  # time limit of a separate process in seconds

PACKAGES = ("safetensors", "tokenizers", "ml_dtypes", "huggingface_hub", "jinja2", "tqdm", "gguf")
PACKAGES += ("starlette", "uvicorn", "nvidia-nccl-cu12", "nvidia-nccl-cu13")

# Environment variables that affect a run: names and prefixes.
VARIABLES = (*BLAS_THREADS, "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME")
VARIABLES += ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN")
PREFIXES = ("NCCL_", "MINITP_", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_JOB_NUM_NODES")
PREFIXES += (
    "OMPI_MCA_",
    "PRTE_MCA_",
    "MPICH_",
    "MPIR_CVAR_",
    "HYDRA_",
    "I_MPI_",
    "UCX_",
    "FI_",
)  # MPI libraries
SECRETS = ("MINITP_API_KEY", "HF_TOKEN")

# Families of MPIs that can start each other's ranks, with words in their version texts.
MPI_FAMILIES = {
    "Open MPI": ("open mpi", "openrte", "open-mpi", "prte"),
    "MPICH": ("mpich", "hydra", "intel(r) mpi", "mvapich"),
}


class InfoCommand(OneProcess):
    """The command `minitp info`."""

    name = "info"
    summary = "show versions and hardware, for a bug report"
    description = (
        "Show the installed software and the hardware: MPI, BLAS, CuPy, NCCL, GPUs, cores, environment "
        "variables. No ranks are started, and missing parts are reported instead of causing a failure."
    )
    examples = (("minitp info --json", "print JSON"),)

    def add_options(self, parser):
        add_json(parser)

    def run(self, args):
        """Print the facts and return 0, even if parts are missing."""
        found = facts()
        write_out(json.dumps(found) + "\n" if args.json else text(found))
        return 0


def facts():
    """Return all facts as a dict for JSON; a part that cannot be found is {"error": reason}."""
    probes = {name: attempt(start, name) for name in ("mpi", "cuda", "nvidia_smi")}
    found = {
        "minitp": {"version": __version__, "path": str(Path(__file__).parent.parent)},
        "python": attempt(python),
        "numpy": attempt(numpy),
        "packages": attempt(packages),
        "system": attempt(system),
        "environment": attempt(variables),
        "demo_model": attempt(demo_model),
        "hugging_face": attempt(hugging_face),
        "mpirun": attempt(mpirun),
    }
    found |= {name: attempt(answer, probe) for name, probe in probes.items()}
    found["mpirun_matches"] = matches(found["mpi"].get("library"), found["mpirun"].get("says"))
    return found


def attempt(function, *arguments):
    """Return what a function returns, or {"error": reason} if it raises."""
    try:
        return function(*arguments)
    except Exception as error:  # any error belongs in the report
        return {"error": one_line(error)[:300]}


# --- facts that this process finds ------------------------------------------------------------------------


def python():
    """Return the version and path of this Python."""
    return {"version": platform.python_version(), "executable": sys.executable}


def numpy():
    """Return the versions of NumPy and of the BLAS that it was built with."""
    import numpy as np

    config = np.show_config(mode="dicts")
    blas = config["Build Dependencies"]["blas"]
    return {
        "version": np.__version__,
        "blas": blas.get("name"),
        "blas_version": blas.get("version"),
        "simd": config.get("SIMD Extensions", {}).get("found", []),
    }


def packages():
    """Return the versions of the packages that minitp uses; None for one that is not installed."""
    return {name: version(name) for name in PACKAGES}


def version(name):
    """Return the version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def system():
    """Return the platform, the processor, its cores and the memory."""
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": cores(),
        "physical_cores": physical_cores(),
        "memory_bytes": memory(),
    }


def variables():
    """Return the environment variables that affect a run, without the values of secrets."""
    names = [name for name in sorted(os.environ) if name in VARIABLES or name.startswith(PREFIXES)]
    found = {name: "(set)" if name in SECRETS else os.environ[name] for name in names}
    world = world_size(os.environ)
    return found if world is None else found | {"(ranks of this MPI world)": str(world)}


def demo_model():
    """Return the demo model's directory and its bytes, which are None before the download."""
    path = demo.cache_directory() / demo.NAME
    files = [file for file in path.rglob("*") if file.is_file()]
    return {"path": str(path), "bytes": sum(file.stat().st_size for file in files) if files else None}


def hugging_face():
    """Return the hub's address, its cache, and whether a token is set and downloads are allowed."""
    from huggingface_hub import constants, get_token

    return {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_TOKEN": get_token() is not None,
        "HF_HUB_OFFLINE": constants.HF_HUB_OFFLINE,
    }


def mpirun():
    """Return the mpirun that minitp would use, and the beginning of its version text."""
    path = find_mpirun()
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=LIMIT_S)
    said = " ".join((done.stdout or done.stderr).split())
    return {"path": path, "says": said[:200]}


def matches(library, said):
    """Return whether this mpirun can start ranks of mpi4py's MPI; None if either is unknown."""
    kinds = [kind_of(words) for words in (library, said)]
    return None if None in kinds else kinds[0] == kinds[1]


def kind_of(words):
    """Return the key of MPI_FAMILIES for an MPI with this version text, or None."""
    found = [kind for kind, marks in MPI_FAMILIES.items() if any(m in (words or "").lower() for m in marks)]
    return found[0] if found else None


# --- facts that separate processes find -------------------------------------------------------------------


def start(name):
    """Start a process that queries `mpi`, `cuda` or `nvidia_smi`, or return the reason why it cannot."""
    if name == "mpi" and importlib.util.find_spec("mpi4py") is None:
        return {"error": "mpi4py is not installed: pip install mpi4py"}
    if name == "cuda" and importlib.util.find_spec("cupy") is None:
        return {"error": "CuPy is not installed; for NVIDIA GPUs: pip install 'minitp[cuda12]' (or cuda13)"}
    command = [*RUN_MODULE, "minitp.cli.info", name]
    if name == "nvidia_smi":
        path = shutil.which("nvidia-smi")
        if path is None:
            return {"error": "nvidia-smi not found"}
        command = [path, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(probe):
    """Return the answer of a process from `start`."""
    if isinstance(probe, dict):
        return probe
    try:
        out, err = probe.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return {"error": f"no answer within {LIMIT_S} s"}
    if probe.returncode:
        last = (err.strip() or out.strip()).splitlines()[-1:]
        return {"error": f"ended with code {probe.returncode}: {' '.join(last)[:250]}"}
    lines = out.strip().splitlines()
    if probe.args[0] != sys.executable:
        return {"gpus": lines}  # nvidia-smi prints one line per GPU
    return json.loads(lines[-1])


def tell(function):
    """Print the result of a function as the last line, and exit."""
    print("\n" + json.dumps(function()), flush=True)
    os._exit(0)  # with an uninitialized MPI or a failing GPU, a normal exit may hang


def mpi():
    """Return the versions of mpi4py and its MPI library, without initializing MPI."""
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    said = " ".join(MPI.Get_library_version().split())
    return {"mpi4py": mpi4py.__version__, "library": said[:200]}


def cuda():
    """Return the versions of CuPy, CUDA and NCCL, the GPUs, and the (a, b) where a cannot read b's memory."""
    import cupy

    runtime = cupy.cuda.runtime
    count = attempt(runtime.getDeviceCount)
    numbers = range(0 if isinstance(count, dict) else count)
    pairs = [(a, b) for a in numbers for b in numbers if a != b]
    return {
        "cupy": cupy.__version__,
        "driver": attempt(runtime.driverGetVersion),
        "runtime": attempt(runtime.runtimeGetVersion),
        "nccl": attempt(nccl_version),
        "gpus": count if isinstance(count, dict) else [gpu(runtime.getDeviceProperties(n)) for n in numbers],
        "out_of_reach": attempt(lambda: [pair for pair in pairs if not runtime.deviceCanAccessPeer(*pair)]),
    }


def nccl_version():
    """Return the version of the NCCL that CuPy finds."""
    from cupy.cuda import nccl

    return nccl.get_version()


def gpu(properties):
    """Return the properties of a GPU that identify its model."""
    return {
        "name": properties["name"].decode(),
        "memory_bytes": properties["totalGlobalMem"],
        "compute_capability": f"{properties['major']}.{properties['minor']}",
    }


if __name__ == "__main__":
    tell({"mpi": mpi, "cuda": cuda}[sys.argv[1]])
