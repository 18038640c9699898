"""Quantized models of which each rank has a part: the parts are those of the whole, bit for bit, and so is a file's;
the output is the whole's within rounding, eagerly and compiled; what cannot be split is refused on all ranks.
"""

import copy
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks_testing import message, on_ranks, results_on_ranks
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import svdq_compile as svdq
from conftest import logged, quiet, relative_error
from svdq_compile import compiled, reading
from svdq_compile.errors import OptionError
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.parallelize_model import part_of
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.ranks import checksums, ranks_of
from svdq_compile.split_linear import ColumnParallelLinear, RowParallelLinear
from svdq_compile.split_plan import plan_for
from svdq_compile.splits import INPUTS, OUTPUTS, TOGETHER, Cutting, Part, Split

WIDTH, HEADS, TOKENS = 256, 4, 24
PLAN = {"blocks.*.to_[qkv]": "colwise", "blocks.*.to_out.0": "rowwise", "*.net.0.proj": "colwise", "*.net.2": "rowwise"}
# One rank's rows have a largest value of their own, so int8 codes are not those of the whole row.
ROUNDING = {"w4a8": 0.01, "w8a8": 0.01, "int4": 1e-5, "nvfp4": 1e-5}


class Attention(nn.Module):
    """As diffusers names it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_v = nn.Linear(WIDTH, WIDTH)
        self.norm_q = nn.RMSNorm(WIDTH // HEADS)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(self.norm_q(q), k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 4 * WIDTH if gated else 2 * WIDTH)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(self.proj(x), approximate="tanh")
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gated(gated), nn.Identity(), nn.Linear(2 * WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class Block(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.attn, self.ff = Attention(), FeedForward(gated)
        self.modulate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = x + self.attn(F.layer_norm(x, (WIDTH,))) * self.modulate(condition)[:, None]
        return x + self.ff(F.layer_norm(x, (WIDTH,)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(False), Block(True)])
        self.project = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return self.project(x)


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().eval().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TOKENS, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)


def quantized(precision: str = "w4a8", **options: Any) -> Model:
    whole = model()
    svdq.quantize(
        whole,
        calibrate=lambda m: m(*inputs()),
        **quiet(refine=0, rank=16, precision=precision, group="alone", **options),
    )
    return whole


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def split(whole: nn.Module, plan: Any = None) -> nn.Module:
    return svdq.parallelize(whole, mesh(), plan, progress=False)


def state(parts: nn.Module) -> dict[str, list[int]]:
    """The checksums of all that this rank has."""
    found = {}
    for name, weight in parts.named_parameters():
        own = [weight]
        if isinstance(weight, QuantizedWeight):
            own = [*weight._svdq.plain_tensors().values(), weight._svdq.shared.smooth, weight._svdq.down]
        found[name] = [*weight.shape, *checksums(own)]
    return found


def rows_and_columns(parts: nn.Module, whole: nn.Module) -> float:
    """How far what the parts stand for is from the same part of the whole."""
    rank, size, furthest = dist.get_rank(), dist.get_world_size(), 0.0
    for name, module in parts.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(weight, QuantizedWeight):
            continue
        full = svdq.packed(whole.get_submodule(name).weight).dequantize(torch.float32)
        if isinstance(module, ColumnParallelLinear):
            halves = full.chunk(2) if module.weight.shape[0] * size == 4 * WIDTH else [full]
            full = torch.cat([half.chunk(size)[rank] for half in halves])
        if isinstance(module, RowParallelLinear):
            full = full.chunk(size, 1)[rank]
        assert svdq.packed(weight).dequantize(torch.float32).shape == full.shape == weight.shape
        furthest = max(furthest, float((svdq.packed(weight).dequantize(torch.float32) - full).abs().max()))
    return furthest


# What follows runs in the processes, all of it in one run.


def together(folder: Path) -> dict[str, Any]:
    found = {}
    for name, step in STEPS.items():
        torch._dynamo.reset()
        found[name] = step(folder)
    return found


def formats(folder: Path) -> Any:
    """Eagerly, in each format: the output against the whole's, the parts, and how many bytes they have."""
    found = {}
    for precision in ROUNDING:
        whole, parts = quantized(precision), quantized(precision)
        expected = whole(*inputs())
        split(parts)
        found[precision] = (
            relative_error(parts(*inputs()), expected),
            rows_and_columns(parts, whole),
            sum(w._svdq.nbytes() for w in parts.parameters() if isinstance(w, QuantizedWeight))
            / sum(w._svdq.nbytes() for w in whole.parameters() if isinstance(w, QuantizedWeight)),
            [p._svdq.offset is not None for n, p in parts.named_parameters() if n.endswith("net.2.weight")],
            parts(*inputs()).tolist(),
        )
    return found


