"""What every launcher needs: tensors checked, a kernel started with little Python, and what the GPU is.

Triton's own launch path takes about 55 us of the host, 150 us with TMA descriptors (measured beside an H200): more than
many of these kernels run. `launch` goes through it once for each specialization and keeps the compiled kernel, which
brings a call to about 35 and 50 us.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction


class Descriptor(NamedTuple):
    """What Triton's launcher reads of a TensorDescriptor, without its constructor's checks."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any
    padding: str = "zero"
    round_f32_to_tf32: bool = False


_compiled: dict[tuple, CompiledKernel] = {}


def launch(kernel: JITFunction, grid: tuple[int, int, int], arguments: tuple, constants: tuple, **options: int) -> None:
    """Start a kernel on the current device.

    arguments  tensors, ints, floats, `Descriptor`s and tuples of these in the order of the kernel's parameters
    constants  its constexpr parameters, which come last; the functions of hooks among them
    options    num_warps, num_stages
    """
    key = (
        kernel.fn,
        torch.cuda.current_device() if torch.cuda.is_available() else None,
        constants,
        *options.values(),
        *[_specialization(a) for a in arguments],
    )
    compiled = _compiled.get(key)
    if compiled is None:
        arguments = tuple(_described(a) if isinstance(a, Descriptor) else a for a in arguments)
        _compiled[key] = kernel[grid](*arguments, *constants, **options)
    else:
        compiled[grid](*arguments, *constants)


def _specialization(argument: Tensor | int | float | Descriptor | tuple) -> object:
    """All that Triton compiles in about an argument: types, divisibility by 16, and the int 1."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, float):
        return float
    if isinstance(argument, Descriptor):
        return argument.base.dtype, argument.block_shape
    return tuple(_specialization(a) for a in argument)


def _described(descriptor: Descriptor) -> object:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    base, shape, strides, block_shape, layout, padding, _ = descriptor
    return TensorDescriptor(base, list(shape), list(strides), list(block_shape), layout, padding)


def check_tensor(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise unless the tensor is contiguous and has this device, dtype and shape."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, its strides are {tensor.stride()}")


def check_low_rank(xd: Tensor, up: Tensor, rows: int, features: int) -> None:
    """Raise unless xd [rows, r] (columns side by side, any row stride) and up [features, r] belong together."""
    if xd.ndim != 2 or xd.shape[0] != rows or (xd.shape[1] and xd.stride(1) != 1):
        raise ValueError(f"xd has shape {tuple(xd.shape)}, strides {xd.stride()}, expected ({rows}, r) with stride 1")
    check_tensor("up", up, xd.device, xd.dtype, (features, xd.shape[1]))


@cache
def _kept_counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32, device=device)


def zeroed_counters(device: torch.device) -> Tensor:
    """1024 int32 zeros for programs of one launch to count themselves; the kernel leaves them zero again.

    Each stream has its own, so that launches which may overlap never share them; a CUDA graph, which may run on any
    stream, gets its own for each launch.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1024, dtype=torch.int32, device=device)
    return _kept_counters(device, torch.cuda.current_stream(device).cuda_stream)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
