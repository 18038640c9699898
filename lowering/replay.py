"""Operators without their Python: what a call launched, launched again for other tensors.

Between an operator and its kernels lie checks, the choice of a kernel and of its tile, and the description of every
argument. All of that follows from the operands' shapes, strides, dtypes and alignment, and costs the host more than the
launches themselves. So it is done for the first two calls with the same of these; the second is recorded, and from the
third on the same kernels are started with the new addresses.

A call can be replayed if all it did on the GPU was `triton_launch.launch`, on memory that came in as an operand or was
allocated during the call. Whatever else it asked of torch (a copy, a library product) is noticed, and such a call runs
as ever. Not noticed are numbers read from elsewhere, so a launcher must depend on nothing but metadata.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import has_kernels
from .torch_private import allocator

if TYPE_CHECKING:
    from ..kernels.triton_launch import Direct

log = logging.getLogger("svdq_compile.lowering")

MAX_PLANS = 4096  # for each operator
MAX_ADDRESSES = 2048  # whose descriptors a plan keeps, for each of its parameters
ATTEMPTS = 3  # at recording: the first may meet a measurement of tiles

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


@functools.cache
def _triton_launch() -> Any:
    """Imported when there is a GPU that needs it: Triton may not be installed, and takes its time."""
    from ..kernels import triton_launch

    return triton_launch


class NotReplayable(Exception):
    """This call did something that a replay would miss."""


class _Watch(TorchDispatchMode):
    """Sees every torch operator of a call, and so knows of each tensor which source's memory it is.

    sources  the operands, then what the call allocated
    others   operators that are neither allocations nor views
    """

    def __init__(self, operands: list[Tensor]) -> None:
        super().__init__()
        self.operands = operands
        self.allocated: list[Tensor] = []
        self.others: list[str] = []
        self._source: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # an id is a tensor's only while it lives
        for t in operands:
            self.add(t)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.device == self.operands[0].device:
            self.allocated.append(result)
            self.add(result)
        elif func.is_view and id(args[0]) in self._source:
            for view in [result] if isinstance(result, Tensor) else result:
                self._kept.append(view)
                self._source[id(view)] = self._source[id(args[0])]
        else:
            self.others.append(str(func))
        return result

    def add(self, source: Tensor) -> None:
        self._source[id(source)] = source

    def source(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._source:
            raise NotReplayable("memory from elsewhere")
        return self._source[id(tensor)]


@dataclass
class _Launch:
    """One kernel: its arguments with holes for the addresses, each a source's (see `Plan`) plus an offset."""

    direct: "Direct"
    grid: tuple[int, int, int]
    values: list
    pointers: list[tuple[int, int, int]] = field(default_factory=list)  # place, source, offset
    tuples: list[tuple[int, list]] = field(default_factory=list)  # place, (source, offset) or a number each
    descriptors: list[tuple] = field(default_factory=list)  # place, source, offset, encoded by address, encode

    def __call__(self, sources: list[int], stream: int | None) -> None:
        values = self.values.copy()
        for place, source, offset in self.pointers:
            values[place] = sources[source] + offset
        for place, inside in self.tuples:
            values[place] = tuple(sources[i[0]] + i[1] if type(i) is tuple else i for i in inside)
        for place, source, offset, encoded, encode in self.descriptors:
            address = sources[source] + offset
            values[place : place + 1] = encoded.get(address) or encode(address)
        self.direct(self.grid, stream, values)


@dataclass
class Plan:
    """A recorded call. Sources are addresses: of the operands, then of what is allocated, then of the counters."""

    device: torch.device
    allocate: Callable[..., Tensor]
    allocated: list[tuple]  # shape, strides, dtype
    results: list[int] | int  # which of these are returned
    launches: list[_Launch]
    counts: bool  # whether a kernel takes the counters

    def __call__(self, addresses: list[int]) -> Any:
        device, launching = self.device, _triton_launch()
        fresh = [self.allocate(*size) for size in self.allocated]
        sources = addresses + [t.data_ptr() for t in fresh]
        if self.counts:
            counters = launching.zeroed_counters(device)
            sources.append(counters.data_ptr())
        stream = launching.gpu()[1](device.index)
        for start in self.launches:
            start(sources, stream)
        if isinstance(self.results, int):
            return fresh[self.results]
        return tuple([fresh[i] for i in self.results])


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's implementation, of tensors, lists of them and constants -> itself, replayed where it can be."""
    plans: dict[tuple, Plan | int] = {}  # or how often there was none

    @functools.wraps(function)
    def call(*operands: Any) -> Any:
        entries: list = []
        addresses: list[int] = []
        _read(operands, entries, addresses)
        key = tuple(entries)
        plan = plans.get(key, -1)
        if isinstance(plan, Plan):
            launching = _triton_launch()
            if plan.device.index == launching.gpu()[0]() and not launching.is_observed():
                return plan(addresses)
        elif plan < ATTEMPTS and _is_recordable(operands):
            if len(plans) >= MAX_PLANS:
                plans.clear()
            if plan < 0:
                plans[key] = 0
                return function(*operands)
            result, made = record(function, operands)
            plans[key] = plan + 1 if made is None else made
            return result
        return function(*operands)

    return call


