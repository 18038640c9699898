"""Multiply the two halves of a GEMM's result by one another in the kernel that stores it (GEGLU, SwiGLU).

    before   y = svdq.gemm(...)                  after    h = svdq.fused_gemm(..., [],
             a, b = split(y, F, -1)                           gate(y, right)
             t = mul(b, sigmoid(b))                           t0 = sigmoid(right)
             h = mul(a, t)                                    t1 = mul(right, t0)
                                                              t2 = mul(y, t1))

Half of the result is stored, and the next linear reads it without evaluating an activation. A weight stays as it is: a
kernel loads rows of both halves into one tile (kernels/portable/gates.py).

Left alone: halves of which one is read otherwise, or which lie apart; more than two parts; formats whose kernels fuse
nothing (the next linear's prologue does better); and what `fuse_epilogues` leaves alone.
"""

from torch import fx

from ..kernels.formats.layout import GATE_STEP
from ..kernels.operands import Gemm
from ..lowering import launch, ops
from .after_gemm import fuse_after
from .regions import erase
from .vocabulary import aten, kept_by, value_of

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


def fuse_gates(gm: fx.GraphModule) -> int:
    """Rewrite every GEMM whose halves become one. Returns how many."""
    count = 0
    for gemm in gm.graph.find_nodes(op="call_function", target=ops.gemm):
        halves = _halves(gemm)
        if halves is not None and fuse_after("gate", gemm, dict(zip(halves, ("y", "right"), strict=True))):
            erase(gm.graph, {gemm, *gemm.users, *halves})
            count += 1
    return count


def _halves(gemm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two nodes that are the left and the right half of a result's features, if nobody else reads it."""
    value, users = value_of(gemm), list(gemm.users)
    if not launch.fuses(Gemm(*gemm.args).precision):  # type: ignore[arg-type]
        return None
    if value is None or type(value.shape[-1]) is not int or value.shape[-1] % (2 * GATE_STEP):
        return None
    half, dim = value.shape[-1] // 2, value.dim() - 1
    wanted = range(half), range(half, 2 * half)
    parts: dict[range, fx.Node] = {}
    if len(users) == 1 and len(users[0].users) == 2 and users[0].target in _SPLITS:
        sizes, along = [*users[0].args[1:], 0][:2]
        if sizes in (half, [half, half]) and along in (dim, -1):
            parts = {wanted[node.args[1]]: node for node in users[0].users}  # type: ignore[index]
    elif len(users) == 2 and all(node.target is aten.slice.Tensor for node in users):
        kept = {node: kept_by(node) for node in users}
        parts = {found[0]: node for node, found in kept.items() if found is not None and found[1] == dim}
    return (parts[wanted[0]], parts[wanted[1]]) if parts.keys() == {*wanted} else None
