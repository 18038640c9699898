"""New nodes of an aten graph, with all that others read of them."""

from collections.abc import Callable
from typing import Any

from torch import fx

from ..lowering.torch_private import describe
from .vocabulary import aten

Insert = Callable[..., fx.Node]  # (target, *args) -> the node


def inserter(graph: fx.Graph, like: fx.Node) -> Insert:
    """What makes nodes where the graph is inserting, in the place of `like`."""

    def insert(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        describe(node, like)
        return node

    return insert


def reshaped(node: fx.Node, kept: int, sizes: list[int], insert: Insert) -> fx.Node:
    """A view of a tensor that keeps the first dimensions, some of which may be symbolic, and has these after them."""
    shape = node.meta["val"].shape[:kept]
    first = [size if isinstance(size, int) else insert(aten.sym_size.int, node, i) for i, size in enumerate(shape)]
    return insert(aten.view.default, node, [*first, *sizes])
