"""Ranks that load a model by themselves compare what they run before their compiled code exchanges tensors."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks_testing import message, results_on_ranks
from test_tensor_parallel import inputs, quantized, split
from torch import Tensor, nn
from torch.distributed import _functional_collectives as exchange

import svdq_compile as svdq
from conftest import quiet, relative_error, run_eagerly
from svdq_compile import compiled, undecided
from svdq_compile.ranks import Ranks

WIDTH, TOKENS = 128, 8


class Block(nn.Module):
    """Each rank has a part of the tokens, and of the channels between the two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.up(x).unflatten(-1, (2, -1)).movedim(1, 0).contiguous()  # [P, T, K / P]
        back = exchange.all_to_all_single(parts.flatten(), None, None, dist.group.WORLD).view_as(parts)
        return x + self.down(back.movedim(0, 1).flatten(1))


class Exchanging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def loaded(seed: int = 0, **options: Any) -> nn.Module:
    """As from a file: quantized without the others."""
    torch.manual_seed(seed)
    model = Exchanging().eval().requires_grad_(False)
    svdq.quantize(model, **quiet(refine=0, rank=16, precision="w4a16", group="alone") | options)
    return model


def called(model: nn.Module, *args: Tensor, **options: Any) -> Tensor:
    model.compile(backend="svdquant", fullgraph=True, options=quiet(**options))
    return model(*(args or (torch.ones(TOKENS, WIDTH),)))


def refusal(model: nn.Module, *args: Tensor, **options: Any) -> str:
    """What a call raises, out of what Dynamo wraps around it."""
    return next((line for line in message(lambda: called(model, *args, **options)).splitlines() if "Ranks" in line), "")


# What follows runs in the processes, all of it in one run.


def together() -> dict[str, Any]:
    compiled.compile_with_inductor = undecided.compile_with_inductor = run_eagerly
    found = {}
    for step in STEPS:
        torch._dynamo.reset()
        found[step.__name__] = step(dist.get_rank())
    return found


def alike(rank: int) -> Any:
    """How often they meet, over two sizes and a copy; and the output."""
    model = loaded()
    expected = model(torch.ones(TOKENS, WIDTH))
    with mock.patch.object(Ranks, "compare", autospec=True, side_effect=Ranks.compare) as compare:
        output = called(model)
        model(torch.ones(TOKENS + rank, WIDTH)[:TOKENS])
        model(torch.ones(2 * TOKENS, WIDTH))
        one_model = compare.call_count
        called(loaded(), fuse=False)
    return relative_error(output, expected), one_model, compare.call_count


def alone(rank: int) -> Any:
    """By the option, and where nothing is exchanged: others may do something else meanwhile."""
    with mock.patch.object(Ranks, "compare") as compare:
        called(loaded(), group="alone")
        called(quantized(), *inputs(), fuse=bool(rank))
    return compare.call_count


def differing(rank: int) -> dict[str, str]:
    other = bool(rank)
    return {
        "fuse": refusal(loaded(), fuse=["epilogues"] if other else True),
        "attention": refusal(loaded(), attention="fp8" if other else "exact"),
        "values": refusal(loaded(seed=rank)),
        "rank": refusal(loaded(rank=32 if other else 16)),
        "format": refusal(loaded(precision="w4a8" if other else "w4a16")),
        "layers": refusal(loaded(skip=["blocks.1.up"] if other else [])),
        "none": refusal(Exchanging().requires_grad_(False) if other else loaded(), skip=["*"]),
    }


def split_models(rank: int) -> Any:
    """Parts have other values on each rank; options count."""
    parts = split(quantized("int4"))
    error = relative_error(called(parts, *inputs()), quantized("int4")(*inputs()))
    return error, refusal(split(quantized("int4")), *inputs(), fuse=["siblings"] if rank else True)


def by_blocks(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="svdquant", fullgraph=True, options=quiet(**options))
    return model


def meetings(*calls: Callable[[], Any]) -> list[int]:
    """How often they have met after each call."""
    with mock.patch.object(Ranks, "compare", autospec=True, side_effect=Ranks.compare) as compare:
        return [(call(), compare.call_count)[1] for call in calls]


