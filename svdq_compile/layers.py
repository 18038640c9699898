"""The linears of a module tree, seen without running it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .passes.linears import is_over_channels, why_not
from .passes.peft_names import without_wrapper
from .passes.scope import outside_blocks


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
            yield Layer(name, module, weight, why_not(name, weight, name in outside))


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return is_over_channels(module.kernel_size, module.stride, module.padding, module.groups)
    return isinstance(module, nn.Linear)
