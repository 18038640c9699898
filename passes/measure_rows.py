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
from .vocabulary import SIXTEEN_BIT, aten, cat_of, operation, rows_measured, value_of

MIN_COLUMNS, MAX_COLUMNS = 512, 8192


def measure_rows(gm: fx.GraphModule) -> int:
    """Replace the reductions. Returns how many."""
    moments: dict[fx.Node, list[fx.Node]] = {}
    count = 0
    for node in list(gm.graph.nodes):
        x = rows_measured(node)
        if x is None or not _is_worth_it(x):
            continue
        is_mean = node.target is aten.mean.dim
        for result, which in [(node, 2)] if is_mean else [(item, item.args[1]) for item in node.users]:
            result.replace_all_uses_with(_moments(gm.graph, moments, x, node)[which])
        count += 1
    gm.graph.eliminate_dead_code()
    return count


def _is_worth_it(x: fx.Node) -> bool:
    """Whether x has 16 bits, and rows that the kernel reads sooner than Inductor does."""
    value = value_of(x)
    if value is None or value.dtype not in SIXTEEN_BIT:
        return False
    columns = value.shape[-1]
    fits = isinstance(columns, int) and MIN_COLUMNS <= columns <= MAX_COLUMNS
    cat = cat_of(x)
    # Rows put together of parts: Inductor does it in the kernel that measures them. Whole rows, of text and image
    # tokens, are in memory anyway when a residual reads them too.
    in_parts = cat is not None and cat[1] == value.dim() - 1
    return fits and operation(x) is None and not in_parts


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
