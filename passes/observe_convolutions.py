"""Watch what convolutions read whose weights are to be expanded (expanded.py).

    before   y = conv2d(x, w, b)        after   y = run("conv2d", x, w, b)

Left alone, and so rounded by the weight alone: transposed convolutions, those in bodies of their own, and weights that
are computed on the way.
"""

from collections.abc import Callable, Collection

from torch import fx

from .linears import POINTWISE_CONV, argument


def observe_convolutions(gm: fx.GraphModule, run: Callable, weights: Collection[fx.Node]) -> int:
    """Have them called by `run`, with their name. Returns how many.

    weights  that are to be expanded
    """
    watched = [node for weight in weights for node in weight.users if _reads(node, weight)]
    for node in watched:
        node.args = (node.target.__name__, *node.args)  # type: ignore[union-attr]
        node.target = run
    gm.recompile()
    return len(watched)


def _reads(node: fx.Node, weight: fx.Node) -> bool:
    return node.target in POINTWISE_CONV and argument(node, 1, "weight") is weight
