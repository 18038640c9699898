"""The order of a graph's nodes: each stands after all that it reads, and collectives stand in one order on all ranks.

A collective, an exchange between the processes of torch.distributed, meets the one that the other ranks come to next.
So moving nodes must leave their order as it was, even where a pass does other things on other ranks.
"""

from itertools import pairwise

from torch import fx

from .subgraphs import bodies

# Of torch's functional collectives. The second has those that know gradients: in torch 2.13 the first do.
_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd")


def sends(node: fx.Node) -> bool:
    """Whether it is one of torch's functional collectives, the waiting for their results included."""
    return getattr(node.target, "namespace", None) in _NAMESPACES


def waits(node: fx.Node) -> bool:
    """Whether it waits for what a collective gives."""
    return sends(node) and node.target.name().endswith("::wait_tensor")  # type: ignore[union-attr]


def may_send(gm: fx.GraphModule, collective: str) -> bool:
    """Whether a graph, as Dynamo made it, has collectives whose name begins so; in subgraphs too."""
    names = tuple(f"{namespace}.{collective}" for namespace in _NAMESPACES)
    return any(str(n.target).startswith(names) for n in gm.graph.nodes) or any(
        may_send(b, collective) for b in bodies(gm)
    )


def groups_in(gm: fx.GraphModule) -> list[str]:
    """torch's names of the groups whose ranks a graph, as Dynamo made it, exchanges tensors with; in subgraphs too."""
    found = []
    for node in gm.graph.nodes:
        name = str(node.target).removesuffix(".default")
        if name.startswith(_NAMESPACES) and not name.endswith(".wait_tensor"):
            found += [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, str)][-1:]
    return found + [group for body in bodies(gm) for group in groups_in(body)]


def collectives(graph: fx.Graph) -> list[fx.Node]:
    """In their order, without the waiting."""
    return [node for node in graph.nodes if sends(node) and not waits(node)]


def collective_before(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Of each collective but the first, the one before it."""
    return {later: earlier for earlier, later in pairwise(collectives(graph))}


def sort_topologically(graph: fx.Graph) -> None:
    """Bring the nodes into an order in which each stands after all that it reads, and otherwise as they were."""
    before = collective_before(graph)
    waiting: dict[fx.Node, list[fx.Node]] = {}
    pending, ready = list(reversed(graph.nodes)), dict[fx.Node, None]()
    while pending:
        node = pending.pop()
        needed = [*node.all_input_nodes, *filter(None, [before.get(node)])]
        missing = next((n for n in reversed(needed) if n not in ready), None)
        if missing is not None:
            waiting.setdefault(missing, []).append(node)
        else:
            ready[node] = None
            pending.extend(reversed(waiting.pop(node, [])))
    assert not waiting, f"nodes that read each other in a circle: {[n.name for n in waiting]}"
    for earlier, later in pairwise(ready):
        if earlier.next is not later:
            earlier.append(later)
