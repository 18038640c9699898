"""What would become of a model, before anything is quantized: `doctor`.

Nothing is computed and no weight is read, so a model on the meta device will do (`model_files.empty_model`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Column, Table
from torch import nn

from .config import Config
from .convert import choose_precision, choose_rank, warn_of_skip, why_not_as_asked
from .given import denoisers, model_in
from .kernels.formats import FEW_ROWS, FORMATS
from .kernels.runtime.target import describe
from .layers import Layer, blocks_of, layers
from .lowering.graph_breaks import graph_breaks
from .lowering.launch import kernels_for
from .lowering.packed import PackedLinear, SharedInput, matrix_shape
from .parameter import QuantizedWeight
from .tables import as_text


@dataclass(frozen=True)
class Plan:
    """What would become of one linear.

    reason  why it would stay 16-bit, "" if it would be quantized
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    reason: str


@dataclass(frozen=True)
class Blocks:
    """Repeated blocks: the elements of one list that are of one class, and the linears they hold together."""

    path: str
    kind: str
    count: int
    linears: int


@dataclass(frozen=True)
class Diagnosis:
    """What doctor found. Print it, or read:

    plans         of each linear
    blocks        the repeated blocks that hold linears to be quantized
    other_bytes   of all parameters and buffers that are no linear's weight, by the class of the module that holds them
    way           how to compile the model, as Python
    breaks        where Dynamo cuts the model, with the reason and the source line; None if it was not run
    kernels       by device of this machine, and by format: what its linears would run
    """

    model_class: str
    precision: str
    plans: tuple[Plan, ...]
    blocks: tuple[Blocks, ...]
    other_bytes: Mapping[str, int]
    way: str
    breaks: tuple[str, ...] | None
    kernels: Mapping[str, Mapping[str, str]]

    @property
    def bytes_before(self) -> int:
        """Of the whole model in 16 bits."""
        return sum(plan.bytes_before for plan in self.plans) + sum(self.other_bytes.values())

    @property
    def bytes_after(self) -> int:
        """Of the whole model once it is quantized."""
        return sum(plan.bytes_after for plan in self.plans) + sum(self.other_bytes.values())

    @property
    def quantized(self) -> tuple[Plan, ...]:
        return tuple(plan for plan in self.plans if not plan.reason)

    @property
    def reasons(self) -> Counter[str]:
        """Why linears would stay 16-bit, with how many."""
        return Counter(plan.reason for plan in self.plans if plan.reason)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(self._memory(), self._facts())

    def __str__(self) -> str:
        return as_text(self)

    def _memory(self) -> Table:
        right = [
            Column(heading, justify="right") for heading in ("linears", "MiB in 16-bit", f"MiB in {self.precision}")
        ]
        table = Table(self.model_class, *right)
        table.add_row("quantized", *_sums(self.quantized))
        for reason, _ in self.reasons.most_common():
            table.add_row(f"16-bit: {reason}", *_sums([plan for plan in self.plans if plan.reason == reason]))
        for kind, count in sorted(self.other_bytes.items(), key=lambda item: -item[1]):
            table.add_row(f"no linear: {kind}", "", _mib(count), _mib(count))
        table.add_section()
        table.add_row("the model", str(len(self.plans)), _mib(self.bytes_before), _mib(self.bytes_after))
        return table

    def _facts(self) -> Table:
        facts = Table.grid(padding=(0, 2))
        for found in self.blocks:
            facts.add_row("blocks", f"{found.path}: {found.count} x {found.kind}, {found.linears} linears")
        for line in self.breaks or ():
            facts.add_row("graph break", line)
        if self.breaks == ():
            facts.add_row("graph breaks", "none")
        facts.add_row("compile by", self.way)
        for device, of_formats in self.kernels.items():
            for precision, words in of_formats.items():
                facts.add_row(f"{precision} on {device}", words)
        return facts


