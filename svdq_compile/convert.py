"""Turn weights of a model into quantized form, in place, group by group."""

import difflib
import fnmatch
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from . import decisions
from .checkpoint import serve_libraries
from .config import Config
from .errors import OptionError, UnsupportedDevice
from .fallback import go_on, is_out_of_memory
from .foreign import await_copies, groups_of, renew_copies
from .kernels.formats import AUTO, FEW_ROWS, FORMATS
from .layers import matrices
from .lowering.packed import as_matrix, is_kernel, matrix_shape
from .lowering.torch_private import while_nothing_is_traced
from .parameter import freezing
from .passes import linears
from .quantizer import Quantized, quantize_group
from .sharing import Outcomes, Switches, share_out
from .stages import quantizing
from .summary import decided
from .task import Task

log = logging.getLogger("svdq_compile")

TOO_EXTREME = "its weight or what it reads is too large for fp32 arithmetic"
FAILED = "quantizing it failed: {}"
BY_TARGET = "the target leaves it 16-bit"
IN_16_BIT = "what is left of it stays 16-bit"


def convert(
    tasks: Iterable[Task],
    config: Config,
    device: torch.device | None = None,
    fetch: Callable[[Task], None] | None = None,
    keep: Callable[[Task], None] | None = None,
) -> None:
    """Quantize every weight that is still undecided, or decide that it stays 16-bit.

    device  where the work is done and the packed tensors stay; by default each weight's own
    fetch   called before a task is worked on: its weights may have no memory until then
    keep    called when a task is done; where ranks share the work, what it raises it raises on all

    Groups for which there is not enough memory stay undecided; once the others are done, that is raised. A later call
    takes up what this one has left. Where weights are fetched it is raised at once: they would stay in memory.
    """
    serve_libraries()
    # On one line: an interruption before the next would leave it locked.
    with while_nothing_is_traced(), decisions.LOCK: _convert(list(tasks), config, device, fetch, keep)  # noqa: E701  # fmt: skip


@torch.inference_mode(False)
@torch.no_grad()
def _convert(
    tasks: list[Task],
    config: Config,
    device: torch.device | None,
    fetch: Callable[[Task], None] | None,
    keep: Callable[[Task], None] | None,
) -> None:
    def quantize(task: Task) -> Outcomes:
        if fetch is not None:
            fetch(task)
        return _quantize(task, config, device)

    def switches_of(task: Task, outcomes: Outcomes) -> Switches:
        return _switches(task, outcomes, config)

    missing: Exception | None = None
    weights = [weight for task in tasks for weight, _ in task.undecided]
    model = decisions.model_of(weights)
    groups = groups_of(model)
    if config.weights == "keep":
        _check_offloading(groups)
    await_copies(groups)
    try:
        with quantizing(weights, config):
            shared = share_out(tasks, quantize, switches_of, config, device)
            for task, switches in shared:
                try:
                    if isinstance(switches, Exception):
                        raise switches
                    _take(task, switches)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    if fetch is not None:
                        shared.throw(error)  # which all ranks have: they stay in step
                    missing = error.with_traceback(None)  # whose frames hold tensors
                if keep is not None:
                    try:
                        keep(task)
                    except Exception as error:
                        shared.throw(error)  # likewise
                if not task.undecided:
                    decisions.forget_statistics(task.weights)
    finally:  # what is quantized by now stays so
        renew_copies(groups)
        decided(model)
    if missing is not None:
        raise missing


def _check_versions(weights: Iterable[nn.Parameter]) -> None:
    """Kept values may be written to, which their version tells."""
    for weight in weights:
        try:
            weight._version  # noqa: B018
        except RuntimeError:
            raise OptionError(
                "option weights='keep' needs to know when weights are written to, which torch does not tell of those "
                "made under torch.inference_mode(): make the model under torch.no_grad(), or take weights='offload'"
            ) from None


def _check_offloading(groups: list[Any]) -> None:
    """What group offloading moves are the kept values, and with the 4-bit form gone it would be made at each call."""
    if groups:
        raise OptionError(
            "option weights='keep' leaves 16-bit values in place, and group offloading would move these instead of "
            "the 4-bit ones: take weights='offload', which keeps them in CPU memory"
        )


def _quantize(task: Task, config: Config, device: torch.device | None) -> Outcomes:
    """What becomes of the weights that are undecided, by their place in the task. Changes nothing."""
    if config.weights == "keep":
        _check_versions(weight for weight, _ in task.undecided)
    precision: str | None = choose_precision(config, task.has_few_rows or task.expanded)
    config = replace(config, rank=choose_rank(config, task.expanded, task.weights[0]))
    if task.form is not None:
        precision, config = task.form.precision, replace(config, rank=task.form.rank)
    outcomes: Outcomes = {}
    chosen: list[int] = []
    for i, (weight, name) in enumerate(zip(task.weights, task.names, strict=True)):
        if decisions.is_undecided(weight):
            reason = why_not_as_asked(weight, name, precision, config)
            if reason is None:
                chosen.append(i)
            else:
                outcomes[i] = reason
    if chosen and precision is not None:
        outcomes |= zip(chosen, quantized(task, chosen, precision, config, device), strict=True)
    return outcomes


