"""What a node of an aten graph means to a fused region: an operation of lowering/region.py, and what it reads.

Inductor's decompositions leave few operators, whatever the model wrote: GELU is multiplications and `tanh`, a norm is
`var_mean` and arithmetic. A node is known by its operator and the shapes of its tensors, never by its name.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten, prims = torch.ops.aten, torch.ops.prims

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)

# An operation and the nodes and numbers that it reads; "" where a node has the values of what it reads.
Meaning = tuple[str, tuple[Any, ...]]
Word = str | Callable[[fx.Node], Meaning | None]


def meaning(node: fx.Node, vocabulary: dict[Any, Word]) -> Meaning | None:
    """What a node says in a vocabulary, None if nothing."""
    word = vocabulary.get(node.target) if node.op == "call_function" else None
    return (word, node.args) if isinstance(word, str) else word(node) if word else None


def operation(node: fx.Node) -> Meaning | None:
    """The meaning of an elementwise node, None for all others. In a region a cast to fp32 is "": all is fp32 there."""
    value = value_of(node)
    found = meaning(node, ELEMENTWISE) if value is not None and value.dtype in FLOATS else None
    return found if found is not None and not node.kwargs and all(map(_is_float, found[1])) else None


def _is_float(argument: Any) -> bool:
    if isinstance(argument, bool):
        return False
    value = value_of(argument)
    return isinstance(argument, int | float) if value is None else value.dtype in FLOATS


def is_identity(node: fx.Node) -> bool:
    """Whether a node changes no value, as a cast to fp32: repeating it costs nothing, so others may read it too."""
    found = operation(node)
    return found is not None and found[0] == ""


def before_identities(node: fx.Node) -> fx.Node:
    """What a tensor was before it was cast to fp32: a region reads that, which is half as long."""
    while is_identity(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def value_of(node: Any) -> Tensor | None:
    """The fake tensor a node stands for; None for numbers, and for nodes that give no tensor or several."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def cat_of(node: fx.Node) -> tuple[tuple[fx.Node, ...], int] | None:
    """What a `cat` puts together, and along which dimension, counted from 0; None for another node."""
    args: Any = node.args
    named: Any = node.kwargs
    value = value_of(node)
    if node.target is not aten.cat.default or value is None:
        return None
    return tuple(args[0]), (args[1] if len(args) > 1 else named.get("dim", 0)) % value.dim()


def kept_by(node: fx.Node) -> tuple[range, int] | None:
    """The indices that a `slice` keeps, or a `slice_scatter` writes, and of which dimension, counted from 0; None if
    they are not known.
    """
    args: Any = node.args if node.target is aten.slice.Tensor else (node.args[0], *node.args[2:])
    dim: Any = args[1] if len(args) > 1 else 0
    bounds = (*args[2:], *(None, None, 1)[max(len(args) - 2, 0) :])
    source = value_of(args[0])
    if source is None or not all(b is None or type(b) is int for b in (*bounds, source.shape[dim])):
        return None
    return range(source.shape[dim])[slice(*bounds)], dim % source.dim()


def is_of_rows(node: fx.Node, **wanted: object) -> bool:
    """Whether a reduction is over the last dimension only, and keeps it."""
    value = value_of(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else None
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim")
    others = {name: v for name, v in node.kwargs.items() if name != "keepdim"}
    return value is not None and dims in ([-1], [value.dim() - 1]) and keep is True and others == wanted


def rows_measured(node: fx.Node) -> fx.Node | None:
    """The tensor, before casts to fp32, whose rows' variances and means, or mean squares, a node gives."""
    if node.target is aten.var_mean.correction:
        w: Any = node.args[0] if is_of_rows(node, correction=0) else None
    elif node.target is aten.mean.dim:
        w = _squared(node.args[0]) if is_of_rows(node) else None
    else:
        return None
    return before_identities(w) if isinstance(w, fx.Node) else None


def _squared(node: Any) -> fx.Node | None:
    """w, if the node is w * w."""
    found = operation(node) if isinstance(node, fx.Node) else None
    return found[1][0] if found is not None and found[0] == "mul" and found[1][0] is found[1][1] else None


# ** shapes **


def same_shape(a: Sequence, b: Sequence) -> bool:
    """Whether two shapes are known to be equal, without a guard on symbolic sizes."""
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def axes_of(
    shape: Sequence, block: Sequence, letters: str, choices: Sequence[str], stretched: bool = False
) -> str | None:
    """The axes of a block that a tensor varies over: the first choice that fits, None if there is none.

    letters: the axis of each dimension of the block, as "BTTC". stretched: a tensor may also be constant along axes of
    its choice.
    """
    if len(shape) > len(block):
        return None
    shape = (1,) * (len(block) - len(shape)) + tuple(shape)
    ones = [statically_known_true(size == 1) for size in shape]
    equals = [statically_known_true(m == n) for m, n in zip(shape, block, strict=True)]
    for axes in choices:
        fits = (equal or (stretched and one) if letter in axes else one
                for letter, one, equal in zip(letters, ones, equals, strict=True))  # fmt: skip
        if all(fits):
            return axes
    return None


# ** the words **


def _cast(node: fx.Node) -> Meaning:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(node.args[1], ""), node.args[:1]  # type: ignore[arg-type]


def _unless_by_one(name: str) -> Word:
    """x * 1.0 and x / 1.0 are x. (x + 0.0 is not: -0.0 + 0.0 is 0.0.)"""
    return lambda node: ("", node.args[:1]) if node.args[1] == 1 else (name, node.args)


def _square(node: fx.Node) -> Meaning | None:
    return ("mul", (node.args[0], node.args[0])) if node.args[1] == 2 else None


ELEMENTWISE: dict[Any, Word] = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.mul.Tensor: _unless_by_one("mul"),
    aten.mul.Scalar: _unless_by_one("mul"),
    aten.div.Tensor: _unless_by_one("div"),
    aten.div.Scalar: _unless_by_one("div"),
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.tanh.default: "tanh",
    aten.erf.default: "erf",
    aten.sigmoid.default: "sigmoid",
    aten.relu.default: "relu",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.pow.Tensor_Scalar: _square,
    prims.convert_element_type.default: _cast,
}


