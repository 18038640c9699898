"""Move what follows a GEMM, elementwise, into the kernel that stores its result.

    before   y = svdq.gemm(...)                  after    h = svdq.fused_gemm(..., [h0, gate],
             t = mul(gate, y)                                 epilogue(y, beside: full, a0: column)
             h = add(h0, t)                                   t0 = mul(a0, y)
                                                              t1 = add(beside, t0))

Biases, activations, gates, residuals and casts come this way. A region grows from y over the operations that a region
can hold (pointwise.py) and ends where exactly one of its values is needed outside: that one is stored, all others are
never in memory. Where there are several such places the last one is taken, but none that takes more memory than y.

Left alone: a value that is reshaped or reduced, one that somebody else reads too, operands of shapes that do not lie
along the block, and what depends on y by another way than through the region.
"""

from typing import Any

from torch import fx

from ..kernels.operands import Gemm
from ..lowering import ops
from ..lowering.region import FULL
from ..lowering.torch_private import describe
from .pipeline import log
from .pointwise import SIXTEEN_BIT, Program, operand_class, operation, same_shape, value_of

MAX_STEPS = 64  # GELU takes 10


def fuse_epilogues(gm: fx.GraphModule) -> int:
    """Rewrite every GEMM that something elementwise follows. Returns how many."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    count = 0
    for gemm in gm.graph.find_nodes(op="call_function", target=ops.gemm):
        nodes = _grow(gemm, place)
        if nodes:
            fused = _replace(gm.graph, gemm, nodes)
            place[fused] = place[nodes[-1]]
            count += 1
    return count


def _grow(gemm: fx.Node, place: dict[fx.Node, int]) -> list[fx.Node]:
    """The nodes after `gemm` that can be computed with it, in order; the last one is what it will store.

    place: each node's position. What depends on y is visited in that order, so that whatever a node reads is known to
    be in the region, behind y by another way, or free of y.
    """
    region = {gemm}
    behind = {gemm}
    order: list[fx.Node] = []
    taken = 0
    waiting = set(gemm.users)
    while any(not region.isdisjoint(node.all_input_nodes) for node in waiting) and len(order) < MAX_STEPS:
        node = min(waiting, key=place.__getitem__)
        waiting.remove(node)
        behind.add(node)
        waiting.update(node.users)
        if _fits(node, gemm, region, behind):
            region.add(node)
            order.append(node)
            if _is_narrow(node, gemm) and all(user in region for n in region if n is not node for user in n.users):
                taken = len(order)
    if not taken:
        outside = [str(user.target) for inner in region for user in inner.users if user not in region]
        log.debug("not fused after %s: its result goes to %s", gemm.name, ", ".join(outside) or "nothing")
    return order[:taken]


def _is_narrow(node: fx.Node, gemm: fx.Node) -> bool:
    """Whether storing this value takes no more memory than storing the GEMM's own result."""
    return value_of(node).element_size() <= value_of(gemm).element_size()  # type: ignore[union-attr]


def _fits(node: fx.Node, gemm: fx.Node, region: set[fx.Node], behind: set[fx.Node]) -> bool:
    """Whether a node that depends on y is an elementwise function of region values and of tensors from outside."""
    found = operation(node)
    block, value = value_of(gemm), value_of(node)
    if found is None or block is None or value is None or not same_shape(value, block):
        return False
    for argument in found[1]:
        if not isinstance(argument, fx.Node) or argument in region:
            continue
        outside = value_of(argument)
        if argument in behind or outside is None or operand_class(outside, block) is None:
            return False
    return True


def _replace(graph: fx.Graph, gemm: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    program = Program(value_of(gemm))  # type: ignore[arg-type]
    program.names[gemm] = "y"
    beside: list[fx.Node] = []

    def name(argument: fx.Node) -> str | None:
        """The first full 16-bit operand is the one that the kernel loads in whole tiles."""
        value = value_of(argument)
        if beside or value is None or value.dtype not in SIXTEEN_BIT or operand_class(value, program.block) != FULL:
            return None
        beside.append(argument)
        return "beside"

    for node in nodes:
        program.add_step(node, name)
    result = nodes[-1]
    dtype = value_of(result).dtype  # type: ignore[union-attr]
    with graph.inserting_before(result):
        operands: Any = gemm.args
        arguments = (*Gemm(*operands)._replace(out_dtype=dtype), program.nodes(), str(program.region("epilogue")))
        fused = graph.call_function(ops.fused_gemm, arguments)
    describe(fused, gemm)
    result.replace_all_uses_with(fused)
    for node in (*reversed(nodes), gemm):
        graph.erase_node(node)
    return fused
