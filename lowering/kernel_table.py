"""How an operator's kernel is found: a table for each operator (launch.py), the fastest first, the reference last.
Where no order holds for all shapes, the rows that can are measured.

A row says why it cannot take some operands, or runs them. A kernel that this Triton cannot compile is left out for the
rest of the process, with one warning; the next row takes over. What else keeps a call from a row of its GPU and its
format is logged once, and how often each row ran in a graph (`TORCH_LOGS="svdq_compile"`).

SVDQ_KERNELS=reference       or names of rows, with commas: in each table that has one of them, only these rows and the
                             reference are asked
"""

import difflib
import importlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.runtime.target import Target

log = logging.getLogger("svdq_compile.lowering")

REFERENCE = "reference"
ANY = Target("any device", lambda device: True)
TABLES: dict[str, "Table"] = {}  # by operator; importing launch.py fills it
_left_out: dict[tuple[str, Any], str] = {}  # (a row, the generated function in it or None) -> why
_told: set[tuple] = set()


class NoKernel(Exception):
    """No row is left that could run a generated function."""


def takes_all(operands: object) -> None:
    """The `why_not` of a kernel that takes whatever its target and formats let through."""


@dataclass(frozen=True)
class Kernel:
    """One row.

    name     as SVDQ_KERNELS has it
    target   the GPUs it is written for
    formats  it takes, where the operator has one; ()
    needs    its module in kernels/, for which a Triton may be too old or too new; None: it has none
    why_not  (operands) -> why it cannot take them, None if it can; asked last
    run      (operands, *fused): what is computed with the operator, None each where there is nothing
    fuses    whether it can do that; if not, `fused` is None throughout
    """

    name: str
    target: Target
    formats: tuple[str, ...]
    needs: str | None
    why_not: Callable[[Any], str | None]
    run: Callable[..., Any]
    fuses: bool = True

    def refuses(self, operands: Any) -> str | None:
        """Why it cannot take these operands; None if it can."""
        return self.is_for_others(operands) or _missing(self.name, self.needs) or self.why_not(operands)

    def is_for_others(self, operands: Any) -> str | None:
        """Why it is not meant for this device or this format; None if it is."""
        first = operands if isinstance(operands, Tensor) else operands[0]
        if not self.target.includes(first.device):
            return f"not on {self.target.name}"
        if self.formats and operands.precision not in self.formats:
            return f"it has no {operands.precision}"
        return None


