"""The agreement of the tensors of a block: an attention block, a dense MLP, or one expert.

Each function yields (tensor, text): a tensor that does not agree with those before it, and in what way. The
tensors are given as a dict from the checkpoint's name of a part to the ShardedTensor that holds it.
"""

import numpy as np

from minitp.compare.heads import interleaved
from minitp.lint.layout import QUERY_OR_KEY
from minitp.lint.pieces import piece_numbers
from minitp.lint.words import numbers_text, ranks_text, short_name
from minitp.mapping.table import INTERLEAVED, PLAIN


class Block:
    """The tensors of one block, some of which may be missing.

    Parameters
    ----------
    tensors : dict of str to ShardedTensor
    pieces : CheckpointPieces
    config : Config
    """

    def __init__(self, tensors, pieces, config):
        self.tensors, self.pieces, self.config = tensors, pieces, config
        self.weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}

    def numbers(self, name):
        """Return the numbers of the pieces that each rank holds of a part, [n]; none without it.

        Padding in a tensor of one part, and in the halves of one of two, is -1.
        """
        tensor, found = self.tensors[name], []
        parts = tensor.layout.parts
        for held in tensor.held:
            codes = np.array([], np.int64) if held is None else held.codes
            if len(parts) == 2 and tensor.layout.order == PLAIN:
                half = np.split(codes, [len(codes) // 2])[parts.index(name)]
                codes = half if self.pieces.names_in(half) == [name] else codes
            if len(parts) > 1 and self.pieces.names_in(codes) != [name]:
                found.append(self.pieces.pieces_of(name, codes))
            else:
                found.append(np.where(codes >= 0, piece_numbers(codes), -1))
        return found

    def broken_heads(self):
        """Yield a fault for each tensor in which a rank has parts of heads, or heads in another order."""
        for name, tensor in self.weights.items():
            text = self._broken_head(name)
            if text:
                yield tensor, text

    def _broken_head(self, name):
        """Return what is wrong with the heads of a tensor on the first rank where they are wrong, or ""."""
        d, word = self.config.head_dim, f"{self.pieces.word(name)}s"
        order = np.arange(d)
        if QUERY_OR_KEY.search(name) and self.tensors[name].layout.rope == INTERLEAVED:
            order = interleaved(order, self.config.rotary_dim)
        for rank, numbers in enumerate(self.numbers(name)):
            real = numbers[numbers >= 0]
            if len(real) % d:
                return f"cut inside a head: rank {rank} has {len(real)} {word}, and a head has {d}"
            blocks = real.reshape(-1, d)
            for block, first in zip(blocks, blocks.min(axis=1, initial=2**31) // d * d, strict=True):
                if (block // d != first // d).any():
                    return (
                        f"cut inside a head: rank {rank} has {word} {numbers_text(block)} in place of a head"
                    )
                if not np.array_equal(block - first, order):
                    return f"rank {rank} has the {word} of head {first // d} in another order"
        return ""

    def heads(self, letter):
        """Return the heads of q, k, v or o that each rank holds, in order; None if the tensor is missing."""
        name = next((name for name in self.weights if name.endswith(f".{letter}_proj.weight")), None)
        if name is None:
            return None
        real = [numbers[numbers >= 0] for numbers in self.numbers(name)]
        return [(numbers[:: self.config.head_dim] // self.config.head_dim).tolist() for numbers in real]

    def attention_faults(self):
        """Yield the disagreements of an attention block, whose tensors have whole heads."""
        owner = {name.split(".")[-2][0]: tensor for name, tensor in self.weights.items()}
        q, k, v, o = (self.heads(letter) for letter in "qkvo")
        if q is not None:
            for text in coverage(q, self.config.num_attention_heads, "query head"):
                yield owner["q"], text
            for letter, kv in (("k", k), ("v", v)):
                if kv is not None and (text := self._unpaired(q, kv)):
                    yield owner[letter], text
        for letter, first, one, other in (("v", "k", k, v), ("o", "q", q, o)):
            if one is not None and other is not None and one != other:
                rank = next(rank for rank in range(len(one)) if one[rank] != other[rank])
                has = f"rank {rank} has heads {numbers_text(other[rank])}"
                yield owner[letter], f"{has}, but {first}_proj has {numbers_text(one[rank])}"

    def _unpaired(self, q, kv):
        """Return a text about the first rank whose query heads do not find their KV heads, or ""."""
        count = self.config.num_key_value_heads
        per_kv_head = self.config.num_attention_heads // count
        whole = all(sorted(held) == list(range(count)) for held in kv)
        for rank, (queries, held) in enumerate(zip(q, kv, strict=True)):
            needed = [head // per_kv_head for head in queries]
            size = len(needed) // max(1, len(held))  # query heads that read each KV head, if they are even
            paired = held == list(dict.fromkeys(needed)) or needed == [
                head for head in held for _ in range(size)
            ]
            if not paired and not (whole and held == sorted(held)):
                read = numbers_text(list(dict.fromkeys(needed)))
                queries = f"query heads {numbers_text(queries)}"
                return f"rank {rank} has KV heads {numbers_text(held)}, but its {queries} read {read}"
        return ""

    def mlp_faults(self):
        """Yield the disagreements of the matrices of an MLP, or of an expert."""
        names = list(self.weights)
        held = {name: self.numbers(name) for name in names}
        for name in names[1:]:
            for rank, (one, other) in enumerate(zip(held[names[0]], held[name], strict=True)):
                if not same(one, other):
                    has = f"rank {rank} has {self.pieces.word(name)}s {real_text(other)}"
                    first = f"{short_name(names[0], name)} has {self.pieces.word(names[0])}s {real_text(one)}"
                    yield self.weights[name], f"{has}, but {first}"
                    break
        for name in names[:1]:
            real = [numbers[numbers >= 0].tolist() for numbers in held[name]]
            for text in coverage(real, self.pieces.count(name), self.pieces.word(name)):
                yield self.weights[name], text

    def bias_faults(self):
        """Yield each bias whose elements are not those of its weight's rows."""
        for name, tensor in self.tensors.items():
            weight = f"{name.removesuffix('bias')}weight"
            if not name.endswith(".bias") or weight not in self.weights:
                continue
            values = self.pieces.hashes(name, 0, np.float32)
            for rank, (rows, elements) in enumerate(
                zip(self.numbers(weight), self.numbers(name), strict=True)
            ):
                equal = len(rows) == len(elements) and np.array_equal(values[rows], values[elements])
                if not equal and not same(rows, elements):
                    has = f"rank {rank} has elements {real_text(elements)}"
                    yield tensor, f"{has}, but its weight has rows {real_text(rows)}"
                    break


def coverage(lists, total, noun):
    """Yield a text if some of `total` pieces are on no rank, or on several; all on every rank is right."""
    if all(sorted(held) == list(range(total)) for held in lists):
        return
    counts = np.bincount(np.concatenate([np.array(held, int) for held in lists]), minlength=total)
    missing, twice = np.flatnonzero(counts == 0), np.flatnonzero(counts > 1)
    if len(missing):
        is_end = (np.diff(missing) == 1).all() and missing[-1] == total - 1
        text = f"{noun}s {numbers_text(missing)} are on no rank"
        yield f"{text}: is the file of a last rank missing?" if is_end else text
    if len(twice):
        ranks = [rank for rank, held in enumerate(lists) if twice[0] in held]
        yield f"{noun}s {numbers_text(twice)} are more than once on {ranks_text(ranks)}"


def same(one, other):
    """Return whether two ranks' pieces are the same, apart from padding at the end."""

    def trimmed(numbers):
        real = np.flatnonzero(numbers >= 0)
        return numbers[: real[-1] + 1] if len(real) else numbers[:0]

    return np.array_equal(trimmed(one), trimmed(other))


def real_text(numbers):
    """Return the pieces that are not padding as text."""
    return numbers_text(numbers[numbers >= 0])
