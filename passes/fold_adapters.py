"""Fold LoRA adapters into the low-rank branch of the quantized linear they sit on.

    before   qx, ascales, xd = svdq.quantize(x, smooth, down)
             y0 = svdq.gemm(qx, ascales, xd, weight, up, bias)
             y1 = y0 + linear(linear(x, A1), B1) * s1            y = y1 + linear(linear(x, A2), B2) * s2
    after    qx, ascales, xd = svdq.quantize(x, smooth, cat(down, A1, A2))
             y = svdq.gemm(qx, ascales, xd, weight, cat(up, s1 B1, s2 B2), bias)

Nothing of this is kept between calls: A, B and the strengths stay inputs of the graph, so new values written to them
are seen, and the packed weight is not touched. Linears that share a quantized input go on sharing it; the rows of
`down` then lie linear by linear, because each GEMM reads one run of columns: [down_q, A_q, down_k, A_k]. The rank of a
linear with adapters is filled up with zeros to a multiple of RANK_STEP.

The same for svdq.gemv, where xd = linear(x, down), and for 1x1 convolutions. A strength is a number, a symbol or a
tensor of one value. Between x and A there may be casts and dropout that does nothing.

Of a linear that is split over ranks A or B is cut out of the whole one. Where its product is summed over them, so is
that with A:

    before   y = sum(y0) + bias + linear(sum(linear(x, A1[:, own])), B1) * s1
    after    y = sum(svdq.gemm(..., cat(up, s1 B1))) + bias               B1 is linear, so one sum does

Left alone, as products beside the linear: adapters with a bias, with a weight that is computed, or on a result that
something else reads too; and all adapters on linears that stayed 16-bit.
"""

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..kernels.operands import Gemm, Gemv, Quantize
from ..lowering import ops
from .linears import LINEAR, POINTWISE_CONV, argument, is_spatial_conv
from .peft_names import is_adapter
from .pipeline import log
from .quantize_linears import emit
from .scope import layer_name
from .subgraphs import bodies, invocations

MAX_TOGETHER = 8  # matrices in a concatenation that Inductor computes in one go, without a buffer for its parts
RANK_STEP = 16  # of the kernels' low-rank products
XD = 2  # the result of `quantize` that is the low-rank product
ADD = (operator.add, operator.iadd, torch.add)
OF_INPUTS = (torch.cat, torch.mul, F.pad, torch.flatten, torch.Tensor.to, operator.getitem, "item")
MULTIPLY = (operator.mul, operator.imul, torch.mul)


@dataclass(frozen=True)
class Adapter:
    """linear(linear(x, a), b) * scales[0] * scales[1] ...; a and b are graph inputs, or cut out of one."""

    a: fx.Node
    b: fx.Node
    scales: tuple[Any, ...]

    @property
    def rank(self) -> int:
        return _value(self.a).shape[0]


@dataclass(frozen=True)
class Reader:
    """A quantized linear and the adapters that are added to it.

    node       the svdq.gemm or svdq.gemv
    first, rank   its rows of `down`
    moves      what brings its result into the model's layout, for a convolution: movedim, contiguous; or sums it over
               ranks and adds the bias
    result     the sum of all, which goes on into the model
    """

    node: fx.Node
    first: int
    rank: int
    moves: tuple[fx.Node, ...]
    adapters: tuple[Adapter, ...]
    result: fx.Node

    @property
    def padding(self) -> int:
        return -(self.rank + sum(adapter.rank for adapter in self.adapters)) % RANK_STEP if self.adapters else 0

    @property
    def total_rank(self) -> int:
        return self.rank + sum(adapter.rank for adapter in self.adapters) + self.padding


def fold_adapters(gm: fx.GraphModule) -> int:
    """Rewrite, in subgraphs too. Returns how many adapters were folded."""
    graph, count = gm.graph, 0
    wide: list[fx.Node] = []
    for source, x, readers in _sources(graph):
        if any(reader.adapters for reader in readers):
            wide += _fold(graph, source, x, readers)
            count += sum(len(reader.adapters) for reader in readers)
    _compute_together(graph, wide)
    for node in graph.nodes:
        if _is_of_adapter(node):
            log.debug("not folded: %s stays a product beside its layer", layer_name(node))
    for name in {call.subgraph for call in invocations(gm)}:
        count += fold_adapters(gm.get_submodule(name))  # type: ignore[arg-type]
    return count


