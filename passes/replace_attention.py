"""Leave the choice of attention's kernel to the first call, which measures, instead of torch's fixed list.

    before   y = _scaled_dot_product_flash_attention(q, k, v)[0]
    after    y = svdq.attention(q, k, v, False, None, [0, 2, 1, 3])        (launch.ATTENTION)

Where 8 bits are allowed, a last argument says so, and what makes q and k (fuse_heads.py) becomes part of the operator,
since heads need not be written in 16 bits then:

    before   q = svdq.head_region([x, w], "heads(x, a0: D); ...");  k = ...;  v = cat([text, image], 1)
             y = _scaled_dot_product_flash_attention(permute(q, [0, 2, 1, 3]), ...)[0]
    after    y = svdq.attention_of_heads([x, w, ..., text, image], [0, 1, ...], "heads(x, a0: D); ... | heads(x)", ...)

The result lies in memory as it did, whichever kernel runs: views of it are planned already.

Left alone: attention with a mask, with dropout, whose log-sum is used too, or on a device that has no choice. q and k
that others read too, or that come from elsewhere (another rank), stay operands.
"""

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..kernels.runtime.target import has_kernels
from ..lowering import ops
from ..lowering.launch import TORCHS_ATTENTIONS
from ..lowering.region import PARTS, PLAIN
from ..lowering.torch_private import describe
from .fuse_heads import unturned
from .pipeline import log
from .vocabulary import aten, cat_of


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
    if count:
        gm.graph.eliminate_dead_code()
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
    how = (options["is_causal"], options["scale"], order, *allowed)
    with graph.inserting_before(node):
        heads = _heads(graph, node) if allowed else None
        if heads is None:
            new = graph.call_function(ops.attention, (*node.args[:3], *how))
        else:
            new = graph.call_function(ops.attention_of_heads, (*heads, *how))
    describe(new, node)
    for user in list(node.users):
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)  # dead-code elimination would keep it: it could have drawn random numbers


def _heads(graph: fx.Graph, node: fx.Node) -> tuple[Any, ...] | None:
    """What makes q, k and v: operands, reads, region and counts, as the operator has it. None if no region does."""
    made = [_made_by(argument) for argument in node.args[:2]]
    regions = [region for region in made if region is not None]
    if len(regions) < len(made):
        return None
    values = _parts(graph, node.args[2])
    read: list[Any] = [operand for region in regions for operand in region.args[0]] + values  # type: ignore[union-attr]
    operands = list(dict.fromkeys(read))
    texts = [str(region.args[1]) for region in regions]
    text = PARTS.join([*texts, *[str(PLAIN)] * len(values)])
    return operands, [operands.index(n) for n in read], text, [len(t.split(PARTS)) for t in texts]


def _made_by(argument: Any) -> fx.Node | None:
    """The region that makes q or k, if nothing else reads it."""
    node, letters = unturned(argument)
    is_one_way = all(len(n.users) == 1 for n in _way(argument, node))
    return node if node.target is ops.head_region and letters == "BTHD" and is_one_way else None


def _way(argument: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """From what attention reads back to what permutations turn for it."""
    while argument is not end:
        yield argument
        argument = argument.all_input_nodes[0]
    yield end


def _parts(graph: fx.Graph, v: Any) -> list[fx.Node]:
    """v as [B, T, H, D], or what is put together along its tokens for it alone."""
    node, letters = unturned(v)
    parts, dim = cat_of(node) or ((node,), 0)
    is_of_tokens = letters[dim] == "T" and all(len(n.users) == 1 for n in _way(v, node))
    turned = [letters.index(axis) for axis in "BTHD"]
    found = []
    for part in parts if is_of_tokens else (node,):
        if letters != "BTHD":
            permuted = graph.call_function(aten.permute.default, (part, turned))
            describe(permuted, part)
            part = permuted
        found.append(part)
    return found
