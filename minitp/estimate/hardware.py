"""Memory, bandwidth, matrix rate and links of machines, each figure with its source.

The figures of GPUs are from NVIDIA's datasheets: memory in GB of 10^9 bytes, matrix rates without sparsity
(half of those printed "with sparsity") and with float32 sums. The bandwidth of the H100 and the H200 was
measured.
"""

from dataclasses import dataclass, replace

from minitp.estimate.kernels import H100_KERNELS, H200_KERNELS, MeasuredKernels
from minitp.util.format import counted


@dataclass(frozen=True)
class Link:
    """A connection between ranks.

    Attributes
    ----------
    name : str
    start_s : float
        Minimum time of any collective, in seconds.
    hop_s : float
        Seconds from one rank to the next; a tree has one hop up and one down per level.
    bytes_per_s : float
        Bandwidth of one rank in one direction.
    """

    name: str
    start_s: float
    hop_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Efficiency:
    """The efficiency of real programs, relative to what the hardware could do. The defaults mean no loss.

    Attributes
    ----------
    memory, matrix, link : float
        Fractions of the bandwidth, the matrix rate and the link's bandwidth that are reached.
    latency : float
        Latency of a collective within a pass, where ranks do not arrive together, as a multiple of its
        latency when measured alone.
    layer_s, sequence_s : float
        Seconds per layer in addition to its products, and additional seconds per sequence.
    threads : float
        Bandwidth of ranks with several BLAS threads, relative to one single-threaded rank on each core.
    packs : bool
        Whether products of several rows first read the matrix, then compute, as BLAS does on a CPU.
    host_s : float
        Seconds per layer that the host takes to launch a pass of a prompt.
    kernels : MeasuredKernels or None
        The measured kernels of a decode pass, which replace `memory` and `layer_s` there.
    """

    memory: float = 1.0
    matrix: float = 1.0
    link: float = 1.0
    latency: float = 1.0
    layer_s: float = 0.0
    sequence_s: float = 0.0
    threads: float = 1.0
    packs: bool = False
    host_s: float = 0.0
    kernels: MeasuredKernels | None = None