def doctor(
    model: Any,
    config: Config | Mapping[str, Any] | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Diagnosis:
    """Say what would become of a model, or of a pipeline's denoiser, on any device, the meta device included.

    config, options  a Config or a dict of options, and options by name
    example_inputs  keyword arguments of the model's forward: the model is traced with them, to say where Dynamo cuts
                    it. Dynamo forgets then what it has compiled in this process.

    A linear that reads few rows (one a sample) will be in w4a16, which only running tells: it is counted in the chosen
    precision. Raises NotAModel, OptionError.
    """
    config = Config.of(config, options)
    config.refuse_target("is met by measuring, which doctor does not do")
    model = _denoiser(model)
    warn_of_skip([model], config)
    precision = choose_precision(config, weight_only=False)
    found = list(layers(model))
    plans = tuple(_plan(layer, choose_precision(config, layer.expanded), config) for layer in found)
    blocks = tuple(_blocks(model, [plan.name for plan in plans if not plan.reason]))
    others = _others(model, {id(layer.weight) for layer in found})
    breaks = None if example_inputs is None else tuple(graph_breaks(model, example_inputs))
    return Diagnosis(type(model).__name__, precision, plans, blocks, others, _way(model, blocks, plans), breaks,
                     _kernels((precision, FEW_ROWS)))  # fmt: skip


def _denoiser(model: Any) -> nn.Module:
    """The model itself without torch.compile's wrapper, or the first denoiser of a pipeline."""
    return model_in(next(iter(denoisers(model, "doctor").values())), "doctor")


def _plan(layer: Layer, precision: str, config: Config) -> Plan:
    name, weight = layer.name, layer.weight
    before = weight.numel() * weight.element_size()
    if isinstance(weight, QuantizedWeight):
        return Plan(name, tuple(weight.shape), before, weight._svdq.nbytes(), "")
    reason = layer.why_not(config.convolutions) or why_not_as_asked(weight, name, precision, config) or ""
    after = before if reason else _packed_bytes(weight, precision, choose_rank(config, layer.expanded, weight))
    return Plan(name, tuple(weight.shape), before, after, reason)


def _packed_bytes(weight: nn.Parameter, precision: str, rank: int) -> int:
    """What a weight takes once it is packed: the format packs it on the meta device."""
    n, k = matrix_shape(weight.shape)
    meta: dict[str, Any] = {"device": "meta"}
    codes = FORMATS[precision].quantize_weight(torch.empty(n, k, **meta), None)
    up, down = torch.empty(n, rank, dtype=weight.dtype, **meta), torch.empty(rank, k, dtype=weight.dtype, **meta)
    return PackedLinear(SharedInput(precision, torch.empty(k, **meta), down), codes, up).nbytes()


def _others(model: nn.Module, linears: set[int]) -> Counter[str]:
    """Bytes of what is no linear's weight, each tensor once."""
    sizes: Counter[str] = Counter()
    seen = set(linears)
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                is_bias = isinstance(module, nn.Linear)
                sizes["biases of linears" if is_bias else type(module).__name__] += tensor.nbytes
    return sizes


def _blocks(model: nn.Module, quantized: list[str]) -> Iterator[Blocks]:
    """The repeated blocks that hold linears to be quantized, by their list and class."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for path, block in blocks_of(model).items():
        linears = sum(name.startswith(f"{path}.") for name in quantized)
        if linears:
            kinds.setdefault((path.rpartition(".")[0], type(block).__name__), []).append(linears)
    for (path, kind), linears_of in kinds.items():
        yield Blocks(path, kind, len(linears_of), sum(linears_of))


def _way(model: nn.Module, blocks: tuple[Blocks, ...], plans: tuple[Plan, ...]) -> str:
    """By blocks where some are repeated: a block is compiled once for all like it."""
    taken = {plan.name for plan in plans if not plan.reason}
    if not taken:
        return "not at all: no linear would be quantized"
    if any(layer.is_between and layer.name in taken for layer in layers(model)):
        return "svdq_compile.compile(model, convolutions=True)"  # only the whole model holds them
    if getattr(type(model), "_repeated_blocks", None):
        return 'model.compile_repeated_blocks(backend="svdquant")'
    repeated = [found.path for found in blocks if found.count > 1]
    if repeated:
        lists = ", ".join(f"*model.{path}" if path else "*model" for path in dict.fromkeys(repeated))
        return f'for block in [{lists}]: block.compile(backend="svdquant")'
    return "svdq_compile.compile(model)"


def _kernels(precisions: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """For each kind of GPU in this machine, or for the CPU where there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    return {
        "the CPU" if device.type == "cpu" else describe(device): {p: kernels_for(p, device) for p in precisions}
        for device in devices
    }


def _sums(plans: tuple[Plan, ...] | list[Plan]) -> tuple[str, str, str]:
    before, after = sum(p.bytes_before for p in plans), sum(p.bytes_after for p in plans)
    return str(len(plans)), _mib(before), _mib(after)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"
