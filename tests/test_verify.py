"""The verifier of graphs (passes/verify.py): it lets the real passes through, and each of its rules catches a pass
that breaks it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from svdq_compile.kernels.formats import FORMATS
from svdq_compile.kernels.operands import Gemm, Gemv, Quantize
from svdq_compile.lowering import ops
from svdq_compile.lowering.torch_private import describe
from svdq_compile.passes import pipeline
from svdq_compile.passes.fuse_epilogues import fuse_epilogues
from svdq_compile.passes.verify import BrokenGraph

aten = torch.ops.aten
N, RANK = 128, 16


def fused_graph() -> fx.GraphModule:
    """h = residual + gate * gemm(...), a mask with random numbers, and a write to `state`: (h, mask), fused."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def given(name: str, value: Tensor) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = mode.from_tensor(value)
        return node

    def call(target: Callable, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        describe(node, node)
        return node

    qx, ascales = FORMATS["w4a8"].quantize_activation(torch.randn(2, 24, 128))  # type: ignore[misc]
    weight = FORMATS["w4a8"].quantize_weight(torch.randn(N, 128))
    half = torch.bfloat16
    inputs = [given("qx", qx), given("ascales", ascales), given("xd", torch.zeros(2, 24, RANK, dtype=half))]
    packed = [given(f"w{i}", t) for i, t in enumerate(weight)]
    up, gate = given("up", torch.zeros(N, RANK, dtype=half)), given("gate", torch.zeros(N, dtype=half))
    residual, state = given("residual", torch.zeros(2, 24, N, dtype=half)), given("state", torch.zeros(N, dtype=half))
    y = call(ops.gemm, *inputs, packed, up, None, None, "w4a8", half)
    h = call(aten.add.Tensor, residual, call(aten.mul.Tensor, y, gate))
    mask = call(aten.bernoulli.default, h)
    call(aten.copy_.default, state, gate)
    graph.output((h, call(aten.neg.default, mask)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    pipeline.run(gm, [fuse_epilogues])
    assert len(gm.graph.find_nodes(op="call_function", target=ops.fused_gemm)) == 1
    return gm


def node_of(gm: fx.GraphModule, target: Callable) -> fx.Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=target)
    return node


def named(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name == name)


def gemm_with(place: int, value: Any) -> Callable[[fx.GraphModule], None]:
    """Another argument for the fused product."""
    return lambda gm: node_of(gm, ops.fused_gemm).update_arg(place, value)


def region_with(old: str, new: str) -> Callable[[fx.GraphModule], None]:
    def change(gm: fx.GraphModule) -> None:
        node = node_of(gm, ops.fused_gemm)
        assert old in node.args[-1]
        node.args = (*node.args[:-1], node.args[-1].replace(old, new))

    return change


def read_before_defined(gm: fx.GraphModule) -> None:
    node_of(gm, aten.bernoulli.default).prepend(node_of(gm, aten.neg.default))


def lose_an_operand(gm: fx.GraphModule) -> None:
    node = node_of(gm, ops.fused_gemm)
    *first, operands, region = node.args
    node.args = (*first, operands[:1], region)


def lose_an_argument(gm: fx.GraphModule) -> None:
    node = node_of(gm, ops.fused_gemm)
    node.args = node.args[:-1]


def lose_a_weight_tensor(gm: fx.GraphModule) -> None:
    node = node_of(gm, ops.fused_gemm)
    node.update_arg(3, node.args[3][:2])


def narrow_operand(gm: fx.GraphModule) -> None:
    """The gate becomes one whose channels are not those of the product."""
    gate, node = named(gm, "gate"), node_of(gm, ops.fused_gemm)
    with gm.graph.inserting_before(node):
        part = gm.graph.call_function(aten.slice.Tensor, (gate, 0, 0, 64))
    describe(part, node)
    node.replace_input_with(gate, part)


def lying_strides(gm: fx.GraphModule) -> None:
    node = node_of(gm, aten.bernoulli.default)
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = torch.empty_strided(value.shape, (24 * N, 1, 24), dtype=value.dtype)


def lying_dtype(gm: fx.GraphModule) -> None:
    node = node_of(gm, aten.bernoulli.default)
    node.meta["val"] = node.meta["val"].float()


def replace_without_looking(gm: fx.GraphModule) -> None:
    """The mask is made of fewer rows, and described as before."""
    node = node_of(gm, ops.fused_gemm)
    with gm.graph.inserting_after(node):
        row = gm.graph.call_function(aten.slice.Tensor, (node, 1, 0, 12))
    describe(row, node)
    node_of(gm, aten.bernoulli.default).replace_input_with(node, row)


def lose_an_output(gm: fx.GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = (output.args[0][:1],)


def other_output(gm: fx.GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = ((output.args[0][0], named(gm, "gate")),)


def lose_a_write(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(node_of(gm, aten.copy_.default))


def leave_random_numbers_behind(gm: fx.GraphModule) -> None:
    mask = node_of(gm, aten.bernoulli.default)
    mask.replace_all_uses_with(node_of(gm, ops.fused_gemm))


def lose_a_weight(gm: fx.GraphModule) -> None:
    """The product reads its residual twice, and the gate goes."""
    gate = named(gm, "gate")
    gate.replace_all_uses_with(named(gm, "state"))
    gm.graph.erase_node(gate)


BROKEN: list[tuple[Callable[[fx.GraphModule], None], str]] = [
    (read_before_defined, "before it has been defined"),
    (lose_an_argument, "missing: .'region'"),
    (lose_a_weight_tensor, "precision 'w4a8': its tensors are qweight, subscales, wscales"),
    (gemm_with(0, 1.0), "qx should be Tensor"),
    (gemm_with(2, None), "xd should be Tensor"),
    (gemm_with(5, 1.0), r"bias should be Optional\[Tensor\]"),
    (gemm_with(7, "w4a9"), "precision 'w4a9': the formats are"),
    (gemm_with(8, "bf16"), "out_dtype should be int"),
    (region_with("; ", ";\n"), "one line of plain characters"),
    (region_with("mul", "mule"), "not a step"),
    (region_with("epilogue(y, ", "prologue(y, "), "of the kind epilogue or gate"),
    (lose_an_operand, "2 operands are named, and it has 1"),
    (narrow_operand, "broadcast a dimension of length 64"),
    (lying_dtype, "its meta says torch.float32"),
    (lying_strides, r"its meta says .* with strides \(3072, 1, 24\)"),
    (replace_without_looking, r"it gives torch.bfloat16 \(2, 12, 128\)"),
    (lose_an_output, "2 outputs have become 1"),
    (other_output, r"output 1, gate: .* has become .*\(128,\)"),
    (lose_a_write, "what writes to memory is gone: .*copy_"),
    (leave_random_numbers_behind, "nobody reads it any more"),
    (lose_a_weight, "the input gate was read before the pass, and is gone"),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_broken_graph_is_caught(break_it: Callable, message: str) -> None:
    gm = fused_graph()

    def careless(gm: fx.GraphModule) -> int:
        break_it(gm)
        return 1

    with pytest.raises(BrokenGraph, match=f"(?s)after careless: .*({message})"):
        pipeline.run(gm, [careless])


def test_a_subgraph_gets_as_many_operands_as_it_has_inputs() -> None:
    inner, outer = fx.Graph(), fx.Graph()
    inner.output((inner.placeholder("a"),))
    x, body = outer.placeholder("x"), outer.get_attr("body")
    call = outer.call_function(torch.ops.higher_order.invoke_subgraph, (body, "body", x))
    outer.output((call,))
    gm = fx.GraphModule({"body": fx.GraphModule(torch.nn.Module(), inner)}, outer)

    def twice(gm: fx.GraphModule) -> int:
        call.args = (body, "body", x, x)
        return 1

    with pytest.raises(BrokenGraph, match="body has 1 inputs and gets 2 operands"):
        pipeline.run(gm, [twice])


def test_a_pass_that_says_nothing_must_do_nothing() -> None:
    def silent(gm: fx.GraphModule) -> int:
        node = node_of(gm, aten.neg.default)
        node.target = aten.abs.default
        return 0

    with pytest.raises(BrokenGraph, match="is new or changed, and the pass says 0"):
        pipeline.run(fused_graph(), [silent])


def test_a_pass_run_twice_must_do_nothing_more() -> None:
    def one_more(gm: fx.GraphModule) -> int:
        node = node_of(gm, aten.bernoulli.default)
        with gm.graph.inserting_before(node):
            again = gm.graph.call_function(aten.neg.default, node.args)
        describe(again, node)
        node.args = (again,)
        return 1

    with pytest.raises(BrokenGraph, match="one_more, run once more, changed 1"):
        pipeline.run(fused_graph(), [one_more])


def test_a_pass_that_changes_nothing_is_let_through() -> None:
    pipeline.run(fused_graph(), [lambda gm: 0])


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVDQ_VERIFY")
    gm = fused_graph()
    pipeline.run(gm, [lambda gm: bool(lose_an_output(gm)) + 1])
    assert len(gm.graph.output_node().args[0]) == 1


@pytest.mark.parametrize("record", [Quantize, Gemm, Gemv])
def test_operands_are_named_as_the_schema_has_them(record: type) -> None:
    operator = getattr(ops, record.__name__.lower())
    assert record._fields == tuple(argument.name for argument in operator._schema.arguments)  # type: ignore
