"""The judgement of what the ranks hold: each tensor by itself, then the tensors of a block together.

A tensor by itself is wrong if it has pieces that are not its own, or its own in an order that the engine does
not expect. The tensors of a block must agree: a rank's query heads find their KV heads, the columns of o_proj
are those of the rank's query heads, and the rows of gate and up are the columns of down. Any permutation of
heads or FFN columns in which they agree is right. Vocabulary rows must be in rank order, because an engine
finds a token by its number.
"""

import numpy as np

from minitp.lint.blocks import Block, coverage
from minitp.lint.head_mistakes import joined_matrix_cut
from minitp.lint.layout import VOCABULARY
from minitp.lint.mistakes import explain
from minitp.lint.origin import layer_of
from minitp.lint.pieces import PADDING, UNKNOWN, piece_numbers
from minitp.lint.words import ranks_text, short_name
from minitp.lint.wrong_tensor import WrongTensor, described

CONSISTENT = "consistent, but not contiguous"
MAPPED = "right only if the engine's map of experts says so"
GATHERED = "the joined matrix was cut as a whole: right if its outputs are gathered, as with tp_plan"


class Judge:
    """The judgement of all tensors.

    Attributes
    ----------
    faults : dict of str to str
        What is wrong with a tensor, by the engine's name, or by the checkpoint's if no rank has it; in the
        order of the checkpoint.
    notes : dict of str to str
        What is unusual about a tensor that is right.
    """

    def __init__(self, collected, pieces, expectation, engine):
        self.engine, self.experts = engine, collected.experts
        self.tensors, self.pieces, self.expectation = collected.tensors, pieces, expectation
        self.config, self.tp = expectation.config, expectation.tp
        self.faults, self.notes, self.of_part = dict(collected.faults), dict(collected.notes), {}
        for tensor in self.tensors:
            for part in tensor.layout.parts:
                self.of_part.setdefault(part, []).append(tensor)

    def judge(self):
        """Enter all faults and notes."""
        for tensor in self.tensors:
            fault = self._own_fault(tensor)
            if fault:
                self.faults.setdefault(tensor.name, fault)
        blocks = self._blocks()
        for block in blocks:
            self._judge_block(block)
        self._judge_experts([names for names in blocks if ".experts." in names[0]])
        for part in self.pieces.names:
            if part not in self.of_part:
                self.faults[part] = "is in no rank's file"
        places = {name: place for place, name in enumerate(self.pieces.names)}
        for tensor in self.tensors:
            places[tensor.name] = min((places[part] for part in tensor.layout.parts), default=len(places))
        by_place = sorted(self.faults.items(), key=lambda fault: places.get(fault[0], len(places)))
        self.faults = dict(by_place)

    # --- a tensor by itself -----------------------------------------------------------------------------

    def _own_fault(self, tensor):
        """Return what is wrong with a tensor by itself, or ""."""
        parts = tensor.layout.parts
        if not parts:
            return "is not in the checkpoint: none of its rows or columns is found there"
        absent = [rank for rank in range(self.tp) if rank not in tensor.holders]
        if note := self._note_on_bias(tensor):
            self.notes[tensor.name] = note
            return ""
        if absent and ".experts." not in parts[0]:
            return f"is missing on {ranks_text(absent)}"
        strict = not self.pieces.is_split(parts[0]) or VOCABULARY.search(parts[0])
        if VOCABULARY.search(parts[0]) and self._is_padded(tensor):
            real = [tensor.expected[rank] for rank in tensor.holders]
            held = [piece_numbers(codes[codes >= 0]).tolist() for codes in real]
            return next(coverage(held, self.pieces.count(parts[0]), "row"), "")
        if tensor.is_expected:
            return ""
        return self._explained(tensor) if strict or self._has_other_pieces(tensor) else ""

    def _has_other_pieces(self, tensor):
        """Return whether a rank has pieces that are not the tensor's own, or its parts in another order."""
        case = WrongTensor(tensor, self.pieces, self.expectation)
        for held, codes in zip(case.held, case.found, strict=True):
            foreign = set(self.pieces.names_in(codes)) - set(tensor.layout.parts)
            real = codes[codes >= 0]
            if held.values or foreign or (codes == UNKNOWN).any() or (len(codes) and not len(real)):
                return True
            if not np.array_equal(self.expectation.arranged(real, tensor.layout), real):
                return True
        return not case.along

    def _note_on_bias(self, tensor):
        """Return a note if a bias is such that each rank can add it before the sum over the ranks, or ""."""
        part, held = tensor.layout.parts[0], [one for one in tensor.held if one is not None]
        if (
            self.pieces.is_split(part)
            or not part.endswith(".bias")
            or self.tp == 1
            or 0 not in tensor.holders
        ):
            return ""
        if {one.values for one in held} == {f"has the expected values times {1 / self.tp:.6g}"}:
            return "divided by the number of ranks: right if each rank adds it before the sum"
        alone = all((one.codes == PADDING).all() for one in held[1:])
        is_first = np.array_equal(held[0].codes, tensor.expected[0]) and not held[0].values
        if alone and is_first:
            return "on rank 0 only: right if each rank adds what it has before the sum"
        return ""

    def _is_padded(self, tensor):
        """Return whether a tensor of the vocabulary has the expected rows, and anything after the last."""
        for rank in tensor.holders:
            right, held = tensor.expected[rank], tensor.held[rank]
            if right is None or held.values or (held.axis, held.source_axis) != (0, 0):
                return False
            if not np.array_equal(right[right >= 0], held.codes[: len(right)][right >= 0]):
                return False
        return True

    # --- the tensors of a block -------------------------------------------------------------------------

    def _blocks(self):
        """Return the names of the split tensors of each attention block, dense MLP and expert, in order."""
        blocks = {}
        for name in self.pieces.names:
            if self.pieces.is_split(name) and not VOCABULARY.search(name):
                blocks.setdefault(name.rsplit(".", 2)[0], []).append(name)
        return list(blocks.values())

    def _judge_block(self, names):
        """Judge the tensors of a block together, and blame those that are not as expected."""
        tensors = {name: self.of_part[name][0] for name in names if name in self.of_part}
        is_attention = ".self_attn." in names[0]
        if self.engine == "hf" and self._is_gathered(tensors):
            joined = [tensor for tensor in tensors.values() if len(tensor.layout.parts) > 1]
            self.notes |= {tensor.name: GATHERED for tensor in joined}
            return
        if is_attention:
            for tensor, text in self._sound(tensors).broken_heads():
                self.faults.setdefault(tensor.name, text if tensor.is_expected else self._explained(tensor))
        block = self._sound(tensors)
        faults = list(block.attention_faults() if is_attention else block.mlp_faults())
        reasons = {tensor.name: text for tensor, text in reversed(faults)}
        unusual = [tensor for tensor in block.weights.values() if not tensor.is_expected]
        for tensor in unusual:
            if faults:
                other, text = faults[0]
                other = f"does not agree with {short_name(other.layout.parts[0])}: {text}"
                reason = reasons.get(tensor.name, other)
                self.faults[tensor.name] = explain(tensor, self.pieces, self.expectation, reason)
            else:
                text = described(WrongTensor(tensor, self.pieces, self.expectation))
                self.notes.setdefault(tensor.name, f"{CONSISTENT}: {text}")
        for tensor, text in faults if not unusual else ():
            self.faults.setdefault(tensor.name, text)
        for tensor, text in self._sound(tensors).bias_faults():
            self.faults.setdefault(tensor.name, text if tensor.is_expected else self._explained(tensor))

    def _judge_experts(self, blocks):
        """Judge the experts of each layer together: which ranks have them, and in what order."""
        layers = {}
        for names in blocks if self.tp > 1 else ():
            layers.setdefault(names[0].partition(".experts.")[0], []).append(names)
        for layer, experts in layers.items():
            tensors = [
                {name: self.of_part[name][0] for name in names if name in self.of_part} for names in experts
            ]
            everywhere = [some for some in tensors if self._sound(some).is_everywhere()]
            for some in everywhere if len(everywhere) < len(experts) else ():
                times = "twice" if self.tp == 2 else f"{self.tp} times"
                text = f"this expert is whole on every rank, others are not: its output is summed {times}"
                self.faults |= {tensor.name: text for tensor in some.values()}
            order = self.experts.unusual_order(layer_of(experts[0][0]))
            if order and not any(one.name in self.faults for some in tensors for one in some.values()):
                self.notes[f"{layer}.experts"] = f"the ranks have {order}: {MAPPED}"

    def _is_gathered(self, tensors):
        """Return whether joined matrices were cut as wholes, and the other matrices of a block evenly."""
        cut = set()
        for tensor in tensors.values():
            if joined_matrix_cut(WrongTensor(tensor, self.pieces, self.expectation)):
                cut.add(tensor.name)
            elif tensor.name in self.faults or not tensor.is_expected:
                return False
        return bool(cut)

    def _sound(self, tensors):
        """Return the Block of the tensors that are not wrong by themselves."""
        sound = {name: tensor for name, tensor in tensors.items() if tensor.name not in self.faults}
        return Block(sound, self.pieces, self.config, self.expectation.plan)

    def _explained(self, tensor):
        """Return the mistake in a tensor, or what its ranks hold."""
        return explain(tensor, self.pieces, self.expectation)
