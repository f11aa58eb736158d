"""The facts of `minitp info` as text."""

import re

from minitp.util.format import aligned, counted, size

MATCH = {
    True: "it starts ranks of this MPI",
    False: "IT IS OF ANOTHER MPI: each of its ranks would be a world of its own; use that of the MPI above",
    None: "whether it starts ranks of this MPI is not known",
}


def text(found):
    """Return the dict of `info.facts` as text; a part without an answer says why."""
    rows = [
        ("minitp", "{version}, in {path}".format(**found["minitp"])),
        ("Python", or_error(found["python"], "{version}, {executable}".format_map)),
        ("NumPy", or_error(found["numpy"], numpy)),
        ("packages", or_error(found["packages"], entries)),
        ("system", or_error(found["system"], "{platform}".format_map)),
        ("CPU", or_error(found["system"], cpu)),
        ("MPI", or_error(found["mpi"], lambda part: f"{short(part['library'])}; mpi4py {part['mpi4py']}")),
        ("mpirun", or_error(found["mpirun"], lambda part: f"{part['path']}: {short(part['says'])}")),
        ("", MATCH[found["mpirun_matches"]]),
        ("CuPy", or_error(found["cuda"], cupy)),
        *([] if "error" in found["cuda"] else [("GPUs", gpus(found["cuda"]))]),
        ("nvidia-smi", or_error(found["nvidia_smi"], lambda part: "; ".join(part["gpus"]) or "no GPU")),
        (
            "variables",
            or_error(found["environment"], lambda part: entries(part, "=") or "none set"),
        ),
        ("demo model", or_error(found["demo_model"], demo_model)),
    ]
    return "\n".join(aligned(rows, "<<")) + "\n"


def or_error(part, words):
    """Return `words(part)`, or why the part is not known."""
    return part["error"] if isinstance(part, dict) and "error" in part else words(part)


def entries(part, between=" "):
    """Return names and values in one line."""
    return ", ".join(f"{name}{between}{value or 'not installed'}" for name, value in part.items())


def numpy(part):
    """Return the versions of NumPy and its BLAS, and the SIMD instructions that it uses."""
    simd = " ".join(part["simd"]) or "none beyond the baseline"
    return f"{part['version']}; BLAS: {part['blas']} {part['blas_version']}; SIMD: {simd}"


def cpu(part):
    """Return the processor, its cores and the memory."""
    cores = f"{counted(part['cores'], 'core')} to use, {part['physical_cores']} physical"
    return f"{part['cpu']}, {cores}, {size(part['memory_bytes'])}"


def short(said):
    """Return an MPI's version text up to the version number.

    >>> short("MPICH Version: 4.1 MPICH Release date: .."), short("mpirun (Open MPI) 4.1.4 Report bugs to ..")
    ('MPICH Version: 4.1', 'mpirun (Open MPI) 4.1.4')
    """
    found = re.search(r"^.*?\d+(\.\d+)+[^\s,]*", said)
    return found[0] if found else said


def cupy(part):
    """Return the versions of CuPy, CUDA and NCCL."""
    versions = [
        f"{name} {or_error(part[key], str)}"
        for name, key in (("CUDA driver", "driver"), ("runtime", "runtime"), ("NCCL", "nccl"))
    ]
    return ", ".join([part["cupy"], *versions])


def gpus(part):
    """Return the GPUs, and whether each can read the others' memory."""

    def list_them(found):
        return "; ".join(f"{g['name']} ({g['compute_capability']}, {size(g['memory_bytes'])})" for g in found)

    listed = or_error(part["gpus"], list_them) or "none"
    apart = or_error(part["out_of_reach"], lambda pairs: ", ".join(f"{a} of {b}" for a, b in pairs))
    if apart:
        return f"{listed}; CANNOT READ the memory: {apart}"
    return f"{listed}; each reads the others' memory" if len(part["gpus"]) > 1 else listed


def demo_model(part):
    """Return where the demo model is, and its size."""
    if part["bytes"] is None:
        return f"not fetched yet; it will be kept in {part['path']}"
    return f"{part['path']}, {size(part['bytes'])}"
