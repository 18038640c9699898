"""Quantizing together with other ranks: what each has observed is put together, each quantizes a part, all get all.

    rank 0   observes some rows of q's input ──┐                 ┌─► quantizes q, k, v ──┐
                                               ├─► one and the same                      ├─► every pack, bit for bit
    rank 1   observes others ──────────────────┘                 └─► quantizes up ───────┘

Alone it is a loop over the tasks.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice
from operator import or_
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import Config
from .fallback import is_out_of_memory
from .input_statistics import MAX_ROWS, InputStatistics, Moment
from .kernels.formats import FORMATS
from .lowering.launch import in_device_order
from .lowering.packed import PackedLinear, SharedInput
from .quantizer import Quantized
from .ranks import Ranks, ranks_of
from .task import Task

T = TypeVar("T")

# What becomes of a task's weights, by their place: their 4-bit form, or why they stay 16-bit.
Outcomes = dict[int, Quantized | str]
# What gives it to them, which cannot fail any more; or why they stay 16-bit.
Switches = dict[int, Callable[[], None] | str]

# Groups of linears that a rank quantizes before the packs are exchanged. More even the ranks' work out better, and
# take more memory: the 16-bit weights go when the packs are there.
PER_ROUND = 4


def share_out(
    tasks: Sequence[Task],
    quantize: Callable[[Task], Outcomes],
    switches_of: Callable[[Task, Outcomes], Switches],
    config: Config,
    device: torch.device | None,
) -> Generator[tuple[Task, Switches | Exception], None, None]:
    """Each task, and the switches for what `quantize` made of it, on whichever rank; an error if memory was short. What
    else it raises is raised, on all ranks.
    """
    ranks = ranks_of(config) if any(task.undecided for task in tasks) else None
    if ranks is None:
        for task in tasks:
            yield task, _tried(partial(_by_itself, task, quantize, switches_of))
        return
    tasks = [task for task in tasks if task.undecided]
    ranks.agree([task.undecided for task in tasks], config)
    step = PER_ROUND * ranks.size
    with ranks.in_step():
        for start in range(0, len(tasks), step):
            yield from _round(ranks, tasks[start : start + step], quantize, switches_of, device)


def _by_itself(
    task: Task, quantize: Callable[[Task], Outcomes], switches_of: Callable[[Task, Outcomes], Switches]
) -> Switches:
    return switches_of(task, quantize(task))


def _tried(make: Callable[[], T]) -> T | Exception:
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)


def _round(
    ranks: Ranks,
    tasks: Sequence[Task],
    quantize: Callable[[Task], Outcomes],
    switches_of: Callable[[Task, Outcomes], Switches],
    device: torch.device | None,
) -> Iterator[tuple[Task, Switches | Exception]]:
    at = device or tasks[0].weights[0].device
    owners = _dealt(tasks, ranks.size)
    tasks = _observed_by_all(ranks, tasks, owners, at)

    def work() -> tuple[list, list[Tensor]]:
        own = [task for task, owner in zip(tasks, owners, strict=True) if owner == ranks.own]
        made = [_written(_tried(partial(quantize, task))) for task in own]
        return [(said, len(tensors)) for said, tensors in made], [t for _, tensors in made for t in tensors]

    found = [(iter(said), iter(tensors)) for said, tensors in ranks.exchange(work, at)]
    switches: list[Switches | Exception] = []

    def take(task: Task, said: Any, tensors: list[Tensor]) -> Switches:
        place = device or task.weights[0].device
        outcomes = _read(said, iter([tensor.to(place) for tensor in tensors]))
        if isinstance(outcomes, Exception):
            raise outcomes
        return switches_of(task, outcomes)

    def taken() -> list[dict[int, str] | str]:
        """What this rank leaves 16-bit of each task, and why; or for what there was no memory."""
        for task, owner in zip(tasks, owners, strict=True):
            said, count = next(found[owner][0])
            switches.append(_tried(partial(take, task, said, list(islice(found[owner][1], count)))))
        return [
            str(s) if isinstance(s, Exception) else {i: r for i, r in s.items() if isinstance(r, str)} for s in switches
        ]

    for task, own, left in zip(tasks, switches, zip(*ranks.told(taken), strict=True), strict=True):
        missing = next((text for text in left if isinstance(text, str)), None)
        if missing is not None or isinstance(own, Exception):
            yield task, torch.OutOfMemoryError(missing)
        else:
            yield task, reduce(or_, left, own)


@dataclass(frozen=True)
class _Seen:
    """What a rank has observed of an input, as the others are told.

    shape, rows  of the second moment; None: it has none
    """

    most_rows: float | None
    has_span: bool
    shape: torch.Size | None
    rows: int

    @classmethod
    def of(cls, own: InputStatistics) -> "_Seen":
        if own.span is None or own.moment is None:
            return cls(own.most_rows, own.span is not None, None, 0)
        return cls(own.most_rows, True, own.moment.sum.shape, own.moment.rows)


def _observed_by_all(ranks: Ranks, tasks: Sequence[Task], owners: Sequence[int], at: torch.device) -> list[Task]:
    """With the statistics of all ranks: the same rows in the same order on each. Second moments, which are large, get
    only the owners, who need them.
    """
    own = [task.statistics for task in tasks]
    share = -(-MAX_ROWS // ranks.size)

    def observed() -> tuple[list[_Seen], list[Tensor]]:
        tensors = [t for one in own if one.span is not None for t in (one.span, one.thinned(share))]
        return [_Seen.of(one) for one in own], [tensor.to(at) for tensor in tensors]

    found = ranks.exchange(observed, at)

    def put_together() -> list[InputStatistics]:
        queues = [iter(tensors) for _, tensors in found]
        whole = []
        for seen in zip(*(said for said, _ in found), strict=True):
            pairs = [(next(queue), next(queue)) for queue, one in zip(queues, seen, strict=True) if one.has_span]
            most = max((one.most_rows for one in seen if one.most_rows is not None), default=None)
            whole.append(InputStatistics.of([span for span, _ in pairs], [rows for _, rows in pairs], most))
        return whole

    together = ranks.each(put_together)
    seen = [[one for one in by_rank if one.has_span] for by_rank in zip(*(said for said, _ in found), strict=True)]
    shapes = [_smallest([one.shape for one in ones]) for ones in seen]
    sums = ranks.each(
        lambda: [
            one.moment.within(shape).sum if shape and one.span is not None and one.moment else None
            for one, shape in zip(own, shapes, strict=True)
        ]
    )
    totals = ranks.summed(sums, shapes, owners, at)
    for whole, ones, total in zip(together, seen, totals, strict=True):
        whole.moment = None if total is None else Moment(total, sum(one.rows for one in ones))
    return [replace(task, statistics=whole) for task, whole in zip(tasks, together, strict=True)]


def _smallest(shapes: Sequence[torch.Size | None]) -> torch.Size | None:
    """The blocks in which all ranks know a second moment; None: not all know it."""
    known = [shape for shape in shapes if shape]
    return min(known, key=lambda shape: shape[-1]) if known and len(known) == len(shapes) else None


def _dealt(tasks: Sequence[Task], size: int) -> list[int]:
    """Who quantizes each task: the largest first, each to whom has least to do."""
    costs = [sum(weight.numel() for weight, _ in task.undecided) for task in tasks]
    loads, owners = [0] * size, [0] * len(tasks)
    for place in sorted(range(len(tasks)), key=lambda place: -costs[place]):
        owners[place] = min(range(size), key=loads.__getitem__)
        loads[owners[place]] += costs[place]
    return owners


def _written(outcomes: Outcomes | Exception) -> tuple[Any, list[Tensor]]:
    """As it is sent: words and numbers, and tensors."""
    if isinstance(outcomes, Exception):
        return str(outcomes), []
    packs = [outcome.packed for outcome in outcomes.values() if isinstance(outcome, Quantized)]
    if not packs:
        return (None, outcomes), []
    shared = packs[0].shared  # by all of a task
    said = {i: _words(o) if isinstance(o, Quantized) else o for i, o in outcomes.items()}
    tensors = [shared.smooth, shared.down, *(t for packed in packs for t in packed.own_tensors().values())]
    return ((shared.precision, shared.shift, shared.rotate), said), tensors


def _words(outcome: Quantized) -> dict[str, Any]:
    packed = outcome.packed
    own = {"rank_start": packed.rank_start, "expanded": packed.expanded, "taps_first": packed.taps_first}
    return {"error": outcome.error, "packed": own, "tensors": list(packed.own_tensors())}


def _read(said: Any, tensors: Iterator[Tensor]) -> Outcomes | Exception:
    """The opposite of `_written`."""
    if isinstance(said, str):
        return torch.OutOfMemoryError(said)
    form, outcomes = said
    if form is None:
        return dict(outcomes)
    precision, shift, rotate = form
    shared = SharedInput(precision, next(tensors), next(tensors), shift, rotate)
    return {i: o if isinstance(o, str) else _pack(shared, o, tensors) for i, o in outcomes.items()}


def _pack(shared: SharedInput, words: Mapping[str, Any], tensors: Iterator[Tensor]) -> Quantized:
    own = {name: next(tensors) for name in words["tensors"]}
    weight = in_device_order(shared.precision, tuple(own[name] for name in FORMATS[shared.precision].fields))
    packed = PackedLinear(shared, weight, own["up"], offset=own.get("offset"), **words["packed"])
    return Quantized(packed, words["error"])