def quantized(
    task: Task, chosen: list[int], precision: str, config: Config, device: torch.device | None
) -> Sequence[Quantized | str]:
    """The chosen weights of a task in 4-bit form, or why they stay 16-bit. Changes nothing."""
    weights, names = [task.weights[i] for i in chosen], [task.names[i] for i in chosen]
    at = device or weights[0].device
    if at.type not in ("cpu", "cuda"):
        raise UnsupportedDevice(names[0], str(at))
    try:
        matrices = [as_matrix(_in_arithmetic(weight.detach().to(at))) for weight in weights]
        with torch.autocast(at.type, enabled=False):
            results = quantize_group(matrices, names, precision, config, task.statistics, task.shift)
        return [
            replace(own, packed=replace(own.packed, expanded=task.expanded, taps_first=is_kernel(weight.shape)))
            for own, weight in zip(results, weights, strict=True)
        ]
    except torch.linalg.LinAlgError as error:
        log.warning("svdquant: %s cannot be decomposed and stays 16-bit: %s", ", ".join(names), error)
        return [TOO_EXTREME] * len(names)
    except Exception as error:
        go_on(error, f"quantizing {', '.join(names)}", IN_16_BIT, config)
        return [FAILED.format(type(error).__name__)] * len(names)


def _in_arithmetic(weight: Tensor) -> Tensor:
    """In a dtype that can be computed in: a hook that casts the weight for its use casts the branch too."""
    return weight.bfloat16() if linears.is_storage(weight.dtype) else weight


def _switches(task: Task, outcomes: Outcomes, config: Config) -> Switches:
    """How the weights get their 4-bit form; or why not: also if that is too far from the weight. Changes nothing."""
    calibrated = task.statistics.span is not None
    switches: Switches = {}
    for i, outcome in outcomes.items():
        weight, name = task.weights[i], task.names[i]
        if not decisions.is_undecided(weight):  # another task had it too
            continue
        if isinstance(outcome, str):
            switches[i] = outcome
        elif outcome.error <= config.error_budget:
            effect = None if task.form is None else task.form.effects[i]
            try:
                switches[i] = freezing(weight, outcome.packed, name, outcome.error, config.weights, calibrated, effect)
            except Exception as error:
                go_on(error, f"quantizing {name}", IN_16_BIT, config)
                switches[i] = FAILED.format(type(error).__name__)
        elif math.isfinite(outcome.error):
            switches[i] = f"its error would be {outcome.error:.2f}, above error_budget"
        else:
            switches[i] = TOO_EXTREME
    return switches


def _take(task: Task, switches: Switches) -> None:
    """Let the weights have their 4-bit form, or stay 16-bit."""
    for i, switch in switches.items():
        if not decisions.is_undecided(task.weights[i]):  # another task of the same round had it too
            continue
        if isinstance(switch, str):
            decisions.leave_alone(task.weights[i], switch)
        else:
            switch()


def choose_precision(config: Config, weight_only: bool) -> str:
    """The format of one weight. For a linear with few rows, rounding its input would cost accuracy and gain no time;
    where the weight is expanded there is no linear whose input could be rounded.
    """
    if weight_only:
        return FEW_ROWS
    return AUTO if config.precision == "auto" else config.precision


def choose_rank(config: Config, expanded: bool, weight: Tensor) -> int:
    """The rank of one weight's branch. A convolution has none: for its bytes it gains little (docs/architecture.md)."""
    return 0 if expanded and is_kernel(weight.shape) else config.rank


def is_skipped(name: str, patterns: Iterable[str]) -> bool:
    """Whether the option `skip` names a layer, or a module that it stands in."""
    names = [*accumulate(name.split("."), "{}.{}".format), f".{name}"]
    return any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns for n in names)


def warn_of_skip(models: Sequence[nn.Module], config: Config) -> None:
    """Say which patterns of the option `skip` name no layer of any of these models."""
    names = [matrix.name for model in models for matrix in matrices(model)] if config.skip else []
    for pattern in config.skip:
        if not any(is_skipped(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
            log.warning(
                "svdquant: option skip: %r names no layer of %s; %s",
                pattern,
                ", ".join(type(model).__name__ for model in models),
                f"the nearest is {near[0]!r}" if near else "svdq_compile.report(model) has the names",
            )


def why_not_as_asked(weight: nn.Parameter, name: str, precision: str | None, config: Config) -> str | None:
    """Why a linear that could be quantized stays 16-bit by the options that were given; by a target it may have no
    precision.
    """
    if is_skipped(name, config.skip):
        return "option skip"
    if precision is None:
        return BY_TARGET
    n, k = matrix_shape(weight.shape)
    if FORMATS[precision].codes is not None and config.rank * (n + k) > n * k / 2:
        return f"a branch of rank {config.rank} would be half as large as its {n} x {k} weight, or larger"
    return None
