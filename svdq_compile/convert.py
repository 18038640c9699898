"""Turn weights of a model into quantized form, in place, group by group."""

import fnmatch
import logging
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from . import decisions
from .config import Config
from .errors import UnsupportedDevice
from .input_statistics import InputStatistics
from .kernels.formats import AUTO, FEW_ROWS, FORMATS
from .parameter import freeze
from .passes import linears
from .quantizer import quantize_group
from .summary import TALLY

log = logging.getLogger("svdq_compile")

TOO_EXTREME = "its weight or what it reads is too large for fp32 arithmetic"


@dataclass(frozen=True)
class Task:
    """Weights that share an input, and what is known of it.

    few_rows, shift   as in LinearSite, of a graph that reads it
    """

    weights: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    few_rows: bool
    shift: float
    statistics: InputStatistics

    @property
    def has_few_rows(self) -> bool:
        """Whether it never has many rows, in all calls that were observed: one graph may be of a short prompt."""
        most = self.statistics.most_rows
        return self.few_rows if most is None else most <= linears.FEW_ROWS


def convert(tasks: Iterable[Task], config: Config, device: torch.device | None = None) -> None:
    """Quantize every weight that is still undecided, or decide that it stays 16-bit.

    device  where the work is done and the packed tensors stay; by default each weight's own
    """
    with decisions.LOCK, torch.inference_mode(False), torch.no_grad():
        todo = [task for task in tasks if any(decisions.is_undecided(w) for w in task.weights)]
        for task in progress(todo, config.progress):
            _convert_group(task, config, device)


def progress(tasks: list[Task], visible: bool) -> Iterable[Task]:
    """The tasks, with a bar on stderr that goes away when they are done."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("quantizing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not visible) as bar:
        yield from bar.track(tasks)


def _convert_group(task: Task, config: Config, device: torch.device | None) -> None:
    members = [(w, n) for w, n in zip(task.weights, task.names, strict=True) if decisions.is_undecided(w)]
    precision = choose_precision(config, task.has_few_rows)
    chosen = []
    for weight, name in members:
        reason = _why_not(weight, name, precision, config)
        if reason is None:
            chosen.append((weight, name))
        else:
            _leave(weight, reason)
    if chosen:
        at = device or chosen[0][0].device
        if at.type not in ("cpu", "cuda"):
            raise UnsupportedDevice(chosen[0][1], str(at))
        matrices = [weight.detach().to(at).flatten(1) for weight, _ in chosen]
        names = [name for _, name in chosen]
        try:
            with torch.autocast(at.type, enabled=False):
                quantized = quantize_group(matrices, names, precision, config, task.statistics, task.shift)
        except torch.linalg.LinAlgError as error:
            log.warning("svdquant: %s cannot be decomposed and stays 16-bit: %s", ", ".join(names), error)
            for weight, _ in chosen:
                _leave(weight, TOO_EXTREME)
            chosen, quantized = [], []
        for (weight, name), result in zip(chosen, quantized, strict=True):
            if not result.error <= config.error_budget:  # nan is none
                finite = math.isfinite(result.error)
                reason = f"its error would be {result.error:.2f}, above error_budget" if finite else TOO_EXTREME
                _leave(weight, reason)
            else:
                TALLY.quantized(precision, weight.nbytes, result.packed.nbytes())
                freeze(weight, result.packed, name, result.error, config.weights)
    decisions.forget_statistics(task.weights)


def _leave(weight: nn.Parameter, reason: str) -> None:
    decisions.leave_alone(weight, reason)
    TALLY.left(reason, weight.nbytes)


def choose_precision(config: Config, few_rows: bool) -> str:
    """The format of one linear. Rounding the input of a linear with few rows would cost accuracy and gain no time."""
    if few_rows:
        return FEW_ROWS
    return AUTO if config.precision == "auto" else config.precision


def is_skipped(name: str, patterns: Iterable[str]) -> bool:
    """Whether the option `skip` names a layer, or a module that it stands in."""
    names = [*accumulate(name.split("."), "{}.{}".format), f".{name}"]
    return any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns for n in names)


def _why_not(weight: nn.Parameter, name: str, precision: str, config: Config) -> str | None:
    if is_skipped(name, config.skip):
        return "option skip"
    n, k = weight.shape[0], weight[0].numel()
    if FORMATS[precision].codes is not None and config.rank * (n + k) > n * k / 2:
        return f"a branch of rank {config.rank} would be half as large as its {n} x {k} weight, or larger"
    return None
