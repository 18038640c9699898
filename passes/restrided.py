"""What nodes of an aten graph give once some of them lie differently in memory: their fake tensors, followed through
all that reads them until nothing changes any more.

Kernels give rows side by side. What the model's own operator would have given may lie otherwise: a residual that came
out of a transposition hands its strides on to every sum.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from ..lowering.torch_private import fake_mode_of


def restrided(new: dict[fx.Node, Any], memory: Tensor | None = None) -> dict[fx.Node, Any] | None:
    """The nodes of `new` with what they give from now on, and the others that give something else because of it; None
    if somebody cannot read it so.

    memory  what is in this memory may neither leave the graph nor be overwritten, so views are listed with their new
            values too: Inductor must know them, or it may write there too early
    """
    values = dict(new)
    moved = [node for node in new if memory is not None or not _alike(new[node], node.meta["val"], _strides)]
    waiting = {user for node in moved for user in node.users}
    while waiting:
        node = min(waiting)
        waiting.remove(node)
        if node.op == "output" and memory is None:
            continue
        value = _value_with(node, values)
        if value is None or not _alike(value, node.meta["val"], _shape):
            return None
        if not _alike(value, node.meta["val"], _strides) or (memory is not None and _is_view(value, memory)):
            values[node] = value
            waiting.update(node.users)
    return values


def _value_with(node: fx.Node, changed: dict[fx.Node, Any]) -> Any:
    """What a node gives when some of what it reads lies differently; None where that is not known, or an error."""
    if isinstance(node.target, torch._ops.OpOverload):
        if "eager_input_vals" in node.meta and node.target.namespace != "svdq":
            return None  # somebody's own operator, which relies on the strides
    elif node.target is not operator.getitem:
        return None
    args: Any = fx.map_arg(node.args, lambda a: changed.get(a, a.meta.get("val")))
    kwargs: Any = fx.map_arg(node.kwargs, lambda a: changed.get(a, a.meta.get("val")))
    try:
        with fake_mode_of(args, kwargs):
            return node.target(*args, **kwargs)
    except (RuntimeError, ValueError):
        return None


def _alike(a: Any, b: Any, what: Callable[[Tensor], Sequence]) -> bool:
    """Whether the tensors in two results have the same shapes or strides."""
    tensors = ([t for t in tree_leaves(result) if isinstance(t, Tensor)] for result in (a, b))
    pairs = [(what(x), what(y)) for x, y in zip(*tensors, strict=True)]
    return all(len(m) == len(n) and all(map(statically_known_true, map(operator.eq, m, n))) for m, n in pairs)


def _is_view(result: Any, whole: Tensor) -> bool:
    """Whether some tensor of it is in the same memory."""
    memory = whole.untyped_storage()._cdata
    return any(isinstance(t, Tensor) and t.untyped_storage()._cdata == memory for t in tree_leaves(result))


def _shape(value: Tensor) -> Sequence:
    return value.shape


def _strides(value: Tensor) -> Sequence:
    """Those of dimensions of size 1 do not count."""
    sizes = zip(value.shape, value.stride(), strict=True)
    return [0 if statically_known_true(size == 1) else stride for size, stride in sizes]
