"""Sequences: the operator, the pass that makes them, and compiled code of any size that calls them."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from fusion_testing import Two, count, run, run_as_aten, tokens, zoo
from torch import Tensor, fx

from conftest import WIDTH, quiet
from svdq_compile.config import FUSIONS
from svdq_compile.lowering import ops, sequences

APART = tuple(name for name in FUSIONS if name != "sequences")
PASS = importlib.import_module("svdq_compile.passes.group_sequences")  # the package has the function by that name


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only there are operators put together."""
    monkeypatch.setattr(PASS, "has_kernels", lambda device: True)


def programs(graphs: list[fx.GraphModule]) -> list[str]:
    return [n.args[2] for gm in graphs for n in gm.graph.find_nodes(op="call_function", target=ops.sequence)]


def operators_in(program: str) -> int:
    return sum(line.split(" = ")[1].startswith("svdq.") for line in program.split("; ") if " = svdq." in line)


def sorted_rows(x: Tensor) -> Tensor:
    """What no operator of ours does."""
    return x.sort(-1).values


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


# Around two linears, each a quantize and a gemm: how many operators each sequence should have.
AROUND = {
    "chain": (lambda a, b, x: b(a(x)), [4]),
    "views": (lambda a, b, x: b(a(x).view(48, WIDTH)[None, 2:].transpose(0, 1)), [4]),
    "parts": (lambda a, b, x: b(torch.stack(a(x).chunk(2, 1)).sum(0)), [2, 2]),
    "between": (lambda a, b, x: b(sorted_rows(a(x))), [2, 2]),
    "beside": (lambda a, b, x: (a(x), sorted_rows(b(x + 1))), [4]),
    "both-ends": (lambda a, b, x: (b(h := a(x)), sorted_rows(h)), [4]),
    "a-result-viewed": (lambda a, b, x: (b(h := a(x)), h[:, 1:]), [4]),
    "attention": (lambda a, b, x: b(F.scaled_dot_product_attention(*3 * (heads(a(x)),)).transpose(1, 2).flatten(2)),
                  [2, 2]),
    "waits-for-the-other": (lambda a, b, x: (sorted_rows(a(sorted_rows(x))), b(x)), [4]),
    "writes": (lambda a, b, x: b(a(x.add_(1.0))), []),
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.usefixtures("with_kernels")
def test_what_is_put_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    around, expected = AROUND[name]
    graphs = run_as_aten(monkeypatch)
    results = []
    for fuse in (FUSIONS, APART):
        model = Two(around).to(torch.bfloat16).requires_grad_(False)
        results.append(run(model, (tokens(),), fuse=fuse))
        if fuse == FUSIONS:
            assert [operators_in(program) for program in programs(graphs)] == expected
            left = sum(count(graphs, op) for op in PASS._GROUPED)
            assert left == (0 if expected else 4)
    assert len(programs(graphs)) == len(expected), "none without the pass"
    assert torch.equal(*results)


@pytest.mark.usefixtures("with_kernels")
def test_on_several_devices_nothing_is_put_together() -> None:
    graph = fx.Graph()
    for device in ("cpu", "meta"):
        x = graph.placeholder(device)
        for _ in range(2):
            x = graph.call_function(ops.gemv, (x,))
            x.meta["val"] = torch.empty(2, 2, device=device)
    graph.output(x)
    assert PASS.group_sequences(fx.GraphModule({}, graph)) == 0


def test_where_there_are_no_kernels_nothing_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    run(Two(lambda a, b, x: b(a(x))).to(torch.bfloat16).requires_grad_(False), (tokens(),))
    assert not programs(graphs)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.usefixtures("with_kernels")
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks most of a block is in one or a few sequences; and all that was computed is."""
    graphs = run_as_aten(monkeypatch)
    results, calls = [], []
    for fuse in (FUSIONS, APART):
        del graphs[:]
        model, inputs, regional = zoo(name)
        results.append(run(model, inputs, regional, fuse=fuse))
        single = sum(count(graphs, op) for op in PASS._GROUPED)
        calls.append((single, sum(map(operators_in, programs(graphs))), len(programs(graphs))))
    assert torch.equal(*results)
    (single, inside, together), (apart, none, _) = calls
    assert single + inside == apart
    assert none == 0
    assert inside > 2 * together
    assert single < apart / 5


def test_stages_are_as_late_as_possible() -> None:
    """A result that only the end wants does not wait there from the beginning."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    early = graph.call_function(ops.row_moments, (x,))
    chain = [graph.call_function(ops.row_moments, (x,))]
    for _ in range(2):
        other = graph.call_function(torch.sort, (chain[-1],))
        chain.append(graph.call_function(ops.row_moments, (other,)))
    graph.output((early, chain[-1]))
    assert PASS._stages(graph) == {early: 4, chain[0]: 0, chain[1]: 2, chain[2]: 4}


class AnySize(Two):
    def __init__(self) -> None:
        super().__init__(lambda a, b, x: b(F.gelu(a(x)).reshape(1, -1, WIDTH)[:, : x.shape[1]]) + x[:1])


@pytest.mark.usefixtures("with_kernels")
def test_compiled_code_of_any_size() -> None:
    """Through Inductor: the sizes reach the program, and each size has a site of its own."""
    torch._dynamo.reset()
    results = []
    for fuse in (FUSIONS, APART):
        model = AnySize().to(torch.bfloat16).requires_grad_(False)
        call = torch.compile(model, backend="svdquant", fullgraph=True, dynamic=True, options=quiet(fuse=fuse))
        with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
            call(tokens(2, 24, WIDTH))
            results.append([call(tokens(samples, n, WIDTH)) for samples, n in ((2, 24), (2, 7), (3, 40), (2, 24))])
    for together, apart in zip(*results, strict=True):
        assert torch.equal(together, apart)


# ** the operator **


def test_a_program_is_run() -> None:
    program = "v0 = aten.reshape.default(x[0], [n[0], -1]); v1 = operator.add(n[0], 1); return [v0, x[0] + v1]"
    x = tokens(2, 6, 4)
    for operator in (ops.sequence, sequences.run):
        y, z = operator([x], [3], program)
        assert torch.equal(y, x.reshape(3, -1))
        assert torch.equal(z, x + 4)


def test_its_shape_function() -> None:
    y, _ = ops.sequence([torch.empty(2, 6, 4, device="meta")], [3], "v0 = aten.sum.dim_IntList(x[0], [n[0] - 3]); "
                        "return [v0, x[0] * 2]")  # fmt: skip
    assert (y.shape, y.device.type) == ((6, 4), "meta")


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(SyntaxError):
        sequences.run([tokens()], [], "return [")
