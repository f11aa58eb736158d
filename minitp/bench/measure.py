"""All that `minitp bench` tells, as one object of plain numbers; every rank takes part."""

import os
import platform
import resource
from datetime import date
from pathlib import Path
from statistics import median

from minitp.bench.limits import (
    ALL_REDUCE_BYTES,
    BareProducts,
    all_reduce_seconds,
    bandwidth,
    matrix_rate,
    total_elements,
)
from minitp.bench.requests import measure_requests
from minitp.bench.runs import (
    bare_decode_seconds,
    keys_read,
    private_bytes,
    profile,
    random_prompt,
    timed_batch,
    timed_run,
)
from minitp.comm import Alone, OneOfMany
from minitp.environment import BLAS_THREADS, cores
from minitp.model import PREFILL_CHUNK


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
    comm, products = model.comm, BareProducts(model)
    result = surroundings(model, source) | {"load_s": load_s}
    progress("limits")
    result["limits"] = limits(model, products, job.prompt_tokens)
    if job.sweep == "context":
        result["sweep"] = {"over": "context", "points": context_sweep(model, products, job, progress)}
    elif job.sweep == "batch":
        result["sweep"] = {"over": "batch", "points": batch_sweep(model, products, job, progress)}
    elif job.requests is not None:
        result["requests"] = measure_requests(model, products, job, progress)
    else:
        runs = []
        prompt = random_prompt(model.config, job.prompt_tokens)
        timed_run(model, products, prompt, 2)  # warms up
        for n in range(job.rounds):
            progress(f"round {n + 1} of {job.rounds}")
            runs.append(timed_run(model, products, prompt, job.new_tokens))
        result |= speeds(runs, model, products, job)
        if job.profile:
            progress("profile")
            result["profile"] = profiles(model, prompt, job.new_tokens)
    del products  # else its arrays counted as the model's
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["memory"] = {
        "private_bytes_per_rank": comm.exchange(private_bytes()),
        "peak_bytes_per_rank": comm.exchange(peak),
    }
    return result


def surroundings(model, source):
    """On what, and of what, everything else was measured."""
    threads = next((os.environ[name] for name in reversed(BLAS_THREADS[:2]) if name in os.environ), "")
    return {
        "date": date.today().isoformat(),
        "machine": cpu_name(),
        "cores": cores(),
        "model": source.name,
        "layers": model.config.num_hidden_layers,
        "tp": model.comm.size,
        "as_rank": model.comm.share if isinstance(model.comm, OneOfMany) else None,
        "dtype": model.device.dtype.name,
        "kv_dtype": model.kv_dtype,
        "comm": type(model.comm).__name__,
        "blas_threads_per_rank": int(threads) if threads.isdigit() else None,
        "weight_bytes_per_rank": model.comm.exchange(model.weights.nbytes),
    }


def cpu_name():
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def limits(model, products, prompt_tokens):
    """Of all ranks together, measured at the same time."""
    comm, xp = model.comm, model.device.xp
    sizes = sorted({*ALL_REDUCE_BYTES, 4 * model.config.hidden_size})
    sizes = [] if isinstance(comm, Alone) else sizes
    return {
        "bytes_per_token": total_elements(comm, products) * products.dtype.itemsize,
        "bandwidth_gb_per_s": bandwidth(comm, products) / 1e9,
        "matrix_gflop_per_s": matrix_rate(comm, products, min(prompt_tokens, PREFILL_CHUNK)) / 1e9,
        "all_reduce": [{"bytes": n, "us": 1e6 * all_reduce_seconds(comm, xp, n)} for n in sizes],
    }


def speeds(runs, model, products, job):
    """Of the rounds: prefill and decode, each beside the bare products that were measured next to it."""
    context = job.prompt_tokens + job.new_tokens // 2
    read = total_elements(model.comm, products) * model.device.dtype.itemsize
    read += sum(model.comm.exchange(products.cache_bytes(keys_read(model, context, 1))))
    return {
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
            "all_reduce_share_per_rank": [
                median(shares) for shares in zip(*[run.all_reduce_shares for run in runs], strict=True)
            ],
        },
        "rounds": len(runs),
    }


def profiles(model, prompt, steps):
    """Seconds by step of the prompt and of a token: the mean over the ranks."""
    every = model.comm.exchange(profile(model, prompt, steps))
    return {
        name: {step: sum(rank[i][step] for rank in every) / len(every) for step in every[0][i]}
        for i, name in enumerate(("prefill_s", "decode_s"))
    }


def context_sweep(model, products, job, progress):
    """Prefill and decode at ever longer contexts."""
    points = []
    for context in job.points:
        prompt = random_prompt(model.config, context)
        runs = []
        for n in range(job.rounds):
            progress(f"context {context}, round {n + 1} of {job.rounds}")
            runs.append(timed_run(model, products, prompt, job.new_tokens))
        points.append(
            {
                "context": context,
                "ttft_s": median(run.ttft_s for run in runs),
                "limit_ttft_s": median(run.bare_prefill_s for run in runs),
                "tokens_per_s": median(1 / run.decode_s for run in runs),
                "limit_tokens_per_s": median(1 / run.bare_decode_s for run in runs),
            }
        )
    return points


def batch_sweep(model, products, job, progress):
    """Decode steps of ever more sequences, each of which continues a prompt of its own."""
    points = []
    prompt = random_prompt(model.config, job.prompt_tokens)
    for batch in job.points:
        steps, bare = [], []
        for n in range(job.rounds):
            progress(f"batch {batch}, round {n + 1} of {job.rounds}")
            bare.append(bare_decode_seconds(model, products, batch, job.prompt_tokens + job.new_tokens // 2))
            steps.append(timed_batch(model, prompt, batch, job.new_tokens))
        points.append(
            {
                "batch": batch,
                "step_s": median(steps),
                "tokens_per_s": batch / median(steps),
                "limit_tokens_per_s": batch / median(bare),
            }
        )
    return points


def spread(values):
    """Median, least and most."""
    values = list(values)
    return {"median": median(values), "min": min(values), "max": max(values)}
