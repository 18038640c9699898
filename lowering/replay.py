"""Operators without their Python: what a call launched, launched again for other tensors.

Between an operator and its kernels lie checks, the choice of a kernel and of its tile, and the description of every
argument. All of that follows from the operands' shapes, strides, dtypes and alignment, and costs the host more than the
launches themselves. So it is done for the first two calls with the same of these; the second is recorded as a few lines
of Python, the plan, and from the third on the same kernels are started with the new addresses:

    def plan(a0, a1, a2, a3, a4):                            quantize(x, smooth, down, "w4a8", 0.0)
        p0, p1, p2 = a0.data_ptr(), a1.data_ptr(), a2.data_ptr()
        if (p0 | p1 | p2) & 15 or ...: return None           # recorded for aligned memory
        t0, ... = allocate((4608, 3072), (3072, 1), int8), ...
        launch(132, 1, 1, stream, ..., *descriptor(p0), p1, 4608, ...)
        return t0, ...

Compiled code calls an operator through a `Site` of its own where all sizes are fixed: there the operands look alike at
every call, so the plan is at hand. Elsewhere it is looked up by what the operands look like.

A call can be replayed if all it did on the GPU was `launcher.launch`, on memory that came in as an operand or was
allocated during the call. Whatever else it asked of torch (a copy, a library product) is noticed, and such a call runs
as ever. Not noticed are numbers read from elsewhere, so a launcher must depend on nothing but metadata.
"""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.runtime.target import has_kernels
from .torch_private import allocator

if TYPE_CHECKING:
    from ..kernels.runtime.launcher import Direct

Plan = Callable[..., Any]  # of the operands; None where it does not stand for them
Recorder = Callable[[Callable[..., Any], tuple], tuple[Any, Plan | None]]  # as `record`

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
def _launcher() -> Any:
    """Imported when there is a GPU that needs it: Triton may not be installed, and takes its time."""
    from ..kernels.runtime import launcher

    return launcher


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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.device == self.operands[0].device:
            self.allocated.append(result)
            self.add(result)
        elif func.is_view and id(args[0]) in self._source and _is_in_memory_of(args[0], result):
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


def _is_in_memory_of(tensor: Tensor, views: Tensor | list[Tensor]) -> bool:
    """Below autograd, where the dispatcher calls us, `reshape` and `contiguous` come as one operator each: a view, or a
    copy.
    """
    memory = tensor.untyped_storage()._cdata
    return all(v.untyped_storage()._cdata == memory for v in ([views] if isinstance(views, Tensor) else views))


class Replayed:
    """An operator's implementation, of tensors, lists of them and constants, replayed where it can be."""

    def __init__(self, function: Callable[..., Any], recorder: "Recorder | None" = None) -> None:
        functools.update_wrapper(self, function)
        self._function, self._record = function, recorder or record
        self._plans: dict[tuple, Plan | int] = {}  # or how often there was none

    def __call__(self, *operands: Any) -> Any:
        return self.run(operands)[0]

    def run(self, operands: tuple) -> tuple[Any, Plan | None]:
        """The result, and the plan for such operands if there is one by now."""
        entries: list = []
        _read(operands, entries)
        key = tuple(entries)
        plan = self._plans.get(key, -1)
        if callable(plan):
            result = plan(*operands)
            return (self._function(*operands) if result is None else result), plan
        if plan >= ATTEMPTS or not _is_recordable(operands):
            return self._function(*operands), None
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        if plan < 0:
            self._plans[key] = 0
            return self._function(*operands), None
        result, made = self._record(self._function, operands)
        self._plans[key] = plan + 1 if made is None else made
        return result, made


class Site:
    """A place in compiled code that calls an operator, with operands that look alike but for their addresses."""

    def __init__(self, operator: Replayed) -> None:
        self._operator = operator
        self._plan: Plan | None = None

    def __call__(self, *operands: Any) -> Any:
        if self._plan is not None:
            result = self._plan(*operands)
            if result is not None:
                return result
        result, self._plan = self._operator.run(operands)
        return result


def _read(operands: tuple | list, key: list) -> None:
    """Append to `key` all that a launcher may decide by."""
    for a in operands:
        if isinstance(a, Tensor):
            key += a.shape, a.stride(), a.dtype, a.get_device(), a.data_ptr() & 15
        elif type(a) is list:
            key.append(len(a))
            _read(a, key)
        else:
            key.append(a)


