"""Use mpirun from an MPICH wheel, on a machine where nothing can be installed.

MINITP_MPICH names the wheel (`pip download --no-deps mpich`), or a folder that contains it, packed or
unpacked.
"""

import os
import zipfile
from pathlib import Path

from minitp.errors import InputError
from minitp.launch.mpirun import find_mpirun

VARIABLE = "MINITP_MPICH"


def mpich_variables(given, folder):
    """Return the environment variables that select the wheel's mpirun, and its library for mpi4py.

    Parameters
    ----------
    given : str
        The value of MINITP_MPICH.
    folder : str or Path
        A wheel is unpacked to this folder.

    Raises
    ------
    InputError
        if the wheel contains no mpirun.
    """
    data = unpacked(Path(given).resolve(), Path(folder))
    for program in (data / "bin").iterdir():
        if not os.access(program, os.X_OK):  # zipfile does not preserve permissions
            program.chmod(0o755)
    before = {
        name: [os.environ[name]] if os.environ.get(name) else [] for name in ("PATH", "LD_LIBRARY_PATH")
    }
    return {
        "PATH": os.pathsep.join([str(data / "bin"), *before["PATH"]]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(data / "lib"), *before["LD_LIBRARY_PATH"]]),
        "MPI4PY_MPIABI": "mpich",  # mpi4py may find the library of another MPI first
    }


def unpacked(given, folder):
    """Return the folder of the wheel that contains `bin` with mpirun and `lib` with the libraries."""
    wheels = [given] if given.suffix == ".whl" else sorted(given.glob("mpich-*.whl"))
    if wheels and zipfile.is_zipfile(wheels[-1]):
        with zipfile.ZipFile(wheels[-1]) as archive:
            archive.extractall(folder)
        given = folder
    for mpirun in given.glob("*.data/data/bin/mpirun"):
        return mpirun.parent.parent
    raise InputError(
        f"{VARIABLE}={given}: expected an mpich wheel, a folder that holds one, or an unpacked one"
    )


def use_mpich(given, folder):
    """Set these variables for this process and all processes that it starts.

    Raises
    ------
    InputError
        like `mpich_variables`, or if minitp would use another mpirun, which is next to this Python.
    """
    os.environ.update(mpich_variables(given, folder))
    found = Path(find_mpirun())
    if str(found.parent) != os.environ["PATH"].split(os.pathsep)[0]:
        raise InputError(f"{VARIABLE}: {found} is next to this Python and takes precedence; unset {VARIABLE}")
