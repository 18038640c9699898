"""The layers of a module tree, seen without running it: what each is called, and whether it may be quantized.

This is where a model's decisions come from, whatever piece of it is compiled, calibrated, loaded or reported.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .blocks import is_beside, repeated_blocks
from .foreign import foreign_weights
from .lowering.packed import MIN_FEATURES, features
from .parameter import QuantizedWeight
from .passes.linears import is_over_channels, is_storage, why_never, why_not_in
from .passes.peft_names import is_adapter, without_wrapper
from .passes.scope import OUTSIDE

BETWEEN = "a convolution outside the repeated blocks: see option convolutions"
# What such a convolution's reason is where the option was off: in files from before it, that of linears there.
UNASKED = frozenset((BETWEEN, OUTSIDE))


@dataclass(frozen=True)
class Layer:
    """A weight that a linear or another product may read.

    name       of its module, as it is without adapters and torch.compile around it; of the Parameter itself where the
               module is no linear and does not call it `weight`
    never      why it must stay 16-bit whatever its dtype, which hooks may change around a call
    is_linear  whether its module is a linear or a 1x1 convolution
    expanded   whether its module is a larger convolution, whose weight is expanded before use (passes/expanded.py); of
               other modules only running tells what they do
    is_between whether it is such a convolution outside the repeated blocks, as a UNet's are: only the option
               `convolutions` has it quantized
    """

    name: str
    weight: nn.Parameter
    never: str | None
    is_linear: bool
    expanded: bool
    is_between: bool

    @property
    def reason(self) -> str | None:
        """Why it stays 16-bit as it is now, whatever the options; None if it may be quantized."""
        return self.never or (None if is_storage(self.weight.dtype) else why_not_in(self.weight.dtype))

    def why_not(self, convolutions: bool) -> str | None:
        """The reason, by this option too."""
        return self.reason or (BETWEEN if self.is_between and not convolutions else None)


def layers(model: nn.Module) -> Iterator[Layer]:
    """Every linear and convolution of a model, in order, and what else is quantized; a weight that several layers are
    tied to comes once.
    """
    return (
        layer
        for layer in matrices(model)
        if layer.is_linear or layer.expanded or isinstance(layer.weight, QuantizedWeight)
    )


def matrices(model: nn.Module) -> Iterator[Layer]:
    """Every weight of a model that a product may read, in order, each once."""
    modules = _modules(model)
    found = _matrices(modules)
    blocks, foreign = _blocks(modules, found), foreign_weights(modules.values())
    for name, (weight, is_linear) in found.items():
        never = foreign.get(id(weight)) or why_never(name, weight)
        expanded, beside = _is_convolution(modules.get(name)) and not is_linear, is_beside(name, blocks)
        if expanded and not beside and not _is_wide(weight):
            continue  # nobody would ask why; of a UNet's first and last ones somebody may
        never = never or (OUTSIDE if beside and not expanded else None)
        yield Layer(name, weight, never, is_linear, expanded, is_between=beside and expanded and never is None)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model, by name."""
    modules = _modules(model)
    blocks = _blocks(modules, _matrices(modules))
    return {name: module for name, module in modules.items() if name in blocks}


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {without_wrapper(_plain(name)): module for name, module in model.named_modules()}


def _matrices(modules: dict[str, nn.Module]) -> dict[str, tuple[nn.Parameter, bool]]:
    """By the names that layers have; and whether the module is a linear."""
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        is_linear = _is_linear(module) and "weight" in module._parameters  # not one that is computed at each call
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and (key == "weight" if is_linear else _may_be_read(module, parameter)):
                seen.add(id(parameter))
                found[path if key == "weight" else f"{path}.{key}".lstrip(".")] = parameter, is_linear
    return found


def _blocks(modules: dict[str, nn.Module], found: dict[str, tuple[nn.Parameter, bool]]) -> set[str]:
    """Adapters are no part of the model: what is a block must not depend on them."""
    own = {path: module for path, module in modules.items() if not is_adapter(path)}
    flat = {
        name: w
        for name, (w, is_linear) in found.items()
        if all(size == 1 for size in w.shape[2:]) and (is_linear or _is_wide(w))
    }
    return repeated_blocks(own, {name: w.numel() for name, w in flat.items() if not is_adapter(name)})


def _plain(name: str) -> str:
    """A module's name without the wrappers of torch.compile around it or above it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return is_over_channels(module.kernel_size, module.stride, module.padding, module.groups)
    return isinstance(module, nn.Linear) and not nn.parameter.is_lazy(module.weight)


def _is_convolution(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _may_be_read(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a product may read a Parameter of a module that is no linear: a matrix that is not a short table, several
    matrices, or a convolution's kernels, few or many.
    """
    if nn.parameter.is_lazy(parameter) or isinstance(module, nn.Embedding) or parameter.dim() < 2:
        return False
    return _is_convolution(module) or _is_wide(parameter)


def _is_wide(weight: Tensor) -> bool:
    return min(features(weight.shape)) >= MIN_FEATURES
