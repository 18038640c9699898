"""svdq::sequence: operators that follow one another, with the views between them, as one.

    y, z = sequence([x, smooth, down, ...], [4608], "v0 = svdq.quantize.default(x[0], x[1], x[2], 'w4a8', 0.0); ...")

The program is Python: an assignment for each operator, of x[0], x[1], ... (the tensors), n[0], n[1], ... (the sizes)
and what came before, and last `return [...]`. It is one line, because Inductor copies a node's arguments into a comment
above its own kernels.

One operator costs the host less than many: its plan (replay.py) starts all kernels one after another, and what passes
between them is no tensor, only a place in its scratch memory.
"""

import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def run(tensors: list[Tensor], sizes: list[int], program: str, operators: Any = torch.ops.svdq) -> list[Tensor]:
    """The results of a program, in which `svdq` stands for `operators`; as it is, fake tensors of fake ones."""
    return _compiled(program)(tensors, sizes, operators)


def namespace(implementations: Mapping[str, Callable[..., Any]]) -> SimpleNamespace:
    """`svdq.gemm.default` for the entry "svdq.gemm.default"."""
    return SimpleNamespace(**{name.split(".")[1]: SimpleNamespace(default=f) for name, f in implementations.items()})


@cache
def _compiled(program: str) -> Callable[[list[Tensor], list[int], Any], list[Tensor]]:
    """The program as a function, of tensors, sizes and what `svdq` is in it. SyntaxError for what is no program."""
    known: dict[str, Any] = {
        "torch": torch,
        "aten": torch.ops.aten,
        "operator": operator,
        "inf": math.inf,
        "nan": math.nan,
    }
    exec(compile(f"def sequence(x, n, svdq): {program}", "<an svdq sequence>", "exec"), known)
    return known["sequence"]
