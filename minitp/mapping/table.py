"""The words of the table: what an engine's arrays and tensors are.

Shape letters are those of `trace.names`; "1" is the batch of one sequence, and a name such as Hd is the
product of two sizes. In names, {i} is the number of a layer and {n} that of an expert.
"""

from dataclasses import dataclass

IN, OUT = "input", "output"
# The orders in which tensors are joined along axis 0 of [out, in].
PLAIN = "one after another"
GROUPED = "for each KV head: its query heads, its key head, its value head"
# The orders of the rows of a head, and of its dimensions.
HALF_SPLIT = "RoPE rotates (x[i], x[i + d/2])"
INTERLEAVED = "RoPE rotates (x[2i], x[2i + 1])"


@dataclass(frozen=True)
class Source:
    """An array of an engine that is a step: an input or output of a module, or a named result.

    Attributes
    ----------
    step : str
        The step, or several that are joined along the last axis, as in "attn.q attn.k attn.v".
    where : str
        IN or OUT.
    layout : str
        The letters of the engine's axes.
    order : str
        PLAIN or GROUPED, the order of joined queries, keys and values.
    index : int
        The number of the input or output, of several.
    offset : int
        -1 if the step is one of the layer before the module's, or of the last layer if the module comes after
        the layers.
    """

    step: str
    where: str
    layout: str
    order: str = PLAIN
    index: int = 0
    offset: int = 0


def out(step, layout="1 T D", index=0, offset=0):
    """Return the Source of a module's output."""
    return Source(step, OUT, layout, index=index, offset=offset)


def into(step, layout="1 T D", index=0):
    """Return the Source of a module's input."""
    return Source(step, IN, layout, index=index)


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of an engine's weights: one tensor of a Hugging Face checkpoint, or several joined ones.

    Attributes
    ----------
    parts : tuple of str
        The checkpoint's names of the joined tensors, as in `tensors`.
    order : str
        PLAIN or GROUPED.
    rope : str
        HALF_SPLIT or INTERLEAVED, the order of the rows of each query and key head.
    offset : float
        A number that the engine has added to the checkpoint's values.
    """

    parts: tuple
    order: str = PLAIN
    rope: str = HALF_SPLIT
    offset: float = 0.0
