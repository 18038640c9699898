"""Compute linears that read one input and lie side by side in memory (lowering/packed.py) by one GEMM.

    before   q = svdq.gemm(qx, ascales, xd[..., 0:r], [w[0:n]], up[0:n], bias_q)
             k = svdq.gemm(qx, ascales, xd[..., r:2r], [w[n:2n]], up[n:2n], bias_k)
             ... view(q), view(k) ...
    after    y = svdq.gemm(qx, ascales, xd[..., 0:2r], [w[0:2n]], up[0:2n], cat(bias_q, bias_k))
             ... view(y[..., 0:n]), view(y[..., n:2n]) ...

One of several thousand features fills a GPU better than three that follow one another, and is started once. Whoever
reads a part reads it where it is, with the rows of all apart; nothing is copied. Where the second matrices of the
low-rank branches do not lie side by side (adapters are folded into them), and for biases, which are parameters that
anybody may write to, the graph puts them together at each call: a few KB.

Left alone: a linear with an epilogue, which is worth more; ranks that differ; one of two with a bias; a result that the
graph returns, that is read too early, or that somebody reads in a way which needs its rows to be neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.formats import FORMATS
from ..kernels.operands import Gemm
from ..lowering import ops
from ..lowering.torch_private import describe
from .pipeline import log
from .restrided import restrided
from .vocabulary import value_of

aten = torch.ops.aten


def merge_siblings(gm: fx.GraphModule) -> int:
    """Rewrite. Returns how many GEMMs went away."""
    place: dict[fx.Node, float] = {node: i for i, node in enumerate(gm.graph.nodes)}
    families: dict[tuple, list[_Linear]] = {}
    for gemm in gm.graph.find_nodes(op="call_function", target=ops.gemm):
        if FORMATS[Gemm(*gemm.args).precision].siblings and gemm.users:
            linear = _Linear.read(gemm)
            families.setdefault(linear.family(), []).append(linear)
    count = 0
    for run in (run for family in families.values() for run in _runs(family)):
        *lead, n = run[0].value.shape
        whole = run[0].value.new_empty(*lead, len(run) * n)
        parts = {linear.node: whole[..., i * n : (i + 1) * n] for i, linear in enumerate(run)}
        values = restrided(parts, whole)
        if values is None or not _in_time(run, place):
            log.debug("not merged: %s", ", ".join(linear.node.name for linear in run))
            continue
        for node, value in values.items():
            node.meta["val"] = value
        _merge(gm.graph, run, whole, place)
        count += len(run) - 1
    if count:
        gm.graph.eliminate_dead_code()
    return count


@dataclass(frozen=True)
class Window:
    """source[start:stop] along a dimension; a tensor that is not cut is its own whole window."""

    source: fx.Node
    dim: int
    start: int
    stop: int

    @classmethod
    def read(cls, node: Any, dim: int = 0) -> "Window":
        """`dim`: along which to look at a whole tensor."""
        value = value_of(node)
        assert value is not None
        if node.target is aten.slice.Tensor and node.args[4:] in ((), (1,)):
            source, along, start = (*node.args, 0, 0)[:3]
            if type(start) is int and start >= 0:
                return cls(source, along, start, start + value.shape[along])
        return cls(node, dim, 0, value.shape[dim])

    def is_next(self, other: "Window") -> bool:
        """Whether it begins where the other one ends."""
        return self.source is other.source and self.dim == other.dim and self.start == other.stop


@dataclass(frozen=True)
class _Linear:
    """The arguments of one svdq.gemm."""

    node: fx.Node
    qx: fx.Node
    ascales: fx.Node
    xd: Window
    weight: tuple[Window, ...]
    up: fx.Node
    bias: fx.Node | None
    offset: fx.Node | None
    precision: str
    dtype: torch.dtype

    @classmethod
    def read(cls, node: fx.Node) -> "_Linear":
        qx, ascales, xd, weight, *rest = node.args
        return cls(node, qx, ascales, Window.read(xd, -1), tuple(map(Window.read, weight)), *rest)  # type: ignore[arg-type]

    @property
    def value(self) -> Tensor:
        return self.node.meta["val"]

    def family(self) -> tuple:
        """What siblings have in common."""
        rank, optional = self.up.meta["val"].shape[1], (self.bias is None, self.offset is None)
        return self.qx, self.ascales, self.xd.source, self.weight[0].source, rank, optional, self.precision, self.dtype

    def is_next(self, last: "_Linear") -> bool:
        pairs = zip((self.xd, *self.weight), (last.xd, *last.weight), strict=True)
        return all(own.is_next(other) for own, other in pairs)

    def inputs(self) -> list[fx.Node]:
        """What must be there before the product."""
        others = [Window.read(node).source for node in (self.up, self.bias, self.offset) if node is not None]
        return [self.qx, self.ascales, self.xd.source, *(w.source for w in self.weight), *others]


def _runs(family: list[_Linear]) -> list[list[_Linear]]:
    """Those that follow one another, in memory and in their columns of xd."""
    runs: list[list[_Linear]] = []
    for linear in sorted(family, key=lambda linear: linear.weight[0].start):
        if runs and linear.is_next(runs[-1][-1]):
            runs[-1].append(linear)
        else:
            runs.append([linear])
    return [run for run in runs if len(run) > 1]


def _first_reader(run: list[_Linear], place: dict[fx.Node, float]) -> fx.Node:
    return min((user for linear in run for user in linear.node.users), key=place.__getitem__)


def _in_time(run: list[_Linear], place: dict[fx.Node, float]) -> bool:
    """Whether all that the product reads is there before anybody reads the result."""
    needed_by = place[_first_reader(run, place)]
    return all(place[node] < needed_by for linear in run for node in linear.inputs())


def _merge(graph: fx.Graph, run: list[_Linear], whole: Tensor, place: dict[fx.Node, float]) -> None:
    first = run[0]
    reader = _first_reader(run, place)

    def insert(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(reader):
            node = graph.call_function(target, args)
        describe(node, first.node)
        place[node] = place[reader] - 0.5
        return node

    def cut(windows: Sequence[Window]) -> fx.Node:
        begin, end = windows[0], windows[-1]
        value = begin.source.meta["val"]
        if (begin.start, end.stop) == (0, value.shape[begin.dim]):
            return begin.source
        return insert(aten.slice.Tensor, begin.source, begin.dim % value.dim(), begin.start, end.stop)

    def join(nodes: Sequence[fx.Node | None]) -> fx.Node | None:
        """What has a value for each feature: as it lies in memory, or put together."""
        if None in nodes:
            return None
        windows = [Window.read(node) for node in nodes]
        if all(own.is_next(other) for own, other in zip(windows[1:], windows, strict=False)):
            return cut(windows)
        return insert(aten.cat.default, list(nodes))

    xd = cut([linear.xd for linear in run])
    weight = [cut(windows) for windows in zip(*(linear.weight for linear in run), strict=True)]
    up, bias, offset = (join([getattr(linear, name) for linear in run]) for name in ("up", "bias", "offset"))
    y = insert(ops.gemm, first.qx, first.ascales, xd, weight, up, bias, offset, first.precision, first.dtype)
    y.meta["val"] = whole
    dim, n = first.value.dim() - 1, first.value.shape[-1]
    for i, linear in enumerate(run):
        part = insert(aten.slice.Tensor, y, dim, i * n, (i + 1) * n)
        part.meta["val"] = linear.value
        linear.node.replace_all_uses_with(part)
        graph.erase_node(linear.node)
