"""A linear on a quantized weight outside compiled code: the operators that compiled code calls, one linear at a time.

Whatever way torch has of not compiling leads here: a quantized model that is simply called, a graph break,
torch.compiler.disable, the "force_eager" stance, Dynamo's recompile limit, tracing for another backend. What it is
called with is checked as torch checks it: the operators trust their operands.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .errors import GradientsNeeded, TangentsNeeded
from .lowering import ops
from .lowering.packed import PackedLinear, expand
from .lowering.torch_private import are_differentiated
from .passes.linears import LINEAR, POINTWISE_CONV, is_over_channels

log = logging.getLogger("svdq_compile")

_PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class LinearCall:
    """A call of a linear, or of a convolution over channels alone.

    channel_dim  the dimension of the input that is multiplied: -1, or before the spatial ones
    """

    func: Callable
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    channel_dim: int


def linear_call(func: Callable, args: tuple, kwargs: dict) -> LinearCall | None:
    """What this call of a torch function is, if it is a linear."""
    if func not in LINEAR and func not in POINTWISE_CONV:
        return None
    given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
    kernel = given["weight"].shape[2:]  # of a linear, nothing
    if not is_over_channels(kernel, given.get("stride", 1), given.get("padding", 0), given.get("groups", 1)):
        return None
    return LinearCall(func, given["input"], given["weight"], given.get("bias"), -1 - POINTWISE_CONV.get(func, 0))


def run(call: LinearCall, packed: PackedLinear) -> Tensor:
    """The 4-bit result, of the dtype that the 16-bit linear would give. Raises GradientsNeeded, TangentsNeeded, and
    RuntimeError for operands that do not fit.
    """
    operands = [t for t in (call.input, call.weight, call.bias) if t is not None]
    _check(call, packed)
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        raise GradientsNeeded
    if are_differentiated(operands):
        raise TangentsNeeded
    return product(call.input, packed, call.bias, call.channel_dim)


def product(x: Tensor, packed: PackedLinear, bias: Tensor | None, channel_dim: int) -> Tensor:
    """A quantized linear along one dimension of x, in autocast's dtype where that is enabled."""
    rows = x.movedim(channel_dim, -1)
    if _has_autocast(x):
        device = x.device.type
        with torch.autocast(device, enabled=False):
            y = ops.linear(rows, packed, bias, torch.get_autocast_dtype(device))
    else:
        y = ops.linear(rows, packed, bias, x.dtype)
    if channel_dim == -1:
        return y
    y = y.movedim(-1, channel_dim)
    # Where channels lay last they lie last again, as a convolution leaves them.
    return y if rows.is_contiguous() and not x.is_contiguous() else y.contiguous()


def _has_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _check(call: LinearCall, packed: PackedLinear) -> None:
    x, weight, bias, spatial = call.input, call.weight, call.bias, -1 - call.channel_dim
    fits = (
        x.dim() > spatial
        and (not spatial or x.dim() <= spatial + 2)
        and x.shape[call.channel_dim] == packed.in_features
        and (x.dtype == weight.dtype or (_has_autocast(x) and x.is_floating_point()))
        and (x.device == packed.device or x.is_meta)
        and (bias is None or (bias.shape == (packed.out_features,) and (bias.device == x.device or x.is_meta)))
    )
    if not fits:
        operands = [t for t in (x, weight, bias) if t is not None]
        told = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in operands)
        raise RuntimeError(f"{call.func.__name__}: the shapes, dtypes or devices of its operands do not fit: {told}")


def expanded(weight: Tensor, packed: PackedLinear) -> Tensor:
    """A weight that no 4-bit product takes, in 16-bit: gone when its reader is done."""
    shared = packed.shared
    tensors = shared.smooth, packed.up, packed.down, *packed.weight
    return expand(
        packed.precision,
        shared.rotate,
        tuple(weight.shape),
        weight.dtype,
        *tensors,
        taps_first=packed.taps_first,
        contiguous=weight.is_contiguous(),
    )


@cache
def advise() -> None:
    """Say once that there is a faster way."""
    log.warning(
        "svdquant: linears of a quantized model run outside compiled code, which is slower; if the model is not "
        "compiled, call svdq_compile.compile(model)"
    )
