"""Remove the inputs that nothing reads any more: 16-bit weights whose linears were replaced.

    before   placeholder w (no users), placeholder w_qweight, ...
    after    placeholder w_qweight, ...

Left alone: an unused input that is not in `weights` (Dynamo put it there for a reason).
"""

from collections.abc import Collection

from torch import fx

from .subgraphs import invocations, placeholders


def drop_replaced_weights(gm: fx.GraphModule, weights: Collection[fx.Node]) -> int:
    """Erase the unused ones of these placeholders; in subgraphs, the operands with them. Returns how many went away."""
    dropped = 0
    unused: dict[str, list[int]] = {}
    for call in invocations(gm):
        if call.subgraph not in unused:
            body = gm.get_submodule(call.subgraph)
            inner = placeholders(body.graph)  # type: ignore[arg-type]
            passed = [p for p, operand in zip(inner, call.operands, strict=True) if operand in weights]
            unused[call.subgraph] = [inner.index(p) for p in passed if not p.users]
            drop_replaced_weights(body, passed)  # type: ignore[arg-type]
            body.recompile()  # type: ignore[operator]
        gone = unused[call.subgraph]
        if gone:
            call.point_to(gm, call.subgraph, tuple(o for i, o in enumerate(call.operands) if i not in gone))
    for weight in placeholders(gm.graph):
        if weight in weights and not weight.users:
            gm.graph.erase_node(weight)
            dropped += 1
    return dropped