def sums_adapters(gm: fx.GraphModule) -> bool:
    """Whether a graph, as Dynamo made it, sums an adapter's product over ranks, which `fold_adapters` may spare; in
    subgraphs too.
    """
    return any(_sums(n) and _is_of_adapter(n.args[0]) for n in gm.graph.nodes) or any(map(sums_adapters, bodies(gm)))


def _is_of_adapter(node: Any) -> bool:
    """Whether it is a product with an adapter's matrix."""
    return isinstance(node, fx.Node) and node.target in (*LINEAR, *POINTWISE_CONV) and is_adapter(layer_name(node))


def _sources(graph: fx.Graph) -> list[tuple[fx.Node | None, fx.Node, list[Reader]]]:
    """(what computes down x: a `quantize`, a `linear`, or None where the rank is 0; x; the quantized linears behind
    it), the last in the order of their rows.
    """
    found: dict[fx.Node, tuple[fx.Node | None, fx.Node, list[Reader]]] = {}
    for node in graph.nodes:
        if node.target not in (ops.gemm, ops.gemv):
            continue
        operands = _operands(node)
        if operands.up is not None and "example_value" not in operands.up.meta:
            continue  # put together by this pass: it is folded already
        source, first = _low_rank_source(operands.xd)
        x = cast(fx.Node, (source or node).args[0])
        readers = found.setdefault(source or node, (source, x, []))[2]
        readers.append(_reader(node, first, x))
    for _, _, readers in found.values():
        readers.sort(key=lambda reader: reader.first)
    return list(found.values())


def _low_rank_source(xd: Any) -> tuple[fx.Node | None, int]:
    """quantize(...)[2][..., 16:32] -> (quantize, 16);  linear(x, down) -> (linear, 0)."""
    first = 0
    if xd is not None and xd.target is operator.getitem and isinstance(xd.args[1], tuple):
        xd, first = xd.args[0], xd.args[1][1].start
    if xd is not None and xd.target is operator.getitem:
        xd = xd.args[0]
    return xd, first


def _operands(node: fx.Node) -> Gemm | Gemv:
    """Of a quantized linear."""
    return Gemm(*node.args) if node.target is ops.gemm else Gemv(*node.args)  # type: ignore[arg-type]


def _down(source: fx.Node) -> fx.Node:
    """The matrix that `quantize` or `linear` multiplies x by."""
    return Quantize(*source.args).down if source.target is ops.quantize else source.args[1]  # type: ignore[arg-type, return-value]


def _reader(node: fx.Node, first: int, x: fx.Node) -> Reader:
    up: fx.Node | None = _operands(node).up
    y, moves = node, []
    if x.target is torch.movedim:
        x = x.args[0]  # type: ignore[assignment]
        while (user := _only_user(y)) is not None and user.target in (torch.movedim, torch.Tensor.contiguous):
            moves.append(user)
            y = user
    summed = _summed(y)
    moves += summed
    y = moves[-1] if moves else node
    group = summed[0].args[2] if summed else None
    adapters: list[Adapter] = []
    while (user := _only_user(y)) is not None and user.target in ADD and len(user.args) == 2 and not user.kwargs:
        adapter = _adapter(user.args[1] if user.args[0] is y else user.args[0], x, group)
        if adapter is None or (up is not None and _value(adapter.b).shape[0] != _value(up).shape[0]):
            break
        adapters.append(adapter)
        y = user
    rank = 0 if up is None else _value(up).shape[1]
    return Reader(node, first, rank, tuple(moves), tuple(adapters), y)


def _summed(y: fx.Node) -> list[fx.Node]:
    """What sums a product over ranks and adds a bias to the sum; nothing where it is not summed."""
    found: list[fx.Node] = []
    for is_next in (_sums, _waits, _adds_bias):
        user = _only_user(y)
        if user is None or not is_next(user):
            break
        found.append(user)
        y = user
    return found


def _sums(node: fx.Node) -> bool:
    is_one = str(node.target).removesuffix(".default") == "_c10d_functional.all_reduce"
    return is_one and len(node.args) == 3 and node.args[1] == "sum"


def _waits(node: fx.Node) -> bool:
    return str(node.target).removesuffix(".default") == "_c10d_functional.wait_tensor"


