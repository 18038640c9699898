"""Attention whose norm is over all heads (Wan) is split by heads, and gives what one process gives."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_testing import results_on_ranks
from test_tensor_parallel import Model, mesh, split, state
from torch import nn

import svdq_compile as svdq
from conftest import quiet, relative_error, run_eagerly
from svdq_compile import compiled
from svdq_compile.errors import OptionError
from svdq_compile.split_linear import SplitLinear, become_split
from svdq_compile.split_norm import SplitRMSNorm
from svdq_compile.split_plan import plan_for
from svdq_compile.splits import OUTPUTS, Part, Split
from zoo import make

SAME = 1e-5
OPTIONS = {"refine": 0, "rank": 16, "precision": "w4a16"}
# In two blocks: norms of q and k in two attentions, whose four linears are split, and feed-forwards, of two.
SPLIT = {"wan": (8, 20), "ltx_video": (0, 4)}


def counts(model: nn.Module) -> tuple[int, int]:
    """How many norms and linears are split."""
    kinds = [type(module) for module in model.modules()]
    return kinds.count(SplitRMSNorm), sum(issubclass(kind, SplitLinear) for kind in kinds)


# What follows runs in the processes, all of it in one run.


def together(folder: Path) -> dict[str, Any]:
    compiled.compile_with_inductor = run_eagerly
    return {"norm": norms(), "models": {name: whole_models(name) for name in SPLIT}, "files": files(folder)}


def norms() -> list[float]:
    """In both dtypes, with and without a weight and an eps, against torch's: relative to a value's own rounding."""
    found = []
    for dtype, given in ((torch.float32, {}), (torch.bfloat16, {"eps": 1e-3}), (torch.bfloat16, {"affine": False})):
        affine = given.pop("affine", True)
        whole = nn.RMSNorm(64, **given, elementwise_affine=affine, dtype=dtype)  # type: ignore[arg-type]
        x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.01
        if affine:
            whole.weight.copy_(torch.linspace(0.5, 2, 64))
        own = copy.deepcopy(whole)
        part = Part(Split(OUTPUTS, (64,)), dist.get_rank(), 2)
        if affine:
            own.weight = nn.Parameter(part.cut(own.weight, 0))
        become_split(own, part, dist.group.WORLD.group_name)  # type: ignore[union-attr]
        found.append(relative_error(own(part.cut(x, 2)), part.cut(whole(x), 2)) / torch.finfo(dtype).eps)
    return found


def whole_models(name: str) -> Any:
    """Eagerly, and compiled by blocks; what is split."""
    model, given = make(name)
    svdq.quantize(model, **quiet(**OPTIONS, group="alone"))
    expected = model(**given)[0]
    split(model)
    errors = [relative_error(model(**given)[0], expected)]
    model.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=quiet())  # type: ignore[operator]
    errors.append(relative_error(model(**given)[0], expected))
    return errors, counts(model)


def files(folder: Path) -> Any:
    """The parts of a file of the whole, and of 16-bit files that the ranks quantize together."""
    model, _ = make("wan")
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "16")  # type: ignore[operator]
        svdq.quantize(model, **quiet(**OPTIONS, group="alone"))
        svdq.save(model, folder / "4.safetensors", progress=False)
    dist.barrier()
    empty = make("wan")[0].to("meta")
    whole = svdq.load(make("wan")[0], folder / "4.safetensors", progress=False)
    expected = state(split(whole))
    loaded = svdq.load(empty, folder / "4.safetensors", "cpu", mesh=mesh(), progress=False)
    streamed = svdq.from_pretrained(folder / "16", mesh=mesh(), dtype=torch.float32, **quiet(**OPTIONS))
    return state(loaded) == expected, state(streamed) == expected, counts(loaded), counts(streamed)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return results_on_ranks(2, together, folder, folder)


def test_a_norm_is_torch_s(results: list[dict]) -> None:
    for result in results:
        assert max(result["norm"]) < 1


@pytest.mark.parametrize("name", SPLIT)
def test_models(name: str, results: list[dict]) -> None:
    for result in results:
        errors, found = result["models"][name]
        assert max(errors) < SAME
        assert found == SPLIT[name]


def test_files(results: list[dict]) -> None:
    for result in results:
        assert result["files"] == (True, True, SPLIT["wan"], SPLIT["wan"])


class OverAllHeads(nn.LayerNorm):
    """A norm that has means too."""


@pytest.mark.parametrize("kind", [nn.RMSNorm, OverAllHeads])
@pytest.mark.parametrize("affine", [True, False])
def test_which_norms_are_split(kind: type, affine: bool) -> None:
    model = Model()
    for block in model.blocks:
        block.attn.norm_q = kind(256, elementwise_affine=affine)  # type: ignore[union-attr, operator]
    splits = plan_for(model, None, 2).splits
    assert ("blocks.0.attn.norm_q" in splits) == ("blocks.0.attn.to_q" in splits) == (kind is nn.RMSNorm)
    assert "blocks.0.ff.net.0.proj" in splits


@pytest.mark.parametrize("kind", [nn.RMSNorm, OverAllHeads])
@pytest.mark.parametrize("heads", ["heads", "num_heads", None])
def test_norms_do_not_depend_on_how_heads_are_told(heads: str | None, kind: type) -> None:
    """By a plan of one's own, too, which says nothing of norms."""
    model = Model()
    for block in model.blocks:
        del block.attn.heads  # type: ignore[union-attr]
        block.attn.norm_k = kind(256)  # type: ignore[union-attr]
        if heads is not None:
            setattr(block.attn, heads, 4)
    plan = {"blocks.*.to_[qkv]": "colwise", "blocks.*.to_out.0": "rowwise"}
    if kind is nn.RMSNorm:
        splits = plan_for(model, plan, 2).splits
        assert splits["blocks.0.attn.norm_k"] == splits["blocks.0.attn.to_k"]
        assert "blocks.0.attn.norm_q" not in splits, "which is of one head"
        return
    with pytest.raises(OptionError, match=r"plan: blocks\.0\.attn\.norm_k is over all heads, and only torch's RMSNorm"):
        plan_for(model, plan, 2)


def test_only_linears_and_their_norms_become_split() -> None:
    with pytest.raises(AssertionError):
        become_split(nn.LayerNorm(128), Part(Split(OUTPUTS, (256,)), 0, 2), "0")


def test_a_split_linear_without_its_weight() -> None:
    """As whoever moves weights by hand finds it."""
    linear = nn.Linear(64, 64)
    become_split(linear, Part(Split(OUTPUTS, (128,)), 0, 2), "0")
    weight = linear.weight
    del linear.weight
    assert not hasattr(linear, "weight")
    linear.weight = weight
    assert linear.weight is weight
