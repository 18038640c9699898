"""Whether a graph, as Dynamo made it, may write to what it is given: then a call that failed cannot be repeated."""

import operator
from typing import Any

from torch import fx

from .subgraphs import bodies

# x += y comes as operator.iadd, x[i] = y as operator.setitem.
_IN_PLACE = {name for name in dir(operator) if name[0] == "i" and name[1:] in dir(operator)} | {"setitem"}


def may_write(gm: fx.GraphModule) -> bool:
    """Whether some node, in subgraphs too, changes a tensor. One that the graph itself has made counts as well."""
    return any(_writes(node) for node in gm.graph.nodes) or any(may_write(body) for body in bodies(gm))


def _writes(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return schema.is_mutable
    name = target if isinstance(target, str) else target.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _IN_PLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
