"""The shares of --split: how the heads, FFN columns and vocabulary rows are divided among the ranks."""

import math
import re
from fractions import Fraction
from itertools import pairwise

from minitp.errors import InputError, shown
from minitp.util.format import counted

MEASURED = ("auto", "memory")  # values of --split that the devices decide
NUMBER = re.compile(r"([0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})(e[+-]?[0-9]{1,2})?", re.IGNORECASE)
WEIGHTS_SHARE = 0.8  # the weights' share of a memory with --split auto; cache and activations need the rest


def shares_in(split):
    """Return the shares in a value of --split as exact fractions; None for no value, "auto" or "memory".

    >>> [str(share) for share in shares_in("0.75,.25")]
    ['3/4', '1/4']

    Raises
    ------
    InputError
        If a share is not a positive number.
    """
    if split is None or split in MEASURED:
        return None
    parts = [part.strip() for part in split.split(",")]
    for rank, part in enumerate(parts):
        if not NUMBER.fullmatch(part) or not Fraction(part):
            raise InputError(
                f"--split {shown(split)}: the share of rank {rank} is {shown(part)}, expected a positive "
                f"number; give a share for each rank, as in 3,1 or 0.6,0.4, or {' or '.join(MEASURED)}"
            )
    return [Fraction(part) for part in parts]


def shares_of_files(split, ranks):
    """Return the shares in a value of --split, or None; raise InputError unless `ranks` ranks have them."""
    shares = shares_in(split)
    if shares is not None and len(shares) != ranks:
        given, found = counted(len(shares), "share"), counted(ranks, "rank")
        raise InputError(f"--split {shown(split)} has {given}, but there are files of {found}")
    return shares


def numbers_only(split, why):
    """Refuse a value of --split that the devices decide, with the reason; return any other value."""
    if split in MEASURED:
        raise InputError(
            f"--split {split} {why}; give numbers, as `minitp generate --split {split} -v` prints them"
        )
    return split


def other_shares(split, other):
    """Return whether two values of --split are known and give the ranks other shares.

    >>> other_shares("3,1", "1.5,.5"), other_shares("3,1", "1,1"), other_shares("3,1", None)
    (False, True, False)
    """
    if None in (split, other):
        return False
    first, second = ([share / sum(shares) for share in shares] for shares in map(shares_in, (split, other)))
    return first != second


def split_text(split):
    """Return a value of --split as text, given as text or as numbers; raise InputError if it is invalid.

    >>> split_text((3, 1))
    '3,1'
    """
    try:
        text = split if isinstance(split, str) else ",".join(map(str, split))
    except TypeError:
        raise InputError(
            f"--split {shown(split)}: expected a share for each rank, as in 3,1 or (0.6, 0.4)"
        ) from None
    shares_in(text)
    return text


def split_evenly(n, parts):
    """Split range(n) into `parts` ranges as evenly as possible; the first n % parts ranges are longer by one.

    >>> split_evenly(9, 4)
    ((0, 3), (3, 5), (5, 7), (7, 9))
    """
    return split_in_proportion(n, [1] * parts)


def split_in_proportion(n, shares):
    """Split range(n) into ranges of about n * share / sum(shares) numbers, by the largest remainder.

    Each range first gets its exact size, rounded down. The numbers that are left go one each to the ranges
    with the largest fractions, of equal ones to the first. If there are enough numbers, no range is empty:
    those that would have less than one get one, and the others divide the rest.

    >>> split_in_proportion(9, [3, 1]), split_in_proportion(9, [100, 1])
    (((0, 7), (7, 9)), ((0, 8), (8, 9)))
    """
    least = int(n >= len(shares))
    sizes, others = [least] * len(shares), set(range(len(shares)))
    while True:
        rest = n - least * (len(shares) - len(others))
        total = sum(shares[rank] for rank in others)
        exact = {rank: Fraction(rest * shares[rank]) / total for rank in others}
        if all(size >= least for size in exact.values()):
            break
        others = {rank for rank in others if exact[rank] >= least}
    for rank, size in exact.items():
        sizes[rank] = math.floor(size)
    largest_first = sorted(others, key=lambda rank: (sizes[rank] - exact[rank], rank))
    for rank in largest_first[: n - sum(sizes)]:
        sizes[rank] += 1
    edges = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    return tuple(pairwise(edges))


def shares_by_speed(rates, rooms, nbytes):
    """Return the value of --split for ranks that read memory at `rates`, limited by their memory.

    A rank's share is proportional to its rate. If the weights of that share do not fit, the rank gets as many
    as fit, and the others divide the rest in proportion to their rates.

    Parameters
    ----------
    rates : list of float
        The bytes per second that each rank reads.
    rooms : list of float
        The bytes of memory that each rank has.
    nbytes : int
        The bytes of all weights.

    >>> shares_by_speed([33e9, 10e9], [90e9, 90e9], 10e9), shares_by_speed([3e9, 1e9], [5e9, 90e9], 10e9)
    ('3.3,1', '0.4,0.6')
    """
    most = [WEIGHTS_SHARE * room / nbytes for room in rooms]
    full = set()
    while True:
        total = sum(rate for rank, rate in enumerate(rates) if rank not in full)
        rest = 1 - sum(most[rank] for rank in full)
        shares = [most[rank] if rank in full else rest * rate / total for rank, rate in enumerate(rates)]
        too_large = {rank for rank, share in enumerate(shares) if share > most[rank]} - full
        if not too_large:
            return ",".join(f"{share:.3g}" for share in shares) if full else in_tenths(rates)
        full |= too_large
        if len(full) == len(rates):
            return in_tenths(rooms)  # the weights do not fit, or only in more than WEIGHTS_SHARE


def in_tenths(numbers):
    """Return a value of --split in proportion to `numbers`: multiples of the smallest, in steps of 0.1.

    Measured rates vary by some percent; the steps give equal devices equal shares.

    >>> in_tenths([3.21, 1.0, 1.02])
    '3.2,1,1'
    """
    return ",".join(f"{number / min(numbers):.1f}".removesuffix(".0") for number in numbers)
