"""Copy no parts together that lie one after another in memory already.

    before   y = cat([slice(x, 1, 0, 512), slice(x, 1, 512, end)], 1)       after   y = x
    before   y = cat([text, image], 1), both inputs of the graph            after   y = svdq.joined([text, image], 1)

A block that works on text and image as one sequence is given both apart, and gives both back apart. In a whole model
that is seen in the graph, the first line; by blocks only when it is called, by `joined` (lowering/join.py).

Left alone: what no svdq:: operator reads (Inductor puts the parts together where it needs them), what the graph returns
or writes to, since it would be somebody else's memory, and biases, which never lie so.
"""

from collections.abc import Sequence

from torch import fx

from ..lowering import ops
from ..lowering.torch_private import describe
from .vocabulary import aten, cat_of, operation, prims, value_of

_VIEWS = (aten.view.default, aten.reshape.default, aten.slice.Tensor, aten.permute.default, aten.unsqueeze.default,
          aten.squeeze.dim, prims.convert_element_type.default)  # fmt: skip
_ASKING = (aten.var_mean.correction, aten.mean.dim, aten.sym_size.int)


def join_parts(gm: fx.GraphModule) -> int:
    """Replace each `cat` that may not have to copy. Returns how many."""
    count = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.cat.default)):
        found = cat_of(node)
        if found is None or not _is_tokens(node) or not _is_only_read(node) or not _svdq_reads(node):
            continue
        parts, dim = found
        whole = _cut_from(parts, dim)
        if whole is None:
            whole = _joined(gm.graph, node, parts, dim)
        if whole is not None:
            node.replace_all_uses_with(whole)
            gm.graph.erase_node(node)
            count += 1
    gm.graph.eliminate_dead_code()
    return count


def _is_tokens(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() > 2 and value.is_contiguous()


def _is_only_read(node: fx.Node) -> bool:
    """Whether nobody writes to it, and no result of the graph could be the same memory."""
    for user in node.users:
        if user.target in _VIEWS:
            if not _is_only_read(user):
                return False
        elif not (_is_svdq(user) or user.target in _ASKING or operation(user) is not None):
            return False
    return True


def _svdq_reads(node: fx.Node) -> bool:
    return any(_is_svdq(user) or (user.target in _VIEWS and _svdq_reads(user)) for user in node.users)


def _is_svdq(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", None) == "svdq"


def _cut_from(parts: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """The node whose slices these are, one after another, from its beginning to its end."""
    if any(part.target is not aten.slice.Tensor or part.kwargs or len(part.args) != 4 for part in parts):
        return None
    wholes, dims, starts, ends = zip(*(part.args for part in parts), strict=True)
    whole, value = wholes[0], value_of(wholes[0])
    if not isinstance(whole, fx.Node) or value is None or {*wholes} != {whole} or {*dims} != {dim}:
        return None
    size = value.shape[dim]
    if not all(type(n) is int for n in (size, *ends)) or starts != (0, *ends[:-1]) or ends[-1] < size:
        return None
    return whole


def _joined(graph: fx.Graph, node: fx.Node, parts: Sequence[fx.Node], dim: int) -> fx.Node | None:
    written = {n.args[0] for n in graph.find_nodes(op="call_function", target=aten.copy_.default)}
    kinds = {(part.meta["val"].dtype, part.meta["val"].dim()) for part in parts}
    if len(kinds) > 1 or any(part.op != "placeholder" or part in written for part in parts):
        return None
    with graph.inserting_before(node):
        call = graph.call_function(ops.joined, (list(parts), dim))
    describe(call, node)
    return call
