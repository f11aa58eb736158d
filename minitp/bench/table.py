"""The results of `minitp bench` for people."""

from minitp.util.format import aligned, counted, size

PRODUCT, COLLECTIVE = "product", "collective"
KINDS = {  # of a profile's steps; the others are small operations
    **dict.fromkeys(["q k v", "scores", "context", "out_partial", "gate up", "logits_partial"], PRODUCT),
    **dict.fromkeys(["embed", "out", "logits"], COLLECTIVE),
}


def lines(result):
    """All of it, as lines of text."""
    parts = [head(result), limit_lines(result), [loading_line(result["loading"])]]
    if "sweep" in result:
        parts.append(sweep_lines(result["sweep"]))
    elif "requests" in result:
        parts.append(request_lines(result["requests"]))
    else:
        parts += [speed_lines(result), *profile_lines(result.get("profile", {}))]
    parts.append(memory_lines(result))
    return "\n\n".join("\n".join(part) for part in parts).split("\n")


def head(result):
    """On what it was measured."""
    threads = result["blas_threads_per_rank"]
    ranks = counted(result["tp"], "rank") + (f" of {counted(threads, 'BLAS thread')}" if threads else "")
    if result["as_rank"] is not None:
        ranks = f"alone the share of rank {result['as_rank']} of {ranks}"
    layers = counted(result["layers"], "layer")
    cache = "" if result["kv_dtype"] == "auto" else f" (cache in {result['kv_dtype']})"
    return [
        f"{result['model']}, {layers}, {result['dtype']}{cache}; {ranks}, {result['comm']}",
        f"{result['machine']}, {counted(result['cores'], 'core')}; {result['date']}",
    ]


def limit_lines(result):
    """What the machine allows."""
    found = result["limits"]
    weights, speed = size(found["bytes_per_token"]), f"{found['bandwidth_gb_per_s']:.1f} GB/s"
    if "copy_gb_per_s" in found:
        rate = f"{found['matrix_gflop_per_s'] / 1e3:.1f} TFLOP/s"
        rows = [
            ("memory", f"{speed}, reading; a token's weights are {weights}"),
            ("copy", f"{found['copy_gb_per_s']:.1f} GB/s, read and written on the GPU"),
            ("matrix rate", f"{rate}, by cuBLAS, of {counted(found['matrix_rows'], 'row')}"),
        ]
    else:
        rate = f"{found['matrix_gflop_per_s']:.0f} GFLOP/s"
        rows = [
            ("memory", f"{speed}, reading {weights} of weights, one token's products"),
            ("matrix rate", f"{rate}, the same products for a whole prompt"),
        ]
    if found["all_reduce"]:
        latencies = (f"{size(one['bytes'])} {one['us']:.1f} us" for one in found["all_reduce"])
        rows.append(("all-reduce", ", ".join(latencies)))
    return ["limits, all ranks at once:", *(f"  {line}" for line in aligned(rows, "<<"))]


def loading_line(found):
    """How fast the model was loaded."""
    beside = ""
    if found["file_gb_per_s"] is not None:
        beside = f"; reading the file without more takes {found['file_gb_per_s']:.1f} GB/s"
    return f"loaded in {found['seconds']:.2f} s, {found['gb_per_s']:.2f} GB/s of weights{beside}"


def speed_lines(result):
    """Prefill and decode beside their limits."""
    prefill, decode = result["prefill"], result["decode"]
    rows = [
        (f"median of {counted(result['rounds'], 'round')}", "", "min to max", "limit", "share of it"),
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
        f"of a prompt of {prefill['prompt_tokens']} tokens and {decode['new_tokens']} new ones",
        *(gpu_speed_lines if "share_of_copy" in decode else cpu_speed_lines)(prefill, decode),
    ]


def cpu_speed_lines(_, decode):
    """What the limit is, and where the time is."""
    shares = ", ".join(f"{share:.0%}" for share in decode["all_reduce_share_per_rank"])
    reading = decode["gb_per_s"]["median"]
    return [
        "limit: the bare matrix products of the same shapes, measured beside each round",
        f"decoding reads {reading:.1f} GB/s; {shares} of each rank's time is in collectives and waiting",
    ]


