"""Operators without their Python: what a call did, done again for other tensors.

Between an operator and its kernels lie checks, the choice of a kernel and of its tile, and the description of every
argument. All of that follows from the operands' shapes, strides, dtypes and alignment, and costs the host more than the
launches themselves. So it is done for the first two calls with the same of these; the second is recorded as a few lines
of Python, the plan, and from the third on the same kernels are started with the new addresses:

    def plan(a0, a1, a2, a3, a4):                            quantize(x, smooth, down, "w4a8", 0.0)
        p0, p1, p2 = a0.data_ptr(), a1.data_ptr(), a2.data_ptr()
        if (p0 | p1 | p2) & 15 or ...: return None           # recorded for aligned memory
        t3 = allocate((4608, 3072), (3072, 1), int8)
        p3 = t3.data_ptr(); ...
        stream = current_stream(0)
        launch(132, 1, 1, stream, ..., *descriptor(p0), p1, 4608, ...)
        return t3, ...

Compiled code calls an operator through a `Site` of its own for each set of sizes: there the operands look alike at
every call, so the plan is at hand. Elsewhere it is looked up by what the operands look like.

A call can be replayed if all it did on the GPU was `launcher.launch` and operators of torch's that give tensors, on
memory that came in as an operand or was made during the call. A number read from the GPU is noticed, and such a call
runs as ever. Not noticed are numbers read from elsewhere, so a launcher must depend on nothing but metadata.
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..kernels.runtime.target import has_kernels
from .cuda_graphs import is_capturing
from .plan import Call, Launch, Memory, NotReplayable, Plan, Step, launcher, make_plan, tensors_in
from .torch_private import without_views

log = logging.getLogger("svdq_compile.lowering")

MAX_PLANS = 4096  # for each operator
ATTEMPTS = 3  # at recording: the first may meet a measurement of tiles

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)
# Give a seed on the CPU beside their result: one of dropout's, which no operator here has.
_SEEDED = {torch.ops.aten._scaled_dot_product_efficient_attention.default}
_nested = threading.local()  # `is_recorded`: an operator is, so those that it calls must not go by plans of their own


class _Watch(TorchDispatchMode):
    """Sees every torch operator of a call.

    steps    what happened on the GPU, in order; launches of kernels are put there by others
    numbers  operators that gave something else than tensors of this device
    """

    def __init__(self, operands: list[Tensor], steps: list[Step]) -> None:
        super().__init__()
        self.memory, self.steps = Memory(operands), steps
        self.numbers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.device == self.memory.device:
            self.memory.allocated.add(self.memory.add(result))
        elif func.is_view and args[0] in self.memory and _is_in_memory_of(args[0], result):
            for view in [result] if isinstance(result, Tensor) else result:
                self.memory.add_view(args[0], view)
        else:
            self._note(Call(func, args, kwargs or {}, result))
        return result

    def _note(self, call: Call) -> None:
        device, result = self.memory.device, call.result
        if call.function in _SEEDED:
            result = tree_map(lambda t: None if isinstance(t, Tensor) and t.device != device else t, result)
        results, given = tensors_in(result), tensors_in((call.args, call.kwargs))
        if not results or any(t.device != device for t in [*results, *given]) or _gives_numbers(call.function):
            self.numbers.append(str(call.function))
            return
        self.steps.append(call._replace(result=result))
        for t in results:
            if t not in self.memory:  # or it was written to
                self.memory.add(t)


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
        with without_views():  # or the first calls' results would be views, unlike those of a plan
            return self._run(operands)

    def _run(self, operands: tuple) -> tuple[Any, Plan | None]:
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


def _is_recordable(operands: tuple) -> bool:
    if not all(t.is_cuda and has_kernels(t.device) for t in tensors_in(operands)):
        return False
    return not launcher().is_observed() and not is_capturing()


def record(function: Callable[..., Any], operands: tuple) -> tuple[Any, Plan | None]:
    """Run a call -> its result, and the plan to repeat it, if there can be one."""
    recording = launcher().recording
    steps: list[Step] = []
    recording.on_launch = lambda *launch: steps.append(Launch(*launch))
    recording.counters, recording.has_measured, _nested.is_recorded = 0, False, True
    try:
        with _Watch(tensors_in(operands), steps) as watch:
            result = function(*operands)
    finally:
        recording.on_launch, _nested.is_recorded = None, False
    try:
        if recording.has_measured:
            raise NotReplayable("tiles were being measured")
        if watch.numbers or len({id(t) for t in watch.memory.operands}) < len(watch.memory.operands):
            raise NotReplayable(f"{watch.numbers} give numbers, or one tensor is two operands")
        return result, make_plan(operands, watch.memory, steps, recording.counters, result)
    except NotReplayable as reason:
        log.debug("%s runs its Python at every call: %s", getattr(function, "__name__", function), reason)
        return result, None
