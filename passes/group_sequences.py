"""Make one operator of svdq:: operators that nothing else has to come between.

    before   q = svdq.quantize(x, ...);  y = svdq.gemm(q, ...);  z = svdq.attention(view(y), ...)
    after    y, z = svdq.sequence([x, ...], [], "v0 = svdq.quantize.default(x[0], ...); ...; return [v3, v5]")

Each operator gets a stage: 0, or one more than those that it depends on through an operator of another kind. All of a
stage become one sequence; what they depend on is computed before, what depends on them after it. Where there is a
choice a stage is as late as possible, so that no result waits in memory for long. Views, and numbers taken from shapes,
belong to no stage: they are repeated in the sequence. A collective of several ranks counts as depending on the one
before it: their order is the same on all ranks, and stays so.

Left alone: a stage of one operator; graphs that write to memory, where the order matters; graphs on several devices, or
on one without kernels, where operators do not go by plans (lowering/replay.py), which is what a sequence is for.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..kernels.runtime.target import has_kernels
from ..lowering import ops
from ..lowering.torch_private import describe
from .order import collective_before, sort_topologically
from .vocabulary import aten
from .writes import may_write

_GROUPED = {ops.quantize, ops.fused_quantize, ops.gemm, ops.fused_gemm, ops.gemv, ops.row_moments, ops.head_region,
            ops.attention, ops.attention_of_heads}  # fmt: skip
_VIEWS = {aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default,
          aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int,
          aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.expand.default}  # fmt: skip
_NUMBERS = {aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv}


def group_sequences(gm: fx.GraphModule) -> int:
    """Rewrite in place. Returns how many operators are now in sequences."""
    devices = _devices(gm.graph)
    if may_write(gm) or len(devices) != 1 or not all(map(has_kernels, devices)):
        return 0
    stages: dict[int, list[fx.Node]] = {}
    for node, stage in _stages(gm.graph).items():
        stages.setdefault(stage, []).append(node)
    groups = [nodes for nodes in stages.values() if len(nodes) > 1 and ops.sequence not in {n.target for n in nodes}]
    count = sum(_replace(gm.graph, nodes) for nodes in groups)
    if count:
        sort_topologically(gm.graph)
        gm.graph.eliminate_dead_code()
    return count


def _devices(graph: fx.Graph) -> set[torch.device]:
    """Where operators run that can be in a sequence."""
    nodes = filter(_is_grouped, graph.nodes)
    return {t.device for node in nodes for t in tree_leaves(node.meta["val"])}


def _is_grouped(node: fx.Node) -> bool:
    return node.target in _GROUPED or node.target is ops.sequence


def _is_free(node: fx.Node) -> bool:
    """Whether it costs nothing to repeat: a view, a part of several results, a number."""
    return node.op == "call_function" and (
        node.target in _VIEWS or node.target in _NUMBERS or node.target is operator.getitem
    )


def _stages(graph: fx.Graph) -> dict[fx.Node, int]:
    """Of each operator that can be in a sequence, in the graph's order: even numbers, the odd ones are the others'."""
    before = collective_before(graph)
    after = {earlier: later for later, earlier in before.items()}
    early: dict[fx.Node, int] = {}
    for node in graph.nodes:
        stage = max((early[n] for n in node.all_input_nodes), default=-1)
        stage = stage if _is_free(node) else stage + (stage % 2 != _parity(node))
        early[node] = max(stage, early[before[node]]) if node in before else stage
    last = max((stage for node, stage in early.items() if _is_grouped(node)), default=0)
    late: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        stage = min((late[user] for user in node.users), default=last + 1)
        stage = stage if _is_free(node) else stage - (stage % 2 != _parity(node))
        late[node] = min(stage, late[after[node]]) if node in after else stage
    return {node: late[node] for node in graph.nodes if _is_grouped(node)}


def _parity(node: fx.Node) -> int:
    return 0 if _is_grouped(node) else 1


def _replace(graph: fx.Graph, nodes: list[fx.Node]) -> int:
    """By one sequence, which stands anywhere. Returns how many operators; 0 if text cannot say what one is given."""
    program = _Program(nodes)
    results = [node for node in _results(nodes) if _is_read(node, set(nodes))]
    try:
        for node in nodes:
            program.add(node)
        text = program.text(results)
    except _NoText:
        return 0
    with graph.inserting_before(nodes[0]):
        call = graph.call_function(ops.sequence, (program.tensors, program.sizes, text))
        describe(call, nodes[0])
        for i, node in enumerate(results):
            part = graph.call_function(operator.getitem, (call, i))
            part.meta.update(node.meta, val=call.meta["val"][i])
            node.replace_all_uses_with(part)
    return len(nodes)


def _results(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """What gives their results: they themselves, or for several results each its part."""
    for node in nodes:
        if isinstance(node.meta["val"], Tensor):
            yield node
        else:
            parts: dict[Any, fx.Node] = {}
            for part in list(node.users):
                first = parts.setdefault(part.args[1], part)
                if first is part:
                    yield part
                else:
                    part.replace_all_uses_with(first)


def _is_read(node: fx.Node, within: set[fx.Node]) -> bool:
    """Whether somebody reads it who does not belong to these."""
    return any(_is_read(user, within) if _is_free(user) else user not in within for user in node.users)


class _NoText(Exception):
    """An argument that a program has no words for."""


class _Program:
    """The text of a sequence while it is put together, and what it reads."""

    def __init__(self, nodes: list[fx.Node]) -> None:
        self.tensors: list[fx.Node] = []
        self.sizes: list[fx.Node] = []
        self._inside = set(nodes)
        self._names: dict[fx.Node, str] = {}
        self._lines: list[str] = []

    def add(self, node: fx.Node) -> None:
        """One of the operators, or what is repeated for it, and before it what it reads."""
        given = [self._argument(a) for a in node.args]
        given += [f"{name}={self._argument(a)}" for name, a in node.kwargs.items()]
        self._names[node] = f"v{len(self._names)}"
        self._lines.append(f"{self._names[node]} = {_called(node)}({', '.join(given)})")

    def text(self, results: list[fx.Node]) -> str:
        given_back = ", ".join(map(self._name, results))  # first: it may add lines
        return "; ".join([*self._lines, f"return [{given_back}]"])

    def _argument(self, a: Any) -> str:
        if isinstance(a, fx.Node):
            return self._name(a)
        if isinstance(a, list | tuple):
            return f"[{', '.join(map(self._argument, a))}]"
        if a is None or isinstance(a, str | int | float | torch.dtype):
            return repr(a)
        raise _NoText

    def _name(self, node: fx.Node) -> str:
        if node not in self._names:
            if self._is_repeated(node):
                self.add(node)
            else:
                value = node.meta.get("val")
                if not isinstance(value, Tensor | int | torch.SymInt):
                    raise _NoText
                inputs, kind = (self.tensors, "x") if isinstance(value, Tensor) else (self.sizes, "n")
                self._names[node] = f"{kind}[{len(inputs)}]"
                inputs.append(node)
        return self._names[node]

    def _is_repeated(self, node: fx.Node) -> bool:
        """A view is, whatever it is of; a number where it comes from the sequence itself."""
        if not _is_free(node):
            return False
        if node.target is operator.getitem:
            (several,) = node.all_input_nodes
            return several in self._inside or several.target in _VIEWS
        return node.target in _VIEWS or any(self._comes_from_inside(n) for n in node.all_input_nodes)

    def _comes_from_inside(self, node: fx.Node) -> bool:
        inside = node in self._inside
        return inside or (_is_free(node) and any(self._comes_from_inside(n) for n in node.all_input_nodes))


def _called(node: fx.Node) -> str:
    """What a program has for it: "aten.slice.Tensor", "operator.getitem"."""
    target: Any = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{target.__name__}"
