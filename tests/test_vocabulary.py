"""The words: each operation computes what its operator does, and shapes lie along a block as the text says."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from svdq_compile.lowering.region import ALONG_HEADS, HEADS, OPERATIONS, ROWS
from svdq_compile.passes.vocabulary import ELEMENTWISE, WITHIN_HEADS, aten, axes_of, is_identity, meaning, operation

VALUES = torch.tensor([[0.5, -2.0, 3.0, -0.0], [1.0, 1e-30, -7.25, 40.0]])


def call(target: Any, *args: Any) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
    """A node on tensors and numbers, and the tensors that it reads."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"a{i}") if isinstance(a, Tensor) else a for i, a in enumerate(args)]
    values = {node: a for node, a in zip(nodes, args, strict=True) if isinstance(a, Tensor)}
    node = graph.call_function(target, tuple(nodes))
    for other, value in (*values.items(), (node, target(*args))):
        other.meta["val"] = value
    return node, values


@pytest.mark.parametrize("target", ELEMENTWISE, ids=str)
def test_an_elementwise_word_is_its_operator(target: Any) -> None:
    x = VALUES.abs() if target in (aten.sqrt.default, aten.rsqrt.default) else VALUES
    others = {"Tensor": VALUES.flip(0) + 0.1, "Scalar": 3.0, "Tensor_Scalar": 2, "default": VALUES.flip(0)}
    takes_two = len(target._schema.arguments) > 1
    other: Any = torch.bfloat16 if "convert" in str(target) else others[target._overloadname]
    node, values = call(target, x, *([other] if takes_two else []))
    found = operation(node)
    assert found is not None
    name, read = found
    result = OPERATIONS[name](*(values[a] if isinstance(a, fx.Node) else a for a in read))
    assert torch.equal(result, node.meta["val"].float())


@pytest.mark.parametrize(
    ("target", "args", "is_nothing"),
    [
        (aten.mul.Tensor, (1.0,), True),
        (aten.mul.Tensor, (1,), True),
        (aten.div.Tensor, (1.0,), True),
        (aten.div.Tensor, (2.0,), False),
        (aten.mul.Tensor, (-1.0,), False),
        (aten.mul.Tensor, (torch.ones(1),), False),
        (aten.add.Tensor, (0.0,), False),  # -0.0
        (torch.ops.prims.convert_element_type.default, (torch.float32,), True),
        (torch.ops.prims.convert_element_type.default, (torch.float16,), False),
    ],
)
def test_what_changes_no_value(target: Any, args: tuple, is_nothing: bool) -> None:
    node, _ = call(target, VALUES, *args)
    assert is_identity(node) == is_nothing
    assert torch.equal(node.meta["val"].view(torch.int32), VALUES.view(torch.int32)) or not is_nothing


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.remainder.Scalar, (2.0,)),
        (aten.pow.Tensor_Scalar, (3,)),
        (aten.gt.Scalar, (0.0,)),
        (aten.mul.Tensor, (torch.ones(4, dtype=torch.long),)),
        (aten.mul.Tensor, (False,)),
    ],
)
def test_what_has_no_word(target: Any, args: tuple) -> None:
    assert operation(call(target, VALUES, *args)[0]) is None


@pytest.mark.parametrize(
    ("target", "args", "name"),
    [
        (aten.slice.Tensor, (3, 0, 9, 2), "even"),
        (aten.slice.Tensor, (-1, 1, None, 2), "odd"),
        (aten.slice.Tensor, (3, None, 4), "low"),
        (aten.slice.Tensor, (3, -4), "high"),
        (aten.slice.Tensor, (3, 1, 5), None),
        (aten.slice.Tensor, (3, 0, 9, 3), None),
        (aten.slice.Tensor, (1, 2, -1), "slice"),
        (aten.slice.Tensor, (1, 0, 4, 2), None),
        (aten.split.Tensor, (4, -1), ""),
        (aten.split.Tensor, (2, -1), None),
        (aten.split.Tensor, (4,), None),
        (aten.split_with_sizes.default, ([4, 4], 3), ""),
        (aten.split_with_sizes.default, ([6, 2], 3), None),
        (aten.unbind.int, (-1,), None),
        (aten.mean.dim, ([-1], True), "row_mean"),
        (aten.mean.dim, ([-1],), None),
        (aten.mean.dim, ([2], True), None),
    ],
)
def test_words_within_heads(target: Any, args: tuple, name: str | None) -> None:
    x = torch.randn(2, 5, 3, 8)
    node, _ = call(target, x, *args)
    found = meaning(node, WITHIN_HEADS)
    assert (None if found is None else found[0]) == name
    if name in ALONG_HEADS:
        assert torch.equal(ALONG_HEADS[name](x), node.meta["val"])


@pytest.mark.parametrize(
    ("shape", "rows", "heads"),
    [
        ((), "1", "1"),
        ((1, 1, 1, 1), "1", "1"),
        ((8,), "C", "D"),
        ((2, 1, 1, 8), "BC", "BTD"),
        ((2, 5, 3, 1), "BT", "BTH"),
        ((5, 3, 1), None, "BTH"),
        ((5, 1, 8), None, "BTD"),
        ((2, 5, 1, 1), None, "BT"),
        ((3, 8), None, "HD"),
        ((2, 5, 3, 8), "BTC", "BTHD"),
        ((2, 1, 3, 8), None, "BTHD"),
        ((4,), None, None),
        ((1, 2, 5, 3, 8), None, None),
    ],
)
def test_axes(shape: tuple[int, ...], rows: str | None, heads: str | None) -> None:
    assert axes_of(shape, (2, 5, 3, 8), "BTTC", ROWS) == rows
    assert axes_of(shape, (2, 5, 3, 8), "BTHD", HEADS, stretched=True) == heads
