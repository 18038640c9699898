"""The linears of a module tree, seen without running it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from .passes.linears import MIN_FEATURES, QUANTIZABLE_DTYPES, is_over_channels
from .passes.scope import is_adapter, outside_blocks, without_wrapper


@dataclass(frozen=True)
class Layer:
    """A linear, or a 1x1 convolution.

    name    of its module, as it is without adapters around it
    reason  why it must stay 16-bit by the rules of passes/linears.py, None if it may be quantized
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    reason: str | None


def layers(model: nn.Module) -> Iterator[Layer]:
    """Every linear of a model, in order; a weight that several layers are tied to comes once."""
    found = [(without_wrapper(name), module) for name, module in model.named_modules() if _is_linear(module)]
    outside = outside_blocks([name for name, _ in found])
    seen: set[int] = set()
    for name, module in found:
        weight = module.weight
        if isinstance(weight, nn.Parameter) and id(weight) not in seen:
            seen.add(id(weight))
            yield Layer(name, module, weight, _why_not(weight, name in outside, name))


def without_adapters(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Of a model's named parameters or buffers, those it would have without PEFT, by the names they would have."""
    named = list(named)
    wrapped = {name.partition(".base_layer.")[0] for name, _ in named if ".base_layer." in name}
    for name, value in named:
        if ".base_layer." in name:
            yield name.replace(".base_layer.", "."), value
        elif wrapped.isdisjoint(accumulate(name.split("."), "{}.{}".format)):
            yield name, value


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return is_over_channels(module.kernel_size, module.stride, module.padding, module.groups)
    return isinstance(module, nn.Linear)


def _why_not(weight: nn.Parameter, is_outside: bool, name: str) -> str | None:
    if is_adapter(name):
        return "an adapter, which is small and may be swapped"
    if weight.dtype not in QUANTIZABLE_DTYPES:
        return f"its weight is {weight.dtype}"
    if min(weight.shape[:2]) < MIN_FEATURES:
        return f"it is small ({weight.shape[0]} x {weight.shape[1]})"
    if is_outside:
        return "outside the repeated blocks: an embedder or a final projection"
    return None