def _adds_bias(node: fx.Node) -> bool:
    bias = node.args[1] if node.target in ADD and len(node.args) == 2 and not node.kwargs else None
    return isinstance(bias, fx.Node) and bias.op == "placeholder"


def _adapter(term: Any, x: fx.Node, group: Any) -> Adapter | None:
    """Read linear(linear(x, a), b) * scale; None if it is anything else.

    group  torch's name of the ranks over which the inner product is summed; None: it is not
    """
    scales = []
    while isinstance(term, fx.Node) and term.target in MULTIPLY and len(term.args) == 2:
        left, right = term.args
        scale, term = (left, right) if _is_scalar(left) else (right, left)
        if not _is_scalar(scale):
            return None
        scales.append(scale)
    b = _product(term)
    inner = b[0] if b is not None else None
    if inner is not None and group is not None:
        inner = _before_sum(inner, group)
    a = _product(inner)
    if a is None or b is None or not _passes_on(x, a[0]):
        return None
    return Adapter(a[1], b[1], tuple(scales))


def _before_sum(node: fx.Node, group: Any) -> Any:
    """What is summed over the ranks of a group; None if it is no such sum."""
    summed = node.args[0] if _waits(node) else None
    is_such = isinstance(summed, fx.Node) and _sums(summed) and summed.args[2] == group
    return summed.args[0] if is_such else None  # type: ignore[union-attr]


def _product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """linear(x, weight) without a bias, or a 1x1 convolution, -> x and the weight, a graph input or cut out of one."""
    if not isinstance(node, fx.Node) or node.target not in (*LINEAR, *POINTWISE_CONV) or is_spatial_conv(node):
        return None
    x, weight = node.args[0], argument(node, 1, "weight")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or not _is_cut(weight):
        return None
    return (x, weight) if argument(node, 2, "bias") is None else None


def _is_cut(weight: fx.Node) -> bool:
    """Whether it is a graph input, or parts of one side by side that nothing else reads."""
    if weight.op == "placeholder":
        return True
    is_part = weight.target in (torch.cat, operator.getitem) and len(weight.users) == 1
    return is_part and all(_is_cut(part) for part in weight.all_input_nodes)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, fx.Node):
        value = value.meta.get("example_value")
        if isinstance(value, Tensor):
            return value.dim() == 0
    return isinstance(value, int | float | torch.SymFloat | torch.SymInt)


def _passes_on(x: fx.Node, node: fx.Node) -> bool:
    """Whether a node is x, but for casts and dropout that does nothing."""
    while node is not x:
        inactive = node.target is F.dropout and argument(node, 2, "training") is False
        cast = node.op == "call_method" and node.target == "to" and isinstance(argument(node, 1, "dtype"), torch.dtype)
        if not inactive and not cast:
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _value(node: fx.Node) -> Tensor:
    return node.meta["example_value"]


def _fold(graph: fx.Graph, source: fx.Node | None, x: fx.Node, readers: list[Reader]) -> list[fx.Node]:
    """Give the source the rows of all adapters, and each reader its columns; -> the concatenations."""
    down, xd = _widen_down(graph, source, x, readers)
    made = [down]
    first, total = 0, sum(reader.total_rank for reader in readers)
    for reader in readers:
        columns = (Ellipsis, slice(first, first + reader.total_rank))
        own = xd if reader.total_rank == total else emit(graph, reader.node, operator.getitem, xd, columns)
        first += reader.total_rank
        if reader.adapters:
            made.append(_widen_up(graph, reader, own))
        elif reader.rank:
            operands = _operands(reader.node)
            reader.node.args = operands._replace(xd=own)
            _erase_unused(graph, operands.xd)
    return [node for node in made if node.target is torch.cat]


def _compute_together(graph: fx.Graph, wide: list[fx.Node]) -> None:
    """Multiply all concatenations by 1 in one foreach operator, of which Inductor makes one kernel for all of them."""
    wide = [node for node in wide if len(node.args[0]) <= MAX_TOGETHER and _is_of_inputs(node)]  # type: ignore[arg-type]
    if len(wide) < 2:
        return
    users = {user for node in wide for user in node.users}
    first = next(node for node in graph.nodes if node in users)
    _bring_before(graph, first, wide)
    together = emit(graph, first, torch._foreach_mul, wide, 1.0)
    for i, node in enumerate(wide):
        item = emit(graph, first, operator.getitem, together, i)
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user is not together)


