"""Graphs in which a stream is waited for: a stream of the CPU that tells when it was."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import svdq_compile  # noqa: F401 (the backend)
from conftest import quiet
from svdq_compile.passes import gives_streams_work, lift_waits

happened: list[str] = []


class Stream(torch.Stream):
    def synchronize(self) -> None:
        happened.append("waited")


STREAM = Stream(device="cpu")


@torch.library.custom_op("svdq_test_streams::note", mutates_args=())
def note(x: torch.Tensor) -> torch.Tensor:
    """A computation that tells when it is done."""
    happened.append("computed")
    return x.clone()


note.register_fake(torch.empty_like)


class Block(nn.Module):
    """Waits for what a hook has fetched, before it computes or in its middle."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.linear = nn.Linear(128, 128)
        nn.init.normal_(self.linear.weight, std=0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            STREAM.synchronize()
        y = note(x)
        if not self.first:
            STREAM.synchronize()
        return self.linear(y)


def run_block(first: bool, **options: object) -> Callable[[], list[str]]:
    """-> a function that calls the compiled block, which is right, and tells what happened."""
    block = Block(first).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(16, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    expected = block(x).float()
    compiled = torch.compile(block, backend="svdquant", fullgraph=True, options=quiet(**options))

    def call() -> list[str]:
        happened.clear()
        error = (compiled(x).float() - expected).norm() / expected.norm()
        assert error < 0.1
        return happened.copy()

    return call


@pytest.mark.parametrize("first", [True, False], ids=["first", "in between"])
def test_each_call_waits_before_it_computes(first: bool) -> None:
    call = run_block(first)
    for _ in range(4):  # observed, quantized, compiled
        assert call() == ["waited", "computed"]


def test_what_runs_eagerly_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("svdq_compile.backend._compile", fails)
    call = run_block(True, fallback=True)
    assert call() == call() == ["waited", "computed"]


def by_hand(operator: Callable, *args: int) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.neg, (x,))
    graph.call_function(operator, args)
    graph.output((graph.call_function(torch.abs, (y,)),))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(("name", "args"), [("wait_event", (2, 1)), ("wait_event.default", (2, 1))])
def test_operators_that_wait(name: str, args: tuple[int, ...]) -> None:
    operator = torch.ops.streams
    for part in name.split("."):
        operator = getattr(operator, part)
    gm = by_hand(operator, *args)
    assert not gives_streams_work(gm)
    waits = lift_waits(gm)
    assert waits is not None
    assert [n.target for n in waits.graph.nodes if n.op == "call_function"] == [operator]
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [torch.neg, torch.abs]
    assert lift_waits(gm) is None


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("record_event", (1, 0)),
        ("synchronize_stream", (0,)),
        ("wait_stream", (1, 0)),
        ("synchronize_device", ("cuda", 0)),
    ],
)
def test_what_a_graph_waits_for_that_is_its_own_work(name: str, args: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that it records, or what the current stream has got, is not there before it."""
    monkeypatch.setattr(sys.modules["svdq_compile.passes.lift_waits"], "external_object", lambda index: None)
    operator = getattr(torch.ops.streams, name, None)
    if operator is not None:  # torch 2.11 has only some of them
        assert gives_streams_work(by_hand(operator, *args))


def test_the_current_stream_by_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["svdq_compile.passes.lift_waits"], "external_object", lambda index: STREAM)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for current, is_work in ((STREAM, True), (torch.Stream(stream_id=7, device_index=0, device_type=0), False)):
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device, current=current: current)
        assert gives_streams_work(by_hand(torch.ops.streams.wait_event, 5, 6)) == is_work


def test_other_graphs_have_no_waits() -> None:
    gm = fx.symbolic_trace(nn.Linear(4, 4))
    assert not gives_streams_work(gm)
    assert lift_waits(gm) is None