@dataclass(frozen=True)
class Hardware:
    """A machine that a model is planned for.

    Attributes
    ----------
    name, title : str
        The value of `--gpu`, and a readable description.
    memory_bytes : float
    memory_bytes_per_s : float
        Read bandwidth: on a CPU, measured in products of one row; on a GPU, from the datasheet or measured
        with a kernel that only reads.
    flops_per_s : dict
        Additions and multiplications per second in products of many rows, by dtype.
    link : Link
        Link within a node.
    efficiency : Efficiency
    reserve_bytes : float
        Memory that each rank needs in addition to weights and cache.
    limit_source, own_source, expected_source : str
        Readable origin of the figures above, and of those in `efficiency`: measured with minitp, and
        published by others. One of the latter two may be empty.
    cores : int or None
        Cores of a CPU, whose ranks share the figures above; None if each rank has its own GPU.
    ranks : tuple of Hardware
        The GPU of each rank, if they are not alike; the figures above are then the lowest of all.
    """

    name: str
    title: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: dict
    link: Link
    efficiency: Efficiency
    reserve_bytes: float
    limit_source: str
    own_source: str
    expected_source: str
    cores: int | None = None
    ranks: tuple = ()

    def of(self, rank):
        """Return the Hardware of a rank."""
        return self.ranks[rank] if self.ranks else self

    def divided(self, count):
        """Return one of `count` equal parts of a machine whose ranks share its memory and cores."""
        return replace(
            self,
            memory_bytes=self.memory_bytes / count,
            memory_bytes_per_s=self.memory_bytes_per_s / count,
            flops_per_s={dtype: rate / count for dtype, rate in self.flops_per_s.items()},
            cores=max(1, self.cores // count),
        )


LIMIT = Efficiency()

# memory, latency, layer_s: fitted to gpt-fast's published figures (github.com/meta-pytorch/gpt-fast, README):
# Llama models in bfloat16 on 1 to 8 A100-80GB, batch 1; and to the half of an H100's bandwidth that vLLM and
# SGLang reach with Llama-3.2-1B (Spector et al., Look Ma, No Bubbles, 2025). Estimates are within 9% of 14 of
# these 15 figures (docs/performance.md).
# matrix: Dao, FlashAttention-2, 2023: GPT models trained at 225 of an A100's 312 TFLOP/s.
# link: 370 of NVLink 4's 450 GB/s (NCCL's developers, github.com/NVIDIA/nccl-tests/issues/212).
GPU_EFFICIENCY = Efficiency(memory=0.74, matrix=0.72, link=0.82, latency=1.4, layer_s=25e-6)
GPU_SOURCES = (
    "74% of the bandwidth, 25 µs per layer for small kernels, collectives that take 1.4 times as long as "
    "when measured alone (gpt-fast on 1 to 8 A100); 72% of the matrix rate (FlashAttention-2 on A100); 82% "
    "of the link's bandwidth (NCCL on H100)"
)

# Measured with minitp on one H100 and one H200, 2026-11-27 (docs/performance.md): Mistral 7B in bfloat16, 1
# to 32 sequences of 512 tokens. The kernels are in `kernels`; each sequence of a batch adds `sequence_s` per
# layer. A prompt of 2048 tokens reached 54% of the datasheet's matrix rate, counting attention's products and
# leaving out 26 µs per layer; cuBLAS alone reached 77%. Passes of 448 and 512 tokens, at TP=1 and of one rank
# of TP=4, took 14 to 21 ms, of which the matrix rate explains 3 to 14: the host launches 32 layers in about
# 17.6 ms. No collective has run between GPUs, so `link` and `latency` are the ones above.
HOPPER = Efficiency(matrix=0.54, link=0.82, latency=1.4, layer_s=26e-6, host_s=0.55e-3)
H100_EFFICIENCY = replace(HOPPER, kernels=H100_KERNELS, sequence_s=1.9e-6)
H200_EFFICIENCY = replace(HOPPER, kernels=H200_KERNELS, sequence_s=2.3e-6)
HOPPER_OWN = (
    "the kernels of a decode pass, {sequence_us:.1f} µs more per layer and sequence of a batch, 54% of the "
    "matrix rate in prompts, but at least 0.55 ms per layer, which the host took (Mistral 7B, up to 32 "
    "sequences, on one {name}, 2026-11-27, docs/performance.md)"
)
HOPPER_PUBLISHED = (
    "collectives that take 1.4 times as long as when measured alone (gpt-fast on A100); 82% of the link's "
    "bandwidth (NCCL on H100)"
)

# Measured on two cores (docs/performance.md). A decode pass of the demo model at TP=2 has 2.1 ms of small
# operations over 30 layers, and 1.0 ms of collectives, three times as long as when measured alone. Batches of
# 8 to 96 show how much of the small operations is added by each sequence. Products are 80% of prefill. Bare
# products read 33 to 39 GB/s with one rank of two threads, and 46 GB/s with two ranks.
CPU_EFFICIENCY = Efficiency(
    matrix=0.80, latency=3.0, layer_s=20e-6, sequence_s=50e-6, threads=0.80, packs=True
)
CPU_SOURCES = (
    "80% of the matrix rate, and of the bandwidth where a rank has several cores; 20 µs per layer for small "
    "operations and 50 µs more for each sequence; collectives that take three times as long as when measured "
    "alone (docs/performance.md)"
)

PRODUCTS = "the bandwidth and matrix rate just measured on all cores, in products of the model's shapes"

# Latencies follow NCCL's own model of its tree with the low-latency protocol (src/graph/tuning.cc, 2.28: a
# base of 6.8 µs; hops of 0.6 over NVLink, 1.0 over PCIe, 5.0 over a network). For 8 GPUs over NVLink that
# gives 15 µs; 7 to 21 µs are reported for messages of 8 to 64 KiB. A one-shot kernel over peer memory is
# faster: 4 to 8 µs for 2 to 8 H100 (github.com/sgl-project/sglang/pull/2904).
NCCL_START_S = 6.8e-6
NVLINK_HOP_S = 0.6e-6
PCIE_HOP_S = 1.0e-6

# Datasheets add up both directions: 600, 900 and 1800 GB/s; 64 GB/s for PCIe 4.0 x16.
NVLINK_3 = Link("NVLink 3", NCCL_START_S, NVLINK_HOP_S, 300e9)
NVLINK_4 = Link("NVLink 4", NCCL_START_S, NVLINK_HOP_S, 450e9)
NVLINK_5 = Link("NVLink 5", NCCL_START_S, NVLINK_HOP_S, 900e9)
PCIE_4 = Link("PCIe 4.0 x16, peer to peer", NCCL_START_S, PCIE_HOP_S, 32e9)

# The network between nodes is that of a DGX H100: a ConnectX-7 port of 400 Gb/s for each GPU. Its start_s is
# 0 because a collective between nodes has already started within each node.
NETWORK = Link("400 Gb/s InfiniBand, a port for each GPU", 0.0, 5.0e-6, 50e9)
GPUS_PER_NODE = 8

# Ranks on a CPU exchange data through shared memory. An all-reduce of 2.3 KB on two cores was measured at
# 4.9 µs for two ranks and 17.4 µs for four (docs/performance.md); the estimate is 5.4 and 16.2.
SHARED_MEMORY_HOP_S = 2.7e-6


DATASHEET = "the datasheet's bandwidth and matrix rate"
READ = "the bandwidth of a kernel that only reads, and the datasheet's matrix rate"


def _gpu(name, title, memory_gb, gb_per_s, tflops_16_bit, tflops_float32, link):
    rates = {
        "bfloat16": tflops_16_bit * 1e12,
        "float16": tflops_16_bit * 1e12,
        "float32": tflops_float32 * 1e12,
    }
    # 1 GB is assumed for the CUDA context, NCCL's buffers, cuBLAS's workspace and a pass's activations.
    sources = DATASHEET, "", GPU_SOURCES
    return Hardware(name, title, memory_gb * 1e9, gb_per_s * 1e9, rates, link, GPU_EFFICIENCY, 1e9, *sources)


def _measured(gpu, efficiency):
    """Return the GPU with its bandwidth marked as measured and the efficiency of minitp's own runs."""
    own = HOPPER_OWN.format(name=gpu.name.upper(), sequence_us=1e6 * efficiency.sequence_s)
    sources = {"limit_source": READ, "own_source": own, "expected_source": HOPPER_PUBLISHED}
    return replace(gpu, efficiency=efficiency, **sources)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # HGX B200 datasheet, a GPU's share of eight: 180 GB, 8 TB/s, 2.25 PFLOP/s, 75 TFLOP/s in float32
        _gpu("b200", "B200 SXM, 180 GB", 180, 8000, 2250, 75, NVLINK_5),
        # H200 datasheet, SXM: 141 GB, 4.8 TB/s (read: 4.62), 1979 TFLOP/s with sparsity, 67 in float32
        _measured(_gpu("h200", "H200 SXM, 141 GB", 141, 4620, 989, 67, NVLINK_4), H200_EFFICIENCY),
        # H100 datasheet, SXM: 80 GB, 3.35 TB/s (read: 3.19), 1979 TFLOP/s with sparsity, 67 in float32
        _measured(_gpu("h100", "H100 SXM, 80 GB", 80, 3190, 989, 67, NVLINK_4), H100_EFFICIENCY),
        # A100 datasheet, SXM: 80 GB, 2039 GB/s and 40 GB, 1555 GB/s; 312 TFLOP/s, 19.5 in float32
        _gpu("a100", "A100 SXM, 80 GB", 80, 2039, 312, 19.5, NVLINK_3),
        _gpu("a100-40gb", "A100 SXM, 40 GB", 40, 1555, 312, 19.5, NVLINK_3),
        # L40S datasheet: 48 GB, 864 GB/s, 362 TFLOP/s, 91.6 in float32; no NVLink
        _gpu("l40s", "L40S, 48 GB", 48, 864, 362, 91.6, PCIE_4),
        # Ada architecture whitepaper: 24 GB, 1008 GB/s, 165.2 TFLOP/s with float32 sums, 82.6; no NVLink,
        # and NVIDIA's driver allows no peer access: messages go through the host's memory and take longer
        _gpu("rtx-4090", "GeForce RTX 4090, 24 GB", 24, 1008, 165.2, 82.6, PCIE_4),
    )
}


