"""The agreement of the tensors of a block: an attention block, a dense MLP, or one expert.

Each function yields (tensor, text): a tensor that does not agree with those before it, and in what way. The
tensors are given as a dict from the checkpoint's name of a part to the ShardedTensor that holds it.
"""

import numpy as np

from minitp.compare.heads import interleaved
from minitp.lint.layout import QUERY_OR_KEY
from minitp.lint.pieces import PADDING, piece_numbers
from minitp.lint.words import heads_text, numbers_text, ranks_text, short_name
from minitp.mapping.table import INTERLEAVED, PLAIN
from minitp.util.format import counted


class Block:
    """The tensors of one block, some of which may be missing.

    Parameters
    ----------
    tensors : dict of str to ShardedTensor
    pieces : CheckpointPieces
    config : Config
    plan : Plan or None
        minitp's own plan.
    """

    def __init__(self, tensors, pieces, config, plan):
        self.tensors, self.pieces, self.config, self.plan = tensors, pieces, config, plan
        self.weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}

    def numbers(self, name):
        """Return the numbers of the pieces that each rank holds of a part, [n]; none without it.

        Padding is -1, except in joined q, k and v where it does not fill whole heads.
        """
        tensor, found = self.tensors[name], []
        parts = tensor.layout.parts
        for held in tensor.held:
            codes = np.array([], np.int64) if held is None else held.codes
            if len(parts) == 2 and tensor.layout.order == PLAIN:
                half = np.split(codes, [len(codes) // 2])[parts.index(name)]
                codes = half if self.pieces.names_in(half) in ([], [name]) else codes
            if len(parts) == 3:
                codes = self._part_of_joined(name, codes, tensor.layout)
            if len(parts) > 1 and self.pieces.names_in(codes) not in ([], [name]):
                found.append(self.pieces.pieces_of(name, codes))
            else:
                found.append(np.where(codes >= 0, piece_numbers(codes), -1))
        return found

    def _part_of_joined(self, name, codes, layout):
        """Return the codes of one of joined q, k, v, with its padding; all codes if that cannot be told."""
        n = len(codes) // self.config.head_dim
        heads = codes[: n * self.config.head_dim].reshape(n, -1)
        for kv_heads in range(1, n // 2 + 1) if (codes < 0).any() and len(codes) == heads.size else ():
            if layout.order == PLAIN:
                parts = np.split(heads, [n - 2 * kv_heads, n - kv_heads])
            elif n % kv_heads:
                continue
            else:
                groups = heads.reshape(kv_heads, n // kv_heads, -1)
                parts = groups[:, :-2], groups[:, -2], groups[:, -1]
            if all(
                self.pieces.names_in(part.ravel()) in ([], [own])
                for own, part in zip(layout.parts, parts, strict=True)
            ):
                return parts[layout.parts.index(name)].ravel()
        return codes

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
            if len(numbers) % d:
                return f"cut inside a head: rank {rank} has {len(numbers)} {word}, and a head has {d}"
            for block in numbers.reshape(-1, d):
                first = max(block.min(), 0) // d * d
                if (block == PADDING).all() or np.array_equal(block - first, order):
                    continue
                if (block // d != first // d).any():
                    has = f"rank {rank} has {word} {real_text(block)}"
                    return f"cut inside a head: {has} in place of a head"
                return f"rank {rank} has the {word} of head {first // d} in another order"
        return ""

    def heads(self, letter):
        """Return the heads of q, k, v or o that each rank holds, in order; None if the tensor is missing.

        A head of zeros, which is padding, is -1.
        """
        name = next((name for name in self.weights if name.endswith(f".{letter}_proj.weight")), None)
        if name is None:
            return None
        d = self.config.head_dim
        return [(numbers[::d] // d).tolist() for numbers in self.numbers(name)]

    def attention_faults(self):
        """Yield the disagreements of an attention block, whose tensors have whole heads."""
        owner = {name.split(".")[-2][0]: tensor for name, tensor in self.weights.items()}
        q, k, v, o = (self.heads(letter) for letter in "qkvo")
        queries, name = q, "q"
        if q is not None and o is not None and q != o:
            if self._uncovered(q) and not self._uncovered(o):
                queries, name = o, "o"
                yield owner["q"], unequal_heads(q, o, "o")
            else:
                yield owner["o"], unequal_heads(o, q, "q")
        paired = True
        if queries is not None:
            for text in self._uncovered(queries):
                yield owner[name], text
            for letter, kv in (("k", k), ("v", v)):
                if kv is not None and (text := self._unpaired(queries, kv)):
                    paired = False
                    yield owner[letter], text
        if paired and k is not None and v is not None and k != v:
            yield owner["v"], unequal_heads(v, k, "k")

    def _uncovered(self, queries):
        """Return texts about query heads that are on no rank, or on several."""
        real = [[head for head in held if head >= 0] for held in queries]
        return list(coverage(real, self.config.num_attention_heads, "query head"))

    def _unpaired(self, queries, kv):
        """Return a text about the first rank whose query heads do not find their KV heads, or "".

        Local query head j reads local KV head j // (H_r / K_r); heads of zeros count. In minitp's own plan,
        the numbers of query heads that read each KV head may differ.
        """
        total = self.config.num_attention_heads
        group = total // self.config.num_key_value_heads
        for rank, (heads, held) in enumerate(zip(queries, kv, strict=True)):
            if self._is_planned(rank, heads, held) or not heads:
                continue
            has = f"rank {rank} has {counted(len(heads), 'query head')} and {counted(len(held), 'KV head')}"
            if not held or len(heads) % len(held):
                text = f"{has}: a KV head must be read by equally many query heads"
                return text + self._hint_at_whole(held)
            size = len(heads) // len(held)
            for j, head in enumerate(heads):
                read = held[j // size]
                if head >= 0 and read != head // group:
                    reads = f"local query head {j} reads local KV head {j // size}"
                    one = f"KV head {read}" if read >= 0 else "a KV head of zeros"
                    gets = f"query head {head} gets {one}, expected {head // group}"
                    return f"{has}, so {reads}: {gets}{self._hint_at_whole(held)}"
        return ""

    def _is_planned(self, rank, heads, held):
        """Return whether a rank has the query heads and the KV heads of minitp's own plan."""
        if self.plan is None:
            return False
        planned = self.plan.head_ranges[rank], self.plan.kv_head_ranges[rank]
        return (heads, held) == tuple(list(range(*ends)) for ends in planned)

    def _hint_at_whole(self, held):
        """Return a hint for a rank that has all KV heads, or ""."""
        if held != list(range(self.config.num_key_value_heads)):
            return ""
        return "; right only if the engine picks the KV head by the global number"

    def mlp_faults(self):
        """Yield the disagreements of the matrices of an MLP, or of an expert."""
        held = {name: self.numbers(name) for name in self.weights}
        right = self._right_matrix(held)
        for name in held:
            for rank, (one, other) in enumerate(zip(held[right], held[name], strict=True)):
                if not same(one, other):
                    has = f"rank {rank} has {self.pieces.word(name)}s {real_text(other)}"
                    expected = f"{short_name(right, name)} has {self.pieces.word(right)}s {real_text(one)}"
                    yield self.weights[name], f"{has}, but {expected}"
                    break
        for text in self._uncovered_pieces(right, held[right]) if held else ():
            yield self.weights[right], text

    def _right_matrix(self, held):
        """Return the matrix that the others are compared with: one with all pieces, or as most are."""

        def agreeing(name):
            return sum(all(map(same, held[name], other)) for other in held.values())

        first = next(iter(held), None)
        if not held or agreeing(first) == len(held):
            return first
        return max(held, key=lambda name: (not self._uncovered_pieces(name, held[name]), agreeing(name)))

    def _uncovered_pieces(self, name, held):
        """Return texts about pieces of a part that are on no rank, or on several."""
        real = [numbers[numbers >= 0].tolist() for numbers in held]
        return list(coverage(real, self.pieces.count(name), self.pieces.word(name)))

    def is_everywhere(self):
        """Return whether every rank has all pieces of all weights."""
        return bool(self.weights) and all(
            np.array_equal(np.sort(numbers[numbers >= 0]), np.arange(self.pieces.count(name)))
            for name in self.weights
            for numbers in self.numbers(name)
        )

    def bias_faults(self):
        """Yield each bias whose elements are not those of its weight's rows."""
        for name, tensor in self.tensors.items():
            weight = f"{name.removesuffix('bias')}weight"
            if not name.endswith(".bias") or weight not in self.weights:
                continue
            # An index of -1, padding, finds the hash of zero.
            values = np.append(self.pieces.hashes(name, 0, np.float32), hash(bytes(4)))
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
        share = min(map(len, lists))  # a last rank may have somewhat fewer pieces
        is_end = (np.diff(missing) == 1).all() and missing[-1] == total - 1 and 2 * len(missing) >= share
        text = f"{noun}s {numbers_text(missing)} are on no rank"
        yield f"{text}: is the file of a last rank missing?" if is_end else text
    if len(twice):
        ranks = [rank for rank, held in enumerate(lists) if twice[0] in held]
        yield f"{noun}s {numbers_text(twice)} are more than once on {ranks_text(ranks)}"


def unequal_heads(held, right, letter):
    """Return a text about the first rank whose heads are not those of another tensor."""
    rank = next(rank for rank in range(len(held)) if held[rank] != right[rank])
    has = f"rank {rank} has heads {heads_text(held[rank])}"
    return f"{has}, but {letter}_proj has {heads_text(right[rank])}"


def same(one, other):
    """Return whether two ranks' pieces are the same, apart from padding at the end."""

    def trimmed(numbers):
        real = np.flatnonzero(numbers >= 0)
        return numbers[: real[-1] + 1] if len(real) else numbers[:0]

    return np.array_equal(trimmed(one), trimmed(other))


def real_text(numbers):
    """Return the pieces that are not padding as text."""
    return numbers_text(numbers[numbers >= 0])
