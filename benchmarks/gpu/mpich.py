"""mpirun from an mpich wheel, for a machine on which nothing can be installed.

MINITP_MPICH names the wheel (`pip download --no-deps mpich`), or a folder that holds it, packed or unpacked.
"""

import os
import zipfile
from pathlib import Path

from minitp.errors import InputError
from minitp.launch.supervisor import find_mpirun

VARIABLE = "MINITP_MPICH"


def mpich_variables(given, folder):
    """Return the environment variables with which mpirun is that of the wheel, and so is mpi4py's library.

    Parameters
    ----------
    given : str
        The value of MINITP_MPICH.
    folder : str or Path
        A wheel is unpacked to this folder.

    Raises
    ------
    InputError
        if there is no mpirun in it.
    """
    data = unpacked(Path(given).resolve(), Path(folder))
    for program in (data / "bin").iterdir():
        if not os.access(program, os.X_OK):  # zipfile does not keep that
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
    """Return the folder in the wheel that has mpirun in its `bin` and the libraries in its `lib`."""
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
    """Set these variables, for all processes that are started from here.

    Raises
    ------
    InputError
        as `mpich_variables` does, or if another mpirun stands next to this Python, which minitp would take.
    """
    os.environ.update(mpich_variables(given, folder))
    found = Path(find_mpirun())
    if str(found.parent) != os.environ["PATH"].split(os.pathsep)[0]:
        raise InputError(f"{VARIABLE}: {found} stands next to this Python and is used; leave {VARIABLE} out")
