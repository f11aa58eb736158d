"""The pieces that each rank is expected to hold of a tensor: contiguous ranges, in rank order.

An engine may hold other pieces, as long as all tensors of a block agree; `judgement` decides that. The
expected ranges follow from the shapes of the shards, because an engine may pad the vocabulary or split
unevenly.
"""

import re

import numpy as np

from minitp.compare.heads import interleaved
from minitp.errors import InputError
from minitp.lint.pieces import PADDING, SHIFT, piece_numbers
from minitp.mapping.table import GROUPED, INTERLEAVED
from minitp.shard import make_plan

QUERY_OR_KEY = re.compile(r"self_attn\.[qk]_proj\.(weight|bias)$")
KEY_OR_VALUE = re.compile(r"self_attn\.[kv]_proj\.(weight|bias)$")
ALTERNATING = "row by row"  # an order of joined tensors that no engine has
VOCABULARY = re.compile(r"(^|\.)(embed_tokens|lm_head)\.weight$")


class Expectation:
    """The codes that each rank is expected to hold, for a model and a number of ranks.

    Attributes
    ----------
    pieces : CheckpointPieces
    config : Config
    plan : Plan or None
        minitp's own plan for that many ranks and for their shares; None if there are more ranks than heads.
    """

    def __init__(self, config, tp, pieces, shares=None):
        self.config, self.tp, self.pieces = config, tp, pieces
        try:
            self.plan = make_plan(config, tp, shares)
        except InputError:
            self.plan = None

    def codes(self, layout, sizes):
        """Return the expected codes of each rank, or None for a rank without expectation.

        Parameters
        ----------
        layout : EngineTensor
        sizes : list of int or None
            The number of pieces that each rank holds; None if the rank does not have the tensor.
        """
        totals = [self.pieces.count(part) for part in layout.parts]
        held = [size for size in sizes if size is not None]
        if not self.pieces.is_split(layout.parts[0]) or all(size == sum(totals) for size in held):
            whole = self.joined(layout, [range(total) for total in totals])
            return [None if size is None else whole for size in sizes]
        if len(layout.parts) == 1:
            ranges = self._ranges(layout.parts[0], totals[0], sizes)
            parts = [None if held is None else [held] for held in ranges]
        else:
            parts = self._joined_ranges(layout, totals, sizes)
        return [None if part is None else self.joined(layout, part) for part in parts]

    def _ranges(self, name, total, sizes):
        """Return the range of each rank's pieces of one tensor; it may go beyond the tensor's end."""
        kv = KEY_OR_VALUE.search(name)
        if kv and self.plan is not None and sum(size or 0 for size in sizes) != total:
            d = self.config.head_dim
            ranges = [range(start * d, stop * d) for start, stop in self.plan.kv_head_ranges]
            fits = [len(held) for held in ranges] == sizes
            return ranges if fits else [None] * len(sizes)
        ranges, start = [], 0
        for size in sizes:
            ranges.append(None if size is None else range(start, start + size))
            start += size or 0
        return ranges

    def _joined_ranges(self, layout, totals, sizes):
        """Return the ranges of each rank's pieces of the parts of a joined tensor."""
        if len(layout.parts) == 2:
            halves = self._ranges(layout.parts[0], totals[0], [size and size // 2 for size in sizes])
            even = all(size is None or size % 2 == 0 for size in sizes)
            return [[half, half] if half is not None and even else None for half in halves]
        if self.plan is None:
            return [None] * self.tp
        d, parts = self.config.head_dim, []
        for rank, size in enumerate(sizes):
            heads, kv_heads = self.plan.head_ranges[rank], self.plan.kv_head_ranges[rank]
            ranges = [range(n[0] * d, n[1] * d) for n in (heads, kv_heads, kv_heads)]
            parts.append(ranges if size == sum(map(len, ranges)) else None)
        return parts

    def joined(self, layout, ranges):
        """Return the codes of ranges of the parts, in the order of the layout."""
        codes = []
        for part, numbers in zip(layout.parts, ranges, strict=True):
            numbers = np.asarray(numbers, np.int64)
            inside = numbers < self.pieces.count(part)
            held = np.where(inside, self.pieces.codes(part, numbers), PADDING)
            codes.append(self.rotated(part, held, layout.rope))
        if layout.order == GROUPED and len(codes) == 3:
            return self.grouped(*codes)
        return np.concatenate(codes)

    def arranged(self, codes, layout):
        """Return a rank's codes of a joined tensor, without padding, in the order of a layout."""
        index = [self.pieces.codes(part, 0) >> SHIFT for part in layout.parts]
        parts = [codes[(codes >= 0) & (codes >> SHIFT == i)] for i in index]
        if layout.order == ALTERNATING:
            equal = len(set(map(len, parts))) == 1
            return np.stack(parts, axis=1).ravel() if equal else codes[:0]
        if layout.order == GROUPED and len(parts) == 3:
            return self.grouped(*parts)
        return np.concatenate(parts)

    def rotated(self, part, codes, rope):
        """Return codes in the order that an engine's RoPE needs within each query and key head."""
        d = self.config.head_dim
        if rope != INTERLEAVED or not QUERY_OR_KEY.search(part) or len(codes) % d:
            return codes
        return interleaved(codes.reshape(-1, d), self.config.rotary_dim).ravel()

    def grouped(self, q, k, v):
        """Return the codes of heads in the order GROUPED: each KV head after its query heads."""
        d = self.config.head_dim
        if len(q) % d or len(k) % d or len(k) != len(v):
            return np.concatenate((q, k, v))
        q, k, v = (part.reshape(-1, d) for part in (q, k, v))
        query_kv = np.array([self.kv_head(head) for head in q])
        blocks = []
        for key, value in zip(k, v, strict=True):
            blocks += [*q[query_kv == self.head(key)], key, value]
        rest = ~np.isin(query_kv, [self.head(key) for key in k])
        return np.concatenate([*blocks, *q[rest]])

    def head(self, codes):
        """Return the number of the head that a block of codes begins in."""
        return int(piece_numbers(codes).min()) // self.config.head_dim

    def kv_head(self, codes):
        """Return the number of the KV head that a block of query codes reads."""
        return self.head(codes) // (self.config.num_attention_heads // self.config.num_key_value_heads)
