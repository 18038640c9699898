"""Run each attention by the kernel that is fastest here, instead of the first one of torch's list that can.

    before   y = _scaled_dot_product_flash_attention(q, k, v)[0]
    after    y = _scaled_dot_product_cudnn_attention(q, k, v)[0]        if this is faster (lowering/attention.py)

All are exact. Left alone: attention with a mask, with dropout, whose log-sum is used too, of sizes that are not known,
or whose result would lie in memory differently.
"""

import operator
from typing import Any

from torch import Tensor, fx

from ..lowering.attention import KINDS, fastest
from ..lowering.torch_private import describe
from .pipeline import log
from .vocabulary import value_of


def choose_attention(gm: fx.GraphModule) -> int:
    """Replace the operators. Returns how many."""
    count = 0
    names = {function: name for name, (function, _) in KINDS.items()}
    for node in list(gm.graph.nodes):
        if node.target not in names:
            continue
        options = _options(node)
        reason = _why_not(node, options)
        if reason is not None:
            log.debug("attention %s stays with %s: %s", node.name, names[node.target], reason)
            continue
        kind = names[node.target]
        q, k, v = (a.meta["val"] for a in node.args[:3])
        found = fastest(kind, q, k, v, options["is_causal"], options["scale"])
        if found != kind:
            count += _replace(gm.graph, node, found, options)
    return count


def _options(node: fx.Node) -> dict[str, Any]:
    """The operator's arguments after q, k and v, by name, defaults filled in."""
    schema = node.target._schema.arguments[3:]  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args[3:], strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _why_not(node: fx.Node, options: dict[str, Any]) -> str | None:
    if options.get("attn_bias") is not None:
        return "it has a mask"
    if options["dropout_p"] != 0.0 or options.get("return_debug_mask"):
        return "it has dropout"
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return "more than its result is used"
    for value in map(value_of, node.args[:3]):
        if value is None or not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
            return "its sizes are not known"
    return None


def _replace(graph: fx.Graph, node: fx.Node, kind: str, options: dict[str, Any]) -> int:
    function, between = KINDS[kind]
    arguments = (*node.args[:3], *between, options["is_causal"])
    with graph.inserting_before(node):
        new = graph.call_function(function, arguments, {"scale": options["scale"]})
        result = graph.call_function(operator.getitem, (new, 0))
    describe(new, node)
    result.meta["val"] = new.meta["val"][0]
    users = list(node.users)
    if not all(_lie_alike(user.meta["val"], result.meta["val"]) for user in users):
        graph.erase_node(result)
        graph.erase_node(new)
        log.debug("attention %s stays as it is: the result of %s lies differently", node.name, kind)
        return 0
    for user in users:
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)  # dead-code elimination would keep it: it could have drawn random numbers
    return 1


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