def _bring_before(graph: fx.Graph, place: fx.Node, nodes: list[fx.Node]) -> None:
    """Let nodes that are made of graph inputs alone, and all that they are made of, stand before another."""
    if all(node.op == "placeholder" for node in nodes):
        return
    needed = _ancestors(nodes)
    for node in list(graph.nodes)[list(graph.nodes).index(place) :]:
        if node in needed:
            place.prepend(node)


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    open_ = list(nodes)
    while open_:
        node = open_.pop()
        if node not in found:
            found.add(node)
            open_ += node.all_input_nodes
    return found


def _is_of_inputs(node: fx.Node) -> bool:
    """Whether it is made of weights and strengths alone, and so could stand at the graph's beginning."""
    return all(a.op == "placeholder" or a.target in OF_INPUTS for a in _ancestors([node]))


def _widen_down(graph: fx.Graph, source: fx.Node | None, x: fx.Node, readers: list[Reader]) -> tuple[fx.Node, fx.Node]:
    """cat(down, A, ...) in the place of `down`; -> it, and the node of its product with x."""
    before = source or readers[0].node
    down = None if source is None else _down(source)
    dtype = _operands(readers[0].node).out_dtype if down is None else _value(down).dtype
    rows: list[Any] = []
    for reader in readers:
        if reader.rank:
            covers = reader.rank == _value(down).shape[0]  # type: ignore[arg-type]
            own = slice(reader.first, reader.first + reader.rank)
            rows.append(down if covers else emit(graph, before, operator.getitem, down, own))
        _bring_before(graph, before, [adapter.a for adapter in reader.adapters])
        matrices = [_matrix(graph, before, adapter.a, dtype) for adapter in reader.adapters]
        if reader.padding:
            matrices[-1] = emit(graph, before, F.pad, matrices[-1], (0, 0, 0, reader.padding))
        rows += matrices
    wide = emit(graph, before, torch.cat, rows) if len(rows) > 1 else rows[0]
    if source is None:
        return wide, emit(graph, before, F.linear, x, wide)
    if source.target is not ops.quantize:
        source.update_arg(1, wide)
        return wide, source
    source.args = Quantize(*source.args)._replace(down=wide)  # type: ignore[arg-type]
    return wide, next(user for user in source.users if user.args[1] == XD)


def _widen_up(graph: fx.Graph, reader: Reader, xd: fx.Node) -> fx.Node:
    """The linear once more where the last sum was, since strengths may be known only there; -> cat(up, s B, ...)."""
    before, old = reader.result, reader.node
    operands = _operands(old)
    up: fx.Node | None = operands.up
    dtype = operands.out_dtype if up is None else _value(up).dtype
    columns = [up] if up is not None and reader.rank else []
    for adapter in reader.adapters:
        scaled = adapter.b
        for scale in adapter.scales:
            scaled = emit(graph, before, torch.mul, scaled, scale)
        columns.append(_matrix(graph, before, scaled, dtype, adapter.b))
    if reader.padding:
        columns[-1] = emit(graph, before, F.pad, columns[-1], (0, reader.padding))
    wide = emit(graph, before, torch.cat, columns, 1) if len(columns) > 1 else columns[0]
    y = emit(graph, before, old.target, *operands._replace(xd=xd, up=wide))  # type: ignore[arg-type]
    y.meta = dict(old.meta)
    for move in reader.moves:
        y = emit(graph, before, move.target, y, *move.args[1:])  # type: ignore[arg-type]
    if _value(before).dtype != operands.out_dtype:
        y = emit(graph, before, torch.Tensor.to, y, _value(before).dtype)
    before.replace_all_uses_with(y)
    _erase_unused(graph, before)
    return wide


def _matrix(
    graph: fx.Graph, before: fx.Node, node: fx.Node, dtype: torch.dtype, like: fx.Node | None = None
) -> fx.Node:
    """An adapter's matrix [out, in] in the model's dtype; `like`: the graph input that `node` was computed from."""
    value = _value(like or node)
    if value.dim() > 2:
        node = emit(graph, before, torch.flatten, node, 1)
    return node if value.dtype == dtype else emit(graph, before, torch.Tensor.to, node, dtype)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing reads, and then what it alone has read."""
    if node.users or node.op not in ("call_function", "call_method"):
        return
    read = node.all_input_nodes
    graph.erase_node(node)
    for other in read:
        _erase_unused(graph, other)
