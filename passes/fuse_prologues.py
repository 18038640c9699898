"""Move what makes a quantized input, elementwise, into the kernel that quantizes it.

    before   c = sub(h, mean)                    after    q = svdq.fused_quantize([h, mean, rstd, scale, bias], ...,
             n = mul(c, rstd)                                 prologue(x, a0: BT, a1: BT, a2: C, a3: C)
             m = mul(n, scale)                                t0 = sub(x, a0)
             x = add(m, bias)                                 t1 = mul(t0, a1)
             q = svdq.quantize(x, ...)                        ...)

Norms, modulations, gated activations, and two tensors side by side (`cat`). Reductions stay outside: a mean is one
number a token. A region grows from the input backwards over operations that nothing else reads; casts to fp32 are
repeated.

Left alone: inputs that no 16-bit matrix of the same shape goes into, and values that somebody else reads too.
"""

from collections.abc import Iterable

import torch
from torch import fx

from ..kernels.operands import Quantize
from ..lowering import ops
from ..lowering.torch_private import describe
from .pipeline import log
from .regions import axes_in_rows, build, erase, grow, read_from_outside
from .vocabulary import SIXTEEN_BIT, cat_of, operation, value_of


def fuse_prologues(gm: fx.GraphModule) -> int:
    """Rewrite every `quantize` whose input is made elementwise. Returns how many."""
    return sum(_fuse(gm.graph, quantize) for quantize in gm.graph.find_nodes(op="call_function", target=ops.quantize))


def _fuse(graph: fx.Graph, quantize: fx.Node) -> bool:
    o = Quantize(*quantize.args)  # type: ignore[arg-type]
    x = o.x
    block = value_of(x)
    assert isinstance(x, fx.Node)
    if block is None or block.dtype not in SIXTEEN_BIT:
        return False
    nodes, base = _before(x, quantize, block)
    meanings = {node: found for node in nodes if (found := operation(node)) is not None}
    base = base or next((node for node in read_from_outside(meanings) if _is_full(node, block)), None)
    if base is None:
        log.debug("not fused before %s: its input comes from %s", quantize.name, x.target)
        return False
    joined = cat_of(base) if base in nodes else None
    parts = (base,) if joined is None else joined[0]
    operands = [(name, "BTC", part) for name, part in zip(("x", "right"), parts, strict=False)]
    region, read = build("prologue", meanings, lambda node: axes_in_rows(node, block), {base: "x"}, operands)
    with graph.inserting_before(quantize):
        given = read, o.smooth, o.down, o.precision, o.shift, str(region), *((True,) if o.rotate else ())
        fused = graph.call_function(ops.fused_quantize, given)  # without a default, as torch's own nodes
    describe(fused, quantize)
    quantize.replace_all_uses_with(fused)
    erase(graph, [quantize, *nodes])
    return True


def _before(x: fx.Node, quantize: fx.Node, block: torch.Tensor) -> tuple[list[fx.Node], fx.Node | None]:
    """What can be computed with `quantize`, in the graph's order, and the `cat` among it."""
    joined: list[fx.Node] = []

    def take(node: fx.Node, region: set[fx.Node]) -> Iterable[fx.Node] | None:
        found = operation(node)
        is_inside = region.issuperset(node.users) or (node is x and {*node.users} == {quantize})
        if not is_inside and (found is None or found[0] != ""):
            return None
        if not joined and _is_join(node, block):
            joined.append(node)
            return ()
        if found is None:
            return None
        read = [a for a in found[1] if isinstance(a, fx.Node)]
        return read if all(axes_in_rows(a, block) for a in read) else None

    return grow([x], max, take), next(iter(joined), None)


def _is_full(node: fx.Node, block: torch.Tensor) -> bool:
    """Whether the kernel itself can load this as its input."""
    return axes_in_rows(node, block) == "BTC" and node.meta["val"].dtype == block.dtype


def _is_join(node: fx.Node, block: torch.Tensor) -> bool:
    """Two 16-bit tensors side by side, as wide as the block."""
    parts, dim = cat_of(node) or ((), 0)
    return (
        len(parts) == 2
        and dim == node.meta["val"].dim() - 1
        and _is_full(node, block)
        and all(p is not None and p.dtype == block.dtype and p.dim() == block.dim() for p in map(value_of, parts))
    )
