"""Growing a region over a graph, and writing it down: what epilogues, prologues and heads have in common."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from ..lowering.region import ROWS, Argument, Region, Step
from .vocabulary import FLOATS, Meaning, axes_of, before_identities, value_of

MAX_NODES = 200  # GELU takes 10

Operand = tuple[str, str, fx.Node]  # name, axes, and what it is in the graph


def grow(
    waiting: Iterable[fx.Node],
    pick: Callable[[Iterable[fx.Node]], fx.Node],
    take: Callable[[fx.Node, set[fx.Node]], Iterable[fx.Node] | None],
) -> list[fx.Node]:
    """The nodes of a region, in the graph's order.

    pick   which of those that wait comes next: `min` of what reads the region, so that whatever a node reads has been
           asked before; `max` of what the region reads, so that all its readers have been
    take   (node, region) -> those that wait now because of this node; None: it does not belong to the region
    """
    region: set[fx.Node] = set()
    ahead = set(waiting)
    while ahead and len(region) < MAX_NODES:
        node = pick(ahead)
        ahead.remove(node)
        following = take(node, region)
        if following is not None:
            region.add(node)
            ahead.update(following)
    return sorted(region)


def axes_in_rows(node: Any, block: Tensor) -> str | None:
    """How a tensor lies against a block [B, T, ..., C] whose leading dimensions are rows."""
    value = value_of(node)
    if value is None or value.dtype not in FLOATS or value.device != block.device:
        return None
    return axes_of(value.shape, block.shape, ("B" + "T" * block.dim())[: block.dim() - 1] + "C", ROWS)


def read_from_outside(meanings: dict[fx.Node, Meaning]) -> list[fx.Node]:
    """The tensors that a region's nodes read, in that order, as they were before casts to fp32."""
    read = [a for _, arguments in meanings.values() for a in arguments if isinstance(a, fx.Node) and a not in meanings]
    return list(dict.fromkeys(map(before_identities, read)))


def _variance(step: Callable[..., str], x: str) -> str:
    off = step("sub", x, step("row_mean", x))
    return step("row_mean", step("mul", off, off))


def _complex_mul(step: Callable[..., str], x: str, y: str) -> str:
    a, b, c, d = (step(part, z) for z in (x, y) for part in ("even", "odd"))
    real = step("sub", step("mul", a, c), step("mul", b, d))
    return step("pair", real, step("add", step("mul", a, d), step("mul", b, c)))


_SEVERAL_STEPS: dict[str, Callable[..., str]] = {"variance": _variance, "complex_mul": _complex_mul}


def build(
    kind: str,
    meanings: dict[fx.Node, Meaning],
    axes: Callable[[fx.Node], str | None],
    names: dict[fx.Node, str],
    operands: Sequence[Operand] = (),
    auxiliary: fx.Node | None = None,
) -> tuple[Region, list[fx.Node]]:
    """A region of these nodes, and the operands that its operator gets.

    axes       how a tensor from outside lies against the block
    names      of what it works on
    operands   that come before those that its steps read; these are numbered, all but the auxiliary one
    """
    known, taken = dict(names), list(operands)
    steps: dict[str, Step] = {}
    numbers = itertools.count()

    def step(operation: str, *arguments: Argument) -> str:
        made = Step(f"t{len(steps)}", operation, arguments)
        return steps.setdefault(made.expression(), made).name

    def name_of(argument: fx.Node | float) -> Argument:
        if not isinstance(argument, fx.Node):
            return float(argument)
        if argument not in known:
            source = before_identities(argument)
            if source not in known:
                lies = axes(source)
                assert lies is not None, f"{source} does not lie along the block"
                known[source] = "auxiliary" if source is auxiliary else f"a{next(numbers)}"
                taken.append((known[source], lies, source))
            known[argument] = known[source]
        return known[argument]

    for node, (operation, read) in meanings.items():
        arguments: Any = [name_of(argument) for argument in read]
        if operation == "":
            known[node] = arguments[0]
        else:
            several = _SEVERAL_STEPS.get(operation)
            known[node] = several(step, *arguments) if several else step(operation, *arguments)
    region = Region(kind, tuple((name, lies) for name, lies, _ in taken), tuple(steps.values()))
    assert not meanings or known[next(reversed(meanings))] == region.result, "the last step is not the result"
    return region, [node for *_, node in taken]


def erase(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Those that nobody reads any more."""
    for node in sorted(nodes, reverse=True):
        if not node.users:
            graph.erase_node(node)
