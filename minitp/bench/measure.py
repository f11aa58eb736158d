"""All that `minitp bench` tells, as one object of plain numbers; every rank takes part."""

import os
import resource
from datetime import date
from statistics import median

from minitp.bench.concurrency import measure_requests
from minitp.bench.cpu_roofline import BareProducts
from minitp.bench.load_rate import loading
from minitp.bench.roofline import token_bytes
from minitp.bench.runs import (
    bare_decode_seconds,
    keys_read,
    private_bytes,
    profile,
    random_prompt,
    timed_batch,
    timed_run,
)
from minitp.comm.single import ShardOnly
from minitp.util.environment import BLAS_THREADS, cores, cpu_name


def measure(model, source, job, load_s, progress):
    """The results as a dict for JSON, on every rank.

    Parameters
    ----------
    model : Model
    source : ModelSource
    job : Job
        What is wanted.
    load_s : float
    progress : callable
        Called with a few words before each measurement.
    """
    limits = limits_of(model)
    result = surroundings(model, source) | {"load_s": load_s}
    progress("limits")
    result["loading"] = loading(model, source, load_s)
    result["limits"] = limits.measure(job.prompt_tokens)
    if job.sweep == "context":
        result["sweep"] = {"over": "context", "points": context_sweep(model, limits, job, progress)}
    elif job.sweep == "batch":
        result["sweep"] = {"over": "batch", "points": batch_sweep(model, limits, job, progress)}
    elif job.requests is not None:
        result["requests"] = measure_requests(model, limits, job, progress)
    else:
        runs = []
        prompt = random_prompt(model.config, job.prompt_tokens)
        # Warms up. On a GPU as long as the rounds: their step is captured over a pool that has room for them.
        timed_run(model, limits, prompt, job.new_tokens if model.fused else 2)
        for n in range(job.rounds):
            progress(f"round {n + 1} of {job.rounds}")
            runs.append(timed_run(model, limits, prompt, job.new_tokens))
        result |= speeds(runs, model, limits, job)
        if job.profile:
            progress("profile")
            result["profile"] = profiles(model, prompt, job)
    del limits  # else its arrays counted as the model's
    result["memory"] = memory(model)
    return result


def surroundings(model, source):
    """On what, and of what, everything else was measured."""
    host = getattr(model.comm, "host", model.comm)
    threads = next((os.environ[name] for name in reversed(BLAS_THREADS[:2]) if name in os.environ), "")
    return {
        "date": date.today().isoformat(),
        "machine": gpu_name(model.device) if model.device.is_gpu else cpu_name(),
        "cores": cores(),
        "model": source.name,
        "layers": model.config.num_hidden_layers,
        "tp": model.comm.size,
        "device": "cuda" if model.device.is_gpu else "cpu",
        "as_rank": model.comm.shard_rank if isinstance(host, ShardOnly) else None,
        "dtype": model.device.dtype.name,
        "kv_dtype": model.kv_dtype,
        "comm": type(model.comm).__name__,
        "blas_threads_per_rank": int(threads) if threads.isdigit() else None,
        "weight_bytes_per_rank": model.comm.allgather_object(model.weights.nbytes),
    }


def gpu_name(gpu):
    """What this rank's GPU calls itself."""
    runtime = gpu.cupy.cuda.runtime
    return runtime.getDeviceProperties(gpu.cupy.cuda.Device().id)["name"].decode()


def memory(model):
    """Bytes on each rank: its process's own now, and with mapped files at most; of the GPU's the same two."""
    comm, peak = model.comm, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "private_bytes_per_rank": comm.allgather_object(private_bytes()),
        "peak_bytes_per_rank": comm.allgather_object(peak),
    }
    if model.device.is_gpu:
        pool = model.device.cupy.get_default_memory_pool()
        found["device_bytes_per_rank"] = comm.allgather_object(pool.used_bytes())
        found["device_peak_bytes_per_rank"] = comm.allgather_object(
            pool.total_bytes()
        )  # it gives nothing back
    return found


