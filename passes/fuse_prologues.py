"""Move what makes a quantized input, elementwise, into the kernel that quantizes it.

    before   c = sub(h, mean)                    after    q = svdq.fused_quantize([h, mean, rstd, scale, shift], ...,
             n = mul(c, rstd)                                 prologue(x, a0: row, a1: row, a2: column, a3: column)
             m = mul(n, scale)                                t0 = sub(x, a0)
             x = add(m, shift)                                t1 = mul(t0, a1)
             q = svdq.quantize(x, ...)                        ...)

Norms, modulations, gated activations, and two tensors side by side (`cat`). Reductions stay outside: a mean is one
number a row. A region grows from the input backwards over operations that nothing else reads; casts to fp32 are
repeated.

Left alone: inputs that no 16-bit matrix of the same shape goes into, and values that somebody else reads too.
"""

from typing import cast

import torch
from torch import fx

from ..lowering import ops
from ..lowering.region import FULL
from ..lowering.torch_private import describe
from .pipeline import log
from .pointwise import SIXTEEN_BIT, Program, cat_of, is_widening, operand_class, operation, value_of

MAX_STEPS = 64


def fuse_prologues(gm: fx.GraphModule) -> int:
    """Rewrite every `quantize` whose input is made elementwise. Returns how many."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    quantizes = gm.graph.find_nodes(op="call_function", target=ops.quantize)
    return sum(_fuse(gm.graph, quantize, place) for quantize in quantizes)


def _fuse(graph: fx.Graph, quantize: fx.Node, place: dict[fx.Node, int]) -> bool:
    x = quantize.args[0]
    assert isinstance(x, fx.Node)
    block = value_of(x)
    if block is None or block.dtype not in SIXTEEN_BIT:
        return False
    nodes, joined = _grow(x, quantize, place)
    base = joined or _base(nodes, x)
    if base is None or not (nodes or joined):
        log.debug("not fused before %s: its input comes from %s", quantize.name, x.target)
        return False
    _replace(graph, quantize, nodes, base, joined is not None)
    return True


def _grow(x: fx.Node, quantize: fx.Node, place: dict[fx.Node, int]) -> tuple[list[fx.Node], fx.Node | None]:
    """The nodes before `quantize` that can be computed with it, in the graph's order, and the `cat` they begin with."""
    block = value_of(x)
    region: set[fx.Node] = {quantize}
    order: list[fx.Node] = []
    joined = None
    waiting = [x]
    while waiting and len(order) < MAX_STEPS:
        node = waiting.pop()
        if node in region:
            continue
        if not all(user in region for user in node.users) and not is_widening(node):
            continue  # asked again when another of its readers comes in
        if joined is None and _is_join(node, block):
            joined = node
            region.add(node)
        elif (found := operation(node)) is not None and all(_lies_along(a, block) for a in found[1]):
            region.add(node)
            order.append(node)
            waiting.extend(a for a in found[1] if isinstance(a, fx.Node))
    return sorted(order, key=place.__getitem__), joined


def _lies_along(argument: object, block: torch.Tensor | None) -> bool:
    if not isinstance(argument, fx.Node):
        return True
    value = value_of(argument)
    return value is not None and block is not None and operand_class(value, block) is not None


def _is_join(node: fx.Node, block: torch.Tensor | None) -> bool:
    """Two 16-bit tensors side by side, as wide as the block."""
    cat, value = cat_of(node), value_of(node)
    if cat is None or value is None or block is None:
        return False
    parts, dim = cat
    return (
        len(parts) == 2
        and dim == value.dim() - 1
        and operand_class(value, block) == FULL
        and value.dtype == block.dtype
        and all(p is not None and p.dtype == block.dtype and p.dim() == block.dim() for p in map(value_of, parts))
    )


def _base(nodes: list[fx.Node], x: fx.Node) -> fx.Node | None:
    """The 16-bit matrix that the kernel itself loads: the first one that the region reads."""
    block, inside = value_of(x), set(nodes)
    for node in nodes:
        for argument in node.all_input_nodes:
            value = value_of(argument)
            if argument in inside or value is None or block is None:
                continue
            if value.dtype == block.dtype and operand_class(value, block) == FULL:
                return argument
    return None


def _replace(graph: fx.Graph, quantize: fx.Node, nodes: list[fx.Node], base: fx.Node, joined: bool) -> None:
    x, *rest = quantize.args
    program = Program(value_of(x))  # type: ignore[arg-type]
    if joined:
        program.names[base] = "x"
        program.operands += [
            (name, FULL, part) for name, part in zip(("x", "right"), cast(list, base.args[0]), strict=True)
        ]
    else:
        program.add_operand(base, "x")
    for node in nodes:
        program.add_step(node)
    with graph.inserting_before(quantize):
        arguments = (program.nodes(), *rest, str(program.region("prologue")))
        fused = graph.call_function(ops.fused_quantize, arguments)
    describe(fused, quantize)
    quantize.replace_all_uses_with(fused)
    graph.erase_node(quantize)
    for node in (*reversed(nodes), *([base] if joined else [])):
        if not node.users:
            graph.erase_node(node)
