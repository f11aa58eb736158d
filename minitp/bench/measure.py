"""All measurements of `minitp bench`, collected in one dict of plain numbers."""

import os
import resource
from datetime import date
from statistics import median

from minitp.bench.concurrency import measure_requests
from minitp.bench.cpu_roofline import BareProducts
from minitp.bench.duration import expected_seconds
from minitp.bench.load_rate import loading
from minitp.bench.roofline import token_bytes
from minitp.bench.rounds import (
    bare_decode_seconds,
    keys_read,
    private_bytes,
    profile,
    random_prompt,
    timed_batch,
    timed_round,
)
from minitp.comm.single import ShardOnly
from minitp.util.environment import BLAS_THREADS, cores


def measure(model, source, job, load_s, progress, announce):
    """Measure the model; all ranks call this and all get the results, as a dict for JSON.

    Parameters
    ----------
    model : Model
    source : ModelSource
    job : Job
        Lengths, rounds and kinds of measurement.
    load_s : float
        Seconds that loading took on this rank.
    progress : callable
        Called with a short description before each measurement.
    announce : callable
        Called with the expected seconds of all measurements once they can be estimated from the limits.
    """
    roofline = roofline_of(model)
    result = conditions(model, source) | {"load_s": load_s}
    progress("limits")
    result["loading"] = loading(model, source, load_s)
    result["limits"] = roofline.measure(job.prompt_tokens)
    if job.requests is None:
        announce(expected_seconds(job, result["limits"], model))
    if job.sweep == "context":
        result["sweep"] = {"over": "context", "points": context_sweep(model, roofline, job, progress)}
    elif job.sweep == "batch":
        result["sweep"] = {"over": "batch", "points": batch_sweep(model, roofline, job, progress)}
    elif job.requests is not None:
        result["requests"] = measure_requests(model, roofline, job, progress)
    else:
        rounds = []
        prompt = random_prompt(model.config, job.prompt_tokens)
        # The warm-up. On a GPU it is as long as the rounds, so that it captures the graph that they replay.
        timed_round(model, roofline, prompt, job.new_tokens if model.fused else 2)
        for n in range(job.rounds):
            progress(f"round {n + 1} of {job.rounds}")
            rounds.append(timed_round(model, roofline, prompt, job.new_tokens))
        result |= speeds(rounds, model, roofline, job)
        if job.profile:
            progress("profile")
            result["profile"] = profiles(model, prompt, job)
    del roofline  # so that its arrays are not counted as the model's
    result["memory"] = memory(model)
    return result


def conditions(model, source):
    """Describe the machine, the model and the setup of the measurements."""
    host = getattr(model.comm, "host", model.comm)
    threads = next((os.environ[name] for name in reversed(BLAS_THREADS[:2]) if name in os.environ), "")
    return {
        "date": date.today().isoformat(),
        "machine": model.device.name,
        "cores": cores(),
        "model": source.name,
        "layers": model.config.num_hidden_layers,
        "tp": model.comm.size,
        "split": source.shares,
        "replicas": model.comm.all_groups.size // model.comm.size,
        "device": "cuda" if model.device.is_gpu else "cpu",
        "as_rank": model.comm.shard_rank if isinstance(host, ShardOnly) else None,
        "dtype": model.device.dtype.name,
        "kv_dtype": model.kv_dtype,
        "comm": type(model.comm).__name__,
        "blas_threads_per_rank": int(threads) if threads.isdigit() else None,
        "weight_bytes_per_rank": model.comm.all_groups.allgather_object(model.weights.nbytes),
    }


def memory(model):
    """Return the memory of each rank and its GPU: current private bytes, and the peak with mapped files."""
    comm, peak = model.comm.all_groups, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "private_bytes_per_rank": comm.allgather_object(private_bytes()),
        "peak_bytes_per_rank": comm.allgather_object(peak),
    }
    if model.device.is_gpu:
        pool = model.device.cupy.get_default_memory_pool()
        found["device_bytes_per_rank"] = comm.allgather_object(pool.used_bytes())
        peak = pool.total_bytes()  # the pool never returns memory to the GPU
        found["device_peak_bytes_per_rank"] = comm.allgather_object(peak)
    return found


