"""The times of minitp's own kernels on the GPUs on which it has been measured.

A launch takes start_s + bytes / bytes_per_s. Each kernel was measured with all weights of a layer (TP=1) and
with a quarter of them (one rank of TP=4), which gives both figures.
"""

from dataclasses import dataclass

from minitp.estimate.work import EMBED, ITEM_BYTES, LAYER, LM_HEAD, cache_bytes, elements, expert_shares

PARTS = {
    "qkv": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "residual": ("o_proj.weight", "down_proj.weight", "w2.weight"),
    "swiglu": ("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight"),
}
WORDS = {
    "qkv": "q, k and v",
    "attention": "attention",
    "residual": "o and down",
    "swiglu": "gate and up",
    "norms": "norms",
}
# The launches of a layer: o and down are two launches of one kernel.
LAUNCHES = {"qkv": 1, "attention": 1, "residual": 2, "swiglu": 1}


@dataclass(frozen=True)
class MeasuredKernel:
    """A kernel of a decode pass: the start of a launch, and the rate at which it reads after that."""

    start_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class MeasuredKernels:
    """The kernels of a decode pass of one GPU.

    Attributes
    ----------
    qkv, attention, residual, swiglu, logits : MeasuredKernel
        q, k and v; attention; o or down with the residual; gate and up; logits.
    norm_s : float
        Time of a norm in a separate launch, with several ranks or sequences.
    pass_s : float
        Time of the launches before and after the layers, without the logits.
    """

    qkv: MeasuredKernel
    attention: MeasuredKernel
    residual: MeasuredKernel
    swiglu: MeasuredKernel
    logits: MeasuredKernel
    norm_s: float
    pass_s: float


# From benchmarks/results, 2026-11-27: Mistral 7B in bfloat16, one sequence with 512 tokens in the cache, at
# TP=1 and on rank 0 of TP=4 alone. A launch between two events takes longer than in a graph; the difference
# has been subtracted, the same for all launches of a pass. (tests/rooms/estimate repeats the computation.)
H100_KERNELS = MeasuredKernels(
    qkv=MeasuredKernel(2.79e-6, 2.79e12),
    attention=MeasuredKernel(5.85e-6, 3.19e12),
    residual=MeasuredKernel(1.56e-6, 2.93e12),
    swiglu=MeasuredKernel(3.24e-6, 2.99e12),
    logits=MeasuredKernel(0.0, 2.97e12),
    norm_s=2.89e-6,
    pass_s=11.8e-6,
)
H200_KERNELS = MeasuredKernels(
    qkv=MeasuredKernel(2.82e-6, 3.84e12),
    attention=MeasuredKernel(5.55e-6, 4.62e12),
    residual=MeasuredKernel(1.77e-6, 4.31e12),
    swiglu=MeasuredKernel(3.44e-6, 4.24e12),
    logits=MeasuredKernel(0.0, 4.07e12),
    norm_s=2.61e-6,
    pass_s=11.8e-6,
)


def layer_seconds(config, plan, rank, work, dtype, kernels):
    """Return the time of each kind of kernel in a layer of a decode pass on one rank, by name."""
    counts, (_, touched) = elements(plan, rank), expert_shares(config, work.sequences)
    cached = sum(map(work.keys, config.windows)) * cache_bytes(config, plan, rank, dtype) * work.sequences
    nbytes = {"attention": cached / config.num_hidden_layers}
    for kind, endings in PARTS.items():
        sizes = {name: n for name, n in counts.items() if name.startswith(LAYER) and name.endswith(endings)}
        experts = sum(count for name, count in sizes.items() if ".experts." in name)
        nbytes[kind] = (sum(sizes.values()) - (1 - touched) * experts) * ITEM_BYTES[dtype]
    found = {}
    for kind, launches in LAUNCHES.items():
        kernel = getattr(kernels, kind)
        read_s = nbytes[kind] / config.num_hidden_layers / kernel.bytes_per_s
        found[kind] = launches * kernel.start_s + read_s
    return found | {"norms": 2 * kernels.norm_s if separate_norms(plan, work) else 0.0}


def decode_seconds(config, plan, rank, work, dtype, kernels):
    """Return the time of a decode pass on one rank, without its collectives."""
    counts = elements(plan, rank)
    head = counts[LM_HEAD if LM_HEAD in counts else EMBED] * ITEM_BYTES[dtype]
    layer = sum(layer_seconds(config, plan, rank, work, dtype, kernels).values())
    last = kernels.logits.start_s + head / kernels.logits.bytes_per_s
    norm = kernels.norm_s if separate_norms(plan, work) else 0.0
    return config.num_hidden_layers * layer + norm + last + kernels.pass_s


def separate_norms(plan, work):
    """Return whether norms are separate launches; for one sequence on one rank, products contain them."""
    return plan.tp > 1 or work.sequences > 1
