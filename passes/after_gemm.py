"""What follows a GEMM, elementwise, as a region of the kernel that stores its result: what `fuse_epilogues` and
`fuse_gates` have in common.

A region grows from the result, or from its halves, over the operations that a region can hold (vocabulary.py), and ends
where exactly one of its values is needed outside: that one is stored, all others are never in memory. Where there are
several such places the last one is taken, but none whose elements take more memory than the result's.
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


def fuse_after(kind: str, gemm: fx.Node, given: dict[fx.Node, str]) -> bool:
    """Rewrite a GEMM with what follows it. Returns whether something does.

    given  what a region of this kind is given, by the nodes that are it: the result itself or parts of it, of one shape
    """
    graph, block = gemm.graph, value_of(next(iter(given)))
    meanings = _after(gemm, given)
    if not meanings or block is None:
        return False
    outside = [node for node in read_from_outside(meanings) if node not in given]
    full = (n for n in outside if n.meta["val"].dtype in SIXTEEN_BIT and axes_in_rows(n, block) == "BTC")
    region, operands = build(kind, meanings, lambda node: axes_in_rows(node, block), given,
                             auxiliary=next(full, None) if kind == "epilogue" else None)  # fmt: skip
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
    erase(graph, meanings)
    return True


def _after(gemm: fx.Node, given: dict[fx.Node, str]) -> dict[fx.Node, Meaning]:
    """What can be computed with `gemm`, in the graph's order; the last node is what it will store."""
    block, meanings = value_of(next(iter(given))), dict[fx.Node, Meaning]()
    users = {user for node in given for user in node.users}

    def take(node: fx.Node, region: set[fx.Node]) -> Iterable[fx.Node] | None:
        found, value = operation(node), value_of(node)
        if found is None or block is None or value is None or not same_shape(value.shape, block.shape):
            return None
        read = (a for a in found[1] if isinstance(a, fx.Node) and a not in given and a not in region)
        if not all(axes_in_rows(a, block) for a in read):
            return None
        meanings[node] = found
        return node.users

    # A region may end at a node when all else that has been computed by then is read before it: nothing is `needed`.
    taken, needed = 0, set(users)
    for i, node in enumerate(grow(users, min, take)):
        needed.remove(node)
        if not needed and node.meta["val"].element_size() <= gemm.meta["val"].element_size():
            taken = i + 1
        needed.update(node.users)
    if not taken:
        outside = ", ".join(str(node.target) for node in sorted(needed)) or "nothing"
        log.debug("not fused after %s: its result goes to %s", gemm.name, outside)
    return dict(list(meanings.items())[:taken])