def _read(operands: tuple | list, key: list, addresses: list[int]) -> None:
    """Append to `key` all that a launcher may decide by, to `addresses` where the tensors are."""
    for a in operands:
        if isinstance(a, Tensor):
            address = a.data_ptr()
            addresses.append(address)
            key += a.shape, a.stride(), a.dtype, a.get_device(), address & 15
        elif type(a) is list:
            key.append(len(a))
            _read(a, key, addresses)
        else:
            key.append(a)


def _tensors(operands: tuple) -> list[Tensor]:
    return [t for a in operands for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def _is_recordable(operands: tuple) -> bool:
    if not all(t.is_cuda and has_kernels(t.device) for t in _tensors(operands)):
        return False
    return not _triton_launch().is_observed() and not torch.cuda.is_current_stream_capturing()


def record(function: Callable[..., Any], operands: tuple) -> tuple[Any, Plan | None]:
    """Run a call -> its result, and the plan to repeat it, if there can be one."""
    recording = _triton_launch().recording
    outer = getattr(recording, "calls", None)
    calls: list[tuple] = []
    recording.calls = calls
    try:
        with _Watch(_tensors(operands)) as watch:
            result = function(*operands)
    finally:
        recording.calls = outer
    try:
        return result, _plan(watch, calls, result)
    except NotReplayable as reason:
        log.debug("%s runs its Python at every call: %s", getattr(function, "__name__", function), reason)
        return result, None


def _plan(watch: _Watch, calls: list, result: Any) -> Plan:
    if watch.others or len({id(t) for t in watch.operands}) < len(watch.operands):
        raise NotReplayable(f"operators {watch.others}, or one tensor as two operands, which another time are two")
    if len({id(direct) for direct, _, _ in calls}) < len(calls):
        raise NotReplayable("a kernel started twice: tiles were being measured")
    device = watch.operands[0].device
    counters = _triton_launch().zeroed_counters(device)
    watch.add(counters)
    sources = {id(t): i for i, t in enumerate([*watch.operands, *watch.allocated, counters])}
    located: set[int] = set()

    def locate(tensor: Any) -> tuple[int, int]:
        source = watch.source(tensor)
        located.add(id(source))
        offset = tensor.data_ptr() - source.data_ptr() if tensor.numel() else 0  # nothing has no address
        return sources[id(source)], offset

    launches = [_launch(locate, *call) for call in calls]
    counts = id(counters) in located
    allocated = [(tuple(t.shape), t.stride(), t.dtype) for t in watch.allocated]
    results = []
    for t in [result] if isinstance(result, Tensor) else result:
        source, offset = locate(t)
        index = source - len(watch.operands)
        if index < 0 or index in results or offset or t.nbytes != watch.allocated[index].nbytes:
            raise NotReplayable("a result that is not the whole of an allocation")
        allocated[index] = tuple(t.shape), t.stride(), t.dtype
        results.append(index)
    returned = results[0] if isinstance(result, Tensor) else results
    return Plan(device, allocator(device), allocated, returned, launches, counts)


def _launch(locate: Callable[[Any], tuple[int, int]], direct: "Direct | None", grid: tuple,
            arguments: tuple) -> _Launch:  # fmt: skip
    if direct is None:
        raise NotReplayable("a kernel that starts through Triton alone")
    made = _Launch(direct, grid, list(arguments))
    launching = _triton_launch()
    encoders = dict(direct.encoders)
    for place, a in enumerate(arguments):
        if isinstance(a, launching.Descriptor):
            encoded: dict[int, list] = {}
            encode = functools.partial(_encode, encoded, encoders[place], a.base.dtype, a[1:])
            made.descriptors.insert(0, (place, *locate(a.base), encoded, encode))
        elif isinstance(a, Tensor):
            made.pointers.append((place, *locate(a)))
        elif isinstance(a, tuple):
            made.tuples.append((place, [locate(i) if isinstance(i, Tensor) else i for i in a]))
        else:
            continue
        made.values[place] = None
    return made


def _encode(encoded: dict[int, list], encode: Callable, dtype: torch.dtype, rest: tuple, address: int) -> list:
    if len(encoded) >= MAX_ADDRESSES:
        encoded.clear()
    launching = _triton_launch()
    descriptor = launching.Descriptor(launching.Address(address, dtype), *rest)
    encoded[address] = encode((address, *rest[:2], *rest[4:]), descriptor)
    return encoded[address]
