"""A plot of a sweep: medians with their range over the rounds, and the limits."""

import math
import textwrap

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import FuncFormatter, NullLocator

from minitp.util import this_run
from minitp.util.format import counted

# Colors and fonts of the reports (report/style.css).
INK, SOFT, LINE, PAGE, MEASURED = "#1b2026", "#5a636d", "#dfe2e1", "#fdfdfc", "#3b74b8"
FONTS = ("Helvetica Neue", "Segoe UI", "Roboto", "Liberation Sans", "Arial", "DejaVu Sans")
LABEL_PIXELS = 16  # height of a label at matplotlib's 100 pixels per inch
STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",  # keeps text as text instead of outlines
    **dict.fromkeys(("text.color", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), SOFT),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), LINE),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAGE),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
}


def plot(result, path):
    """Draw result["sweep"] into a PNG or SVG file; two panels over the context or the batch."""
    over, points = result["sweep"]["over"], result["sweep"]["points"]
    xs = [point[over] for point in points]
    with matplotlib.rc_context(STYLE | {"font.family": installed(FONTS)}):
        figure = Figure(figsize=(10, 4.9))
        figure.subplots_adjust(left=0.06, right=0.92, top=0.79, bottom=0.24, wspace=0.34)
        left, right = figure.subplots(1, 2)
        ends = draw(left, xs, points, "tokens_per_s", "limit_tokens_per_s")
        left.set_ylim(bottom=0)
        label(left, ends)
        if over == "context":
            title(left, "Decoding", "tokens/s")
            ends = draw(right, xs, points, "ttft_s", "limit_ttft_s")
            title(right, "Time to the first token", "seconds, logarithmic")
            logarithmic(right)
        else:
            title(left, "Decoding, all sequences together", "tokens/s")
            ends = draw(right, xs, points, "step_s", scale=1000)
            title(right, "One token of each sequence", "milliseconds")
            right.set_ylim(bottom=0)
        label(right, ends)
        for axes in (left, right):
            axes.set_xlabel("context in tokens" if over == "context" else "sequences")
            axes.set_xscale("log", base=2)
            axes.set_xticks(xs, [f"{x:,}".replace(",", "\N{NARROW NO-BREAK SPACE}") for x in xs])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        head = f"{result['model']} on {counted(result['tp'], 'rank')}, {result['dtype']}"
        figure.text(0.06, 0.94, head, fontsize=15, fontweight="bold")
        figure.text(0.06, 0.025, footer(result), fontsize=8, color=SOFT, linespacing=1.5)
        figure.savefig(path, dpi=150)


def installed(fonts):
    """Return the fonts that matplotlib finds, because it would warn about each missing one."""
    found = set(get_font_names())
    return [font for font in fonts if font in found] or ["sans-serif"]


def draw(axes, xs, points, measured, limit=None, scale=1):
    """Draw a quantity with its range and its limit; return the ends of the lines as (x, y, text, color)."""
    middle = [scale * point[measured] for point in points]
    if all(f"{measured}_range" in point for point in points):
        low, high = zip(*(point[f"{measured}_range"] for point in points), strict=True)
        low, high = ([scale * y for y in ys] for ys in (low, high))
        axes.fill_between(xs, low, high, color=MEASURED, alpha=0.2, linewidth=0)
    axes.plot(xs, middle, color=MEASURED, linewidth=2, marker="o", markersize=5)
    ends = [(xs[-1], middle[-1], "minitp", MEASURED)]
    if limit is not None:
        bound = [scale * point[limit] for point in points]
        axes.plot(xs, bound, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        ends.append((xs[-1], bound[-1], "limit", SOFT))
    return ends


def label(axes, ends):
    """Write each line's name next to its end; the names of ends that lie close together move apart."""
    ends = sorted(ends, key=lambda end: end[1])
    heights = [axes.transData.transform(end[:2])[1] for end in ends]
    apart = len(ends) < 2 or heights[1] - heights[0] > LABEL_PIXELS
    for side, (x, y, text, color) in zip(("top", "bottom"), ends, strict=False):
        options = dict(textcoords="offset points", va="center" if apart else side, color=color)
        axes.annotate(text, (x, y), (8, 0), annotation_clip=False, **options)


def title(axes, text, unit):
    """Write a panel's title and, below it, the unit of its y axis."""
    axes.set_title(text, loc="left", fontweight="bold", fontsize=11, pad=22)
    axes.text(0, 1.03, unit, transform=axes.transAxes, color=SOFT, fontsize=9)


def logarithmic(axes):
    """Give the y axis a log scale whose labels are plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def footer(result):
    """Return what the lines mean, the machine, the date, minitp's version and the command."""
    facts = dict(this_run.facts("bench", split=result.get("split")))
    cores = f", {counted(result['cores'], 'core')}" if "cores" in result else ""
    run = f"{result['machine']}{cores} · {result.get('date', facts['date'])} · minitp {facts['minitp']}"
    command = textwrap.shorten(facts.get("command", ""), 150, placeholder=" ..")
    legend = "Dots are medians over the rounds; the band is their range."
    return "\n".join(filter(None, [legend, run, command]))