class Table:
    """The rows of one operator. They are asked in order; the reference takes everything but what is fused.

    shape_class  (operands) -> those among which one row is the fastest, if only measuring can tell which
                 (runtime/tuning.py); None: the first that can
    """

    def __init__(
        self,
        operator: str,
        rows: list[Kernel],
        reference: Callable[..., Any],
        shape_class: Callable[[Any], tuple] | None = None,
    ) -> None:
        self.operator = operator
        self._shape_class = shape_class
        self.rows = [*rows, Kernel(REFERENCE, ANY, (), None, takes_all, reference, fuses=False)]
        self.used: Counter[str] = Counter()  # by row: how often it ran; plans of replay.py run past the table
        TABLES[operator] = self

    def choose(self, operands: Any, function: Any = None) -> Kernel:
        """The first row that can run these operands with this generated function, or the fastest such row."""
        able = self._able(operands, function)
        return next(able) if self._shape_class is None else self._fastest(list(able), operands, self._shape_class)

    def preferred(self, device: torch.device, precision: str) -> str:
        """The row that a format's linears of usual sizes get on a device: the first for it that can be imported."""
        takes = (k for k in self.rows if k.target.includes(device) and (not k.formats or precision in k.formats))
        return next(k.name for k in takes if _missing(k.name, k.needs) is None)

    def _able(self, operands: Any, function: Any) -> Iterator[Kernel]:
        for kernel in self._asked():
            reason = _left_out.get((kernel.name, None)) or _left_out.get((kernel.name, function))
            reason = reason or kernel.refuses(operands)
            if reason is None:
                yield kernel
            elif (kernel.name, reason) not in _told:
                _told.add((kernel.name, reason))
                level = logging.DEBUG if kernel.is_for_others(operands) else logging.INFO
                log.log(level, "%s not by %s: %s", self.operator, kernel.name, reason)

    def _fastest(self, able: list[Kernel], operands: Any, shape_class: Callable[[Any], tuple]) -> Kernel:
        rows = {kernel.name: kernel for kernel in able[:-1] or able}  # the last is the reference
        if len(rows) == 1:
            return next(iter(rows.values()))
        from ..kernels.runtime.tuning import CannotRun, choose

        def run(name: str) -> None:
            try:
                rows[name].run(operands)
            except RuntimeError as no:
                raise CannotRun from no

        device = operands[0].device
        return rows[choose(self.operator, shape_class(operands), list(rows), run, device, limited=False)]

    def run(self, operands: Any, *fused: Any) -> Any:
        """The result, by the first row that can. Raises NoKernel where that one could not do what is fused."""
        function = next((f.function for f in fused if hasattr(f, "function")), None)
        while True:
            kernel = self.choose(operands, function)
            if not kernel.fuses and any(f is not None for f in fused):
                raise NoKernel(self.operator)
            try:
                result = kernel.run(operands, *fused)
                self.used[kernel.name] += 1
                return result
            except Exception as error:
                if kernel.name == REFERENCE or not _is_compilers(error):
                    raise
                _leave_out(self.operator, kernel.name, function, error)

    def _asked(self) -> list[Kernel]:
        names = forced(os.environ.get("SVDQ_KERNELS", ""))
        if names.isdisjoint(kernel.name for kernel in self.rows):
            return self.rows
        return [kernel for kernel in self.rows if kernel.name in names or kernel.name == REFERENCE]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Within the context, what the tables run; after it, how often: "gemm hopper_w4a8" -> 24."""
    before = {table.operator: table.used.copy() for table in TABLES.values()}
    counts: Counter[str] = Counter()
    yield counts
    for table in TABLES.values():
        new = table.used - before[table.operator]
        counts.update({f"{table.operator} {name}": n for name, n in new.items()})


def markdown() -> str:
    """The tables as docs/kernels.md shows them."""
    lines = ["| operator | kernel | formats | where | in |", "|---|---|---|---|---|"]
    for table in TABLES.values():
        for kernel in table.rows:
            module = "" if kernel.needs is None else f"`kernels/{kernel.needs.replace('.', '/')}.py`"
            formats = ", ".join(kernel.formats)
            lines.append(f"| {table.operator} | `{kernel.name}` | {formats} | {kernel.target.name} | {module} |")
    return "\n".join(lines)


@cache
def forced(text: str) -> frozenset[str]:
    """The rows that SVDQ_KERNELS names. Raises ValueError, with the nearest name, for one that no table has."""
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    known = {kernel.name for table in TABLES.values() for kernel in table.rows}
    for name in names - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"SVDQ_KERNELS={name!r}: {hint}the kernels are {', '.join(sorted(known))}")
    return names


@cache
def _missing(name: str, module: str | None) -> str | None:
    """Why a kernel's module cannot be imported, said in one warning: Gluon is experimental, and a release may lack what
    one needs or take it otherwise.
    """
    if module is not None:
        try:
            importlib.import_module(f"{kernels.__name__}.{module}")
        except Exception as error:
            _warn(f"{name} cannot be imported", error)
            return f"it cannot be imported: {type(error).__name__}"
    return None


def _is_compilers(error: Exception) -> bool:
    """Asked once a kernel has run, so Triton is there to ask."""
    from ..kernels.runtime.tuning import failed_to_compile

    return failed_to_compile(error)


def _leave_out(operator: str, name: str, function: Any, error: Exception) -> None:
    _left_out[name, function] = f"it does not compile: {type(error).__name__}"
    what = "" if function is None else " with one generated function"
    _warn(f"{name} ({operator}){what} does not compile", error)


def _warn(what: str, error: Exception) -> None:
    triton = getattr(sys.modules.get("triton"), "__version__", "(none)")
    last_line = (str(error).strip().splitlines() or [""])[-1]
    log.warning(
        "kernel %s with Triton %s and torch %s: left out, a slower one takes over. %s: %s",
        what, triton, torch.__version__, type(error).__name__, last_line,
    )  # fmt: skip
