"""What the graph knows of a linear's input: after GELU, SiLU or ReLU it is never far below zero."""

import torch
import torch.nn.functional as F
from torch import fx

# An unsigned 4-bit code needs input + shift >= 0. Minima: GELU -0.16997, its tanh form -0.17004, SiLU -0.27846.
# Each shift is the next number above with few mantissa bits, so that adding it in bf16 is exact enough.
GELU_SHIFT = 0.171875
SILU_SHIFT = 0.28125
_SHIFTS = {F.gelu: GELU_SHIFT, torch._C._nn.gelu: GELU_SHIFT, F.silu: SILU_SHIFT, torch._C._nn.silu: SILU_SHIFT}
_KEEPS_RANGE = frozenset({F.dropout, torch.dropout})
_KEEPS_RANGE_METHODS = frozenset(
    {"reshape", "view", "flatten", "contiguous", "to", "transpose", "permute", "unflatten"}
)


def input_shift(linear: fx.Node) -> float:
    """The shift that makes the input of this linear non-negative; 0 where the graph does not promise one."""
    node = linear.args[0]
    while isinstance(node, fx.Node):
        if node.op == "call_function" and node.target in _SHIFTS:
            return _SHIFTS[node.target]
        if not _keeps_range(node):
            break
        node = node.args[0]
    return 0.0


def _keeps_range(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target in _KEEPS_RANGE:
        return node.args[2:3] == (False,) or node.kwargs.get("training") is False
    return node.op == "call_method" and node.target in _KEEPS_RANGE_METHODS
