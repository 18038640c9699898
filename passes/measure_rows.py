"""Take the statistics of a norm's rows from one kernel that reads them once.

    before   w = convert(x, fp32)                     after    variance, mean, square = svdq.row_moments(x)
             variance, mean = var_mean(w, [-1])
             square = mean(pow(w, 2), [-1])

Inductor's own reductions over rows of some thousand channels take two to three times as long as reading them does.

Left alone: rows that are short (the norm of a head) or very long, and x that Inductor would compute in the same kernel.
"""

import operator

from torch import fx

from ..lowering import ops
from ..lowering.torch_private import describe
from .vocabulary import SIXTEEN_BIT, aten, before_identities, cat_of, is_of_rows, operation, value_of

MIN_COLUMNS, MAX_COLUMNS = 512, 8192


def measure_rows(gm: fx.GraphModule) -> int:
    """Replace the reductions. Returns how many."""
    moments: dict[fx.Node, list[fx.Node]] = {}
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is aten.var_mean.correction and is_of_rows(node, correction=0):
            x, results = _rows(node.args[0]), [(item, item.args[1]) for item in node.users]
        elif node.target is aten.mean.dim and is_of_rows(node):
            x, results = _rows(_squared(node.args[0])), [(node, 2)]
        else:
            continue
        if x is not None:
            for result, which in results:
                result.replace_all_uses_with(_moments(gm.graph, moments, x, node)[which])
            count += 1
    gm.graph.eliminate_dead_code()
    return count


def _squared(node: object) -> fx.Node | None:
    """w, if the node is w * w."""
    found = operation(node) if isinstance(node, fx.Node) else None
    return found[1][0] if found is not None and found[0] == "mul" and found[1][0] is found[1][1] else None


def _rows(w: object) -> fx.Node | None:
    """The 16-bit x that w is, if its rows are worth it."""
    if not isinstance(w, fx.Node):
        return None
    w = before_identities(w)
    value = value_of(w)
    if value is None or value.dtype not in SIXTEEN_BIT:
        return None
    columns = value.shape[-1]
    fits = isinstance(columns, int) and MIN_COLUMNS <= columns <= MAX_COLUMNS
    cat = cat_of(w)
    # Rows put together of parts: Inductor does it in the kernel that measures them. Whole rows, of text and image
    # tokens, are in memory anyway when a residual reads them too.
    in_parts = cat is not None and cat[1] == value.dim() - 1
    return w if fits and operation(w) is None and not in_parts else None


def _moments(graph: fx.Graph, made: dict[fx.Node, list[fx.Node]], x: fx.Node, like: fx.Node) -> list[fx.Node]:
    """The three moments of x's rows, made when first asked for."""
    if x not in made:
        with graph.inserting_after(x):
            after = call = graph.call_function(ops.row_moments, (x,))
        describe(call, like)
        made[x] = []
        for i in range(3):
            with graph.inserting_after(after):
                after = graph.call_function(operator.getitem, (call, i))
            after.meta["val"] = call.meta["val"][i]
            made[x].append(after)
    return made[x]
