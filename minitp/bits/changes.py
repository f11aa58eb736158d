"""The changes that a comparison has found, and what is known about each."""

from dataclasses import dataclass, field

from minitp.bits.copies import WITH_ZEROS
from minitp.bits.difference import BitDifference
from minitp.bits.recording import PassRows
from minitp.trace.names import full_name


@dataclass(frozen=True)
class Change:
    """A step in which a change begins, and what is known about it.

    Attributes
    ----------
    layer : int or None
    step : str
        The step's name in the tables of `trace.names`, or in the file.
    a_pass, b_pass : PassRows or None
        The passes that have the rows; None for an array that is not a step.
    positions : tuple of int
        The positions of the rows in which the change begins.
    difference : BitDifference
        The difference of those rows.
    a_shape, b_shape : tuple of int
        The shapes of the whole arrays.
    at : tuple of int
        The place of the step in the order of the second recording: its pass, and its number in the pass.
    copies : bool
        Whether the step only copies inputs whose bits are the same; see `copies`.
    """

    layer: int | None
    step: str
    a_pass: PassRows | None
    b_pass: PassRows | None
    positions: tuple
    difference: BitDifference
    a_shape: tuple
    b_shape: tuple
    at: tuple = (-1, 0)
    copies: bool = False

    @property
    def name(self):
        """The full name of the step in the second recording."""
        return self.step if self.b_pass is None else full_name(self.b_pass.name, self.layer, self.step)

    @property
    def is_rounding(self):
        """True if another order of a sum explains the difference."""
        if self.copies:
            return self.step == WITH_ZEROS and self.difference.only_zeros
        return self.difference.excess <= 1


@dataclass
class BitComparison:
    """The result of a comparison.

    Attributes
    ----------
    first : Change or None
        The first change; None if all bits are the same.
    suspects : list of Change
        The changes that seem to be larger than rounding.
    begins : list of str
        The steps in which changes begin, without layers and passes.
    left_out : list of str
        Names of arrays that both recordings have and that could not be compared.
    arrays, positions : int
        The number of arrays that were compared, and of positions that both recordings have.
    """

    first: Change | None = None
    suspects: list = field(default_factory=list)
    begins: list = field(default_factory=list)
    left_out: list = field(default_factory=list)
    arrays: int = 0
    positions: int = 0

    def add(self, change):
        self.first = self.first or change
        if not change.is_rounding:
            self.suspects.append(change)
        if change.step not in self.begins:
            self.begins.append(change.step)
