"""The three stages of a model, told while they last (progress.py), each announced once: observing, quantizing,
compiling. A model that was restored begins anew.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import ref

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from . import decisions
from .config import Config
from .layers import blocks_of
from .progress import Activity
from .summary import title

_COURSES = WeakIdKeyDictionary()  # model -> _Course
_NOBODY = nn.Module()  # stands for the models of weights that nobody holds


class _Course:
    """How far a model has come.

    begun    stage -> when it was announced
    waiting  the weights to be quantized, and the block that each stands in, None for none
    """

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}
        self.waiting: list[tuple[ref[nn.Parameter], str | None]] = []

    def begin(self, stage: str, opening: str) -> str:
        """What to announce: nothing if it was."""
        if stage in self.begun:
            return ""
        self.begun[stage] = time.monotonic()
        return opening

    def blocks(self) -> tuple[int, int, str]:
        """How many parts of the model are quantized, of how many, and what the parts are."""
        blocks = {block for _, block in self.waiting if block is not None}
        left = [(weight, block) for weight, block in self.waiting if decisions.is_undecided(weight())]
        if not blocks:
            return len(self.waiting) - len(left), len(self.waiting), "linear"
        return len(blocks - {block for _, block in left}), len(blocks), "block"


def observing(model: nn.Module | None, call: int, calls: int | None, visible: bool) -> AbstractContextManager:
    """A call whose layers are observed.

    call, calls  its number, from 1, and of how many; None: as many as there are
    """
    if not visible:
        return nullcontext()
    course = _course(model)
    doing = f"{title(model)}: observing {call}" + (f" of {calls}" if calls else "")
    what = f"call {call}" if calls is None else f"{call} of {calls} calls" if calls > 1 else "this call"
    then = "" if calls is None else "; then its layers are quantized (option calibration_steps)"
    opening = course.begin("observing", f"{title(model)}: observing {what}, in exact 16-bit{then}")
    return Activity(lambda: doing, visible, opening=opening, since=course.begun["observing"])


def quantizing(weights: Sequence[nn.Parameter], config: Config) -> AbstractContextManager:
    """Weights of one model are quantized. Where nothing is to be observed, the others of the model will follow."""
    if not config.progress or not weights:
        return nullcontext()
    model = decisions.model_of(weights)
    course = _course(model)
    if "quantizing" not in course.begun:
        course.waiting = list(_waiting(model, weights, config))
    _, parts, kind = course.blocks()
    count = f"{parts} {kind}{'s' * (parts != 1)}"
    opening = course.begin("quantizing", f"{title(model)}: quantizing {count}")
    since = course.begun["quantizing"]

    def doing() -> str:
        done = min(course.blocks()[0], parts)
        seconds = (time.monotonic() - since) * (parts - done) / done if done else 0
        left = f", about {seconds:.0f} s left" if seconds >= 1 else ""
        return f"{title(model)}: quantizing {done} of {count}{left}"

    return Activity(doing, config.progress, opening=opening, since=since)


def compiling(model: nn.Module | None, visible: bool) -> AbstractContextManager:
    """A graph is compiled, or called for the first time, when its kernels are."""
    if not visible:
        return nullcontext()
    hint = ", the first time takes about a minute"
    opening = _course(model).begin("compiling", f"{title(model)}: compiling{hint}")
    return Activity(lambda: f"{title(model)}: compiling", visible, opening=opening, hint=hint if opening else "")


def tracing(visible: bool) -> Activity:
    """Dynamo makes a graph of a frame, and whatever the backend does then: it is told of only if it takes long."""
    return Activity(lambda: "tracing the model", visible)


def begin_anew(model: nn.Module | None) -> _Course:
    """All stages are still to come."""
    course = _COURSES[_NOBODY if model is None else model] = _Course()
    return course


def _course(model: nn.Module | None) -> _Course:
    return _COURSES.get(_NOBODY if model is None else model) or begin_anew(model)


def _waiting(
    model: nn.Module | None, weights: Iterable[nn.Parameter], config: Config
) -> Iterable[tuple[ref[nn.Parameter], str | None]]:
    """The undecided weights among these, and those of the rest of the model that were observed, or all of them."""

    def will_follow(weight: nn.Parameter) -> bool:
        return config.calibration_steps == 0 and decisions.may_be_quantized(weight, config.convolutions)

    blocks = {} if model is None else blocks_of(model)
    own = {id(weight): weight for weight in weights}
    rest = () if model is None else model.parameters()
    own |= {id(w): w for w in rest if decisions.is_observed(w) or will_follow(w)}
    for weight in own.values():
        if decisions.is_undecided(weight):
            name = decisions.name_of(weight) or ""
            yield ref(weight), next((block for block in blocks if f"{name}.".startswith(f"{block}.")), None)
