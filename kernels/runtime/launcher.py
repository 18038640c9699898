"""What every launcher needs: tensors checked, a kernel started with little Python, and what the GPU is.

Triton's own launch path takes about 55 us of the host, 150 us with TMA descriptors (measured beside an H200): more than
many of these kernels run. `launch` goes through it once for each specialization. After that it calls the compiled
launcher itself, in 10 and 14 us (beside an H100): with addresses in place of tensors, which saves asking the driver
about each, and with TMA descriptors encoded earlier. A descriptor is a function of an address, shape, strides and what
the kernel was compiled for; weights never move, and PyTorch's allocator hands activations the same addresses step after
step.

On sm_90 and newer a kernel that begins with `gdc_wait()` may be launched with `launch_pdl=True` (programmatic dependent
launch): the GPU then brings it to the multiprocessors while the kernel before it in the stream ends, and lets it go on
when all that one wrote is there. It must wait before its first access to memory, weights included: a LoRA adapter may
just have been written.
"""

import copy
import inspect
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver


@dataclass(frozen=True)
class Address:
    """As much of a tensor as the encoding of a descriptor reads."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class Descriptor(NamedTuple):
    """What Triton's launcher reads of a TensorDescriptor, without its constructor's checks."""

    base: Tensor | Address
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any
    padding: str = "zero"
    round_f32_to_tf32: bool = False


class Started(NamedTuple):
    """A kernel that has been compiled, and how to start it."""

    compiled: CompiledKernel
    direct: "Direct | None"  # None: through Triton
    layouts: list  # which the key knows by identity


_started: dict[tuple, Started] = {}
# While lowering/replay.py looks on: `on_launch`, which is told what is launched how; `counters`, how many were asked
# for; `has_measured`, whether tiles were tried.
recording = threading.local()

COUNTERS = 66 * 1024  # for kernels/hopper/quantize.py: 64 rows and two counters of each of 1024 row blocks
MAX_ENCODED = 4096  # descriptors kept for each parameter of a compiled kernel, about 0.5 KB each


def launch(kernel: JITFunction, grid: tuple[int, int, int], arguments: tuple, constants: tuple, **options: int) -> None:
    """Start a kernel on the current device.

    arguments  tensors, ints, floats, `Descriptor`s and tuples of these in the order of the kernel's parameters
    constants  its constexpr parameters, which come last; generated functions among them
    options    num_warps, num_stages, maxnreg, launch_pdl
    """
    current_device, current_stream = gpu()
    device = current_device()
    entries: list = [kernel.fn, device, constants, *options.items()]
    values: list = []
    _read(arguments, entries, values)
    key = tuple(entries)
    known = _started.get(key)
    on_launch = getattr(recording, "on_launch", None)
    if on_launch is not None:
        on_launch(known and known.direct, grid, arguments)
    if known is None:
        compiled = kernel[grid](*[_described(a) for a in arguments], *constants, **options)
        if compiled is not None:  # None from the interpreter
            layouts = [a.layout for a in arguments if isinstance(a, Descriptor)]
            _started[key] = Started(compiled, _direct(compiled, arguments, constants), layouts)
    elif known.direct is None or is_observed():
        known.compiled[grid](*arguments, *constants)
    else:
        for i, encode in known.direct.encoders:
            values[i : i + 1] = encode(values[i], arguments[i])
        known.direct(grid, current_stream(device), values)


def early_launch(early: bool) -> dict[str, bool]:
    """The option of a kernel that begins with `gdc_wait()`, or none: other GPUs' compilers do not know it."""
    return {"launch_pdl": True} if early else {}


@cache
def gpu() -> tuple[Callable[[], int | None], Callable[[int | None], int | None]]:
    """Which device is current, and a device's current stream."""
    if not torch.cuda.is_available():
        return lambda: None, lambda device: None
    return driver.active.get_current_device, driver.active.get_current_stream


def is_observed() -> bool:
    """Whether a profiler wants to know each launch's kernel and arguments, which only Triton's own path tells it."""
    runtime = knobs.runtime
    return bool(getattr(runtime.launch_enter_hook, "calls", 0) or getattr(runtime.launch_exit_hook, "calls", 0))


def _read(arguments: tuple, key: list, values: list) -> None:
    """Append to `key` all that Triton compiles in about the arguments, to `values` what a launch passes.

    Compiled in are types, divisibility by 16, and the int 1. A tuple's entry says how many of the next are its own.
    """
    for a in arguments:
        kind = type(a)
        if kind is int:
            if a == 1:
                key.append(1)
            elif -(2**31) <= a < 2**31:
                key.append(2 if a & 15 else 3)
            else:
                key.append(4 if a & 15 else 5)
            values.append(a)
        elif kind is Descriptor:
            base, shape, strides, block_shape, layout, padding, rounded = a
            key += base.dtype, block_shape, id(layout)
            values.append((base.data_ptr(), shape, strides, padding, rounded))
        elif isinstance(a, Tensor):
            address = a.data_ptr()
            # The device, so that a tensor of another one goes to Triton, whose error is clear.
            key += a.dtype, a.get_device(), address & 15 == 0
            values.append(address)
        elif kind is tuple:
            key.append(-len(a))
            inside: list = []
            _read(a, key, inside)
            values.append(tuple(inside))
        else:
            key.append(kind)
            values.append(a)


