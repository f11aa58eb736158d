"""A sweep as a picture: measured values beside the limits."""

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter


def plot(result, path):
    """Draw result["sweep"] into a PNG or SVG file; two panels over the context or the batch."""
    over, points = result["sweep"]["over"], result["sweep"]["points"]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    xs = [point[over] for point in points]
    draw(left, xs, points, "tokens_per_s", "limit_tokens_per_s")
    left.set_title("decode" if over == "context" else "decode, all sequences together")
    left.set_ylabel("tokens/s")
    if over == "context":
        draw(right, xs, points, "ttft_s", "limit_ttft_s")
        right.set_title("time to the first token")
        right.set_ylabel("seconds")
    else:
        right.plot(xs, [1000 * point["step_s"] for point in points], marker="o", label="minitp")
        right.set_title("a step: one token of each sequence")
        right.set_ylabel("milliseconds")
        right.legend()
    for axes in (left, right):
        axes.set_xlabel("context, tokens" if over == "context" else "sequences")
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{result['model']}, {result['dtype']}, TP={result['tp']}, {result['machine']}")
    figure.savefig(path, dpi=150)


def draw(axes, xs, points, measured, limit):
    """One quantity and its limit."""
    axes.plot(xs, [point[measured] for point in points], marker="o", label="minitp")
    axes.plot(xs, [point[limit] for point in points], linestyle="--", color="gray", label="limit")
    axes.legend()
