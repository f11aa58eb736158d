"""The tables that benchmarks/gpu/run.py prints at the end: the outcomes, the measurements, the goals.

python benchmarks/gpu/table.py FILE     print the tables of a file in benchmarks/results again
"""

import json
import sys
from pathlib import Path

from commands import CONTEXT
from goals import ONE, SHARE, goal_lines

from minitp.errors import one_line
from minitp.util.format import aligned

# Microseconds of an all-reduce of 8 KiB over NVLink at TP=4 on H100s, in one kernel (SGLang's PR 2904).
PUBLISHED_US = (3.7, 4.8)
WIDEST = 160


def table(facts, outcomes):
    """Return the lines of the table.

    Parameters
    ----------
    facts : dict
        The machine and the date.
    outcomes : list of dict
        The outcomes of `tasks.Runner`.
    """
    found = {one["name"]: one["result"] for one in outcomes if one["status"] == "ok" and one["result"]}
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rows = [
        (
            one["at"],
            one["name"],
            one["status"],
            f"{one['seconds']:.0f} s",
            "" if one["result"] else one["said"],
        )
        for one in outcomes
    ]
    lines = [f"{facts['gpu']}, {facts['date']}; {versions}", ""]
    if rows:
        lines += aligned(rows, "<<<><")
    figures = [row for name, tell in FIGURES.items() if name in found for row in tell(found[name], found)]
    if figures:
        lines += ["", *aligned([("", "", "share"), *figures], "<<<")]
    for name, title in ((ONE, "TP=1"), (SHARE, "rank 0 of 4, without sums")):
        if name in found:
            lines += ["", *kernel_lines(title, found[name]["points"])]
    if outcomes:
        lines += ["", *goal_lines(facts["gpu"], outcomes)]
    return [line[:WIDEST] for line in lines]


def kernel_lines(title, points):
    """Return the table of the microseconds of each kernel's launches, by the number of sequences."""
    points = [one for one in points if "kernels" in one]
    heads = [head for one in points for head in (f"{one['rows']}", "floor")]
    rows, names = [], dict.fromkeys(kernel["name"] for one in points for kernel in one["kernels"])
    for name in names:
        row, count = [], ""
        for one in points:
            kernel = next((kernel for kernel in one["kernels"] if kernel["name"] == name), {})
            row += [figure(kernel, "us"), figure(kernel, "floor_us")]
            count = kernel.get("count", count)
        rows.append((name, str(count), *row))
    table = [(f"us per launch, {title}; sequences:", "launches", *heads), *rows]
    return aligned(table, "<>" + ">" * len(heads))


def figure(kernel, key):
    """Return microseconds as text, or why there are none."""
    if "failed" in kernel and key == "us":
        return "failed"
    return "" if kernel.get(key) is None else f"{kernel[key]:.1f}"


def of_decode(result, _):
    limits, decode = result["limits"], result["decode"]
    graph_s = result["profile"]["graph_us"] / 1e6
    of_graph = decode["bytes_per_token"] / graph_s / 1e9 / limits["read_gb_per_s"]
    launches = result["profile"]["launches"]
    return [
        ("reads of the GPU's memory", f"{limits['read_gb_per_s']:.0f} GB/s", ""),
        ("copy on the GPU, read and written", f"{limits['copy_gb_per_s']:.0f} GB/s", ""),
        (f"decode, context {CONTEXT}, one GPU", *speed(decode)),
        (
            f"  its graph alone, {launches} launches",
            f"{1e3 * graph_s:.2f} ms",
            f"{of_graph:.1%} of the reads",
        ),
    ]


def speed(decode):
    """Return tokens/s, and the share of the memory's read bandwidth in use."""
    share = decode["share_of_reads"]["median"]
    return f"{decode['tokens_per_s']['median']:.1f} tokens/s", f"{share:.1%} of the reads"


def of_prefill(result, _):
    prefill, rate = result["prefill"], result["limits"]["matrix_gflop_per_s"]
    share = f"{prefill['share_of_matrix_rate']['median']:.1%} of the matrix rate"
    rows = [("cuBLAS, 16 bits, the prompt's shapes", f"{rate / 1e3:.0f} TFLOP/s", "")]
    tokens = f"{prefill['tokens_per_s']['median']:.0f} tokens/s"
    return [*rows, (f"prompt of {prefill['prompt_tokens']} tokens, one GPU", tokens, share)]


def of_share(result, _):
    """Return one rank's speed, and an estimate that adds the published time of all-reduces."""
    reductions, own_s = 2 * result["layers"] + 1, 1 / result["decode"]["tokens_per_s"]["median"]
    least, most = (1 / (own_s + reductions * us / 1e6) for us in reversed(PUBLISHED_US))
    published = f"{PUBLISHED_US[0]} to {PUBLISHED_US[1]} us published for each"
    return [
        ("decode, rank 0 of TP=4 alone", *speed(result["decode"])),
        (f"  with {reductions} all-reduces, not run here", f"{least:.0f} to {most:.0f} tokens/s", published),
    ]


def of_few(result, _):
    decode = result["decode"]
    return [(f"  {decode['new_tokens']} tokens of each of {result['rounds']} calls", *speed(decode))]


def of_requests(result, _):
    found = result["requests"]
    sizes = f"{found['count']} requests of {found['prompt_tokens']} + {found['new_tokens']} tokens at once"
    rate, share = found["together_tokens_per_s"], found["share_of_limit"]
    return [(sizes, f"{rate:.0f} tokens/s", f"{share:.0%} of their batches' limit")]


def of_batches(result, _):
    points = result["sweep"]["points"]
    times = ", ".join(f"{one['batch']}: {1e3 * one['step_s']:.2f}" for one in points)
    return [("ms per decode pass, by sequences", times, "")]


def of_loading(result, _):
    found = result["loading"]
    share = found["gb_per_s"] / found["file_gb_per_s"]
    return [("loading from a file", f"{found['gb_per_s']:.1f} GB/s", f"{share:.0%} of reading that file")]


def of_transformers(result, found):
    rows = []
    for name in ("decode", "prefill"):
        theirs = result[f"{name}_tokens_per_s"]
        comparison = ""
        if name in found:
            times = found[name][name]["tokens_per_s"]["median"] / theirs
            comparison = f"minitp is {times:.2f} times as fast"
        compiled = "static cache, torch.compile" if name == "decode" else "eager"
        rows.append((f"transformers {name}, {compiled}", f"{theirs:.1f} tokens/s", comparison))
    return rows


# For each task, a function that makes its rows from its result and from the results of all tasks.
FIGURES = {
    "decode": of_decode,
    "prefill": of_prefill,
    "rank 0 of 4, decode": of_share,
    "16 tokens": of_few,
    "16 requests": of_requests,
    "batches": of_batches,
    "loading": of_loading,
    "transformers": of_transformers,
}


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python benchmarks/gpu/table.py FILE, one of benchmarks/results")
    try:
        saved = json.loads(Path(sys.argv[1]).read_text())
        lines = table(saved, saved["steps"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"{sys.argv[1]}: not a file of results: {one_line(error)}")
    print("\n".join(lines))