def _tensors(operands: tuple) -> list[Tensor]:
    return [t for a in operands for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def _is_recordable(operands: tuple) -> bool:
    if not all(t.is_cuda and has_kernels(t.device) for t in _tensors(operands)):
        return False
    return not _launcher().is_observed() and not torch.cuda.is_current_stream_capturing()


def record(function: Callable[..., Any], operands: tuple) -> tuple[Any, Plan | None]:
    """Run a call -> its result, and the plan to repeat it, if there can be one."""
    recording = _launcher().recording
    outer = getattr(recording, "calls", None)
    calls: list[tuple] = []
    recording.calls, recording.counters = calls, 0
    try:
        with _Watch(_tensors(operands)) as watch:
            result = function(*operands)
    finally:
        recording.calls = outer
    try:
        return result, _plan(operands, watch, calls, result)
    except NotReplayable as reason:
        log.debug("%s runs its Python at every call: %s", getattr(function, "__name__", function), reason)
        return result, None


def _plan(operands: tuple, watch: _Watch, calls: list, result: Any) -> Plan:
    if watch.others or len({id(t) for t in watch.operands}) < len(watch.operands):
        raise NotReplayable(f"operators {watch.others}, or one tensor as two operands, which another time are two")
    if len({id(direct) for direct, _, _ in calls}) < len(calls):
        raise NotReplayable("a kernel started twice: tiles were being measured")
    launching = _launcher()
    count = launching.recording.counters
    counters = launching.zeroed_counters(watch.operands[0].device, count)
    watch.add(counters)
    text = _Text(watch, [*watch.operands, *watch.allocated, counters], count)
    launches = [text.launch(*call) for call in calls]
    allocated = [(tuple(t.shape), t.stride(), t.dtype) for t in watch.allocated]
    results: list[int] = []
    for t in [result] if isinstance(result, Tensor) else result:
        source, offset = text.locate(t)
        index = source - len(watch.operands)
        if index < 0 or index in results or offset or t.nbytes != watch.allocated[index].nbytes:
            raise NotReplayable("a result that is not the whole of an allocation")
        allocated[index] = tuple(t.shape), t.stride(), t.dtype
        results.append(index)
    returned = ", ".join(f"t{i}" for i in results) + ("" if isinstance(result, Tensor) else ",")
    lines = *text.unpacking(operands), *text.conditions(), *text.allocating(allocated), *launches
    return text.function(len(operands), [*lines, f"return {returned}"])


class _Text:
    """A plan's lines while they are put together. In them p0, p1, ... are the addresses of the sources: the operands,
    what is allocated (t0, t1, ...) and the counters.
    """

    def __init__(self, watch: _Watch, sources: list[Tensor], count: int) -> None:
        self._watch, self._count = watch, count
        self._place = {id(t): i for i, t in enumerate(sources)}
        self._device = watch.operands[0].device
        self._counts = False
        self._objects: dict[str, Any] = {}

    def name(self, value: Any) -> str:
        """An expression for an object."""
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"k{len(self._objects)}"
        self._objects[name] = value
        return name

    def locate(self, tensor: Tensor) -> tuple[int, int]:
        """In which source, and how many bytes from its beginning."""
        source = self._watch.source(tensor)
        place = self._place[id(source)]
        self._counts |= place == len(self._place) - 1
        return place, tensor.data_ptr() - source.data_ptr() if tensor.numel() else 0  # nothing has no address

    def address(self, tensor: Tensor) -> str:
        place, offset = self.locate(tensor)
        return f"p{place} + {offset}" if offset else f"p{place}"

    def unpacking(self, operands: tuple) -> list[str]:
        lines, tensors = [], 0
        for i, a in enumerate(operands):
            inside = [f"a{i}_{j}" for j in range(len(a))] if isinstance(a, list) else [f"a{i}"]
            if isinstance(a, list) and a:
                lines.append(f"{', '.join(inside)}, = a{i}")
            for name, t in zip(inside, a if isinstance(a, list) else [a], strict=True):
                if isinstance(t, Tensor):
                    lines.append(f"p{tensors} = {name}.data_ptr()")
                    tensors += 1
        return lines

    def conditions(self) -> list[str]:
        """What must be as it was, apart from what the operands look like."""
        launching, low = _launcher(), [t.data_ptr() & 15 for t in self._watch.operands]
        aligned = " | ".join(f"p{i}" for i, bits in enumerate(low) if not bits)
        wrong = [f"({aligned}) & 15"] if aligned else []
        wrong += [f"p{i} & 15 != {bits}" for i, bits in enumerate(low) if bits]
        wrong.append(f"{self.name(launching.gpu()[0])}() != {self._device.index}")
        return [f"if {' or '.join(wrong)} or {self.name(launching.is_observed)}(): return None"]

    def allocating(self, allocated: list[tuple]) -> list[str]:
        allocate, first, lines = self.name(allocator(self._device)), len(self._watch.operands), []
        for i, (shape, strides, dtype) in enumerate(allocated):
            lines += [f"t{i} = {allocate}({shape}, {strides}, {self.name(dtype)})", f"p{first + i} = t{i}.data_ptr()"]
        launching = _launcher()
        if self._counts:
            lines.append(f"counters = {self.name(launching.zeroed_counters)}({self.name(self._device)}, {self._count})")
            lines.append(f"p{len(self._place) - 1} = counters.data_ptr()")
        return [*lines, f"stream = {self.name(launching.gpu()[1])}({self._device.index})"]

    def launch(self, direct: "Direct | None", grid: tuple, arguments: tuple) -> str:
        if direct is None:
            raise NotReplayable("a kernel that starts through Triton alone")
        encoders = dict(direct.encoders)
        values = []
        for place, a in enumerate(arguments):
            if isinstance(a, _launcher().Descriptor):
                encoded: dict[int, list] = {}
                encode = functools.partial(_encode, encoded, encoders[place], a.base.dtype, a[1:])
                at = self.address(a.base)
                values.append(f"*({self.name(encoded.get)}({at}) or {self.name(encode)}({at}))")
            elif isinstance(a, tuple):
                values.append(f"({''.join(f'{self.value(i)}, ' for i in a)})")
            else:
                values.append(self.value(a))
        return direct.text(grid, "stream", values, self.name)

    def value(self, a: Any) -> str:
        return self.address(a) if isinstance(a, Tensor) else self.name(a)

    def function(self, parameters: int, lines: list[str]) -> Plan:
        source = "\n    ".join([f"def plan({', '.join(f'a{i}' for i in range(parameters))}):", *lines])
        exec(compile(source, "<an svdq operator, replayed>", "exec"), self._objects)
        return self._objects["plan"]


def _encode(encoded: dict[int, list], encode: Callable, dtype: torch.dtype, rest: tuple, address: int) -> list:
    if len(encoded) >= MAX_ADDRESSES:
        encoded.clear()
    launching = _launcher()
    descriptor = launching.Descriptor(launching.Address(address, dtype), *rest)
    encoded[address] = encode((address, *rest[:2], *rest[4:]), descriptor)
    return encoded[address]
