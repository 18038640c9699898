"""Bits where they matter: which format and rank each group of linears gets under options target_bytes, target_error.

    candidates  of each group: what they take, and how far the linears' outputs are off on rows that did not fit them
    effect      of each group: how far the model's output is off in replayed calls with its cheapest candidate alone,
                for one of the linears' own error. So each candidate's part in the output's error is known
    choice      independent errors add up as squares: a knapsack (knapsack.py)

Candidates are fitted to one half of the observed rows, in one round of refinement, and measured on the other half.
What is quantized then is fitted to all rows, in all rounds, and better: errors are predicted rather too large.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import decisions
from .config import Config
from .convert import choose_precision, is_skipped, quantized, why_not_as_asked
from .errors import OptionError
from .fallback import go_on
from .foreign import await_copies, groups_of
from .input_statistics import InputStatistics, Moment
from .kernels.formats import EIGHT_BITS
from .knapsack import Solution, least_cost, solve
from .lowering import ops
from .lowering.launch import has_kernels_for
from .lowering.packed import as_matrix
from .progress import say, steps
from .quantizer import Quantized
from .replays import CannotReplay, Recorder, Replays, replaying
from .report import Report, report
from .summary import title
from .task import Form, Task

log = logging.getLogger("svdq_compile")
_T = TypeVar("_T")

RANKS = (0, 16, 32, 64, 128)
EIGHT_BIT_RANKS = (0, 32)  # a branch takes little out of 8 bits
REFINE = 1
PARTS = 8  # of the observed rows, in their order; every other one fits: neighbours are tokens of one picture
MAX_REPLAYS = 600  # calls of the model for all groups together, and one of each group's in any case


@dataclass(frozen=True)
class _Candidate:
    """What a group may become. errors: of each of its linears, relative"""

    precision: str | None
    rank: int
    nbytes: int
    errors: tuple[float, ...]

    @property
    def square(self) -> float:
        """The squared error of the group, as the mean of its linears'."""
        return sum(error**2 for error in self.errors) / len(self.errors)


@dataclass(frozen=True)
class _Group:
    """A task's linears that are chosen for.

    members     their places in the task
    candidates  the first is 16-bit
    effect      the error of the model's output for one of the group's; None: not measured
    """

    task: Task
    members: tuple[int, ...]
    candidates: tuple[_Candidate, ...]
    effect: float | None

    def form(self, pick: int, effect: float | None) -> Form:
        chosen = self.candidates[pick]
        effects: list[float | None] = [None] * len(self.task.weights)
        for i, error in zip(self.members, chosen.errors, strict=True):
            effects[i] = None if effect is None else effect * error / math.sqrt(len(self.members))
        return Form(chosen.precision, chosen.rank, tuple(effects))


def choose_forms(
    model: nn.Module, tasks: Sequence[Task], recorder: Recorder, config: Config, device: torch.device | None
) -> list[Task]:
    """The tasks, each with the form that the target gives it. Changes nothing of the model.

    recorder  has calls of the model, in 16 bits
    device    where the packs will be, and are made: their bytes are counted there

    Raises OptionError for a target that cannot be met, naming the nearest that can, and for target_error where no call
    of the model can be replayed.
    """
    groups = measured_groups(model, tasks, recorder, config, device)
    is_known = any(group.effect is not None for group in groups)
    effects = _effects(groups)
    names = {group.task.names[i] for group in groups for i in group.members}
    others = sum(row.bytes_after for row in report(model) if row.name not in names)
    solution = _solved(model, groups, effects, others, config)
    _tell(model, solution, others, is_known, config)
    forms = {
        id(group.task): group.form(pick, effect if is_known else None)
        for group, pick, effect in zip(groups, solution.picks, effects, strict=True)
    }
    return [replace(task, form=forms.get(id(task))) for task in tasks]


