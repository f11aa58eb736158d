"""The reasons why a step may have other bits in another run, from the shapes of the two runs."""

from minitp.trace.names import AFTER, INTEGERS
from minitp.util.format import counted

PRODUCTS = ("attn.q", "attn.k", "attn.v", "attn.out_partial", "attn.out")
PRODUCTS += ("mlp.router", "mlp.gate", "mlp.up", "mlp.out_partial", "mlp.out")
PRODUCTS += ("logits_partial", "logits")
SUMS_OF_RANKS = ("embed", "attn.out", "mlp.out")
OVER_KEYS = ("attn.probs", "attn.context")
OTHER_KERNEL = "the library may choose another kernel for that shape, which adds in another order"
RACE = "the same run differs from itself: a race, or a kernel that adds in no fixed order, as with atomics"


def reason(change, a_tp, b_tp, repeated=False):
    """Return the likely reason of a Change, as text.

    Parameters
    ----------
    change : Change
    a_tp, b_tp : int or None
        The numbers of ranks of the two runs, if known.
    repeated : bool
        Whether the second run is the first one again.
    """
    step = change.step
    if repeated:
        return RACE
    if change.b_pass is None:
        return "an array that is not a step of minitp, so its inputs are unknown"
    if step in INTEGERS:
        return "the runs have other tokens or positions"
    if change.copies and not change.is_rounding:
        return "a copy of equal inputs: a race, memory that was overwritten, or a wrong index"
    if a_tp != b_tp and None not in (a_tp, b_tp):
        return _reason_of_ranks(step, a_tp, b_tp)
    a_rows, b_rows = change.a_pass.rows, change.b_pass.rows
    if step in AFTER:  # only some rows have logits
        pairs = ((change.a_pass, change.a_shape), (change.b_pass, change.b_shape))
        a_rows, b_rows = (shape[0] * one.rows // one.width for one, shape in pairs)
    a_keys, b_keys = (one.before + one.stop + one.after for one in (change.a_pass, change.b_pass))
    if step == "attn.scores" and (a_rows, a_keys) != (b_rows, b_keys):
        return (
            f"a product of {counted(b_rows, 'row')} and {counted(b_keys, 'key')}, not of {a_rows} and "
            f"{a_keys}: {OTHER_KERNEL}"
        )
    if step in OVER_KEYS and a_keys != b_keys:
        return (
            f"a sum over {counted(b_keys, 'key')}, not {a_keys}: masked keys only add zeros, but the "
            "terms are grouped in another way"
        )
    if a_rows == b_rows:
        return (
            "the shapes are the same: a race or a kernel that adds in no fixed order, if both are recordings "
            "of the same run; otherwise another kernel, setting or device"
        )
    if step == "mlp.experts":
        return f"products of each expert's share of {counted(b_rows, 'row')}, not of {a_rows}: {OTHER_KERNEL}"
    if step in PRODUCTS or step in OVER_KEYS:
        return f"a product of {counted(b_rows, 'row')}, not {a_rows}: {OTHER_KERNEL}"
    return (
        f"{counted(b_rows, 'row')}, not {a_rows}: each row is computed by itself, so the kernel treats a row "
        "differently by its place or by the number of rows"
    )


def reason_of_shares(a_split, b_split):
    """Return the reason of a change between runs in which as many ranks have other shares."""
    return f"the ranks have shares {b_split}, not {a_split}, and products of other shapes: {OTHER_KERNEL}"


def _reason_of_ranks(step, a_tp, b_tp):
    if step in SUMS_OF_RANKS:
        return (
            f"the sum over the ranks: {counted(b_tp, 'term')}, not {a_tp}, each of which is rounded before "
            "they are added"
        )
    if step in PRODUCTS:
        return (
            f"a rank multiplies by {_share(b_tp, 'the weight')}, not {_share(a_tp, 'it')}, and may have "
            f"another number of threads: {OTHER_KERNEL}"
        )
    parts = _share(b_tp, "the heads or columns"), _share(a_tp, "them")
    return f"a rank has {parts[0]}, not {parts[1]}: {OTHER_KERNEL}"


def _share(tp, what):
    """Return the part of something that each of `tp` ranks has, as text."""
    return f"all of {what}" if tp == 1 else f"one of {tp} parts of {what}"
