"""The results of `minitp bench` as text."""

from minitp.util.format import aligned, counted, size

PRODUCT, COLLECTIVE = "product", "collective"
KINDS = {  # kinds of a profile's steps; the others are small operations
    **dict.fromkeys(["q k v", "scores", "context", "out_partial", "gate up", "logits_partial"], PRODUCT),
    **dict.fromkeys(["embed", "out", "logits"], COLLECTIVE),
}


# What it means if a speed is above its limit, by device.
ABOVE_LIMIT = {
    "cpu": ["A speed is above its limit: the machine was busy with other work; run again when it is idle."],
    "cuda": [
        "A speed is above its limit: the GPU was busy with other work, or the model fits in its L2 cache, "
        "which is faster than its memory."
    ],
}


def lines(result):
    """Return the results as lines of text."""
    parts = [head(result), limit_lines(result), [loading_line(result["loading"])]]
    if "sweep" in result:
        parts.append(sweep_lines(result["sweep"]))
    elif "requests" in result:
        parts.append(request_lines(result["requests"]))
    else:
        parts += [speed_lines(result), *profile_lines(result.get("profile", {}))]
    parts.append(memory_lines(result))
    if above_limit(result):
        parts.append(ABOVE_LIMIT[result["device"]])
    return "\n\n".join("\n".join(part) for part in parts).split("\n")


def above_limit(result):
    """Return whether a speed is above its limit, so that the limit must be wrong."""
    if "sweep" in result:
        return any(point["tokens_per_s"] > point["limit_tokens_per_s"] for point in result["sweep"]["points"])
    if "requests" in result:
        return result["requests"]["share_of_limit"] > 1
    return any(result[part]["share_of_limit"]["median"] > 1 for part in ("prefill", "decode"))


def head(result):
    """Return lines that describe the model, the ranks and the machine."""
    threads = result["blas_threads_per_rank"]
    ranks = counted(result["tp"], "rank") + (f" of {counted(threads, 'BLAS thread')}" if threads else "")
    if result["replicas"] > 1:
        ranks = f"{counted(result['replicas'], 'replica')} of {ranks}"
    if result["as_rank"] is not None:
        ranks = f"only rank {result['as_rank']} of {ranks}"
    layers = counted(result["layers"], "layer")
    cache = "" if result["kv_dtype"] == "auto" else f" (cache in {result['kv_dtype']})"
    return [
        f"{result['model']}, {layers}, {result['dtype']}{cache}; {ranks}, {result['comm']}",
        f"{result['machine']}, {counted(result['cores'], 'core')}; {result['date']}",
    ]


def limit_lines(result):
    """Return the lines of the machine's limits."""
    found = result["limits"]
    weights, speed = size(found["bytes_per_token"]), f"{found['bandwidth_gb_per_s']:.1f} GB/s"
    if "copy_gb_per_s" in found:
        rate = f"{found['matrix_gflop_per_s'] / 1e3:.1f} TFLOP/s"
        rows = [
            ("memory", f"{speed} of reads; a token reads {weights} of weights"),
            ("copy", f"{found['copy_gb_per_s']:.1f} GB/s of reads and writes on the GPU"),
            ("matrix rate", f"{rate} by cuBLAS, with {counted(found['matrix_rows'], 'row')}"),
        ]
    else:
        rate = f"{found['matrix_gflop_per_s']:.0f} GFLOP/s"
        rows = [
            ("memory", f"{speed} in the products of one token, which read {weights} of weights"),
            ("matrix rate", f"{rate} in the same products for a whole prompt"),
        ]
    if found["all_reduce"]:
        latencies = (f"{size(one['bytes'])} {one['us']:.1f} us" for one in found["all_reduce"])
        rows.append(("all-reduce", ", ".join(latencies)))
    of = " of one replica" if result["replicas"] > 1 else ""
    return [f"limits{of}, with all ranks at once:", *(f"  {line}" for line in aligned(rows, "<<"))]


def loading_line(found):
    """Return the line about the speed of loading."""
    file = ""
    if found["file_gb_per_s"] is not None:
        file = f"; only reading the file reaches {found['file_gb_per_s']:.1f} GB/s"
    return f"loaded in {found['seconds']:.2f} s, {found['gb_per_s']:.2f} GB/s of weights{file}"


def speed_lines(result):
    """Return the lines of prefill and decode with their limits."""
    prefill, decode = result["prefill"], result["decode"]
    rows = [
        (f"median of {counted(result['rounds'], 'round')}", "", "min to max", "limit", "share of limit"),
        row("first token", prefill["ttft_s"], prefill["limit_s"], prefill["share_of_limit"], "s", 3),
        row(
            "decode",
            decode["tokens_per_s"],
            decode["limit_tokens_per_s"],
            decode["share_of_limit"],
            "tokens/s",
            1,
        ),
    ]
    return [
        *aligned(rows, "<>>>>"),
        f"with a prompt of {counted(prefill['prompt_tokens'], 'token')} and "
        f"{counted(decode['new_tokens'], 'new token')}",
        *(gpu_speed_lines if "share_of_copy" in decode else cpu_speed_lines)(prefill, decode),
    ]


def cpu_speed_lines(_, decode):
    """Return the lines that explain the limit and say how much of the time collectives take."""
    shares = ", ".join(f"{share:.0%}" for share in decode["all_reduce_share_per_rank"])
    reading = decode["gb_per_s"]["median"]
    waiting = f"{shares} of each rank's time is spent in collectives and waiting"
    return [
        "limit: the bare matrix products of the same shapes, measured with each round",
        f"decoding reads {reading:.1f} GB/s; {waiting}",
    ]


