"""Graphs inside a graph: `nested_compile_region` leaves one body and, for each block, a call of it.

before   body = get_attr("subgraph_0");  y = invoke_subgraph(body, "subgraph_0", x, w0)
                                         z = invoke_subgraph(body, "subgraph_0", y, w1)
"""

from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class Invocation:
    """One call of a subgraph: the node, the name of the body in its GraphModule, and the operands."""

    node: fx.Node
    subgraph: str
    operands: tuple

    def point_to(self, gm: fx.GraphModule, subgraph: str, operands: tuple) -> None:
        """Call another body with other operands."""
        with gm.graph.inserting_before(self.node):
            body = gm.graph.get_attr(subgraph)
        self.node.args = (body, subgraph, *operands)


def invocations(gm: fx.GraphModule) -> list[Invocation]:
    """Every `invoke_subgraph` of a graph, in order."""
    target = torch.ops.higher_order.invoke_subgraph
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is target:
            body = node.args[0]
            found.append(Invocation(node, str(body.target), tuple(node.args[2:])))
    return found


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs, in order."""
    return list(graph.find_nodes(op="placeholder"))
