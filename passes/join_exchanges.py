"""Send by one exchange what several send that follow one another: q, k and v of an attention whose heads are shared out
over ranks (Ulysses).

    before   q2 = view(wait(all_to_all_single(view(q, [n]), splits, splits, group)), shape)        q  [P, T, B, H, D]
             k2 = view(wait(all_to_all_single(view(k, [n]), splits, splits, group)), shape)
    after    y = cat([q, k], -1)                                                              [P, T, B, H, 2 D]
             z = view(wait(all_to_all_single(view(y, [n, 2]), splits, splits, group)), [n / D, 2 D])
             q2 = view(slice(z, 1, 0, D), shape);  k2 = view(slice(z, 1, D, 2 D), shape)

Beside its bytes an exchange has a latency, and takes the host longer than a kernel. Rows of D lie side by side, so all
strides of a result but the last are those of before, times the number: attention reads what came where it is. Inductor
writes the copies that were made to be sent into their places in one buffer.

The ranks must decide alike. So only parts of one size are joined, where every rank sends as much as every other; where
they are uneven, sizes that are equal here need not be so there. And only copies are: what is computed to be sent may be
in an epilogue here, and not where the layer stayed in 16 bits.

Left alone: exchanges that depend on one another, or have another collective between them; other groups, dtypes, shapes;
what was not copied to be sent, or is read by others too, since it would have to be copied once more; results that the
graph returns, or that somebody reads in a way which needs their rows to be neighbours; graphs that write to memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..lowering.torch_private import describe
from .order import collectives, sort_topologically, waits
from .pipeline import log
from .restrided import restrided
from .vocabulary import aten, same_shape
from .writes import may_write

ALIGNMENT = 16  # bytes, of where rows begin: kernels load so many at once
_SHAPES = (aten.view.default, aten.reshape.default)  # Inductor makes the second of all before it calls us


def join_exchanges(gm: fx.GraphModule) -> int:
    """Rewrite in place. Returns how many exchanges went away."""
    if may_write(gm):
        return 0
    count = sum(_join(gm.graph, run) for run in list(_runs(gm.graph)))
    if count:
        sort_topologically(gm.graph)
        gm.graph.eliminate_dead_code()
    return count


@dataclass(frozen=True)
class _Exchange:
    """Each rank sends as many values to each, and gets as many.

    sent     [..., D]: copied to be sent, before it was flattened
    is_flat  whether it was; else its first dimension is shared out
    """

    node: fx.Node
    wait: fx.Node
    sent: fx.Node
    is_flat: bool

    @classmethod
    def read(cls, node: fx.Node) -> "_Exchange | None":
        """None for what must not be joined."""
        if str(node.target) != "_c10d_functional.all_to_all_single.default" or len(node.users) != 1:
            return None
        (wait,) = node.users
        operand: Any = node.args[0]
        copy, is_flat = _copy(operand), operand.meta["val"].dim() == 1
        if copy is None or not waits(wait):
            return None
        exchange = cls(node, wait, copy if is_flat else operand, is_flat)
        return exchange if exchange._is_even() and exchange._has_rows() else None

    @property
    def value(self) -> Tensor:
        return self.sent.meta["val"]

    @property
    def splits(self) -> list[Any]:
        return [*self.node.args[1], *self.node.args[2]]  # type: ignore[misc]

    def _is_even(self) -> bool:
        sizes = [_size(split) for split in self.splits]
        return same_shape(sizes[1:], sizes[:-1])

    def _has_rows(self) -> bool:
        """Whether what came can be read as rows of D, and each begins where kernels can load it."""
        d = self.value.shape[-1]
        if type(d) is not int or d * self.value.itemsize % ALIGNMENT:
            return False
        is_whole = statically_known_true(_size(self.splits[0]) % d == 0)
        return not self.is_flat or (is_whole and all(user.target in _SHAPES for user in self.wait.users))

    def is_like(self, other: "_Exchange") -> bool:
        a, b = self.value, other.value
        kinds = [(e.node.args[3], e.is_flat, e.value.dtype, e.value.device) for e in (self, other)]
        return kinds[0] == kinds[1] and same_shape(a.shape, b.shape)


def _copy(node: fx.Node) -> fx.Node | None:
    """The copy that was made for this reader alone, views in between."""
    while node.target in _SHAPES and len(node.users) == 1:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target is aten.clone.default and len(node.users) == 1 else None


def _size(split: Any) -> Any:
    return split.meta["val"] if isinstance(split, fx.Node) else split


def _runs(graph: fx.Graph) -> Iterator[list[_Exchange]]:
    """Exchanges that are alike, none of which needs what came by another, with no collective between them."""
    sending = set(collectives(graph))
    run: list[_Exchange] = []
    later: set[fx.Node] = set()  # what needs what came by those of the run
    for node in graph.nodes:
        depends = not later.isdisjoint(node.all_input_nodes)
        if node in sending:
            exchange = _Exchange.read(node)
            if exchange is None or depends or not (run and exchange.is_like(run[0])):
                yield run
                run, later, depends = [], set(), False
            if exchange is not None:
                run.append(exchange)
        if depends or node in sending:
            later.add(node)
    yield run


def _join(graph: fx.Graph, run: list[_Exchange]) -> int:
    """Returns how many exchanges went away."""
    if len(run) < 2:
        return 0
    value, is_flat = run[0].value, run[0].is_flat
    d = value.shape[-1]
    lead = [value.numel() // d] if is_flat else value.shape[:-1]
    whole = value.new_empty(*lead, len(run) * d)
    parts = {exchange.wait: whole[..., i * d : (i + 1) * d] for i, exchange in enumerate(run)}
    values = restrided(parts, whole)
    if values is None or _copies(values):
        log.debug("not joined: %s", ", ".join(exchange.node.name for exchange in run))
        return 0
    for node, new in values.items():
        node.meta["val"] = new
    _replace(graph, run, whole)
    return len(run) - 1


def _copies(values: dict[fx.Node, Any]) -> bool:
    """Whether somebody gives one of these another shape, which is no view any more."""
    return any(user.target in _SHAPES and user not in values for node in values for user in node.users)


def _replace(graph: fx.Graph, run: list[_Exchange], whole: Tensor) -> None:
    """By one, of which `whole` comes; where it is sent last, and waited for first."""
    first, count = run[0], len(run)

    def insert(before: fx.Node, target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(before):
            node = graph.call_function(target, args)
        describe(node, first.node)
        return node

    last, needed = run[-1].node, min(exchange.wait for exchange in run)
    y = insert(last, aten.cat.default, [exchange.sent for exchange in run], first.value.dim() - 1)
    if first.is_flat:  # what was one value to the splits is one of each
        y = insert(last, aten.view.default, y, [-1, count])
    came = insert(needed, first.wait.target, insert(last, first.node.target, y, *first.node.args[1:]))
    if first.is_flat:
        came = insert(needed, aten.view.default, came, [-1, whole.shape[-1]])
    came.meta["val"] = whole
    d = whole.shape[-1] // count
    for i, exchange in enumerate(run):
        part = insert(needed, aten.slice.Tensor, came, whole.dim() - 1, i * d, (i + 1) * d)
        part.meta["val"] = exchange.wait.meta["val"]
        exchange.wait.replace_all_uses_with(part)
    for exchange in run:
        graph.erase_node(exchange.wait)
        graph.erase_node(exchange.node)