def gpu_speed_lines(prefill, decode):
    """Return the lines that compare the speeds with what the GPU reads and multiplies."""
    share, rate = decode["share_of_reads"]["median"], prefill["share_of_matrix_rate"]["median"]
    reading, reduces = decode["gb_per_s"]["median"], decode["all_reduce_share_per_rank"][0]
    collectives = f"; all-reduces, by their time alone, are {reduces:.0%} of a token" if reduces else ""
    return [
        "limit: reading at the memory's speed, or the products at the matrix rate, whichever takes longer",
        f"decoding reads {reading:.1f} GB/s, {share:.1%} of the memory's speed{collectives}",
        f"the prompt's products with the weights go at {rate:.1%} of the matrix rate",
    ]


def row(name, value, limit, share, unit, digits):
    """One speed."""
    return (
        name,
        f"{value['median']:.{digits}f} {unit}",
        f"{value['min']:.{digits}f} to {value['max']:.{digits}f}",
        f"{limit['median']:.{digits}f}",
        f"{share['median']:.0%}",
    )


def profile_lines(profile):
    """Where the time goes, step by step; the mean of the ranks. On a GPU by kernel."""
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
        rows += [(kind, f"{scale * s:.1f}", f"{s / total:.1%}", "in all") for kind, s in kinds.items()]
        yield aligned(rows, "<>><")


def kernel_lines(profile):
    """A line for each kernel of a token's step."""
    rows = [("a token, us", "launches", "", "share", "read")]
    for one in profile["kernels"]:
        speed = "" if one["bytes"] is None else f"{one['bytes'] / one['us'] / 1e3:.0f} GB/s"
        share = f"{one['us'] / profile['eager_us']:.1%}"
        rows.append((one["name"], str(one["count"]), f"{one['us']:.1f}", share, speed))
    rows.append(("launch by launch", str(profile["launches"]), f"{profile['eager_us']:.1f}", "", ""))
    rows.append(("as one graph", "", f"{profile['graph_us']:.1f}", "", ""))
    return aligned(rows, "<>>>>")


def sweep_lines(sweep):
    """One line a point."""
    if sweep["over"] == "context":
        rows = [("context", "first token", "limit", "tokens/s", "limit", "share")]
        for p in sweep["points"]:
            share = p["tokens_per_s"] / p["limit_tokens_per_s"]
            first = (f"{p['ttft_s']:.3f} s", f"{p['limit_ttft_s']:.3f} s")
            decode = (f"{p['tokens_per_s']:.1f}", f"{p['limit_tokens_per_s']:.1f}", f"{share:.0%}")
            rows.append((str(p["context"]), *first, *decode))
        return aligned(rows, ">>>>>>")
    rows = [("sequences", "a step", "tokens/s", "limit", "share")]
    for p in sweep["points"]:
        share = p["tokens_per_s"] / p["limit_tokens_per_s"]
        speed = (f"{p['tokens_per_s']:.1f}", f"{p['limit_tokens_per_s']:.1f}", f"{share:.0%}")
        rows.append((str(p["batch"]), f"{1000 * p['step_s']:.1f} ms", *speed))
    return aligned(rows, ">>>>>")


def request_lines(found):
    """Many at once, beside one by one and beside the limit."""
    rows = [
        ("all at once", f"{found['together_tokens_per_s']:.1f} tokens/s", f"in {found['steps']} steps"),
        ("one by one", f"{found['one_by_one_tokens_per_s']:.1f} tokens/s", ""),
        (
            "limit",
            f"{found['limit_tokens_per_s']:.1f} tokens/s",
            "of the same steps",
        ),
    ]
    each = f"{found['prompt_tokens']} prompt and {found['new_tokens']} new tokens each; new ones are counted"
    ratio, share = found["times_one_by_one"], found["share_of_limit"]
    return [
        f"{counted(found['count'], 'request')} of {each}",
        *aligned(rows, "<><"),
        f"{ratio:.2f} times as fast as one by one, {share:.0%} of the limit",
    ]


def memory_lines(result):
    """What each rank takes."""
    rows = [["", "weights", "own memory", "at most, with files and this measuring"]]
    found = result["memory"]
    columns = [result["weight_bytes_per_rank"], found["private_bytes_per_rank"], found["peak_bytes_per_rank"]]
    if "device_bytes_per_rank" in found:
        rows[0] += ["on the GPU", "at most"]
        columns += [found["device_bytes_per_rank"], found["device_peak_bytes_per_rank"]]
    first = result["as_rank"] or 0
    for rank, sizes in enumerate(zip(*columns, strict=True), start=first):
        rows.append([f"rank {rank}", *map(size, sizes)])
    return aligned(rows, "<" + ">" * len(columns))
