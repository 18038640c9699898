"""Leave the choice of attention's kernel to the first call, which measures, instead of torch's fixed list.

    before   y = _scaled_dot_product_flash_attention(q, k, v)[0]
    after    y = svdq.attention(q, k, v, False, None, [0, 2, 1, 3])        (launch.ATTENTION)

Where 8 bits are allowed, a last argument says so.

The result lies in memory as it did, whichever kernel runs: views of it are planned already.

Left alone: attention with a mask, with dropout, whose log-sum is used too, or on a device that has no choice.
"""

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..kernels.runtime.target import has_kernels
from ..lowering import ops
from ..lowering.launch import TORCHS_ATTENTIONS
from ..lowering.torch_private import describe
from .pipeline import log


def replace_attention(gm: fx.GraphModule, arithmetic: str = "exact") -> int:
    """Replace the operators. Returns how many. arithmetic: as `operands.Attention` has it."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target not in TORCHS_ATTENTIONS:
            continue
        options = _options(node)
        reason = _why_not(node, options)
        if reason is None:
            _replace(gm.graph, node, options, arithmetic)
            count += 1
        else:
            log.debug("attention %s stays torch's: %s", node.name, reason)
    return count


def _options(node: fx.Node) -> dict[str, Any]:
    """The operator's arguments after q, k and v, by name, defaults filled in."""
    schema = node.target._schema.arguments[3:]  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args[3:], strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _why_not(node: fx.Node, options: dict[str, Any]) -> str | None:
    if options.get("attn_bias") is not None:
        return "it has a mask"
    if options["dropout_p"] != 0.0 or options.get("return_debug_mask"):
        return "it has dropout"
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return "more than its result is used"
    if isinstance(options["scale"], fx.Node):
        return "its scale is not known"
    y = node.meta["val"][0]
    if not has_kernels(y.device):
        return f"there is no choice on {y.device}"
    return "its result has gaps in memory" if _order(y) is None else None


def _order(y: Tensor) -> list[int] | None:
    """The dimensions as they lie in memory, the outermost first; None if there are gaps."""
    return next((list(order) for order in itertools.permutations(range(4)) if _lies_in(order, y)), None)


def _lies_in(order: tuple[int, ...], y: Tensor) -> bool:
    stride = 1
    for dim in reversed(order):
        size = y.shape[dim]
        if not (statically_known_true(size == 1) or statically_known_true(y.stride(dim) == stride)):
            return False
        stride = stride * torch.sym_max(size, 1)  # as torch has it where there is nothing
    return True


def _replace(graph: fx.Graph, node: fx.Node, options: dict[str, Any], arithmetic: str) -> None:
    order = _order(node.meta["val"][0])
    allowed = () if arithmetic == "exact" else (arithmetic,)
    with graph.inserting_before(node):
        new = graph.call_function(
            ops.attention, (*node.args[:3], options["is_causal"], options["scale"], order, *allowed)
        )
    describe(new, node)
    for user in list(node.users):
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)  # dead-code elimination would keep it: it could have drawn random numbers
