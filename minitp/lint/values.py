"""The difference between the values of a shard's pieces and those that the checkpoint has in their place."""

import ml_dtypes
import numpy as np

from minitp.util.format import counted

ROUNDED = {  # dtypes through which weights may have been rounded
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8 (e4m3)": ml_dtypes.float8_e4m3fn,
    "float8 (e5m2)": ml_dtypes.float8_e5m2,
}
DIFFERENT = "has values that differ from the expected ones"
SIMILAR = 0.5  # the relative difference up to which two arrays are taken for the same weights


def exact_change(found, right):
    """Return the change that turns the right values into those of a shard; "" if none does.

    Parameters
    ----------
    found : array, [n, width]
    right : array, [n, width]
        The checkpoint's values in float64.
    """
    finite = np.isfinite(found)
    if not finite.all():
        return f"has {counted(int((~finite).sum()), 'value')} not finite"
    with np.errstate(all="ignore"):
        factor = _factor(found, right)
        changes = [
            *((f"was rounded through {name}", rounding(kind), 0) for name, kind in ROUNDED.items()),
            ("has the expected values plus 1", lambda x: x + 1, 0),
            ("has the expected values minus 1", lambda x: x - 1, 0),
            (f"has the expected values times {factor:.6g}", lambda x: x * factor, 4),
        ]
        for text, change, room in changes if factor else changes[:-1]:
            if all(_equal(found[rows], change(right[rows]), room) for rows in (slice(0, 1), slice(1, None))):
                return text
    return ""


def rounding(kind):
    """Return a function that rounds an array to a dtype."""
    return lambda x: x.astype(kind)


def _equal(found, expected, room):
    """Return whether two arrays differ by at most `room` roundings in the dtype of the first."""
    if room == 0:
        return np.array_equal(expected.astype(found.dtype), found)
    eps = float(ml_dtypes.finfo(found.dtype).eps)
    difference = np.abs(found.astype(np.float64) - expected)
    return difference.max(initial=0.0) <= room * eps * np.abs(expected).max(initial=0.0)


def _factor(found, right):
    """Return the factor of a scaled first row; 0 if it is too close to 0 or 1 to be one."""
    x, y = found[0].astype(np.float64), right[0]
    factor = float(np.vdot(y, x) / max(np.vdot(y, y), 1e-300))
    return factor if abs(factor) > 1e-6 and abs(factor - 1) > 1e-3 else 0.0


def similar_values(found, right):
    """Return how far the values of a shard are from the right ones; "" if the two are unrelated."""
    difference = found.astype(np.float64) - right
    if np.linalg.norm(difference) > SIMILAR * np.linalg.norm(right):
        return ""
    return f"{DIFFERENT} by up to {np.abs(difference).max():.2g}"
