"""The facts of `minitp info` as text."""

import re

from minitp.util.format import aligned, counted, size

MATCH = {
    True: "matches this MPI",
    False: "BELONGS TO ANOTHER MPI: every rank would be a world of size 1; use the mpirun of the MPI above",
    None: "unknown whether it matches this MPI",
}


def text(found):
    """Format the dict of `info.facts`; a part that could not be found shows the reason."""
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
        ("Hugging Face", or_error(found["hugging_face"], hugging_face)),
    ]
    return "\n".join(aligned(rows, "<<")) + "\n"


def or_error(part, words):
    """Return `words(part)`, or the reason why the part could not be found."""
    return part["error"] if isinstance(part, dict) and "error" in part else words(part)


def entries(part, between=" "):
    """Format names and values on one line."""
    return ", ".join(f"{name}{between}{value or 'not installed'}" for name, value in part.items())


def numpy(part):
    """Return the versions of NumPy and its BLAS, and the SIMD instructions that it uses."""
    simd = " ".join(part["simd"]) or "none beyond the baseline"
    return f"{part['version']}; BLAS: {part['blas']} {part['blas_version']}; SIMD: {simd}"


def cpu(part):
    """Return the processor, its cores and the memory."""
    cores = f"{counted(part['cores'], 'core')} available, {part['physical_cores']} physical"
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
    """Return the GPUs, and whether they can read each other's memory."""

    def list_them(found):
        return "; ".join(f"{g['name']} ({g['compute_capability']}, {size(g['memory_bytes'])})" for g in found)

    listed = or_error(part["gpus"], list_them) or "none"
    apart = or_error(part["out_of_reach"], lambda pairs: ", ".join(f"GPU {a} to {b}" for a, b in pairs))
    if apart:
        return f"{listed}; NO PEER ACCESS: {apart}"
    return f"{listed}; all have peer access to each other" if len(part["gpus"]) > 1 else listed


def demo_model(part):
    """Return the demo model's directory and size."""
    if part["bytes"] is None:
        return f"not downloaded yet; it will be stored in {part['path']}"
    return f"{part['path']}, {size(part['bytes'])}"


def hugging_face(part):
    """Return the hub's address and cache, and whether there is a token."""
    token = "set" if part["HF_TOKEN"] else "not set"
    offline = ", HF_HUB_OFFLINE is set: no downloads" if part["HF_HUB_OFFLINE"] else ""
    return f"{part['HF_ENDPOINT']}, cache {part['HF_HUB_CACHE']}, HF_TOKEN {token}{offline}"
