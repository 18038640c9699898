"""Graphs inside a graph: what a body computes, and what stands around it, is quantized as without it, or left alone."""

import functools
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._higher_order_ops import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from conftest import FLIPPED_CODES, WIDTH, compiled, logged, quiet, relative_error
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.passes.subgraphs import bodies, invocations, other_bodies

OLD = torch.__version__ < (2, 12)
NO_FLEX = pytest.mark.skipif(OLD, reason="torch 2.11 refuses one buffer for query, key and value on a CPU")


class Block(nn.Module):
    def __init__(self, around: Callable) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        return x + self.around(self, x)


class Model(nn.Module):
    """An embedder, which stands outside the blocks, and two blocks."""

    def __init__(self, around: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(around) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def make(around: Callable) -> Model:
    return Model(around).eval().requires_grad_(False)


def quantized(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)}


def flex(block: Block, x: Tensor) -> Tensor:
    q = block.first(x).unflatten(-1, (4, 32)).transpose(1, 2)
    y = flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + 0.01 * (i - j))
    return block.second(y.transpose(1, 2).flatten(2))


def cond(block: Block, x: Tensor) -> Tensor:
    h = block.first(x)
    return block.second(torch.cond(h.sum() > 0, lambda v: v.sin(), lambda v: v.cos(), (h,)))


def loop(block: Block, x: Tensor) -> Tensor:
    start = torch.zeros((), dtype=torch.int64)
    return block.second(while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, v.tanh()), (start, block.first(x)))[1])


def scanned(block: Block, x: Tensor) -> Tensor:
    h = block.first(x)
    return block.second(scan(lambda c, v: (c * 0.5 + v, (c + v).tanh()), torch.zeros_like(h[0]), h, dim=0)[1])


def cond_of_linears(block: Block, x: Tensor) -> Tensor:
    h = block.first(x)
    return torch.cond(h.sum() > 0, lambda v: block.second(v.sin()), lambda v: block.second(v.cos()), (h,))


def plain(block: Block, x: Tensor) -> Tensor:
    return block.second(F.gelu(block.first(x)))


@torch.compiler.nested_compile_region
def region(block: Block, x: Tensor) -> Tensor:
    return plain(block, x)


def checkpointed(block: Block, x: Tensor) -> Tensor:
    return checkpoint(plain, block, x, use_reentrant=False)


def selectively(block: Block, x: Tensor) -> Tensor:
    def recompute(*_, **__) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, recompute)
    return checkpoint(plain, block, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("around", [pytest.param(flex, marks=NO_FLEX), cond, loop, scanned])
def test_linears_around_a_body_compiled_whole(around: Callable) -> None:
    model, x = make(around), torch.randn(2, 24, WIDTH)
    reference, run = model(x), compiled(model)
    assert torch.equal(run(x), reference), "observed"
    assert 0 < relative_error(run(x), reference) < 0.06
    assert quantized(model) == {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("first", "second")}


@pytest.mark.parametrize("around", [pytest.param(flex, marks=NO_FLEX), cond, loop, scanned])
def test_linears_around_a_body_compiled_by_blocks(around: Callable) -> None:
    """Dynamic sizes and bfloat16."""
    model = make(around).bfloat16()
    for block in model.blocks:
        block.compile(backend="svdquant", fullgraph=True, dynamic=True, options=quiet())
    for tokens in (24, 24, 40):
        x = torch.randn(2, tokens, WIDTH).bfloat16()
        output = model(x)
    assert len(quantized(model)) == 4
    expected = make(around)
    assert 0 < relative_error(output, expected(x.float())) < 0.06


@pytest.mark.parametrize("around", [checkpointed, selectively, region])
def test_linears_in_a_body_that_is_only_called(around: Callable) -> None:
    model, expected, x = make(around), make(plain), torch.randn(2, 24, WIDTH)
    run, reference = compiled(model), compiled(expected)
    for _ in range(2):
        output, other = run(x), reference(x)
    assert quantized(model) == quantized(expected), "and the embedder in neither"
    assert relative_error(output, other) < FLIPPED_CODES


def test_linears_in_a_body_that_is_run_in_another_way_stay_and_that_is_said() -> None:
    model, x = make(cond_of_linears), torch.randn(2, 24, WIDTH)
    reference, run = model(x), compiled(model)
    with logged("svdq_compile.passes", logging.INFO) as records:
        run(x)
    assert any("blocks.1.second stays 16-bit: it stands inside cond" in r.getMessage() for r in records)
    assert 0 < relative_error(run(x), reference) < 0.06
    assert quantized(model) == {"blocks.0.first.weight", "blocks.1.first.weight"}


def test_attributes_that_are_no_graphs_are_left_alone() -> None:
    root = nn.Module()
    root.constant = torch.ones(2)
    root.function = torch.sin
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in ("constant", "function"):
        body = graph.create_node("get_attr", name)
        x = graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (body, x))
    graph.output(x)
    gm = fx.GraphModule(root, graph)
    assert invocations(gm) == bodies(gm) == other_bodies(gm) == []