def speeds(rounds, model, roofline, job):
    """Return the speed of prefill and decode over the rounds, and their limits."""
    context = job.prompt_tokens + job.new_tokens // 2
    keys = keys_read(model, context, 1)
    read = token_bytes(model.comm, roofline, keys)
    found = {
        "prefill": {
            "prompt_tokens": job.prompt_tokens,
            "ttft_s": median_and_range(one.ttft_s for one in rounds),
            "limit_s": median_and_range(one.bare_prefill_s for one in rounds),
            "share_of_limit": median_and_range(one.bare_prefill_s / one.ttft_s for one in rounds),
            "tokens_per_s": median_and_range(job.prompt_tokens / one.ttft_s for one in rounds),
        },
        "decode": {
            "new_tokens": job.new_tokens,
            "tokens_per_s": median_and_range(1 / one.decode_s for one in rounds),
            "limit_tokens_per_s": median_and_range(1 / one.bare_decode_s for one in rounds),
            "share_of_limit": median_and_range(one.bare_decode_s / one.decode_s for one in rounds),
            "bytes_per_token": read,
            "gb_per_s": median_and_range(read / one.decode_s / 1e9 for one in rounds),
            "all_reduce_share_per_rank": roofline.collective_shares(rounds),
        },
        "rounds": len(rounds),
    }
    if model.device.is_gpu:
        shares = [roofline.shares_of_bandwidth(keys, one.decode_s) for one in rounds]
        found["decode"]["share_of_reads"] = median_and_range(of_reads for of_reads, _ in shares)
        found["decode"]["share_of_copy"] = median_and_range(of_copy for _, of_copy in shares)
        found["prefill"]["share_of_matrix_rate"] = median_and_range(
            roofline.share_of_matrix_rate(job.prompt_tokens, one.ttft_s) for one in rounds
        )
    return found


def profiles(model, prompt, job):
    """Return the seconds of each step of a prompt and of a token; on a GPU, of a token's kernels.

    On a CPU, they are means over the ranks; on a GPU, they are those of rank 0.
    """
    if model.device.is_gpu:
        from minitp.bench.gpu_profile import gpu_profile

        return gpu_profile(model, keys_read(model, job.prompt_tokens + job.new_tokens // 2, 1))
    ranks = model.comm.allgather_object(profile(model, prompt, job.new_tokens))
    return {
        name: {step: sum(rank[i][step] for rank in ranks) / len(ranks) for step in ranks[0][i]}
        for i, name in enumerate(("prefill_s", "decode_s"))
    }


def context_sweep(model, roofline, job, progress):
    """Measure prefill and decode at increasing contexts."""
    points = []
    if model.fused:  # captures a graph over a pool that is large enough for all points
        timed_round(model, roofline, random_prompt(model.config, job.points[-1]), job.new_tokens)
    for context in job.points:
        prompt = random_prompt(model.config, context)
        rounds = []
        for n in range(job.rounds):
            progress(f"context {context}, round {n + 1} of {job.rounds}")
            rounds.append(timed_round(model, roofline, prompt, job.new_tokens))
        points.append(
            {
                "context": context,
                "ttft_s": median(one.ttft_s for one in rounds),
                "ttft_s_range": extremes(one.ttft_s for one in rounds),
                "limit_ttft_s": median(one.bare_prefill_s for one in rounds),
                "tokens_per_s": median(1 / one.decode_s for one in rounds),
                "tokens_per_s_range": extremes(1 / one.decode_s for one in rounds),
                "limit_tokens_per_s": median(1 / one.bare_decode_s for one in rounds),
            }
        )
    return points


def batch_sweep(model, roofline, job, progress):
    """Measure decode passes with increasing batch sizes; every sequence continues the same prompt."""
    points = []
    prompt = random_prompt(model.config, job.prompt_tokens)
    for batch in job.points:
        passes, bare = [], []
        for n in range(job.rounds):
            progress(f"batch {batch}, round {n + 1} of {job.rounds}")
            bare.append(bare_decode_seconds(model, roofline, batch, job.prompt_tokens + job.new_tokens // 2))
            passes.append(timed_batch(model, prompt, batch, job.new_tokens))
        points.append(
            {
                "batch": batch,
                "step_s": median(passes),
                "step_s_range": extremes(passes),
                "tokens_per_s": batch / median(passes),
                "tokens_per_s_range": extremes(batch / seconds for seconds in passes),
                "limit_tokens_per_s": batch / median(bare),
            }
        )
    return points


def median_and_range(values):
    """Return the median and the range of the values, as a dict for JSON."""
    values = list(values)
    return {"median": median(values), "min": min(values), "max": max(values)}


def extremes(values):
    """Return the smallest and the largest value, as a list for JSON."""
    values = list(values)
    return [min(values), max(values)]


def roofline_of(model):
    """Return the Roofline for the model's device."""
    if model.device.is_gpu:
        from minitp.bench.gpu_roofline import GpuRoofline

        return GpuRoofline(model)
    return BareProducts(model)
