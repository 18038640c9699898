"""Calls of a model that are kept while it is calibrated, and run again: what a layer's 4-bit form does to its output.

Nothing of the model changes: within a replay the products with some weights are computed by packs instead.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from . import eager
from .errors import SvdqError
from .lowering.packed import PackedLinear
from .thinning import Thinned

# Calls that are kept, evenly from the first to the last; more of them while it is not known how many there will be.
MAX_CALLS = 4
MAX_BYTES = 2**30  # of their inputs, in CPU memory; one call's are kept in any case
SAME = 1e-3  # how far an output may be off that comes again; atomics sum up in any order


class CannotReplay(SvdqError):
    """The model's calls do not come out the same when they are made again."""


@dataclass(frozen=True)
class _Elsewhere:
    """A tensor on the CPU, to be brought back to where it was."""

    values: Tensor
    device: torch.device


@dataclass(frozen=True)
class _Call:
    """A call's arguments, and the autocast that it was made in: (device type, dtype)."""

    arguments: tuple[tuple, dict[str, Any]]
    autocast: tuple[tuple[str, torch.dtype], ...]

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> "_Call":
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        return cls(tree_map(_kept, (args, kwargs)), tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds))

    @property
    def nbytes(self) -> int:
        return sum(leaf.values.nbytes for leaf in tree_leaves(self.arguments) if isinstance(leaf, _Elsewhere))

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors of numbers in the model's output."""
        args, kwargs = tree_map(_back, self.arguments)
        with ExitStack() as stack:
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            outputs = tree_leaves(model(*args, **kwargs))
        return [t.detach().clone() for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]


def _kept(value: Any) -> Any:
    # A copy in any case: some samplers write into their latents.
    return _Elsewhere(value.detach().to("cpu", copy=True), value.device) if isinstance(value, Tensor) else value


def _back(value: Any) -> Any:
    return value.values.to(value.device, copy=True) if isinstance(value, _Elsewhere) else value


class Recorder:
    """Some of a model's calls, evenly over all that were made, in bounded memory."""

    def __init__(self) -> None:
        self._calls = Thinned(_are_too_many)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within the context, what a compiled model is called with. Dynamo sees nothing of it."""
        run = model._compiled_call_impl
        assert run is not None

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.add(lambda: _Call.of(args, kwargs))
            return run(*args, **kwargs)

        model._compiled_call_impl = call
        try:
            yield
        finally:
            model._compiled_call_impl = run

    def calls(self, most: int) -> list[_Call]:
        """At most so many, in the middles of equal parts of all that were kept."""
        kept = self._calls.kept
        count = min(most, MAX_CALLS, len(kept))
        return [kept[(2 * i + 1) * len(kept) // (2 * count)] for i in range(count)]


def _are_too_many(calls: list[_Call]) -> bool:
    return len(calls) >= 2 * MAX_CALLS or sum(call.nbytes for call in calls) > MAX_BYTES


class Replays:
    """Recorded calls of a model in 16 bits, with their outputs. Made and used within `replaying`.

    Raises CannotReplay, which says why.
    """

    def __init__(self, model: nn.Module, calls: list[_Call]) -> None:
        if not calls:
            raise CannotReplay("calibrate did not call the model itself")
        self._model, self._calls = model, calls
        self._truths = [call.run(model) for call in calls]
        if not all(any(t.numel() for t in truth) for truth in self._truths):
            raise CannotReplay("no tensor of numbers is found in its output")
        if not self.error({}) <= SAME:
            raise CannotReplay("called again with the same inputs it gives another output, or none of finite numbers")

    def error(self, packs: Mapping[int, PackedLinear]) -> float:
        """How far the output is off with these packs, by id of the weights that they are of: relative, the mean square
        over the calls. NaN or Inf if the output is not finite.
        """
        with _Packs(packs):
            outputs = [call.run(self._model) for call in self._calls]
        squares = [_off(output, truth) for output, truth in zip(outputs, self._truths, strict=True)]
        return math.sqrt(sum(squares) / len(squares))


def _off(output: list[Tensor], truth: list[Tensor]) -> float:
    """|y - t|^2 / |t|^2 over all tensors of an output."""
    if [t.shape for t in output] != [t.shape for t in truth]:
        return math.inf
    off = sum(float((y.double() - t.double()).square().sum()) for y, t in zip(output, truth, strict=True))
    whole = sum(float(t.double().square().sum()) for t in truth)
    return off / whole if whole else off


@contextmanager
def replaying() -> Iterator[None]:
    """Within the context models run as they stand there: eagerly, without gradients, in a call's own autocast."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Packs(TorchFunctionMode):
    """Within the context linears that read some weights, given by id, are computed by packs; what else reads such a
    weight reads its pack's values. Packs go where they are wanted: offloading has weights elsewhere between calls than
    in them.
    """

    def __init__(self, packs: Mapping[int, PackedLinear]) -> None:
        super().__init__()
        self._packs = dict(packs)
        self._values: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        call = eager.linear_call(func, args, kwargs)
        if call is not None and id(call.weight) in self._packs:
            return eager.run(call, self._pack(call.weight, call.input.device))
        if any(pack.expanded for pack in self._packs.values()):
            args, kwargs = tree_map(self._read, (args, kwargs))
        return func(*args, **kwargs)

    def _pack(self, weight: Tensor, device: torch.device) -> PackedLinear:
        pack = self._packs[id(weight)]
        pack = self._packs[id(weight)] = pack.to(device, pack.up.dtype)
        return pack

    def _read(self, value: Any) -> Any:
        if not isinstance(value, nn.Parameter) or id(value) not in self._packs:
            return value
        if not self._packs[id(value)].expanded:
            return value
        if id(value) not in self._values or self._values[id(value)].device != value.device:
            self._values[id(value)] = eager.expanded(value, self._pack(value, value.device))
        return self._values[id(value)]
