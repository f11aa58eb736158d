"""The result of `minitp plan` as text."""

import textwrap

from minitp.cli.plan_result import is_asked
from minitp.util.format import aligned, counted, size

WIDTH = 100  # columns of sentences; tables are as wide as necessary


def text(result):
    """Format the dict of `plan_result.predict`."""
    parts = [
        [line for sentence in head(result) for line in wrapped(sentence)],
        wrapped(answer(result) + in_all(result)),
        memory_lines(result),
        speed_lines(result),
        rank_lines(result),
        [line for note in result["notes"] for line in wrapped(note, "- ")],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def wrapped(sentence, mark=""):
    """Return a sentence, wrapped into lines."""
    indent = " " * len(mark)
    return textwrap.wrap(
        sentence, WIDTH, initial_indent=mark, subsequent_indent=indent, break_on_hyphens=False
    )


def head(result):
    """Return the sentences on the model and on the machine."""
    machine = result["hardware"]
    rate, bandwidth = machine["flops_per_s"], machine["memory_bytes_per_s"]
    layers, cache = counted(result["layers"], "layer"), size(result["kv_cache_bytes_per_token"])
    return (
        f"{result['model']}: {amount(result['parameters'])} parameters in {layers}, "
        f"{size(result['weight_bytes'])} in {result['dtype']}; KV cache {cache} a token; "
        f"context {result['model_context_tokens']}",
        f"{machine['title']}: {rounded(bandwidth / 1e9)} GB/s, "
        + (f"{rounded(rate / 1e12)} TFLOP/s" if rate >= 1e12 else f"{rounded(rate / 1e9)} GFLOP/s"),
    )


def answer(result):
    """Return the sentence that says whether the marked row fits, and the speed to expect."""
    row = next(row for row in result["estimates"] if is_asked(result, row))
    load = f"{counted(result['batch'] or 1, 'sequence')} of {counted(result['context_tokens'], 'token')}"
    place = f"TP={row['tp']}" + (f" with --split {row['split']}" if row["split"] else "")
    place += f" over {row['nodes']} nodes" if row["nodes"] > 1 else ""
    if row["fits"]:
        prefill, speed = duration(row["prefill_expected_s"]), rounded(row["decode_expected_tokens_per_s"])
        return (
            f"{place} fits with {load}; expect {prefill} for a prompt of {result['prompt_tokens']}, "
            f"then {speed} tokens/s."
        )
    smallest = result["smallest_tp_that_fits"]
    if result["ranks"]:
        return f"{place} does not fit with {load}; --split memory gives each rank what its memory holds."
    other = "nor does any other TP" if smallest is None else f"the smallest TP that does is {smallest}"
    return f"{place} does not fit with {load}; {other}."


def in_all(result):
    """Return the sentence on all replicas together, if there are several."""
    found = result["all_replicas"]
    if found is None:
        return ""
    return (
        f" {counted(result['replicas'], 'replica')} ({counted(found['ranks'], 'rank')}) with "
        f"{counted(found['sequences'], 'sequence')} give {rounded(found['expected_tokens_per_s'])} tokens/s "
        "in all."
    )


def memory_lines(result):
    """Return the table of the memory of a rank, and the contexts and batches that fit."""
    smallest = result["smallest_tp_that_fits"]
    too_large = "does not fit" + (f"; TP={smallest} does" if smallest else "")
    rows = [
        ("", "TP", "nodes", "weights", "KV cache", "longest", "limited", "sequences", ""),
        ("", "", "", "per rank", "per token", "context", "by", f"of {result['context_tokens']}", ""),
    ]
    for row in result["estimates"]:
        rows.append(
            (
                *labels(result, row),
                size(row["weight_bytes_per_rank"]),
                size(row["kv_cache_bytes_per_token_per_rank"]),
                str(row["longest_context_tokens"]),
                row["longest_context_limited_by"],
                str(row["largest_batch"]),
                "" if row["fits"] else too_large,
            )
        )
    return aligned(rows, "<>>>>><><")


def speed_lines(result):
    """Return the table of times and speeds, each as the limit and as expected."""
    titles = (f"prefill of {result['prompt_tokens']}", "tokens/s of one", "tokens/s in all", "in collectives")
    prefill, one, together, collectives = (f"{title:^18}" for title in titles)
    kinds = pair("limit", "expected")
    rows = [
        ("", "TP", "nodes", prefill, one, "batch", together, collectives),
        ("", "", "", kinds, kinds, "", kinds, kinds),
    ]
    for row in result["estimates"]:
        if not row["fits"]:
            continue
        rows.append(
            (
                *labels(result, row),
                pair(duration(row["prefill_limit_s"]), duration(row["prefill_expected_s"])),
                pair(rounded(row["decode_limit_tokens_per_s"]), rounded(row["decode_expected_tokens_per_s"])),
                str(row["batch"]),
                pair(rounded(row["batch_limit_tokens_per_s"]), rounded(row["batch_expected_tokens_per_s"])),
                pair(f"{row['collective_share_limit']:.0%}", f"{row['collective_share_expected']:.0%}"),
            )
        )
    return aligned(rows, "<>>>>>>>") if len(rows) > 2 else []


def pair(limit, expected):
    """Return the two columns under a title.

    >>> pair("12.5", "9.4")
    '    12.5       9.4'
    """
    return f"{limit:>8}{expected:>10}"


def labels(result, row):
    """Return the first columns of a row: a mark if the user chose it, the TP with its shares, the nodes."""
    shares = f" as {row['split']}" if row["split"] else ""
    return ">" if is_asked(result, row) else "", f"{row['tp']}{shares}", str(row["nodes"])


def rank_lines(result):
    """Return the table of the ranks, if they are unequal."""
    if not result["ranks"]:
        return []
    rows = [
        ("rank", "hardware", "memory", "weights", "KV cache", "query heads", "KV heads", "FFN", "one token"),
        ("", "", "", "", "per token", "", "", "columns", pair("limit", "expected")),
    ]
    for rank in result["ranks"]:
        sizes = rank["memory_bytes"], rank["weight_bytes"], rank["kv_cache_bytes_per_token"]
        ranges = rank["query_heads"], rank["kv_heads"], rank["ffn_columns"]
        times = duration(rank["decode_limit_s"]), duration(rank["decode_expected_s"])
        texts = [*map(size, sizes), *(f"{start}:{stop}" for start, stop in ranges), pair(*times)]
        rows.append((str(rank["rank"]), rank["hardware"], *texts))
    return aligned(rows, "><>>>>>>>")


def amount(number):
    """Format a number, with a word for millions and billions.

    >>> amount(7241732096), amount(134515008), amount(20736)
    ('7.24 billion', '134.5 million', '20736')
    """
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:.1f} million" if number >= 1e6 else str(number)


def rounded(number):
    """Format a number with three significant digits, or as a whole number.

    >>> rounded(12345.6), rounded(104.94), rounded(65), rounded(0.2312)
    ('12346', '105', '65.0', '0.231')
    """
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}"


def duration(seconds):
    """Format a time in seconds or milliseconds.

    >>> duration(75.2), duration(0.6543), duration(0.00432)
    ('75.2 s', '0.654 s', '4.32 ms')
    """
    return f"{rounded(seconds)} s" if seconds >= 0.1 else f"{rounded(seconds * 1e3)} ms"