def cpu(cores, memory_bytes, memory_bytes_per_s, flops_per_s):
    """Return the Hardware of a machine without GPUs, which all ranks share.

    `memory_bytes_per_s` and `flops_per_s`, a dict by dtype, are measured on all cores together.
    """
    link = Link("shared memory", 0.0, SHARED_MEMORY_HOP_S, memory_bytes_per_s)
    title = f"this machine, {counted(cores, 'core')}, {memory_bytes / 1e9:.0f} GB"
    # Python and the libraries take 0.2 GB in each rank.
    return Hardware(
        *("cpu", title, memory_bytes, memory_bytes_per_s, flops_per_s, link, CPU_EFFICIENCY, 0.2e9),
        *(PRODUCTS, CPU_SOURCES, "", cores),
    )


def mixed(gpus):
    """Return the Hardware of ranks with these GPUs, which may be of several kinds."""
    slowest = min(gpus, key=lambda gpu: gpu.link.bytes_per_s)
    return replace(
        slowest,
        name=",".join(gpu.name for gpu in gpus),
        title="; ".join(gpu.title for gpu in gpus),
        memory_bytes=min(gpu.memory_bytes for gpu in gpus),
        memory_bytes_per_s=min(gpu.memory_bytes_per_s for gpu in gpus),
        flops_per_s={name: min(gpu.flops_per_s[name] for gpu in gpus) for name in slowest.flops_per_s},
        ranks=tuple(gpus),
        **{kind: _sources(gpus, kind) for kind in ("limit_source", "own_source", "expected_source")},
    )


def _sources(gpus, kind):
    """Return the origins of the figures of these GPUs; each names its GPUs if there are several origins."""
    found = {gpu.name: getattr(gpu, kind) for gpu in gpus}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    parts = []
    for source in dict.fromkeys(filter(None, found.values())):
        names = " and ".join(name for name, other in found.items() if other == source)
        parts.append(f"for {names}, {source}")
    return "; ".join(parts)
