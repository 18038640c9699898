"""Turn weights of a model into quantized form, in place, group by group."""

import difflib
import fnmatch
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from . import decisions
from .checkpoint import serve_libraries
from .config import Config
from .errors import OptionError, UnsupportedDevice
from .fallback import go_on, is_out_of_memory
from .input_statistics import InputStatistics
from .kernels.formats import AUTO, FEW_ROWS, FORMATS
from .layers import matrices
from .lowering.packed import as_matrix
from .lowering.torch_private import while_nothing_is_traced
from .parameter import freeze
from .passes import linears
from .quantizer import Quantized, quantize_group
from .stages import quantizing
from .summary import decided

log = logging.getLogger("svdq_compile")

TOO_EXTREME = "its weight or what it reads is too large for fp32 arithmetic"


@dataclass(frozen=True)
class Task:
    """Weights that share an input, and what is known of it.

    few_rows, shift   as in LinearSite, of a graph that reads it
    expanded          as in WeightGroup
    """

    weights: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    few_rows: bool
    shift: float
    statistics: InputStatistics
    expanded: bool = False

    @property
    def has_few_rows(self) -> bool:
        """Whether it never has many rows, in all calls that were observed: one graph may be of a short prompt."""
        most = self.statistics.most_rows
        return self.few_rows if most is None else most <= linears.FEW_ROWS


def convert(
    tasks: Iterable[Task],
    config: Config,
    device: torch.device | None = None,
    at_hand: Callable[[Task], AbstractContextManager] = nullcontext,
) -> None:
    """Quantize every weight that is still undecided, or decide that it stays 16-bit.

    device   where the work is done and the packed tensors stay; by default each weight's own
    at_hand  around each task: where its weights come from that have no memory yet

    Groups for which there is not enough memory stay undecided; once the others are done, that is raised. A later call
    takes up what this one has left.
    """
    serve_libraries()
    # On one line: an interruption before the next would leave it locked.
    with while_nothing_is_traced(), decisions.LOCK: _convert(list(tasks), config, device, at_hand)  # noqa: E701  # fmt: skip


@torch.inference_mode(False)
@torch.no_grad()
def _convert(
    tasks: list[Task],
    config: Config,
    device: torch.device | None,
    at_hand: Callable[[Task], AbstractContextManager],
) -> None:
    missing: Exception | None = None
    weights = [weight for task in tasks for weight, _ in _undecided(task)]
    if config.weights == "keep":
        _check_versions(weights)
    with quantizing(weights, config.calibration_steps == 0, config.progress):
        for task in tasks:
            try:
                with at_hand(task):
                    _convert_group(task, config, device)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                missing = error.with_traceback(None)  # whose frames hold tensors
            if not _undecided(task):
                decisions.forget_statistics(task.weights)
    decided(decisions.model_of(weights))
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


def _undecided(task: Task) -> list[tuple[nn.Parameter, str]]:
    """The weights that are, with their names."""
    return [(w, n) for w, n in zip(task.weights, task.names, strict=True) if decisions.is_undecided(w)]


def _convert_group(task: Task, config: Config, device: torch.device | None) -> None:
    precision = choose_precision(config, task.has_few_rows or task.expanded)
    for weight, name in _undecided(task):
        reason = why_not_as_asked(weight, name, precision, config)
        if reason is not None:
            decisions.leave_alone(weight, reason)
    chosen = _undecided(task)
    if not chosen:
        return
    names = [name for _, name in chosen]
    at = device or chosen[0][0].device
    if at.type not in ("cpu", "cuda"):
        raise UnsupportedDevice(names[0], str(at))
    try:
        matrices = [as_matrix(_in_arithmetic(weight.detach().to(at))) for weight, _ in chosen]
        with torch.autocast(at.type, enabled=False):
            quantized = quantize_group(matrices, names, precision, config, task.statistics, task.shift)
        for (weight, name), result in zip(chosen, quantized, strict=True):
            result = replace(result, packed=replace(result.packed, expanded=task.expanded))
            _take(weight, name, result, config, calibrated=task.statistics.span is not None)
    except torch.linalg.LinAlgError as error:
        log.warning("svdquant: %s cannot be decomposed and stays 16-bit: %s", ", ".join(names), error)
        for weight, _ in _undecided(task):
            decisions.leave_alone(weight, TOO_EXTREME)
    except Exception as error:
        go_on(error, f"quantizing {', '.join(names)}", "what is left of it stays 16-bit", config)
        for weight, _ in _undecided(task):
            decisions.leave_alone(weight, f"quantizing it failed: {type(error).__name__}")


def _in_arithmetic(weight: Tensor) -> Tensor:
    """In a dtype that can be computed in: a hook that casts the weight for its use casts the branch too."""
    return weight.bfloat16() if linears.is_storage(weight.dtype) else weight


def _take(weight: nn.Parameter, name: str, result: Quantized, config: Config, calibrated: bool) -> None:
    """The 4-bit form, unless it is too far from the weight."""
    if result.error <= config.error_budget:
        freeze(weight, result.packed, name, result.error, config.weights, calibrated)
    elif math.isfinite(result.error):
        decisions.leave_alone(weight, f"its error would be {result.error:.2f}, above error_budget")
    else:
        decisions.leave_alone(weight, TOO_EXTREME)


def choose_precision(config: Config, weight_only: bool) -> str:
    """The format of one weight. For a linear with few rows, rounding its input would cost accuracy and gain no time;
    where the weight is expanded there is no linear whose input could be rounded.
    """
    if weight_only:
        return FEW_ROWS
    return AUTO if config.precision == "auto" else config.precision


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


def why_not_as_asked(weight: nn.Parameter, name: str, precision: str, config: Config) -> str | None:
    """Why a linear that could be quantized stays 16-bit by the options that were given."""
    if is_skipped(name, config.skip):
        return "option skip"
    n, k = as_matrix(weight).shape
    if FORMATS[precision].codes is not None and config.rank * (n + k) > n * k / 2:
        return f"a branch of rank {config.rank} would be half as large as its {n} x {k} weight, or larger"
    return None
