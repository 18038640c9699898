"""Operators without their Python: what a call did, done again for other tensors.

Between an operator and its kernels lie checks, the choice of a kernel and of its tile, and the description of every
argument. All of that follows from the operands' shapes, strides, dtypes and alignment, and costs the host more than the
launches themselves. So it is done for the first two calls with the same of these; the second is recorded as a few lines
of Python, the plan, and from the third on the same kernels are started with the new addresses:

    def plan(a0, a1, a2, a3, a4):                            quantize(x, smooth, down, "w4a8", 0.0)
        p0, p1, p2 = a0.data_ptr(), a1.data_ptr(), a2.data_ptr()
        if (p0 | p1 | p2) & 15 or ...: return None           # recorded for aligned memory
        stream = current_stream(0)
        t3 = allocate((4608, 3072), (3072, 1), int8)
        p3 = t3.data_ptr(); ...
        launch(132, 1, 1, stream, ..., *descriptor(p0), p1, 4608, ...)
        return t3, ...

What a call allocates and does not return lies in one piece of scratch memory, at places that others had before or get
after it. Operators of torch's (attention, a library's product) are called again, on tensors of the same form.

A launch still costs 10 to 20 us, and a denoising loop gets the same memory from torch's allocator step after step. So
where several kernels start at the addresses that they have started at before, they are one CUDA graph from then on
(`Repeated`). It is only launched where every address is the one in it: nothing is copied, and nothing kept for it.

Compiled code calls an operator through a `Site` of its own for each set of sizes: there the operands look alike at
every call, so the plan is at hand. Elsewhere it is looked up by what the operands look like.

A call can be replayed if all it did on the GPU was `launcher.launch` and operators of torch's that give tensors, on
memory that came in as an operand or was made during the call. A number read from the GPU is noticed, and such a call
runs as ever. Not noticed are numbers read from elsewhere, so a launcher must depend on nothing but metadata.
"""

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..kernels.runtime.target import has_kernels
from .cuda_graphs import captured, is_capturing
from .torch_private import allocator, reinterpret

if TYPE_CHECKING:
    from ..kernels.runtime.launcher import Direct

Plan = Callable[..., Any]  # of the operands; None where it does not stand for them

log = logging.getLogger("svdq_compile.lowering")

MAX_PLANS = 4096  # for each operator
MAX_ADDRESSES = 2048  # whose descriptors a plan keeps, for each of its parameters
ATTEMPTS = 3  # at recording: the first may meet a measurement of tiles
MAX_GRAPHS = 512  # of each run of launches: one for each block, and what else changes addresses
ALIGNMENT = 256  # of what lies in scratch memory, in bytes

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)
_nested = threading.local()  # `is_recorded`: an operator is, so those that it calls must not go by plans of their own


@functools.cache
def _launcher() -> Any:
    """Imported when there is a GPU that needs it: Triton may not be installed, and takes its time."""
    from ..kernels.runtime import launcher

    return launcher


class NotReplayable(Exception):
    """This call did something that a replay would miss."""


class Launch(NamedTuple):
    """A kernel of ours that was started."""

    direct: "Direct | None"
    grid: tuple[int, int, int]
    arguments: tuple


class Call(NamedTuple):
    """An operator of torch's that was called, and what it gave."""

    function: Any
    args: tuple
    kwargs: dict
    result: Any


Step = Launch | Call


