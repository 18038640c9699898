"""What a node of an aten graph means to a fused region: which operation it is, and how it lies against a block.

Inductor's decompositions leave few operations, whatever the model wrote: GELU is multiplications and `tanh`, a norm is
`var_mean` and arithmetic. A node is known by its operator and the shapes of its tensors, never by its name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..lowering.region import COLUMN, FULL, ROW, SAMPLE, SCALAR, Region, Step

aten, prims = torch.ops.aten, torch.ops.prims

_BINARY = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
}
_UNARY = {
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
}
_ROUNDING: dict[Any, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def value_of(node: Any) -> Tensor | None:
    """The fake tensor a node stands for; None for numbers, and for nodes that give no tensor or several."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def operation(node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
    """(name of the region's operation, arguments: nodes and numbers), or None if a region cannot hold this node.

    A cast to fp32 is ("", (argument,)): in a region everything is fp32 already.
    """
    value = value_of(node)
    if node.op != "call_function" or value is None or value.dtype not in FLOATS:
        return None
    found = _meaning(node)
    if found is None or not all(_is_float(a) for a in found[1]):
        return None
    return found


def _meaning(node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
    target, args = node.target, node.args
    if target is prims.convert_element_type.default:
        return _ROUNDING.get(args[1], ""), args[:1]
    if target in _UNARY and not node.kwargs:
        return _UNARY[target], args[:1]
    if target in _BINARY and len(args) == 2 and not node.kwargs:  # no alpha, no rounding mode
        return _BINARY[target], args
    if target is aten.pow.Tensor_Scalar and args[1] == 2:
        return "mul", (args[0], args[0])
    return None


def _is_float(argument: Any) -> bool:
    if isinstance(argument, bool):
        return False
    value = value_of(argument)
    return isinstance(argument, int | float) if value is None else value.dtype in FLOATS


def is_widening(node: fx.Node) -> bool:
    """A cast that changes no value: repeating it costs nothing, so others may read it too."""
    found = operation(node)
    return found is not None and found[0] == ""


def before_widening(node: fx.Node) -> fx.Node:
    """What a tensor was before it was cast to fp32: a region reads that, which is half as long."""
    while is_widening(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def cat_of(node: fx.Node) -> tuple[tuple[fx.Node, ...], int] | None:
    """What a `cat` puts together, and along which dimension, counted from 0; None for another node."""
    args: Any = node.args
    named: Any = node.kwargs
    value = value_of(node)
    if node.target is not aten.cat.default or value is None:
        return None
    return tuple(args[0]), (args[1] if len(args) > 1 else named.get("dim", 0)) % value.dim()


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are known to be equal, without a guard on symbolic sizes."""
    return a.dim() == b.dim() and all(_same(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def operand_class(value: Tensor, block: Tensor) -> str | None:
    """How a tensor lies against a block [..., C]: one of the region's classes, or None if it does not."""
    if value.dim() > block.dim() or value.dtype not in FLOATS:
        return None
    shape = (1,) * (block.dim() - value.dim()) + tuple(value.shape)
    ones = [_same(size, 1) for size in shape]
    equal = [_same(size, whole) for size, whole in zip(shape, block.shape, strict=True)]
    if all(ones):
        return SCALAR
    if all(equal):
        return FULL
    if equal[-1] and all(ones[:-1]):
        return COLUMN
    if ones[-1] and all(equal[:-1]):
        return ROW
    if equal[-1] and block.dim() > 2 and equal[0] and all(ones[1:-1]):
        return SAMPLE
    return None


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return statically_known_true(a == b)


class Program:
    """Steps and operands of a region while it is being put together."""

    def __init__(self, block: Tensor) -> None:
        self.block = block
        self.names: dict[fx.Node, str] = {}
        self.operands: list[tuple[str, str, fx.Node]] = []
        self.steps: list[Step] = []

    def add_operand(self, node: fx.Node, name: str | None = None) -> None:
        """Take a tensor in from outside."""
        value = value_of(node)
        cls = operand_class(value, self.block) if value is not None else None
        assert cls is not None, f"{node} does not fit the block"
        self.names[node] = name or f"a{sum(n.startswith('a') for n, *_ in self.operands)}"
        self.operands.append((self.names[node], cls, node))

    def add_step(self, node: fx.Node, choose_name: Callable[[fx.Node], str | None] = lambda _: None) -> None:
        """Take a node in; what it reads and is not in yet becomes an operand, named by `choose_name` or by number."""
        found = operation(node)
        assert found is not None
        name, arguments = found
        for argument in arguments:
            if isinstance(argument, fx.Node) and argument not in self.names:
                source = before_widening(argument)
                if source not in self.names:
                    self.add_operand(source, choose_name(source))
                self.names[argument] = self.names[source]
        read = tuple(self.names[a] if isinstance(a, fx.Node) else float(a) for a in arguments)
        if name == "":
            self.names[node] = read[0]  # type: ignore[assignment]
            return
        self.names[node] = f"t{len(self.steps)}"
        self.steps.append(Step(self.names[node], name, read))

    def region(self, kind: str) -> Region:
        """The finished region."""
        return Region(kind, tuple((name, cls) for name, cls, _ in self.operands), tuple(self.steps))

    def nodes(self) -> list[fx.Node]:
        """Of its operands, in their order."""
        return [node for *_, node in self.operands]
