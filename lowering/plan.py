"""The text of a plan: what a call did, as a function of its operands. replay.py says when there is one, and shows it.

What the call allocated and did not return lies in one piece of scratch memory, at places that others had before or get
after it. Operators of torch's (attention, a library's product) are called again, on tensors of the same form.

A launch costs the host 10 to 20 us and an operator of torch's more, and a denoising loop gets the same memory from
torch's allocator step after step. So what has run at the same addresses before is one CUDA graph from then on
(cuda_graphs.py), launched only where every address is the one in it: nothing is copied, and nothing kept for it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from .cuda_graphs import Repeated
from .torch_private import allocator, reinterpret

if TYPE_CHECKING:
    from ..kernels.runtime.launcher import Direct

Plan = Callable[..., Any]  # of the operands; None where it does not stand for them

MAX_ADDRESSES = 2048  # whose descriptors a plan keeps, for each of its parameters
ALIGNMENT = 256  # of what lies in scratch memory, in bytes


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


@functools.cache
def launcher() -> Any:
    """Imported when there is a GPU that needs it: Triton may not be installed, and takes its time."""
    from ..kernels.runtime import launcher

    return launcher


class Memory:
    """Of each tensor that was seen, which source's memory it is: an operand, what a call allocated or torch made."""

    def __init__(self, operands: list[Tensor]) -> None:
        self.operands = operands
        self.device = operands[0].device
        self.sources: list[Tensor] = []
        self.allocated: set[int] = set()  # by place among the sources
        self._place: dict[int, int] = {}  # an id is a tensor's only while it lives: `_kept`
        self._kept: list[Tensor] = []
        for t in operands:
            self.add(t)

    def __contains__(self, tensor: Any) -> bool:
        return id(tensor) in self._place

    def add(self, source: Tensor) -> int:
        """Returns its place."""
        self._place[id(source)] = len(self.sources)
        self.sources.append(source)
        return len(self.sources) - 1

    def add_view(self, tensor: Tensor, view: Tensor) -> None:
        """Of a tensor that was seen."""
        self._kept.append(view)
        self._place[id(view)] = self._place[id(tensor)]

    def place(self, tensor: Tensor) -> int:
        """Of the source whose memory this is."""
        if tensor not in self:
            raise NotReplayable("memory from elsewhere")
        return self._place[id(tensor)]


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in lists, tuples and dictionaries."""
    return [t for t in tree_iter(values) if isinstance(t, Tensor)]


def make_plan(operands: tuple, memory: Memory, steps: list[Step], counters: int, result: Any) -> Plan:
    """The function that repeats these steps; counters: how many were asked for. Raises NotReplayable."""
    counters_at = memory.add(launcher().zeroed_counters(memory.device, counters))
    results = [result] if isinstance(result, Tensor) else list(result)
    text = _Text(memory, steps, results, counters_at)
    before = [*text.unpacking(operands), *text.conditions(), *text.allocating(counters)]
    returned = ", ".join(map(text.tensor, results)) + ("" if isinstance(result, Tensor) else ",")
    return text.plan(len(operands), [*before, *text.running(), f"return {returned}"])


class _Text:
    """A plan's lines while they are put together. In them p0, p1, ... are the addresses of the sources and t0, t1, ...
    the sources themselves; s is the address of scratch memory.

    counters  their place
    """

    def __init__(self, memory: Memory, steps: list[Step], results: list[Tensor], counters: int) -> None:
        self._memory, self._steps, self._device = memory, steps, memory.device
        self._counters = counters
        self._uses = [{*_places(memory, step)} for step in steps]
        self._spans = _spans(self._uses)
        self._returned = self._check_results(results)
        self._objects: dict[str, Any] = {}
        self._used: set[str] = set()  # the names in the steps' lines
        self._made = {
            *range(len(memory.operands), counters)
        } - memory.allocated  # by operators of torch's, in the steps
        inner = memory.allocated & self._spans.keys() - self._returned.keys()
        sizes = {place: memory.sources[place].untyped_storage().nbytes() for place in inner}
        self._offsets, self._scratch = arrange(sizes, self._spans)

    def _check_results(self, results: list[Tensor]) -> dict[int, Tensor]:
        """By place. Each is the whole of what was made in the call, another one each."""
        returned: dict[int, Tensor] = {}
        for t in results:
            place = self._memory.place(t)
            source = self._memory.sources[place]
            is_whole = t.data_ptr() == source.data_ptr() and t.nbytes == source.nbytes
            if place < len(self._memory.operands) or place in returned or not is_whole:
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
        low = [t.data_ptr() & 15 for t in self._memory.operands]
        aligned = " | ".join(f"p{i}" for i, bits in enumerate(low) if not bits)
        wrong = [f"({aligned}) & 15"] if aligned else []
        wrong += [f"p{i} & 15 != {bits}" for i, bits in enumerate(low) if bits]
        wrong.append(f"{self.name(launcher().gpu()[0])}() != {self._device.index}")
        return [f"if {' or '.join(wrong)} or {self.name(launcher().is_observed)}(): return None"]

    def allocating(self, count: int) -> list[str]:
        """Scratch memory, the results and so many counters; and which stream is current."""
        lines, allocate = [], self.name(allocator(self._device))
        if self._offsets:  # what is empty has an address too
            size = max(self._scratch, ALIGNMENT)
            lines.append(f"scratch = {allocate}(({size},), (1,), {self.name(torch.uint8)})")
            lines.append("s = scratch.data_ptr()")
        for place in sorted(self._returned.keys() & self._memory.allocated):
            t = self._returned[place]
            lines.append(f"t{place} = {allocate}({tuple(t.shape)}, {t.stride()}, {self.name(t.dtype)})")
            lines.append(f"p{place} = t{place}.data_ptr()")
        if self._counters in self._spans:
            counters = f"{self.name(launcher().zeroed_counters)}({self.name(self._device)}, {count})"
            lines.append(f"t{self._counters} = {counters}; p{self._counters} = t{self._counters}.data_ptr()")
        return [*lines, f"stream = {self.name(launcher().gpu()[1])}({self._device.index})"]

    def running(self) -> list[str]:
        """The steps; as a function of its own where they can be a CUDA graph, to which every address is given that they
        use. Nothing that they make is returned then: it would be the graph's memory, which is written again.
        """
        lines = [line for i, step in enumerate(self._steps) for line in (*self._step(step), *self._freeing(i))]
        if len(self._steps) < 2 or not self._returned.keys() <= self._memory.allocated:
            return lines
        made = {f"{kind}{place}" for place in self._made for kind in "tp"}
        used = sorted(self._used - made, key=lambda name: (len(name), name))
        tensors = ", ".join(name for name in used if name[0] == "t" or name == "scratch")
        addresses = ", ".join(["stream", *(name for name in used if name[0] == "p" or name == "s")])
        unpacked = [f"{tensors}, = tensors"] if tensors else []
        run = self._function("run", f"tensors, {addresses}", [*unpacked, *lines])
        operands = "".join(f"t{i}, " for i in range(len(self._memory.operands)))
        return [
            f"{self.name(Repeated(run, self._device))}(({operands}), ({tensors}{',' if tensors else ''}), {addresses})"
        ]

    def _freeing(self, step: int) -> Iterator[str]:
        """What nobody reads after this step."""
        made = self._uses[step] & self._made - self._returned.keys()
        gone = sorted(place for place in made if self._spans[place][1] == step)
        if gone:
            yield f"del {', '.join(f't{place}' for place in gone)}"

    def _step(self, step: Step) -> list[str]:
        return self._call(step) if isinstance(step, Call) else [self._launch(step)]

    def _launch(self, step: Launch) -> str:
        if step.direct is None:
            raise NotReplayable("a kernel that starts through Triton alone")
        encoders = dict(step.direct.encoders)
        values = []
        for place, a in enumerate(step.arguments):
            if isinstance(a, launcher().Descriptor):
                encoded: dict[int, list] = {}
                encode = functools.partial(_encode, encoded, encoders[place], a.base.dtype, a[1:])
                at = self._address(a.base)
                values.append(f"*({self.name(encoded.get)}({at}) or {self.name(encode)}({at}))")
            elif isinstance(a, tuple):
                values.append(f"({''.join(f'{self._value(i)}, ' for i in a)})")
            else:
                values.append(self._value(a))
        return step.direct.text(step.grid, "stream", values, self.name)

    def _value(self, a: Any) -> str:
        return self._address(a) if isinstance(a, Tensor) else self.name(a)

    def _address(self, tensor: Tensor) -> str:
        place = self._memory.place(tensor)
        offset = tensor.data_ptr() - self._memory.sources[place].data_ptr() if tensor.numel() else 0
        base = f"p{place}"
        if place in self._offsets:
            base, offset = "s", self._offsets[place] + offset
        self._used.add(base)
        return f"{base} + {offset}" if offset else base

    def _call(self, step: Call) -> list[str]:
        given = [*map(self._argument, step.args), *(f"{k}={self._argument(v)}" for k, v in step.kwargs.items())]
        lines = [f"r = {self.name(step.function)}({', '.join(given)})"]
        results = [step.result] if isinstance(step.result, Tensor) else step.result
        if len(tensors_in(step.result)) > sum(isinstance(t, Tensor) for t in results):
            raise NotReplayable("lists of results")
        for i, t in enumerate(results):
            if isinstance(t, Tensor) and self._memory.place(t) in self._made:
                place = self._memory.place(t)
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
        place = self._memory.place(tensor)
        source, form = self._memory.sources[place], f"{tuple(tensor.shape)}, {tensor.stride()}"
        if place in self._offsets:
            self._used |= {"scratch", "s"}
            start = self._offsets[place] + tensor.data_ptr() - source.data_ptr()
            typed = f"scratch.view({self.name(tensor.dtype)})"
            return f"{self.name(reinterpret)}({typed}, {form}, {start // tensor.itemsize})"
        made = self._returned.get(place, source) if place in self._memory.allocated else source
        if tensor.dtype != made.dtype:
            raise NotReplayable("memory read as another type")
        self._used |= {f"t{place}", f"p{place}"}
        offset = tensor.storage_offset() - made.storage_offset()
        if (tensor.shape, tensor.stride(), offset) == (made.shape, made.stride(), 0):
            return f"t{place}"
        return f"{self.name(reinterpret)}(t{place}, {form}, {offset})"

    def plan(self, parameters: int, lines: list[str]) -> Plan:
        return self._function("plan", ", ".join(f"a{i}" for i in range(parameters)), lines)

    def _function(self, name: str, parameters: str, lines: list[str]) -> Callable[..., Any]:
        source = "\n    ".join([f"def {name}({parameters}):", *lines])
        exec(compile(source, f"<an svdq operator, {name}>", "exec"), self._objects)
        return self._objects[name]


def _places(memory: Memory, step: Step) -> Iterator[int]:
    """The sources that a step reads or writes."""
    if isinstance(step, Call):
        yield from map(memory.place, tensors_in((step.args, step.kwargs, step.result)))
    else:
        yield from map(memory.place, _in_arguments(step.arguments))


def _in_arguments(arguments: tuple) -> Iterator[Tensor]:
    for a in arguments:
        if isinstance(a, launcher().Descriptor):
            yield a.base
        elif isinstance(a, tuple):
            yield from _in_arguments(a)
        elif isinstance(a, Tensor):
            yield a


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
    in_use: dict[int, list[int]] = {}  # by step: what has its place; a step meets few, however many steps there are
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        steps = range(spans[name][0], spans[name][1] + 1)
        offset = 0
        for other in sorted({n for step in steps for n in in_use.get(step, ())}, key=offsets.__getitem__):
            if offset + sizes[name] > offsets[other]:
                offset = max(offset, _aligned(offsets[other] + sizes[other]))
        offsets[name] = offset
        for step in steps:
            in_use.setdefault(step, []).append(name)
    return offsets, max((_aligned(offset + sizes[name]) for name, offset in offsets.items()), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _encode(encoded: dict[int, list], encode: Callable, dtype: torch.dtype, rest: tuple, address: int) -> list:
    if len(encoded) >= MAX_ADDRESSES:
        encoded.clear()
    descriptor = launcher().Descriptor(launcher().Address(address, dtype), *rest)
    encoded[address] = encode((address, *rest[:2], *rest[4:]), descriptor)
    return encoded[address]