def _described(argument: object) -> object:
    if not isinstance(argument, Descriptor):
        return argument
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    base, shape, strides, block_shape, layout, padding, _ = argument
    return TensorDescriptor(base, list(shape), list(strides), list(block_shape), layout, padding)


def _direct(compiled: CompiledKernel, arguments: tuple, constants: tuple) -> "Direct | None":
    try:
        return Direct(compiled, arguments, constants)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


class Direct:
    """A compiled kernel's start past Triton's wrappers. All that knows their inside is here: they must look as they do
    in 3.6 or 3.9, or this raises.

    encoders  for each `Descriptor`, from the last to the first: its place among the arguments; and a function of its
              value in `_read` and itself -> the several values that are passed for it
    """

    def __init__(self, compiled: CompiledKernel, arguments: tuple, constants: tuple) -> None:
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
            raise ValueError("the wrapper allocates memory for each call")
        slots = [i for i, a in enumerate(arguments) if isinstance(a, Descriptor)]
        metas = compiled.metadata.tensordesc_meta if slots else []
        self.encoders = [(i, _encoder(launcher, meta)) for i, meta in zip(slots, metas, strict=True)][::-1]
        self._call = inspect.getclosurevars(launcher.launch).nonlocals["launcher"] if slots else launcher.launch
        self._fixed, self._is_flat = _fixed_arguments(launcher, compiled)
        self._constants = constants

    def __call__(self, grid: tuple[int, int, int], stream: int | None, values: list) -> None:
        if self._is_flat:
            self._call(*grid, stream, *self._fixed, *values, *self._constants)
        else:
            self._call(*grid, stream, *self._fixed, (*values, *self._constants))

    def text(self, grid: tuple[int, int, int], stream: str, values: list[str], name: Callable[[Any], str]) -> str:
        """The same as an expression, of expressions for the stream and the values; name: makes one for an object."""
        passed = ", ".join([*values, *map(name, self._constants)])
        fixed = [*map(str, grid), stream, *map(name, self._fixed)]
        return f"{name(self._call)}({', '.join(fixed)}, {passed if self._is_flat else f'({passed},)'})"


def _fixed_arguments(launcher: Any, compiled: CompiledKernel) -> tuple[tuple, bool]:
    """What Triton's wrapper passes between the stream and the kernel's own arguments, the same in every call, and
    whether those follow one by one (3.6) or in a sequence (3.9).
    """
    passed: list[tuple] = []
    wrapper = copy.copy(launcher)
    wrapper.launch = lambda *a: passed.append(a)
    first, mark = (1, 2, 3, 4), object()  # grid and stream
    wrapper(*first, compiled.function, compiled.packed_metadata, None, None, None, mark)
    *fixed, last = passed[0]
    if tuple(fixed[:4]) != first or (last is not mark and tuple(last) != (mark,)):
        raise ValueError("an unknown order of arguments")
    return tuple(fixed[4:]), last is mark


def _encoder(launcher: Any, meta: dict) -> Callable[[tuple, Descriptor], list]:
    make = sys.modules[type(launcher).__module__].make_tensordesc_arg
    unused = [None] * (len(inspect.signature(make).parameters) - 2)
    encoded: dict[tuple, list] = {}

    def encode(value: tuple, descriptor: Descriptor) -> list:
        known = encoded.get(value)
        if known is None:
            if len(encoded) >= MAX_ENCODED:
                encoded.clear()
            known = encoded[value] = make(_described(descriptor), meta, *unused)
        return known

    return encode


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
def _kept_counters(device: torch.device, stream: int | None) -> Tensor:
    """By a thread of its own: what this one allocates while Inductor warms a CUDA graph up belongs to the graph."""

    def allocate() -> Tensor:
        counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        return counters

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()


def zeroed_counters(device: torch.device, count: int) -> Tensor:
    """`count` int32 zeros or more, for programs of one launch to count themselves; the kernel leaves them zero again.

    There are COUNTERS at most. Each stream has its own, so that launches which may overlap never share them; a CUDA
    graph, which may run on any stream, gets its own for each launch.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    recording.counters = max(count, getattr(recording, "counters", 0))
    return _kept_counters(device, gpu()[1](device.index))
