"""Graphs inside a graph. `nested_compile_region` leaves one body and, for each block, a call of it; checkpoints have a
body each.

before   body = get_attr("subgraph_0");    y = invoke_subgraph(body, "subgraph_0", x, w0)
                                           z = invoke_subgraph(body, "subgraph_0", y, w1)
         body = get_attr("wrap_body_0");   y = tag_activation_checkpoint(body, x, w0)

Left alone: bodies that somebody else runs in a way of his own (cond, while_loop, scan, flex_attention).
"""

from dataclasses import dataclass

import torch
from torch import fx

# The operators that call a body with their operands, nothing else, and where the operands begin.
FIRST_OPERAND = {
    torch.ops.higher_order.invoke_subgraph: 2,  # the name comes before
    torch.ops.higher_order.tag_activation_checkpoint: 1,
    torch.ops.higher_order.wrap: 1,
}


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
        name = (subgraph,) * (FIRST_OPERAND[self.node.target] - 1)  # type: ignore[index]
        self.node.args = (body, *name, *operands)


def invocations(gm: fx.GraphModule) -> list[Invocation]:
    """Every call of a body, in order."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in FIRST_OPERAND and _body(gm, node.args[0]) is not None:
            found.append(Invocation(node, str(node.args[0].target), tuple(node.args[FIRST_OPERAND[node.target] :])))
    return found


def bodies(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """Every graph inside this one, whoever runs it."""
    found = (_body(gm, node) for node in gm.graph.find_nodes(op="get_attr"))
    return [body for body in found if body is not None]


def other_bodies(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.GraphModule]]:
    """Every body that is not called by an invocation, with a node that runs it."""
    called = {call.node for call in invocations(gm)}
    found = ((user, _body(gm, node)) for node in gm.graph.find_nodes(op="get_attr") for user in node.users)
    return [(user, body) for user, body in found if body is not None and user not in called]


def _body(gm: fx.GraphModule, node: object) -> fx.GraphModule | None:
    """The graph that a node stands for. Other attributes of a module are tensors, or functions."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: object = gm
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, fx.GraphModule) else None


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs, in order."""
    return list(graph.find_nodes(op="placeholder"))
