"""Move what follows a GEMM, elementwise, into the kernel that stores its result.

    before   y = svdq.gemm(...)                  after    h = svdq.fused_gemm(..., [gate, h0],
             t = mul(gate, y)                                 epilogue(y, a0: C, auxiliary: BTC)
             h = add(h0, t)                                   t0 = mul(a0, y)
                                                              t1 = add(auxiliary, t0))

Biases, activations, gates, residuals and casts come this way. A region grows from y over the operations that a region
can hold (vocabulary.py) and ends where exactly one of its values is needed outside: that one is stored, all others are
never in memory. Where there are several such places the last one is taken, but none that takes more memory than y.

Left alone: a value that is reshaped or reduced, one that somebody else reads too, operands of shapes that do not lie
along the block, what depends on y by another way than through the region, and a result whose strides somebody relies
on.
"""

from collections.abc import Iterable

from torch import fx

from ..kernels.operands import Gemm
from ..lowering import ops
from ..lowering.torch_private import describe
from .pipeline import log
from .regions import axes_in_rows, build, erase, grow, read_from_outside
from .restrided import restrided
from .vocabulary import SIXTEEN_BIT, Meaning, operation, same_shape, value_of


def fuse_epilogues(gm: fx.GraphModule) -> int:
    """Rewrite every GEMM that something elementwise follows. Returns how many."""
    return sum(_fuse(gm.graph, gemm) for gemm in gm.graph.find_nodes(op="call_function", target=ops.gemm))


def _fuse(graph: fx.Graph, gemm: fx.Node) -> bool:
    meanings = _after(gemm)
    block = value_of(gemm)
    if not meanings or block is None:
        return False
    outside = [node for node in read_from_outside(meanings) if node is not gemm]
    full = (n for n in outside if n.meta["val"].dtype in SIXTEEN_BIT and axes_in_rows(n, block) == "BTC")
    region, operands = build("epilogue", meanings, lambda node: axes_in_rows(node, block), {gemm: "y"},
                             auxiliary=next(full, None))  # fmt: skip
    result = list(meanings)[-1]
    plain = Gemm(*gemm.args)._replace(out_dtype=result.meta["val"].dtype)  # type: ignore[arg-type]
    with graph.inserting_before(result):
        fused = graph.call_function(ops.fused_gemm, (*plain, operands, str(region)))
    describe(fused, gemm)
    values = restrided({result: fused.meta["val"]})
    if values is None:
        log.debug("not fused after %s: somebody reads its result by its strides", gemm.name)
        graph.erase_node(fused)
        return False
    for node, value in values.items():
        node.meta["val"] = value
    result.replace_all_uses_with(fused)
    erase(graph, [gemm, *meanings])
    return True


def _after(gemm: fx.Node) -> dict[fx.Node, Meaning]:
    """What can be computed with `gemm`, in the graph's order; the last node is what it will store."""
    block, meanings = value_of(gemm), dict[fx.Node, Meaning]()

    def take(node: fx.Node, region: set[fx.Node]) -> Iterable[fx.Node] | None:
        found, value = operation(node), value_of(node)
        if found is None or block is None or value is None or not same_shape(value.shape, block.shape):
            return None
        read = (a for a in found[1] if isinstance(a, fx.Node) and a is not gemm and a not in region)
        if not all(axes_in_rows(a, block) for a in read):
            return None
        meanings[node] = found
        return node.users

    # A region may end at a node when all else that has been computed by then is read before it: nothing is `needed`.
    taken, needed = 0, set(gemm.users)
    for i, node in enumerate(grow(gemm.users, min, take)):
        needed.remove(node)
        if not needed and node.meta["val"].element_size() <= gemm.meta["val"].element_size():
            taken = i + 1
        needed.update(node.users)
    if not taken:
        outside = ", ".join(str(node.target) for node in sorted(needed)) or "nothing"
        log.debug("not fused after %s: its result goes to %s", gemm.name, outside)
    return dict(list(meanings.items())[:taken])
