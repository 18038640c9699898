"""What is to be quantized together."""

from dataclasses import dataclass

from torch import nn

from . import decisions
from .input_statistics import InputStatistics
from .passes import linears


@dataclass(frozen=True)
class Form:
    """What a target has chosen for the linears of a task (budget.py).

    precision  None: they stay 16-bit
    effects    of each weight: the relative error that it makes in the model's output; None: that was not measured
    """

    precision: str | None
    rank: int
    effects: tuple[float | None, ...]


@dataclass(frozen=True)
class Task:
    """Weights that share an input, and what is known of it.

    few_rows, shift   as in LinearSite, of a graph that reads it
    expanded          as in WeightGroup
    form              None: what the options say
    """

    weights: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    few_rows: bool
    shift: float
    statistics: InputStatistics
    expanded: bool = False
    form: Form | None = None

    @property
    def has_few_rows(self) -> bool:
        """Whether it never has many rows, in all calls that were observed: one graph may be of a short prompt."""
        most = self.statistics.most_rows
        return self.few_rows if most is None else most <= linears.FEW_ROWS

    @property
    def undecided(self) -> list[tuple[nn.Parameter, str]]:
        """The weights that are, with their names."""
        return [(w, n) for w, n in zip(self.weights, self.names, strict=True) if decisions.is_undecided(w)]
