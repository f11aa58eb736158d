"""The common mistakes in sharding: one is named if it explains every piece that the ranks hold."""

from minitp.lint.head_mistakes import joined_matrix_cut, joined_order, kv_heads_modulo, other_rope_layout
from minitp.lint.piece_mistakes import (
    changed_values,
    cut_replicated,
    exchanged_ranks,
    not_written,
    off_by_a_block,
    other_tensor,
    padding_inside,
    strided,
    transposed,
)
from minitp.lint.wrong_tensor import WrongTensor, described

MISTAKES = (
    not_written,
    changed_values,
    transposed,
    other_tensor,
    cut_replicated,
    kv_heads_modulo,
    exchanged_ranks,
    joined_order,
    joined_matrix_cut,
    other_rope_layout,
    padding_inside,
    off_by_a_block,
    strided,
)


def explain(tensor, pieces, expectation, reason=""):
    """Return the mistake that explains what the ranks hold of a wrong tensor, or a description of that.

    Parameters
    ----------
    reason : str
        The disagreement with the other tensors of the block, if that is what is wrong.
    """
    case = WrongTensor(tensor, pieces, expectation)
    named = next((text for mistake in MISTAKES if (text := mistake(case))), "")
    return named or reason or described(case)