def in_one_graph(folder: Path) -> Any:
    """Compiled by blocks, through Inductor, with the plan that is found by itself, and the parts offloaded."""
    whole, parts = quantized(), split(quantized(weights="offload"))
    for block in parts.blocks:
        block.compile(backend="svdquant", fullgraph=True, options=quiet())
    eager = relative_error(split(quantized())(*inputs()), whole(*inputs()))
    return eager, relative_error(parts(*inputs()), whole(*inputs())), svdq.restore(parts, progress=False)


def graphs(folder: Path) -> Any:
    """What is compiled, without Inductor: how often each operator is there."""
    counts: Counter[str] = Counter()

    def count(gm: fx.GraphModule, *_: Any) -> Any:
        counts.update(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    inductor, compiled.compile_with_inductor = compiled.compile_with_inductor, count
    parts = quantized()
    parts.compile(backend="svdquant", fullgraph=True, options=quiet())
    parts(*inputs())
    counts.clear()
    split(parts, PLAN)  # compiled code looks at what it is given
    output = parts(*inputs())
    compiled.compile_with_inductor = inductor
    return counts, relative_error(output, quantized()(*inputs()))


class Odd(Model):
    """Of three heads in the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].attn.heads = 3


def plans(folder: Path) -> Any:
    """The same by different words; what is left whole; what is refused."""
    styles = {
        "*.to_[qkv]": ColwiseParallel(),
        "*.to_out.0": RowwiseParallel(),
        "*.net.2": "rowwise",
        "*.proj": "colwise",
    }
    same = [state(split(quantized(), plan)) for plan in (None, PLAN, styles)]
    odd = Odd().eval().requires_grad_(False)
    svdq.quantize(odd, **quiet(refine=0, group="alone"))
    with logged("svdq_compile") as records:
        told = message(lambda: split(copy.deepcopy(odd), PLAN)), message(lambda: split(odd))
    left = [r.getMessage() for r in records if "whole on every rank" in r.getMessage()]
    whole = {name for name, m in odd.named_modules() if "attn.to" in name and type(m) is nn.Linear}
    refused = {
        "pattern": message(lambda: split(quantized(), {"blocks.*.to_x": "colwise"})),
        "style": message(lambda: split(quantized(), PLAN | {"*.to_q": "diagonal"})),
        "layouts": message(lambda: split(quantized(), PLAN | {"*.to_q": ColwiseParallel(output_layouts=Replicate())})),
        "siblings": message(lambda: split(quantized(), {"*.to_q": "rowwise"})),
        "no dict": message(lambda: split(quantized(), ["*.to_q"])),
        "16-bit": message(lambda: split(model())),
        "mesh": message(lambda: svdq.parallelize(quantized(), 2)),
    }
    return same, told, left, whole, refused


def written(folder: Path, precision: str = "w4a8") -> Path:
    """A file of the whole, which one rank writes."""
    path = folder / f"{precision}.svdq.safetensors"
    if dist.get_rank() == 0 and not path.exists():
        svdq.save(quantized(precision), path, progress=False)
    dist.barrier()
    return path


def empty() -> Model:
    with torch.device("meta"):
        return Model().requires_grad_(False)


def loading(folder: Path) -> Any:
    """Into a model without memory: the parts are those of the whole, and so is what is read."""
    found = {}
    for precision in ("w4a8", "int4"):
        path, parts = written(folder, precision), empty()
        read = bytes_read(partial(svdq.load, parts, path, mesh=mesh(), progress=False))
        expected = split(quantized(precision))
        same = torch.equal(parts(*inputs()), expected(*inputs()))
        found[precision] = state(parts) == state(expected), same, read / path.stat().st_size
    return found


def bytes_read(call: Callable[[], Any]) -> int:
    """How many a call reads of tensors in files."""
    sizes: list[int] = []
    ways = (reading.Slices, "__getitem__"), (reading.TensorFile, "get")

    def counting(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any) -> Tensor:
            tensor = read(*args)
            sizes.append(tensor.nbytes)
            return tensor

        return counted

    with ExitStack() as patched:
        for holder, name in ways:
            patched.enter_context(mock.patch.object(holder, name, counting(getattr(holder, name))))
        call()
    return sum(sizes)


def files_that_are_refused(folder: Path) -> Any:
    """Damaged where one rank looks, another file on each rank, a plan that does not fit, a model that is no such."""
    path, rank = written(folder), dist.get_rank()
    mine = folder / f"{rank}.svdq.safetensors"
    shutil.copy(path, mine)
    if rank:
        svdq.save(quantized(skip=["*.to_q"]), mine, progress=False)
    damaged = folder / "damaged.svdq.safetensors"
    if rank == 0:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    parts = empty()
    found = {
        "other": message(lambda: svdq.load(parts, mine, mesh=mesh(), progress=False)),
        "damaged": message(lambda: svdq.load(parts, damaged, mesh=mesh(), progress=False)),
        "missing": message(lambda: svdq.load(parts, folder / f"{rank}" if rank else path, mesh=mesh(), progress=False)),
        "plan": message(lambda: svdq.load(parts, path, mesh=mesh(), plan={"*.to_q": "rowwise"}, progress=False)),
        "mesh": message(lambda: svdq.load(parts, path, plan=PLAN, progress=False)),
    }
    return found, all(type(p) is nn.Parameter and p.is_meta for p in parts.parameters())


def ranks_apart(folder: Path) -> Any:
    """Ranks that are about to do different things."""
    rank = dist.get_rank()
    other = quantized()
    if rank:
        other.blocks[0].modulate.bias[3] += 1
    return {
        "plan": message(lambda: split(quantized(), PLAN if rank else {**PLAN, "*.net.2": "colwise"})),
        "values": message(lambda: split(other)),
        "precision": message(lambda: split(quantized("int4" if rank else "w4a8"))),
    }


def wrong_on_one(folder: Path) -> Any:
    """One rank is at an end before it has begun, or does something else than the other."""
    path, rank, known = written(folder), dist.get_rank(), ranks_of(svdq.Config())
    assert known is not None
    return {
        "16-bit": message(lambda: split(model() if rank else quantized())),
        "no model": message(lambda: svdq.load(3 if rank else empty(), path, mesh=mesh(), progress=False)),  # type: ignore[arg-type]
        "precision": message(
            lambda: svdq.load(empty(), path, mesh=mesh(), progress=False, precision="w4a8" if rank else None)
        ),
        "option": message(lambda: svdq.quantize(model(), **quiet(**{"target_bytes": 10**6} if rank else {}))),
        "calibrate": message(lambda: svdq.quantize(model(), calibrate="" if rank else None, **quiet())),  # type: ignore[arg-type]
        "another call": message(lambda: known.compare(lambda: {"tensor" if rank else "weight": [("x", 1)]})),
    }


def afterwards(folder: Path) -> Any:
    """What a split model refuses, and goes on as before."""
    from peft import LoraConfig, inject_adapter_in_model

    parts, path = split(quantized()), folder / "split.svdq.safetensors"
    before = parts(*inputs())
    adapter = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_out.0"])
    with_adapter = quantized()
    inject_adapter_in_model(adapter, with_adapter)
    refused = {
        "saving": message(lambda: svdq.save(parts, path)),
        "loading": message(lambda: svdq.load(parts, path)),
        "splitting": message(lambda: split(parts)),
        "adapter before": message(lambda: split(with_adapter)),
    }
    moved = copy.deepcopy(parts).to(torch.bfloat16).to(torch.float32)
    return refused, path.exists(), torch.equal(parts(*inputs()), before), relative_error(moved(*inputs()), before)


STEPS = {
    step.__name__: step
    for step in (
        formats,
        in_one_graph,
        graphs,
        plans,
        loading,
        files_that_are_refused,
        ranks_apart,
        wrong_on_one,
        afterwards,
    )
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of all steps, for each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return results_on_ranks(2, together, folder, folder)


@pytest.mark.parametrize("precision", ROUNDING)
def test_parts_are_those_of_the_whole(precision: str, results: list[dict]) -> None:
    for result in results:
        error, furthest, share, offsets, _ = result["formats"][precision]
        assert error < ROUNDING[precision]
        assert furthest == 0
        assert 0.5 < share < 0.75  # the modulation, D and U of some are whole
        assert offsets == [FORMATS[precision].codes.unsigned, False]
    assert results[0]["formats"][precision][-1] == results[1]["formats"][precision][-1]


def test_compiled_in_one_graph(results: list[dict]) -> None:
    for result in results:
        eager, error, restored = result["in_one_graph"]
        assert max(eager, error) < ROUNDING["w4a8"]
        assert restored == 14


def test_what_is_compiled(results: list[dict]) -> None:
    for result in results:
        counts, error = result["graphs"]
        assert error < ROUNDING["w4a8"]
        assert counts["svdq.quantize.default"] == 2 * 4  # q, k and v share theirs, as in the whole
        assert counts["svdq.gemm.default"] == 2 * 6
        assert counts["_c10d_functional.all_reduce"] + counts["_c10d_functional.all_reduce.default"] == 2 * 2


def test_plans(results: list[dict]) -> None:
    for result in results:
        same, (given, own), left, whole, refused = result["plans"]
        assert same[0] == same[1] == same[2]
        assert "plan: blocks.0.attn has 3 heads, which 2 ranks cannot share" in given
        assert own == ""
        assert len(left) == 1
        assert "4 linears are whole on every rank: blocks.0.attn has 3 heads" in left[0]
        assert whole == {f"blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
        for step, words in {
            "pattern": "'blocks.*.to_x' names no linear of this Model; the nearest is",
            "style": "'diagonal' is not known: give 'colwise' or 'rowwise'",
            "layouts": "has layouts of its own",
            "siblings": "read one input, and only one is split by its channels",
            "no dict": "give a dict",
            "16-bit": "is not quantized",
            "mesh": "give a device mesh of one dimension",
        }.items():
            assert refused[step].startswith("OptionError: ")
            assert words in refused[step]


def test_groups_stay_whole() -> None:
    for kind in FORMATS.values():
        assert TOGETHER % (kind.group_size or 1) == TOGETHER % (kind.codes.block if kind.codes else 1) == 0
    assert Split(INPUTS, (512, 256)).why_not(4) is None
    told = Split(INPUTS, (512, 384)).why_not(4)
    assert told == "groups of 64 of its 384 input channels cannot be shared by 4 ranks"
    assert Split(OUTPUTS, (512, 384)).why_not(4) is None


@pytest.mark.parametrize("precision", [None, "nvfp4", "w4a8"])
def test_what_is_split_does_not_depend_on_the_format(precision: str | None) -> None:
    """A file may be loaded by parts, or a model be split that is quantized or not yet: all to the same parts."""
    whole = model() if precision is None else quantized(precision)
    assert len(plan_for(whole, {"*.net.2": "rowwise"}, 8).splits) == 2
    with pytest.raises(OptionError, match="groups of 64 of its 512 input channels cannot be shared by 16 ranks"):
        plan_for(whole, {"*.net.2": "rowwise"}, 16)


@pytest.mark.parametrize(
    ("step", "named"),
    {
        "plan": "splits blocks.0.ff.net.2 by outputs [256]",
        "values": "weight of blocks.0.modulate",
        "precision": "blocks.0.attn.to_q",
    }.items(),
)
def test_ranks_that_differ(step: str, named: str, results: list[dict]) -> None:
    told = results[0]["ranks_apart"][step]
    assert told.startswith("RanksDiffer: rank 0 ")
    assert named in told
    assert told == results[1]["ranks_apart"][step]


def test_what_is_wrong_on_one_ends_all(results: list[dict]) -> None:
    first, second = (result["wrong_on_one"] for result in results)
    assert first.pop("another call") == (told := second.pop("another call"))
    assert told.startswith("RanksDiffer: rank 0 has other values in the weight of x")
    for step, told in second.items():
        assert told.startswith(("OptionError: ", "NotAModel: ")), (step, told)
        assert first[step] == f"RankFailed: rank 1 failed, so all ranks stop: {told}"


def test_what_needs_the_whole_is_refused(results: list[dict]) -> None:
    for result in results:
        refused, written, same, moved = result["afterwards"]
        for step, told in refused.items():
            assert told.startswith("SplitRefused: "), (step, told)
            assert "2 ranks" in told or step == "adapter before"
        assert not written
        assert same
        assert 0 < moved < 0.02  # the branch was rounded to bfloat16


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
def test_a_file_is_loaded_by_parts(precision: str, results: list[dict]) -> None:
    for result in results:
        equal, same, read = result["loading"][precision]
        assert equal
        assert same
        assert read < 0.5 + (0.8 if precision == "w4a8" else 1.2)  # half of all to look at; what has an offset is whole


def test_files_that_are_refused(results: list[dict]) -> None:
    (first, untouched), (second, also) = (result["files_that_are_refused"] for result in results)
    assert untouched
    assert also
    assert first["other"] == second["other"]
    assert first["other"].startswith("RanksDiffer: rank 0 ")
    assert sorted(told["damaged"].split(":")[0] for told in (first, second)) == ["FileRefused", "RankFailed"]
    assert all("is damaged: its checksum differs" in told["damaged"] for told in (first, second))
    assert second["missing"].startswith("FileNotFoundError: ")
    assert first["missing"].startswith("RankFailed: rank 1 failed")
    assert "plan" in first["plan"]
    assert "give the mesh" in first["mesh"]


def test_a_part_has_the_effect_of_the_whole() -> None:
    weight = quantized().blocks[0].attn.to_q.weight
    weight._svdq_effect = 0.25
    part = part_of(weight, Part(Split(OUTPUTS, (WIDTH,)), 0, 2), Cutting())
    assert isinstance(part, QuantizedWeight)
    assert part._svdq_effect == 0.25


def on_four(folder: Path) -> Any:
    """Two models, each on two ranks of four; one on all; and at the end one that is alone."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "parts"))
    whole, rank = quantized(), dist.get_rank()
    expected = whole(*inputs())
    halves = svdq.parallelize(copy.deepcopy(whole), both["parts"], progress=False)
    quarters = split(whole)
    shapes = [tuple(m.blocks[0].attn.to_out[0].weight.shape) for m in (halves, quarters)]
    outputs = [m(*inputs()) for m in (halves, quarters)]
    if rank == 3:
        return None
    begun = time.monotonic()
    told = message(lambda: split(quantized()))
    return [relative_error(y, expected) for y in outputs], shapes, told, time.monotonic() - begun


def test_four_ranks(tmp_path: Path) -> None:
    for errors, shapes, told, seconds in on_ranks(4, on_four, tmp_path, tmp_path)[:3]:
        assert max(errors) < ROUNDING["w4a8"]
        assert shapes == [(WIDTH, WIDTH // 2), (WIDTH, WIDTH // 4)]
        assert told.startswith("RanksApart: ranks 0, 1, 2, 3 did not all come")
        assert seconds < 25, "that a process ends is noticed"