def gpu_speed_lines(prefill, decode):
    """Return the lines that compare the speeds with the GPU's bandwidth and matrix rate."""
    share, rate = decode["share_of_reads"]["median"], prefill["share_of_matrix_rate"]["median"]
    reading, reduces = decode["gb_per_s"]["median"], decode["all_reduce_share_per_rank"][0]
    collectives = f"; all-reduces, timed separately, take {reduces:.0%} of a token's time" if reduces else ""
    return [
        "limit: reads at the memory's speed or products at the matrix rate, whichever takes longer",
        f"decoding reads {reading:.1f} GB/s, {share:.1%} of the memory's speed{collectives}",
        f"the prompt's products with the weights reach {rate:.1%} of the matrix rate",
    ]


def row(name, value, limit, share, unit, digits):
    """Return the table row of one speed."""
    return (
        name,
        f"{value['median']:.{digits}f} {unit}",
        f"{value['min']:.{digits}f} to {value['max']:.{digits}f}",
        f"{limit['median']:.{digits}f}",
        f"{share['median']:.0%}",
    )


def profile_lines(profile):
    """Yield the tables of a profile: the steps of a prompt and a token, or on a GPU a token's kernels."""
    if "kernels" in profile:
        yield kernel_lines(profile)
    for name, title in (("prefill_s", "the prompt, ms"), ("decode_s", "a token, us")):
        if name not in profile:
            continue
        steps, scale = profile[name], 1e3 if name == "prefill_s" else 1e6
        total, kinds = sum(steps.values()), {}
        rows = [(title, "", "", "")]
        for step, seconds in steps.items():
            kind = KINDS.get(step.split(".")[-1], "small operation")
            kinds[kind] = kinds.get(kind, 0.0) + seconds
            rows.append((step, f"{scale * seconds:.1f}", f"{seconds / total:.1%}", kind))
        rows += [(kind, f"{scale * s:.1f}", f"{s / total:.1%}", "total") for kind, s in kinds.items()]
        yield aligned(rows, "<>><")


def kernel_lines(profile):
    """Return a table of the kernels of a token."""
    rows = [("a token, us", "launches", "", "share", "read")]
    for one in profile["kernels"]:
        speed = "" if one["bytes"] is None else f"{one['bytes'] / one['us'] / 1e3:.0f} GB/s"
        share = f"{one['us'] / profile['eager_us']:.1%}"
        rows.append((one["name"], str(one["count"]), f"{one['us']:.1f}", share, speed))
    rows.append(("launched one by one", str(profile["launches"]), f"{profile['eager_us']:.1f}", "", ""))
    rows.append(("as one graph", "", f"{profile['graph_us']:.1f}", "", ""))
    return aligned(rows, "<>>>>")


def sweep_lines(sweep):
    """Return a table with a row for each point."""
    if sweep["over"] == "context":
        rows = [("context", "first token", "limit", "tokens/s", "limit", "share")]
        for p in sweep["points"]:
            share = p["tokens_per_s"] / p["limit_tokens_per_s"]
            first = (f"{p['ttft_s']:.3f} s", f"{p['limit_ttft_s']:.3f} s")
            decode = (f"{p['tokens_per_s']:.1f}", f"{p['limit_tokens_per_s']:.1f}", f"{share:.0%}")
            rows.append((str(p["context"]), *first, *decode))
        return aligned(rows, ">>>>>>")
    rows = [("sequences", "a pass", "tokens/s", "limit", "share")]
    for p in sweep["points"]:
        share = p["tokens_per_s"] / p["limit_tokens_per_s"]
        speed = (f"{p['tokens_per_s']:.1f}", f"{p['limit_tokens_per_s']:.1f}", f"{share:.0%}")
        rows.append((str(p["batch"]), f"{1000 * p['step_s']:.1f} ms", *speed))
    return aligned(rows, ">>>>>")


def request_lines(found):
    """Return the lines that compare concurrent requests with one by one and with the limit."""
    together, one_by_one, limit = (
        f"{found[f'{name}_tokens_per_s']:.1f} tokens/s" for name in ("together", "one_by_one", "limit")
    )
    rows = [
        ("all at once", together, f"in {counted(found['steps'], 'batch')}"),
        ("one by one", one_by_one, ""),
        ("limit", limit, "for the same batches"),
    ]
    prompt, new = counted(found["prompt_tokens"], "prompt token"), counted(found["new_tokens"], "new token")
    ratio, share = found["times_one_by_one"], found["share_of_limit"]
    return [
        f"{counted(found['count'], 'request')} of {prompt} and {new} each; speeds count new tokens",
        *aligned(rows, "<><"),
        f"{ratio:.2f} times as fast as one by one, {share:.0%} of the limit",
    ]


def memory_lines(result):
    """Return a table of the memory of each rank."""
    rows = [["", "weights", "private memory", "peak, with files and measuring"]]
    found = result["memory"]
    columns = [result["weight_bytes_per_rank"], found["private_bytes_per_rank"], found["peak_bytes_per_rank"]]
    if "device_bytes_per_rank" in found:
        rows[0] += ["on the GPU", "peak"]
        columns += [found["device_bytes_per_rank"], found["device_peak_bytes_per_rank"]]
    first = result["as_rank"] or 0
    for rank, sizes in enumerate(zip(*columns, strict=True), start=first):
        rows.append([f"rank {rank}", *map(size, sizes)])
    return aligned(rows, "<" + ">" * len(columns))