class _Watch(TorchDispatchMode):
    """Sees every torch operator of a call, and so knows of each tensor which source's memory it is.

    sources  the operands, then what the call allocated, and what operators of torch's made
    steps    what happened on the GPU, in order
    """

    def __init__(self, operands: list[Tensor], steps: list[Step]) -> None:
        super().__init__()
        self.operands = operands
        self.device = operands[0].device
        self.sources: list[Tensor] = []
        self.allocated: set[int] = set()  # by place among the sources
        self.steps = steps
        self.numbers: list[str] = []  # operators that gave something else than tensors of this device
        self._place: dict[int, int] = {}  # an id is a tensor's only while it lives: `_kept`
        self._kept: list[Tensor] = []
        for t in operands:
            self.add(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.device == self.device:
            self.allocated.add(self.add(result))
        elif func.is_view and id(args[0]) in self._place and _is_in_memory_of(args[0], result):
            for view in [result] if isinstance(result, Tensor) else result:
                self._kept.append(view)
                self._place[id(view)] = self._place[id(args[0])]
        else:
            self._note(Call(func, args, kwargs or {}, result))
        return result

    def _note(self, call: Call) -> None:
        results = _tensors(call.result)
        everything = [*results, *_tensors(call.args), *_tensors(call.kwargs)]
        if not results or any(t.device != self.device for t in everything) or _gives_numbers(call.function):
            self.numbers.append(str(call.function))
            return
        self.steps.append(call)
        for t in results:
            if id(t) not in self._place:  # or it was written to
                self.add(t)

    def add(self, source: Tensor) -> int:
        """Returns its place."""
        self._place[id(source)] = len(self.sources)
        self.sources.append(source)
        return len(self.sources) - 1

    def place(self, tensor: Tensor) -> int:
        """Of the source whose memory this is."""
        if id(tensor) not in self._place:
            raise NotReplayable("memory from elsewhere")
        return self._place[id(tensor)]


def _gives_numbers(function: Any) -> bool:
    """Whether what it gives may depend on values, in its shape too."""
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


def _is_in_memory_of(tensor: Tensor, views: Tensor | list[Tensor]) -> bool:
    """Below autograd, where the dispatcher calls us, `reshape` and `contiguous` come as one operator each: a view, or a
    copy.
    """
    memory = tensor.untyped_storage()._cdata
    return all(v.untyped_storage()._cdata == memory for v in ([views] if isinstance(views, Tensor) else views))


class Replayed:
    """An operator's implementation, of tensors, lists of them and constants, replayed where it can be."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._plans: dict[tuple, Plan | int] = {}  # or how often there was none

    def __call__(self, *operands: Any) -> Any:
        return self.run(operands)[0]

    def run(self, operands: tuple) -> tuple[Any, Plan | None]:
        """The result, and the plan for such operands if there is one by now."""
        if getattr(_nested, "is_recorded", False):
            return self._function(*operands), None
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
        result, made = record(self._function, operands)
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


class Sites:
    """A place in compiled code for any sizes: a `Site` for each value of the symbols that the operands depend on."""

    def __init__(self, operator: Replayed) -> None:
        self._operator = operator
        self._sites: dict[tuple[int, ...], Site] = {}

    def of(self, *sizes: int) -> Site:
        """The site for these sizes."""
        site = self._sites.get(sizes)
        if site is None:
            if len(self._sites) >= MAX_PLANS:
                self._sites.clear()
            site = self._sites[sizes] = Site(self._operator)
        return site


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


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_iter(values) if isinstance(t, Tensor)]


def _is_recordable(operands: tuple) -> bool:
    if not all(t.is_cuda and has_kernels(t.device) for t in _tensors(operands)):
        return False
    return not _launcher().is_observed() and not is_capturing()


def record(function: Callable[..., Any], operands: tuple) -> tuple[Any, Plan | None]:
    """Run a call -> its result, and the plan to repeat it, if there can be one."""
    recording = _launcher().recording
    steps: list[Step] = []
    recording.on_launch = lambda *launch: steps.append(Launch(*launch))
    recording.counters, recording.has_measured, _nested.is_recorded = 0, False, True
    try:
        with _Watch(_tensors(operands), steps) as watch:
            result = function(*operands)
    finally:
        recording.on_launch, _nested.is_recorded = None, False
    try:
        return result, _plan(operands, watch, result)
    except NotReplayable as reason:
        log.debug("%s runs its Python at every call: %s", getattr(function, "__name__", function), reason)
        return result, None


def _plan(operands: tuple, watch: _Watch, result: Any) -> Plan:
    launching = _launcher()
    if watch.numbers or len({id(t) for t in watch.operands}) < len(watch.operands):
        raise NotReplayable(f"{watch.numbers} give numbers, or one tensor is two operands, which another time are two")
    if launching.recording.has_measured:
        raise NotReplayable("tiles were being measured")
    count = launching.recording.counters
    counters = watch.add(launching.zeroed_counters(watch.device, count))
    uses = [{*_places(watch, step)} for step in watch.steps]
    results = [result] if isinstance(result, Tensor) else list(result)
    text = _Text(watch, uses, results, counters, count)
    lines = [*text.unpacking(operands), *text.conditions(), *text.beginning()]
    for _, run in itertools.groupby(range(len(watch.steps)), lambda i: i if isinstance(watch.steps[i], Call) else -1):
        places = list(run)
        lines += [line for i in places for line in text.allocating(i)]
        lines += text.steps([watch.steps[i] for i in places])
        lines += [line for i in places for line in text.freeing(i)]
    returned = ", ".join(map(text.tensor, results)) + ("" if isinstance(result, Tensor) else ",")
    return text.plan(len(operands), [*lines, f"return {returned}"])


def _places(watch: _Watch, step: Step) -> Iterator[int]:
    """The sources that a step reads or writes."""
    if isinstance(step, Call):
        yield from map(watch.place, _tensors((step.args, step.kwargs, step.result)))
    else:
        yield from map(watch.place, _in_arguments(step.arguments))


def _in_arguments(arguments: tuple) -> Iterator[Tensor]:
    for a in arguments:
        if isinstance(a, _launcher().Descriptor):
            yield a.base
        elif isinstance(a, tuple):
            yield from _in_arguments(a)
        elif isinstance(a, Tensor):
            yield a


class _Text:
    """A plan's lines while they are put together. In them p0, p1, ... are the addresses of the sources: the operands,
    what is made (t2, t3, ...) and the counters; s is the address of scratch memory.

    uses     by step: the places of the sources that it reads or writes
    results  the call's
    """

    def __init__(self, watch: _Watch, uses: list[set[int]], results: list[Tensor], counters: int, count: int) -> None:
        self._watch, self._device = watch, watch.device
        self._counters, self._count = counters, count
        self._spans = _spans(uses)
        self._returned = self._check_results(results)
        self._objects: dict[str, Any] = {}
        self._used: set[str] = set()  # names of addresses in the launches since it was emptied
        called = {place for step, places in zip(watch.steps, uses, strict=True) if isinstance(step, Call)
                  for place in places}  # fmt: skip
        inner = [p for p in self._spans if p in watch.allocated and p not in self._returned and p not in called]
        sizes = {place: watch.sources[place].untyped_storage().nbytes() for place in inner}
        self._offsets, self._scratch = arrange(sizes, self._spans)

    def _check_results(self, results: list[Tensor]) -> dict[int, Tensor]:
        """By place. Each is the whole of what was made in the call, another one each."""
        returned: dict[int, Tensor] = {}
        for t in results:
            place = self._watch.place(t)
            source = self._watch.sources[place]
            is_whole = t.data_ptr() == source.data_ptr() and t.nbytes == source.nbytes
            if place < len(self._watch.operands) or place in returned or not is_whole:
                raise NotReplayable("a result that is not the whole of what was made")
            returned[place] = t
        return returned

    def name(self, value: Any) -> str:
        """An expression for an object."""
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"k{len(self._objects)}"
        self._objects[name] = value
        return name

    def address(self, tensor: Tensor) -> str:
        place = self._watch.place(tensor)
        offset = tensor.data_ptr() - self._watch.sources[place].data_ptr() if tensor.numel() else 0
        base = f"p{place}"
        if place in self._offsets:
            base, offset = "s", self._offsets[place] + offset
        self._used.add(base)
        return f"{base} + {offset}" if offset else base

    def unpacking(self, operands: tuple) -> list[str]:
        lines, tensors = [], 0
        for i, a in enumerate(operands):
            inside = [f"a{i}_{j}" for j in range(len(a))] if isinstance(a, list) else [f"a{i}"]
            if isinstance(a, list) and a:
                lines.append(f"{', '.join(inside)}, = a{i}")
            for name, t in zip(inside, a if isinstance(a, list) else [a], strict=True):
                if isinstance(t, Tensor):
                    lines.append(f"t{tensors} = {name}; p{tensors} = {name}.data_ptr()")
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

    def beginning(self) -> list[str]:
        launching, lines = _launcher(), []
        self._allocate = self.name(allocator(self._device))
        if self._scratch:
            lines.append(f"scratch = {self._allocate}(({self._scratch},), (1,), {self.name(torch.uint8)})")
            lines.append("s = scratch.data_ptr()")
        if self._counters in self._spans:
            lines.append(f"counters = {self.name(launching.zeroed_counters)}({self.name(self._device)}, {self._count})")
            lines.append(f"p{self._counters} = counters.data_ptr()")
        for place in self._returned.keys() - self._spans.keys():  # of no rows
            lines += self._allocation(place)
        return [*lines, f"stream = {self.name(launching.gpu()[1])}({self._device.index})"]

    def allocating(self, step: int) -> Iterator[str]:
        """What is used from this step on and does not lie in scratch memory."""
        for place in sorted(self._watch.allocated - self._offsets.keys()):
            if place in self._spans and self._spans[place][0] == step:
                yield from self._allocation(place)

    def _form(self, place: int) -> Tensor:
        """What shape, strides and dtype t0, t1, ... have: of what is allocated and returned, those of the result."""
        source = self._watch.sources[place]
        return self._returned.get(place, source) if place in self._watch.allocated else source

    def _allocation(self, place: int) -> list[str]:
        t = self._form(place)
        made = f"{self._allocate}({tuple(t.shape)}, {t.stride()}, {self.name(t.dtype)})"
        return [f"t{place} = {made}", f"p{place} = t{place}.data_ptr()"]

    def freeing(self, step: int) -> Iterator[str]:
        """What nobody reads after this step."""
        gone = [p for p, (_, last) in self._spans.items() if last == step and self._is_made(p)]
        if gone:
            yield f"del {', '.join(f't{place}' for place in gone)}"

    def _is_made(self, place: int) -> bool:
        own = len(self._watch.operands) <= place < self._counters
        return own and place not in self._returned and place not in self._offsets

    def steps(self, steps: list[Step]) -> list[str]:
        """Of one call, or of launches that follow one another."""
        if isinstance(steps[0], Call):
            return self._call(steps[0])
        self._used = {"stream"}
        lines = [self._launch(step) for step in steps if isinstance(step, Launch)]
        if len(lines) == 1:
            return lines
        given = ", ".join(sorted(self._used, key=lambda name: (name != "stream", name)))
        launching = self._function("launching", given, lines)
        return [f"{self.name(Repeated(launching, self._device))}({given})"]

    def _launch(self, step: Launch) -> str:
        if step.direct is None:
            raise NotReplayable("a kernel that starts through Triton alone")
        encoders = dict(step.direct.encoders)
        values = []
        for place, a in enumerate(step.arguments):
            if isinstance(a, _launcher().Descriptor):
                encoded: dict[int, list] = {}
                encode = functools.partial(_encode, encoded, encoders[place], a.base.dtype, a[1:])
                at = self.address(a.base)
                values.append(f"*({self.name(encoded.get)}({at}) or {self.name(encode)}({at}))")
            elif isinstance(a, tuple):
                values.append(f"({''.join(f'{self._value(i)}, ' for i in a)})")
            else:
                values.append(self._value(a))
        return step.direct.text(step.grid, "stream", values, self.name)

    def _value(self, a: Any) -> str:
        return self.address(a) if isinstance(a, Tensor) else self.name(a)

    def _call(self, step: Call) -> list[str]:
        given = [*map(self._argument, step.args), *(f"{k}={self._argument(v)}" for k, v in step.kwargs.items())]
        lines = [f"r = {self.name(step.function)}({', '.join(given)})"]
        results = [step.result] if isinstance(step.result, Tensor) else step.result
        for i, t in enumerate(results):
            if isinstance(t, Tensor) and self._watch.sources[self._watch.place(t)] is t:
                place = self._watch.place(t)
                if self._is_made(place) or place in self._returned:
                    lines.append(f"t{place} = r{'' if t is step.result else f'[{i}]'}; p{place} = t{place}.data_ptr()")
        return [*lines, "del r"]

    def _argument(self, a: Any) -> str:
        if isinstance(a, Tensor):
            return self.tensor(a)
        if isinstance(a, list | tuple):
            inside = "".join(f"{self._argument(i)}, " for i in a)
            return f"[{inside}]" if isinstance(a, list) else f"({inside})"
        return self.name(a)

    def tensor(self, tensor: Tensor) -> str:
        """A tensor of this form in the memory of its source."""
        place = self._watch.place(tensor)
        made = self._form(place)
        if tensor.dtype != made.dtype:
            raise NotReplayable("memory read as another type")
        offset = tensor.storage_offset() - made.storage_offset()
        if (tensor.shape, tensor.stride(), offset) == (made.shape, made.stride(), 0):
            return f"t{place}"
        return f"{self.name(reinterpret)}(t{place}, {tuple(tensor.shape)}, {tensor.stride()}, {offset})"

    def plan(self, parameters: int, lines: list[str]) -> Plan:
        return self._function("plan", ", ".join(f"a{i}" for i in range(parameters)), lines)

    def _function(self, name: str, parameters: str, lines: list[str]) -> Callable[..., Any]:
        source = "\n    ".join([f"def {name}({parameters}):", *lines])
        exec(compile(source, f"<an svdq operator, {name}>", "exec"), self._objects)
        return self._objects[name]


class Repeated:
    """Launches of kernels, as a CUDA graph where they are at the addresses of an earlier call.

    launch  (stream, *addresses): starts them one by one
    """

    def __init__(self, launch: Callable[..., None], device: torch.device) -> None:
        self._launch, self._device = launch, device
        self._graphs: dict[tuple[int, ...], Callable[[], None] | None] = {}  # None: met once
        self._can = True

    def __call__(self, *given: int) -> None:
        graph = self._graphs.get(given)
        if graph is not None and not is_capturing():
            graph()
        elif graph is None and given in self._graphs and self._can and not is_capturing():
            self._capture(given)
        else:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.clear()
            self._graphs.setdefault(given)
            self._launch(*given)

    def _capture(self, given: tuple[int, ...]) -> None:
        try:
            graph = captured(lambda stream: self._launch(stream, *given[1:]), self._device)
        except RuntimeError as error:
            log.info("launches stay apart, they cannot be a CUDA graph: %s", error)
            self._can = False
            self._launch(*given)
        else:
            self._graphs[given] = graph
            graph()


def _spans(uses: list[set[int]]) -> dict[int, tuple[int, int]]:
    """By place: the first step that uses it, and the last."""
    spans: dict[int, tuple[int, int]] = {}
    for step, places in enumerate(uses):
        for place in places:
            spans[place] = (spans.get(place, (step, step))[0], step)
    return spans


def arrange(sizes: Mapping[int, int], spans: Mapping[int, tuple[int, int]]) -> tuple[dict[int, int], int]:
    """Where in one piece of memory each lies, and how large it is: what is in use at the same time lies apart. The
    largest first, each as far in front as it can.
    """
    offsets: dict[int, int] = {}
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        begin, end = spans[name]
        offset = 0
        for other in sorted(offsets, key=offsets.__getitem__):
            is_apart = spans[other][1] < begin or end < spans[other][0]
            if not is_apart and offset + sizes[name] > offsets[other]:
                offset = max(offset, _aligned(offsets[other] + sizes[other]))
        offsets[name] = offset
    return offsets, max((offset + sizes[name] for name, offset in offsets.items()), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _encode(encoded: dict[int, list], encode: Callable, dtype: torch.dtype, rest: tuple, address: int) -> list:
    if len(encoded) >= MAX_ADDRESSES:
        encoded.clear()
    launching = _launcher()
    descriptor = launching.Descriptor(launching.Address(address, dtype), *rest)
    encoded[address] = encode((address, *rest[:2], *rest[4:]), descriptor)
    return encoded[address]
