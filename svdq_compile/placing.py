"""Putting what a file holds into a model, a tensor at a time; past the wrappers that adapters leave."""

import torch
from torch import Tensor, nn

from .lowering.packed import PackedLinear
from .lowering.torch_private import shell
from .parameter import QuantizedWeight, become_quantized
from .passes.peft_names import wrapped_layer


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the CPU for one on the meta device."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def own_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that a model has made for itself and that are never saved."""
    named = ((prefix, name, module) for prefix, module in model.named_modules() for name in module._buffers)
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, name, module in named
        if name in module._non_persistent_buffers_set
        and (buffer := module._buffers[name]) is not None
        and not buffer.is_meta
    }


def put_quantized(
    model: nn.Module,
    weight: str,
    packed: PackedLinear,
    dtype: torch.dtype,
    *,
    error: float,
    calibrated: bool | None,
    effect: float | None = None,
) -> None:
    """Let a Parameter be a quantized one. dtype, error, calibrated, effect: what it tells of itself."""
    module, _, leaf = weight.rpartition(".")
    old = owner_of(model, module).get_parameter(leaf)
    parameter = nn.Parameter(shell(old.shape, old.stride(), dtype, packed.device), old.requires_grad)
    assign(model, weight, become_quantized(parameter, packed, module, error, calibrated, effect=effect))


def put_elsewhere(model: nn.Module, weight: str, packed: PackedLinear) -> None:
    """Let a quantized Parameter have these packed tensors, equal to its own; it stays the same object."""
    module, _, leaf = weight.rpartition(".")
    old = owner_of(model, module).get_parameter(leaf)
    assert isinstance(old, QuantizedWeight)
    twin = nn.Parameter(shell(old.shape, old.stride(), old.dtype, packed.device), old.requires_grad)
    old.data = become_quantized(twin, packed, module, old._svdq_error, old._svdq_calibrated, effect=old._svdq_effect)


def put_plain(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a Parameter or a buffer have these values."""
    module, _, leaf = name.rpartition(".")
    owner = owner_of(model, module)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        assign(model, name, nn.Parameter(tensor, owner.get_parameter(leaf).requires_grad))


def owner_of(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, or the one that PEFT's stands around."""
    return wrapped_layer(model.get_submodule(name))


def assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a Parameter in the place of another."""
    module, _, leaf = name.rpartition(".")
    setattr(owner_of(model, module), leaf, parameter)