def speeds(runs, model, limits, job):
    """Of the rounds: prefill and decode, each beside its limit."""
    context = job.prompt_tokens + job.new_tokens // 2
    keys = keys_read(model, context, 1)
    read = token_bytes(model.comm, limits, keys)
    found = {
        "prefill": {
            "prompt_tokens": job.prompt_tokens,
            "ttft_s": spread(run.ttft_s for run in runs),
            "limit_s": spread(run.bare_prefill_s for run in runs),
            "share_of_limit": spread(run.bare_prefill_s / run.ttft_s for run in runs),
            "tokens_per_s": spread(job.prompt_tokens / run.ttft_s for run in runs),
        },
        "decode": {
            "new_tokens": job.new_tokens,
            "tokens_per_s": spread(1 / run.decode_s for run in runs),
            "limit_tokens_per_s": spread(1 / run.bare_decode_s for run in runs),
            "share_of_limit": spread(run.bare_decode_s / run.decode_s for run in runs),
            "bytes_per_token": read,
            "gb_per_s": spread(read / run.decode_s / 1e9 for run in runs),
            "all_reduce_share_per_rank": limits.collective_shares(runs),
        },
        "rounds": len(runs),
    }
    if model.device.is_gpu:
        shares = [limits.shares_of_bandwidth(keys, run.decode_s) for run in runs]
        found["decode"]["share_of_reads"] = spread(of_reads for of_reads, _ in shares)
        found["decode"]["share_of_copy"] = spread(of_copy for _, of_copy in shares)
        found["prefill"]["share_of_matrix_rate"] = spread(
            limits.share_of_matrix_rate(job.prompt_tokens, run.ttft_s) for run in runs
        )
    return found


def profiles(model, prompt, job):
    """Seconds by step of the prompt and of a token, the mean over the ranks; on a GPU the token's kernels."""
    if model.device.is_gpu:
        from minitp.bench.gpu_profile import gpu_profile

        return gpu_profile(model, keys_read(model, job.prompt_tokens + job.new_tokens // 2, 1))
    every = model.comm.allgather_object(profile(model, prompt, job.new_tokens))
    return {
        name: {step: sum(rank[i][step] for rank in every) / len(every) for step in every[0][i]}
        for i, name in enumerate(("prefill_s", "decode_s"))
    }


def context_sweep(model, limits, job, progress):
    """Prefill and decode at ever longer contexts."""
    points = []
    if model.fused:  # captures a step over a pool that is large enough for all
        timed_run(model, limits, random_prompt(model.config, job.points[-1]), job.new_tokens)
    for context in job.points:
        prompt = random_prompt(model.config, context)
        runs = []
        for n in range(job.rounds):
            progress(f"context {context}, round {n + 1} of {job.rounds}")
            runs.append(timed_run(model, limits, prompt, job.new_tokens))
        points.append(
            {
                "context": context,
                "ttft_s": median(run.ttft_s for run in runs),
                "ttft_s_range": extremes(run.ttft_s for run in runs),
                "limit_ttft_s": median(run.bare_prefill_s for run in runs),
                "tokens_per_s": median(1 / run.decode_s for run in runs),
                "tokens_per_s_range": extremes(1 / run.decode_s for run in runs),
                "limit_tokens_per_s": median(1 / run.bare_decode_s for run in runs),
            }
        )
    return points


def batch_sweep(model, limits, job, progress):
    """Decode steps of ever more sequences, each of which continues a prompt of its own."""
    points = []
    prompt = random_prompt(model.config, job.prompt_tokens)
    for batch in job.points:
        steps, bare = [], []
        for n in range(job.rounds):
            progress(f"batch {batch}, round {n + 1} of {job.rounds}")
            bare.append(bare_decode_seconds(model, limits, batch, job.prompt_tokens + job.new_tokens // 2))
            steps.append(timed_batch(model, prompt, batch, job.new_tokens))
        points.append(
            {
                "batch": batch,
                "step_s": median(steps),
                "step_s_range": extremes(steps),
                "tokens_per_s": batch / median(steps),
                "tokens_per_s_range": extremes(batch / step for step in steps),
                "limit_tokens_per_s": batch / median(bare),
            }
        )
    return points


def spread(values):
    """Median, least and most."""
    values = list(values)
    return {"median": median(values), "min": min(values), "max": max(values)}


def extremes(values):
    """Return the least and the largest value, as a list for JSON."""
    values = list(values)
    return [min(values), max(values)]


def limits_of(model):
    """The Roofline of a model where it is."""
    if model.device.is_gpu:
        from minitp.bench.gpu_roofline import GpuRoofline

        return GpuRoofline(model)
    return BareProducts(model)