def measured_groups(
    model: nn.Module, tasks: Sequence[Task], recorder: Recorder, config: Config, device: torch.device | None
) -> list[_Group]:
    """All that are to be chosen for, with their candidates and effects; these are None if calls cannot be replayed."""
    members = _members(tasks, config)
    with replaying():
        most = max(1, MAX_REPLAYS // max(len(members), 1))
        replays = _replayed(lambda: Replays(model, recorder.calls(most)), model, config)
        doing = f"{title(model)}: measuring formats and ranks for {len(members)} groups of linears"
        groups, moved = [], groups_of(model)
        for task, own in steps(members, doing, config.progress):
            await_copies(moved)  # which each replay fetches anew
            group, probe = _measured(task, own, config, device)
            if replays is not None and probe:
                known = _replayed(partial(_with_effect, group, probe, replays), model, config)
                group, replays = (group, None) if known is None else (known, replays)
            groups.append(group)
    if replays is None:  # also if that has come out late
        groups = [replace(group, effect=None) for group in groups]
    elif all(group.effect is None for group in groups):
        _go_by_layers(model, "the calls that were made again read none of the weights that can be quantized", config)
    return groups


def check_outcome(outcome: Report, config: Config) -> None:
    """Say if a linear that was to be quantized was not, and the model takes more than it was to."""
    if isinstance(config.target_bytes, int) and outcome.bytes_after > config.target_bytes:
        log.warning(
            "svdquant: the linears take %d bytes, more than target_bytes=%d: some could not be quantized as chosen, "
            "svdq_compile.report(model) says why",
            outcome.bytes_after,
            config.target_bytes,
        )


def _members(tasks: Sequence[Task], config: Config) -> list[tuple[Task, tuple[int, ...]]]:
    """Each task with the places of its weights that are to be chosen for; a weight of several tasks is the first's."""
    taken: set[int] = set()
    found = []
    for task in tasks:
        own = []
        for i, (weight, name) in enumerate(zip(task.weights, task.names, strict=True)):
            if decisions.is_undecided(weight) and id(weight) not in taken and not is_skipped(name, config.skip):
                own.append(i)
                taken.add(id(weight))
        if own:
            found.append((task, tuple(own)))
    return found


def _replayed(replay: Callable[[], _T], model: nn.Module, config: Config) -> _T | None:
    """None, and told why, where calls cannot be replayed. Raises OptionError then for target_error."""
    try:
        return replay()
    except CannotReplay as no:
        _go_by_layers(model, str(no), config)
    except Exception as error:
        go_on(error, f"calling {title(model)} again", "the errors of its layers alone decide", config)
        _go_by_layers(model, f"{type(error).__name__}: {error}", config)
    return None


def _go_by_layers(model: nn.Module, why: str, config: Config) -> None:
    """Say that nothing is known of the output; which a target for it cannot do without."""
    kind = type(model).__name__
    if config.target_error is not None:
        raise OptionError(
            f"option target_error={config.target_error}: the error of this {kind}'s output cannot be measured, for "
            f"{why}. Give target_bytes, for which the errors of its layers will do"
        )
    log.warning(
        "svdquant: what each layer does to the output of this %s cannot be measured, so the layers' own errors decide: "
        "%s",
        kind,
        why,
    )


def _measured(
    task: Task, members: tuple[int, ...], config: Config, device: torch.device | None
) -> tuple[_Group, list[Quantized]]:
    """A group's candidates, of which those that cannot be made or are above error_budget are left out; and the linears
    of the cheapest one, which show the group's effect: none where they cannot.
    """
    weights = [task.weights[i] for i in members]
    fitting, held = _halves(task.statistics)
    at = device or weights[0].device
    truths = [] if held is None else [held.float().to(at) @ as_matrix(w.detach()).float().to(at).t() for w in weights]
    plain = _Candidate(None, 0, sum(w.numel() * w.element_size() for w in weights), (0.0,) * len(weights))
    candidates, cheapest = [plain], plain
    probe: list[Quantized] = []
    for precision, rank in _forms(task, members, config, at):
        options = replace(config, rank=rank, refine=min(config.refine, REFINE))
        made = quantized(replace(task, statistics=fitting), list(members), precision, options, device)
        results = [result for result in made if isinstance(result, Quantized)]
        if len(results) < len(made):
            continue
        errors = tuple(_errors(results, held, truths))
        if not all(error <= config.error_budget for error in errors):  # nor if one is NaN
            continue
        candidate = _Candidate(precision, rank, sum(result.packed.nbytes() for result in results), errors)
        candidates.append(candidate)
        if candidate.nbytes < cheapest.nbytes:
            cheapest, probe = candidate, results
    return _Group(task, members, tuple(candidates), None), [] if held is None or not cheapest.square else probe


def _with_effect(group: _Group, probe: Sequence[Quantized], replays: Replays) -> _Group:
    """If the cheapest candidate leaves an output that is not finite, there is no other than 16 bits."""
    packs = {id(group.task.weights[i]): own.packed for i, own in zip(group.members, probe, strict=True)}
    cheapest = min(group.candidates, key=lambda candidate: candidate.nbytes)
    effect = replays.error(packs) / math.sqrt(cheapest.square)
    if not math.isfinite(effect):
        return replace(group, candidates=group.candidates[:1])
    return replace(group, effect=effect or None)  # 0: none of the calls has come to it


def _forms(task: Task, members: tuple[int, ...], config: Config, device: torch.device) -> Iterator[tuple[str, int]]:
    """The formats and ranks that a group may have: the one that it would have without a target, and 8 bits."""
    usual = choose_precision(config, task.has_few_rows or task.expanded)
    forms = [(usual, rank) for rank in RANKS]
    if usual != EIGHT_BITS and not task.expanded and has_kernels_for(EIGHT_BITS, device):
        forms += [(EIGHT_BITS, rank) for rank in EIGHT_BIT_RANKS]
    for precision, rank in forms:
        options = replace(config, rank=rank)
        if not any(why_not_as_asked(task.weights[i], task.names[i], precision, options) for i in members):
            yield precision, rank


def _halves(seen: InputStatistics) -> tuple[InputStatistics, Tensor | None]:
    """Statistics of some of the observed rows, and the others. Of one row the weights alone are fitted; None: there is
    no row.
    """
    if seen.span is None:
        return seen, None
    rows = seen.rows
    part = torch.arange(len(rows), device=rows.device) * PARTS // max(len(rows), PARTS)
    fitting, held = rows[part % 2 == 0], rows[part % 2 == 1]
    if not len(held):
        return InputStatistics.of((), (), seen.most_rows), rows
    moment = None if seen.moment is None else Moment.of(fitting, seen.moment.sum.shape[-1])
    return InputStatistics.of([fitting.abs().amax(0).float()], [fitting], seen.most_rows, moment), held


def _errors(results: Sequence[Quantized], held: Tensor | None, truths: Sequence[Tensor]) -> Iterator[float]:
    """|y - x W^T| / |x W^T| of each linear; without rows the error of its weight."""
    if held is None:
        yield from (result.error for result in results)
        return
    for result, truth in zip(results, truths, strict=True):
        x = held.to(result.packed.device, result.packed.up.dtype)
        off = float((ops.linear(x, result.packed, None, torch.float32) - truth).norm())
        yield off / (float(truth.norm()) or 1.0)


def _effects(groups: Sequence[_Group]) -> list[float]:
    """Of each group. What was not measured counts like the middle of the others, or each linear like any other."""
    known = [group.effect for group in groups if group.effect is not None]
    if not known:
        return [math.sqrt(len(group.members)) for group in groups]
    unknown = [
        group.task.names[i]
        for group in groups
        if group.effect is None and len(group.candidates) > 1
        for i in group.members
    ]
    if unknown:
        log.warning(
            "svdquant: no replayed call shows what these layers do to the output, so they count like the middle of the "
            "others: %s",
            ", ".join(unknown),
        )
    middle = statistics.median(known)
    return [group.effect if group.effect is not None else middle for group in groups]


def _solved(
    model: nn.Module, groups: Sequence[_Group], effects: Sequence[float], others: int, config: Config
) -> Solution:
    """The choice; for target_error its cost is the squared error, and what it loses the bytes."""
    squares = [
        [effect**2 * candidate.square for candidate in group.candidates]
        for group, effect in zip(groups, effects, strict=True)
    ]
    sizes = [[float(candidate.nbytes) for candidate in group.candidates] for group in groups]
    if config.target_error is not None:
        options = [list(zip(*group, strict=True)) for group in zip(squares, sizes, strict=True)]
        solution = solve(options, config.target_error**2)
        assert solution is not None, "all in 16 bits has no error"
        return solution
    assert isinstance(config.target_bytes, int)
    options = [list(zip(*group, strict=True)) for group in zip(sizes, squares, strict=True)]
    solution = solve(options, config.target_bytes - others)
    if solution is None:
        least = others + int(least_cost(options))
        raise OptionError(
            f"option target_bytes={config.target_bytes}: the linears of this {type(model).__name__} take "
            f"{least} bytes ({_mib(least)}) at the least, {_mib(others)} of it in linears that no target changes; give "
            f"target_bytes={least} or more"
        )
    return solution


def _tell(model: nn.Module, solution: Solution, others: int, is_known: bool, config: Config) -> None:
    """What was chosen, and how near it is to the best that could be."""
    if config.target_error is not None:
        text = (
            f"target_error {_percent(config.target_error**2)}: {_mib(others + solution.loss)} of linears, predicted "
            f"{_percent(solution.cost)} (no choice takes less than {_mib(others + solution.bound)})"
        )
    else:
        assert isinstance(config.target_bytes, int)
        text = f"target_bytes {_mib(config.target_bytes)}: {_mib(others + solution.cost)} of linears"
        if is_known:
            text += (
                f", predicted error of the output {_percent(solution.loss)} (no choice has below "
                f"{_percent(solution.bound)})"
            )
    say(f"svdquant: {title(model)}: {text}", config.progress)


def _percent(square: float) -> str:
    """Of a squared error, which may have come out below 0."""
    return f"{100 * math.sqrt(max(square, 0.0)):.3g} %"


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
