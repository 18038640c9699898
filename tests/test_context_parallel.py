"""diffusers' context parallelism in one graph: what is found there is what one process finds, and nothing that is sent
to other ranks changes its place among what is sent.

torch's "fake" process group answers for ranks that are not there; what they would send is not looked at.
"""

import importlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fusion_testing import count, run, run_as_aten, zoo
from test_heads import own_buffers
from torch import fx, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from svdq_compile.lowering import ops
from svdq_compile.passes.order import collective_before, sort_topologically

ContextParallelConfig = pytest.importorskip("diffusers").ContextParallelConfig
SEND = torch.ops._c10d_functional.all_to_all_single.default
PASS = importlib.import_module("svdq_compile.passes.group_sequences")


@pytest.fixture
def first_of_two() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with (
            mock.patch("torch.accelerator.device_count", return_value=1),
            mock.patch("torch._C._get_accelerator", return_value=torch.device("cpu")),
        ):
            yield
    finally:
        dist.destroy_process_group()


def split(model: nn.Module, inputs: dict) -> None:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))  # type: ignore[operator]
    model(**inputs)  # its hooks look up arguments at the first call, which Dynamo cannot


def graphs_of(name: str, monkeypatch: pytest.MonkeyPatch, prepare: Callable) -> list[fx.GraphModule]:
    graphs = run_as_aten(monkeypatch)
    model, inputs, regional = zoo(name)
    prepare(own_buffers(model), inputs)
    run(model, inputs, regional=regional, group="alone")
    return graphs


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_all_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = graphs_of(name, monkeypatch, split)
    theirs = graphs_of(name, monkeypatch, lambda *_: None)
    assert count(ours, SEND) == 2 * len(ours)  # q, k and v, and back
    for operator in (ops.head_region, ops.joined):
        assert count(ours, operator) / len(ours) == count(theirs, operator) / len(theirs)
    assert count(ours, ops.head_region) / len(ours) == {"flux": 2, "wan": 4}[name]
    assert count(ours, ops.joined) == (name == "flux")


@pytest.mark.usefixtures("first_of_two")
def test_sequences_end_where_something_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single blocks: what makes q, k and v, and what reads the attention."""
    monkeypatch.setattr(PASS, "has_kernels", lambda device: True)
    gm = graphs_of("flux", monkeypatch, split)[-1]
    kinds = [
        "sequence" if n.target is ops.sequence else "send" for n in gm.graph.nodes if n.target in (SEND, ops.sequence)
    ]
    assert kinds == ["sequence", "send", "send", "sequence"]


def graph_of(*lines: tuple[str, str, list[str]]) -> fx.Graph:
    """Nodes by name: what kind, and what they read. "send" is a collective, "ours" an operator of ours."""
    graph, made = fx.Graph(), {}
    for name, kind, read in lines:
        operands = tuple(made[r] for r in read)
        if kind == "input":
            made[name] = graph.placeholder(name)
        elif kind == "send":
            made[name] = graph.create_node("call_function", SEND, (*operands, [1], [1], "0"), name=name)
        else:
            target = {"ours": torch.ops.svdq.row_moments.default, "other": torch.ops.aten.relu.default}[kind]
            made[name] = graph.create_node("call_function", target, operands, name=name)
    graph.output([node for name, node in made.items() if not node.users])
    return graph


def names(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op == "call_function"]


def test_sorting_keeps_what_is_sent_in_order() -> None:
    graph = graph_of(
        ("x", "input", []),
        ("a", "ours", ["x"]),
        ("first", "send", ["a"]),
        ("second", "send", ["x"]),
        ("late", "other", ["x"]),
    )
    by_name = {node.name: node for node in graph.nodes}
    by_name["a"].args = (by_name["late"],)  # as one that now waits for the rest of its sequence
    sort_topologically(graph)
    assert names(graph) == ["late", "a", "first", "second"]
    graph.lint()


def test_a_stage_does_not_depend_on_what_is_sent_after_it() -> None:
    """The second is sent for an operator that could stand in one sequence with the one that the first sends."""
    graph = graph_of(
        ("x", "input", []),
        ("a", "ours", ["x"]),
        ("first", "send", ["a"]),
        ("second", "send", ["x"]),
        ("b", "ours", ["second"]),
        ("end", "other", ["b"]),
        ("c", "ours", ["end"]),
        ("other_end", "other", ["first", "c"]),
    )
    by_name = {node.name: node for node in graph.nodes}
    stages = {node.name: stage for node, stage in PASS._stages(graph).items()}
    assert collective_before(graph) == {by_name["second"]: by_name["first"]}
    assert stages["a"] < stages["b"] < stages["c"]


def test_a_circle_has_no_order() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.neg, (x,))
    second = graph.call_function(torch.neg, (first,))
    first.args = (second,)
    graph.output(second)
    with pytest.raises(AssertionError, match="in a circle"):
        sort_topologically(graph)
