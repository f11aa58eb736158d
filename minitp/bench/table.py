"""The results of `minitp bench` for people."""

from minitp.table import aligned, counted, size

PRODUCT, COLLECTIVE = "product", "collective"
KINDS = {  # of a profile's steps; the others are small operations
    **dict.fromkeys(["q k v", "scores", "context", "out_partial", "gate up", "logits_partial"], PRODUCT),
    **dict.fromkeys(["embed", "out", "logits"], COLLECTIVE),
}


def lines(result):
    """All of it, as lines of text."""
    parts = [head(result), limit_lines(result)]
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
    weights = size(found["bytes_per_token"])
    rows = [
        (
            "memory",
            f"{found['bandwidth_gb_per_s']:.1f} GB/s, reading {weights} of weights, one token's products",
        ),
        ("matrix rate", f"{found['matrix_gflop_per_s']:.0f} GFLOP/s, the same products for a whole prompt"),
    ]
    if found["all_reduce"]:
        latencies = (f"{size(one['bytes'])} {one['us']:.1f} us" for one in found["all_reduce"])
        rows.append(("all-reduce", ", ".join(latencies)))
    return ["limits, all ranks at once:", *(f"  {line}" for line in aligned(rows, "<<"))]


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
    shares = ", ".join(f"{share:.0%}" for share in decode["all_reduce_share_per_rank"])
    reading = decode["gb_per_s"]["median"]
    return [
        *aligned(rows, "<>>>>"),
        f"of a prompt of {prefill['prompt_tokens']} tokens and {decode['new_tokens']} new ones",
        "limit: the bare matrix products of the same shapes, measured beside each round",
        f"decoding reads {reading:.1f} GB/s; {shares} of each rank's time is in collectives and waiting",
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
    """Where the time goes, step by step; the mean of the ranks."""
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
            "the bare matrix products of the same steps",
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
    rows = [("", "weights", "own memory", "at most, with files and this measuring")]
    memory = result["memory"]
    each = zip(
        result["weight_bytes_per_rank"],
        memory["private_bytes_per_rank"],
        memory["peak_bytes_per_rank"],
        strict=True,
    )
    first = result["as_rank"] or 0
    rows += [(f"rank {rank}", *map(size, sizes)) for rank, sizes in enumerate(each, start=first)]
    return aligned(rows, "<>>>")
