"""What became of each linear of a model, as a table."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from . import decisions
from .given import model_in
from .layers import BETWEEN, Layer, layers, matrices
from .parameter import QuantizedWeight
from .passes.linears import OTHERWISE
from .tables import as_text, names


@dataclass(frozen=True)
class LayerReport:
    """One linear.

    precision     a format, or the dtype of a weight that was left alone
    rank          of the 16-bit branch
    bytes_before  of the 16-bit weight; bytes_after: of what takes its place
    error         relative, of the layer's output on observed rows (of the weight if nothing was observed); None: exact
    reason        why it was left alone
    effect        relative, the error that it was predicted to make in the model's output; None: not measured
    """

    name: str
    precision: str
    rank: int
    bytes_before: int
    bytes_after: int
    error: float | None
    reason: str
    effect: float | None = None


@dataclass(frozen=True)
class Report:
    """The linears of a model. Iterate over `rows`, print it, or hand it to a rich console."""

    rows: tuple[LayerReport, ...]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def effect(self) -> float | None:
        """The predicted relative error of the model's output: the layers' effects, which add up as squares. None where
        none was measured.
        """
        effects = [row.effect for row in self.rows if row.effect is not None]
        return math.hypot(*effects) if effects else None

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        layer = names("layer", self.names, options.max_width)
        measured = any(row.effect is not None for row in self.rows)
        effect = ("effect",) if measured else ()
        table = Table(layer, "precision", "rank", "MiB before", "MiB after", "error", *effect, "why 16-bit")
        for row in self.rows:
            table.add_row(
                row.name,
                row.precision,
                str(row.rank) if row.rank else "",
                _mib(row.bytes_before),
                _mib(row.bytes_after),
                _percent(row.error),
                *([_percent(row.effect)] if measured else []),
                row.reason,
            )
        table.add_section()
        sums = _mib(self.bytes_before), _mib(self.bytes_after)
        table.add_row("all linears", "", "", *sums, "", *([_percent(self.effect)] if measured else []))
        yield table

    def __str__(self) -> str:
        return as_text(self, self.names)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"


def report(model: nn.Module) -> Report:
    """The report of a model, or of one that torch.compile wraps. Raises NotAModel."""
    inner = model_in(model, "report")
    compiled = _compiled_weights(model)
    shown = {id(layer.weight) for layer in layers(inner)}
    return Report(tuple(_row(x, compiled) for x in matrices(inner) if id(x.weight) in shown or _was_asked_for(x)))


def why_nothing(model: nn.Module) -> str:
    """Of a model that has no linear layer to quantize: what it has, and the commonest reasons."""
    reasons = Counter(row.reason for row in report(model))
    text = f"{type(model).__name__} has no linear layer that can be quantized"
    if not reasons:
        return f"{text}: it has no nn.Linear and no convolution."
    most = "; ".join(f"{count} of them: {reason}" for reason, count in reasons.most_common(3))
    return f"{text}. It has {reasons.total()} linears; {most}. svdq_compile.report(model) says why for each."


def _was_asked_for(layer: Layer) -> bool:
    """Whether a Parameter that is no module's weight was met as one, and left in 16-bit."""
    reason = decisions.reason_of(layer.weight)
    return reason is not None and reason != OTHERWISE and layer.never is None


def _row(layer: Layer, compiled: set[int]) -> LayerReport:
    weight = layer.weight
    before = weight.numel() * weight.element_size()
    if isinstance(weight, QuantizedWeight):
        packed = weight._svdq
        told = before, packed.nbytes(), weight._svdq_error, "", weight._svdq_effect
        return LayerReport(layer.name, packed.precision, packed.rank, *told)
    dtype = str(weight.dtype).removeprefix("torch.")
    reason = decisions.reason_of(weight) or layer.reason or _why_not_yet(layer, compiled)
    return LayerReport(layer.name, dtype, 0, before, before, None, reason)


def _compiled_weights(model: nn.Module) -> set[int]:
    """The ids of the Parameters in modules that were compiled, in place or by a wrapper."""
    modules = [m for m in model.modules() if m._compiled_call_impl is not None or hasattr(m, "_orig_mod")]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _why_not_yet(layer: Layer, compiled: set[int]) -> str:
    """Of a weight that nothing is decided of."""
    weight, seen = layer.weight, decisions.seen_by(layer.weight)
    if seen is not None and seen.calls:
        return f"observed in {seen.calls} of {seen.wanted} calls"
    if layer.is_between:
        return BETWEEN
    if compiled and id(weight) not in compiled:
        return "not compiled: it stands outside the modules that were"
    return "not reached yet"