def compiled_on_one(rank: int) -> Tensor:
    """Dynamo guards strides: a graph that only rank 1 compiles."""
    return torch.ones(TOKENS, 2 * WIDTH)[:, ::2] if rank else torch.ones(TOKENS, WIDTH)


def of_another_model(rank: int) -> Any:
    """Which takes no graph of its own, until one rank needs one."""
    one, two = (by_blocks(loaded(seed)) for seed in (0, 1))
    x = torch.ones(TOKENS, WIDTH)
    found = meetings(lambda: one(x), lambda: two(x), lambda: two(compiled_on_one(rank)), lambda: one(x))
    return found, message(lambda: by_blocks(loaded(seed=rank))(x))


def all_in_16_bits(rank: int) -> Any:
    """By the option; the second model by the graphs of the first."""
    x, options = torch.ones(TOKENS, WIDTH), {"skip": ["*"]}
    torch.manual_seed(0)
    one, two, other = (by_blocks(Exchanging().eval().requires_grad_(False), **options) for _ in range(3))
    one(x), two(x)  # the first call observes, and agrees about that
    found = meetings(lambda: one(x), lambda: two(x), lambda: two(compiled_on_one(rank)), lambda: one(x))
    return found, message(lambda: by_blocks(loaded(), **options)(x) if rank else other(x))


def eagerly_on_one(rank: int) -> Any:
    """Where one rank cannot compile, and eagerly would send the same, it meets the other one too."""
    model = loaded()
    expected = model(torch.ones(TOKENS, WIDTH))
    with mock.patch.object(compiled, "compile_with_inductor", side_effect=RuntimeError if rank else run_eagerly):
        output = called(model, fuse=["epilogues"], fallback=True)
    return relative_error(output, expected)


STEPS = (alike, alone, differing, split_models, of_another_model, all_in_16_bits, eagerly_on_one)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_on_ranks(2, together, tmp_path_factory.mktemp("ranks"))


def test_they_meet_once(results: list[dict]) -> None:
    for result in results:
        error, one_model, another = result["alike"]
        assert error < 1e-5
        assert (one_model, another) == (1, 2)


def test_where_nobody_comes_nobody_is_waited_for(results: list[dict]) -> None:
    assert [result["alone"] for result in results] == [0, 0]


@pytest.mark.parametrize(
    ("step", "named"),
    {
        "fuse": "has option fuse=",
        "attention": "has option attention='exact', rank 1 attention='fp8'",
        "values": "has other values in the weight of blocks.0.up.weight",
        "rank": "has blocks.0.up.weight as [128, 128] torch.float32 w4a16 of rank 16, rank 1 as ",
        "format": "as [128, 128] torch.float32 w4a16 of rank 16, rank 1 as [128, 128] torch.float32 w4a8 of rank 16",
        "layers": "has blocks.1.up.weight as [128, 128] torch.float32 w4a16 of rank 16, rank 1 as none",
        "none": "blocks.0.up.weight",
    }.items(),
)
def test_what_differs_is_named_on_all(step: str, named: str, results: list[dict]) -> None:
    told = [result["differing"][step] for result in results]
    assert told[0] == told[1]
    assert told[0].startswith("RanksDiffer: rank 0 ")
    assert named in told[0]


def test_split_models(results: list[dict]) -> None:
    for result in results:
        error, told = result["split_models"]
        assert error < 1e-5
        assert told.startswith("RanksDiffer: rank 0 has option fuse=")


@pytest.mark.parametrize("step", ["of_another_model", "all_in_16_bits"])
def test_a_model_that_is_served_by_another_one_s_graphs(step: str, results: list[dict]) -> None:
    for result in results:
        found, told = result[step]
        assert found == [1, 2, 2, 2], "once for each model, and not where one rank compiles alone"
        assert "RanksDiffer: rank 0 " in told
        assert "blocks.0.up" in told


def test_a_rank_that_cannot_compile_meets_the_others(results: list[dict]) -> None:
    assert all(result["eagerly_on_one"] < 1e-5 for result in results)
