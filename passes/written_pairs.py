"""Put side by side what a model writes into the even and the odd channels of new memory.

    before   e = slice_scatter(m, copy(slice(m, 3, 0, end, 2), even), 3, 0, end, 2)
             y = slice_scatter(e, copy(slice(e, 3, 1, end, 2), odd), 3, 1, end, 2)
    after    y = view(cat([unsqueeze(even, 4), unsqueeze(odd, 4)], -1), [..., D])

So Wan writes its rotation, into `torch.empty_like(q)`. Nothing of m is left: it may hold anything.

Left alone: any other two slices; results that do not lie in memory as their dimensions follow one another; and m that
is not new where sizes are symbolic: nobody was given them then, and to ask a tensor for its sizes is to read it.
"""

from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .inserting import inserter
from .vocabulary import aten, kept_by, prims, same_shape, value_of

_WRITE = aten.slice_scatter.default


def stack_written_pairs(graph: fx.Graph) -> int:
    """Rewrite every write that is the second of such two. Returns how many."""
    count = sum(_stack(graph, node) for node in graph.find_nodes(op="call_function", target=_WRITE))
    if count:
        graph.eliminate_dead_code()
    return count


def _stack(graph: fx.Graph, node: fx.Node) -> bool:
    y, first = value_of(node), node.args[0]
    if y is None or not isinstance(first, fx.Node) or first.target is not _WRITE or not _is_contiguous(y):
        return False
    channels, last, sizes = y.shape[-1], y.dim() - 1, _sizes(y, first.args[0])
    if sizes is None or type(channels) is not int or channels % 2:
        return False
    written = {kept_by(write): _written(write) for write in (first, node)}
    even, odd = (written.get((range(start, channels, 2), last)) for start in (0, 1))
    if even is None or odd is None:
        return False
    with graph.inserting_before(node):
        insert = inserter(graph, node)
        cast = [insert(prims.convert_element_type.default, half, y.dtype) for half in (even, odd)]
        halves = [insert(aten.unsqueeze.default, half, y.dim()) for half in cast]
        stacked = insert(aten.view.default, insert(aten.cat.default, halves, -1), sizes)
    node.replace_all_uses_with(stacked)
    return True


def _sizes(y: Tensor, memory: Any) -> list[Any] | None:
    """Of the result, as an argument: numbers, or nodes of symbolic ones that were given to what made the memory."""
    if all(isinstance(size, int) for size in y.shape):
        return list(y.shape)
    given = memory.args[0] if memory.args else None
    if not isinstance(given, list | tuple) or len(given) != y.dim():
        return None
    return list(given) if all(value_of(size) is None for size in given) else None


def _written(write: fx.Node) -> fx.Node | None:
    """What is written, one value for each place; `copy` casts it."""
    place = write.args[1]
    assert isinstance(place, fx.Node)
    source = place.args[1] if place.target is aten.copy.default else place
    value = value_of(source)
    there = place.meta["val"]
    fits = value is not None and value.device == there.device and same_shape(value.shape, there.shape)
    return source if fits and isinstance(source, fx.Node) else None


def _is_contiguous(value: Tensor) -> bool:
    """Whether that is known without a guard on symbolic sizes."""
    stride = 1
    for size, step in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not (statically_known_true(size == 1) or statically_known_true(step == stride)):
            return False
        stride = stride * size
    return True