def _same_values(node: fx.Node) -> Meaning:
    return "", node.args[:1]


def _last(node: fx.Node, dim: Any) -> int | None:
    """How long the last dimension of what a node reads is, if that is this one, and if it is known."""
    value = value_of(node.args[0])
    is_last = value is not None and dim % value.dim() == value.dim() - 1
    return value.shape[-1] if is_last and type(value.shape[-1]) is int else None  # type: ignore[union-attr]


def _mean(node: fx.Node) -> Meaning | None:
    return ("row_mean", node.args[:1]) if is_of_rows(node) else None


def _moments(node: fx.Node) -> Meaning | None:
    return _same_values(node) if is_of_rows(node, correction=0) else None


def _unbind(node: fx.Node) -> Meaning | None:
    return _same_values(node) if _last(node, [*node.args, 0][1]) == 2 else None


def _split(node: fx.Node) -> Meaning | None:
    sizes, dim = [*node.args[1:], 0][:2]
    half = (_last(node, dim) or 0) // 2
    return _same_values(node) if sizes in (half, [half, half]) else None


# What each of the two results of a node is.
_ITEMS = {
    aten.var_mean.correction: ("variance", "row_mean"),
    aten.unbind.int: ("even", "odd"),
    aten.split.Tensor: ("low", "high"),
    aten.split_with_sizes.default: ("low", "high"),
}


def _item(node: fx.Node) -> Meaning | None:
    source: Any = node.args[0]
    return (_ITEMS[source.target][node.args[1]], (source,)) if meaning(source, WITHIN_HEADS) else None  # type: ignore[index]


def _select(node: fx.Node) -> Meaning | None:
    dim, index = node.args[1:]
    return (("even", "odd")[index], node.args[:1]) if _last(node, dim) == 2 else None  # type: ignore[index]


def _slice(node: fx.Node) -> Meaning | None:
    kept, dim = kept_by(node) or (range(0), 0)
    d = _last(node, dim)
    if not kept or d is None:
        return ("slice", node.args[:1]) if kept and kept.step == 1 else None
    names = {range(0, d, 2): "even", range(1, d, 2): "odd", range(d // 2): "low", range(d // 2, d): "high"}
    return (names[kept], node.args[:1]) if d > 2 and kept in names else None


def _cat(node: fx.Node) -> Meaning | None:
    operands, dim = cat_of(node) or ((), 0)
    shape = value_of(node).shape  # type: ignore[union-attr]
    if dim < len(shape) - 1:
        return "cat", operands
    return ("pair" if same_shape(shape[-1:], [2]) else "halves", operands) if len(operands) == 2 else None


def _complex_mul(node: fx.Node) -> Meaning | None:
    value = value_of(node)
    return ("complex_mul", node.args) if value is not None and value.dtype == torch.complex64 else None


# What a region over heads knows besides, of values [..., D] and of pairs [..., D / 2, 2] and complex numbers made of
# neighbouring channels. `slice` and `cat`: of tokens. `variance` and `complex_mul` are several steps (grow_region.py).
WITHIN_HEADS: dict[Any, Word] = {
    aten.view.default: _same_values,
    aten.reshape.default: _same_values,
    aten._unsafe_view.default: _same_values,
    aten.unsqueeze.default: _same_values,
    aten.clone.default: _same_values,
    aten.view_as_complex.default: _same_values,
    aten.view_as_real.default: _same_values,
    aten.mean.dim: _mean,
    aten.var_mean.correction: _moments,
    aten.unbind.int: _unbind,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    operator.getitem: _item,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.mul.Tensor: _complex_mul,
}
