"""What people do around a quantized model: casting, layouts, offloading hooks, and what they are told."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import FLIPPED_CODES, Net, inputs, net, quiet, relative_error
from svdq_compile.errors import NothingToQuantize, UnsupportedDevice
from svdq_compile.parameter import QuantizedWeight
from zoo import make

pytestmark = pytest.mark.usefixtures("without_inductor")

CPU = torch.device("cpu")


def quantized(dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    model = net(dtype=dtype)
    svdq.quantize(model, svdq.Config(**quiet(**options)))
    return model


def count(model: nn.Module) -> int:
    return sum(isinstance(p, QuantizedWeight) for p in model.parameters())


def compile_it(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model, backend="svdquant", options=quiet())


# Casts.

CASTS: dict[str, tuple[Callable[[nn.Module], Any], torch.dtype]] = {
    "half()": (lambda m: m.half(), torch.float16),
    "bfloat16()": (lambda m: m.bfloat16(), torch.bfloat16),
    "double()": (lambda m: m.double(), torch.float64),
    "to(dtype)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "type(dtype)": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
    "to(a tensor)": (lambda m: m.to(torch.zeros(1, dtype=torch.float16)), torch.float16),
}


@pytest.mark.parametrize("weights", ["release", "offload"])
@pytest.mark.parametrize("name", CASTS)
def test_a_cast_is_whole_and_computes(name: str, weights: str) -> None:
    cast, dtype = CASTS[name]
    model, reference = quantized(weights=weights), net()(*inputs())
    before = model(*inputs())
    cast(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert count(model) == 10
    args = inputs(dtype=dtype)
    assert model(*args).dtype == dtype
    assert relative_error(model(*args), reference) < 0.07
    run = compile_it(model)
    assert relative_error(run(*args), reference) < 0.07
    model.float()
    # The branch has been rounded to 16 bits; what is packed has not changed.
    assert relative_error(model(*inputs()), before) < (0.02 if dtype.itemsize == 2 else 1e-6)
    assert relative_error(run(*inputs()), reference) < 0.06


def test_layers_that_share_an_input_share_it_after_a_cast() -> None:
    model = net()
    svdq.quantize(model, svdq.Config(**quiet()), calibrate=lambda m: m(*inputs()))
    model.bfloat16()
    block = model.blocks[0]
    assert svdq.packed(block.to_q.weight).shared is svdq.packed(block.to_k.weight).shared
    assert svdq.packed(block.to_q.weight).up.dtype == torch.bfloat16


def test_kept_weights_are_cast_and_quantized_again() -> None:
    model = quantized(weights="keep").half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    expected = net().half()(*inputs(dtype=torch.float16))
    assert torch.equal(model(*inputs(dtype=torch.float16)), expected)
    run = compile_it(model)
    run(*inputs(dtype=torch.float16))
    assert 0 < relative_error(run(*inputs(dtype=torch.float16)), expected) < 0.07


def test_a_cast_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = quantized().bfloat16()
    svdq.save(model, tmp_path / "model", progress=False)
    other = svdq.load(net(seed=3), tmp_path / "model", progress=False)
    args = inputs(dtype=torch.bfloat16)
    assert torch.equal(other(*args), model(*args))


def test_to_empty_gives_plain_weights() -> None:
    model = quantized().to_empty(device="cpu")
    assert count(model) == 0
    model.load_state_dict(net().state_dict())
    assert torch.equal(model(*inputs()), net()(*inputs()))


def test_another_pipeline_from_the_same_parts() -> None:
    """`from_pipe` casts to float32 unless told otherwise; the transformer belongs to both."""
    model, args = make("flux", torch.bfloat16)
    reference = model(**args)[0]
    svdq.quantize(model, svdq.Config(**quiet(rank=16, refine=0)))
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    assert other.transformer is model
    assert len({p.dtype for p in model.parameters()}) == 1
    dtype = next(model.parameters()).dtype
    moved = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}
    assert relative_error(model(**moved)[0], reference) < 0.25
    model.to(torch.bfloat16)
    assert relative_error(model(**args)[0], reference) < 0.25


# Memory formats.


class Convolutions(nn.Module):
    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.pointwise, self.spatial = kind(128, 128, 1), kind(128, 128, 3, padding=1)
        self.linear = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial(self.pointwise(x))
        return y + self.linear(y.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(dims: int, when: str) -> None:
    torch.manual_seed(0)
    model, x = Convolutions(dims).requires_grad_(False), torch.randn(1, 128, *(6, 5, 4)[:dims])
    order = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    reference = model(x)
    if when == "before":
        model.to(memory_format=order)
    svdq.quantize(model, svdq.Config(**quiet()))
    if when == "after":
        model.to(memory_format=order)
    assert count(model) == 3
    assert model.spatial.weight.is_contiguous(memory_format=order)
    run = compile_it(model)
    for given in (x, x.to(memory_format=order)):
        assert relative_error(model(given), reference) < 0.08
        assert relative_error(run(given), reference) < 0.08
    model.to(torch.bfloat16, memory_format=torch.contiguous_format)
    assert relative_error(model(x.bfloat16()), reference) < 0.09
    svdq.restore(model, dequantize=True)
    assert relative_error(model(x.bfloat16()), reference) < 0.09


# Hooks.


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting(when: str, storage: torch.dtype) -> None:
    args = inputs(dtype=torch.bfloat16)
    model = net(dtype=torch.bfloat16)
    if when == "after":
        svdq.quantize(model, svdq.Config(**quiet()))
    twin = net(dtype=torch.bfloat16)
    for each in (model, twin):
        apply_layerwise_casting(each, storage_dtype=storage, compute_dtype=torch.bfloat16)
    reference = twin(*args)
    run = compile_it(model)
    for _ in range(3):
        assert relative_error(run(*args), reference) < 0.08
        assert relative_error(model(*args), reference) < 0.08
    assert {p.dtype for p in model.parameters()} == {storage}
    assert count(model) == 10


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_sequential_offload_of_a_quantized_model(way: str) -> None:
    model = quantized()
    accelerate.cpu_offload(model, execution_device=CPU)
    run = compile_it(model) if way == "compiled" else model
    for _ in range(2):
        assert 1e-3 < relative_error(run(*inputs()), net()(*inputs())) < 0.06
    assert all(p.is_meta for p in model.parameters())


def test_sequential_offload_before_quantizing() -> None:
    """The weights are new ones at each call: there is nothing to quantize, or it is said when."""
    model = net()
    accelerate.cpu_offload(model, execution_device=CPU)
    run = compile_it(model)
    for _ in range(3):
        assert relative_error(run(*inputs()), net()(*inputs())) < 1e-5
    with pytest.raises(UnsupportedDevice, match="quantize before it is enabled"):
        svdq.quantize(model, svdq.Config(**quiet()))
    assert relative_error(model(*inputs()), net()(*inputs())) < 1e-5


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_group_offload(when: str, kind: str) -> None:
    model = net() if when == "before" else quantized()
    how = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=kind, **how)
    run = compile_it(model)
    for _ in range(3):
        assert relative_error(run(*inputs()), net()(*inputs())) < 0.06
    assert count(model) == 10


def test_model_offload() -> None:
    model = quantized()
    model, _ = accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    assert relative_error(model(*inputs()), net()(*inputs())) < 0.06


def test_a_weight_of_the_same_class() -> None:
    """As libraries make it that put a weight back."""
    weight = quantized().blocks[0].up.weight
    assert type(weight)(weight, requires_grad=False) is weight
    assert type(type(weight)(torch.zeros(2, 2), requires_grad=False)) is nn.Parameter


# What a user is told.


def test_what_is_left_to_do(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    model = net()
    svdq.quantize(model, svdq.Config(**quiet() | {"progress": True}))
    lines = capsys.readouterr().err.strip().split("\n")
    assert "10 linears quantized" in lines[-2]
    assert "svdq_compile.compile(model)" in lines[-1]
    svdq.save(model, tmp_path / "file", progress=False)
    svdq.load(net(), tmp_path / "file")
    assert "svdq_compile.compile(model)" in capsys.readouterr().err
    svdq.load(net(), tmp_path / "file", progress=False)
    assert not capsys.readouterr().err
    other = net()
    other.blocks[0].compile(backend="svdquant")
    svdq.load(other, tmp_path / "file")
    assert "model.compile" not in capsys.readouterr().err, "it was"


def test_that_it_is_observing_once(capsys: pytest.CaptureFixture) -> None:
    model = net()
    for block in model.blocks:
        block.compile(backend="svdquant", options=quiet(calibration_steps=3) | {"progress": True})
    for _ in range(3):
        model(*inputs())
    first, second = capsys.readouterr().err.splitlines()
    assert "observing 1 of 3 calls, in exact 16-bit; then its layers are quantized (option calibration_steps)" in first
    assert second.endswith("quantizing 2 blocks")
    model(*inputs())
    assert "10 linears quantized" in capsys.readouterr().err


@pytest.mark.parametrize("stderr", ["none", "closed", "broken pipe"])
def test_nobody_to_tell(stderr: str) -> None:
    ends = {
        "none": "sys.stderr = None",
        "closed": "sys.stderr.close()",
        "broken pipe": "r, w = os.pipe(); os.close(r); os.dup2(w, 2)",
    }
    code = (
        "import os, sys, torch, svdq_compile as svdq\n"
        "net = torch.nn.Sequential(torch.nn.Linear(64, 64)).requires_grad_(False)\n"
        f"{ends[stderr]}\n"
        "svdq.quantize(net, svdq.Config(rank=8, refine=0))\n"
        "print(type(net[0].weight).__name__, tuple(net(torch.ones(2, 64)).shape))\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "QuantizedWeight (2, 64)\n", done.stderr


# Torch's own switches.


def test_modes_of_torch() -> None:
    model, reference = quantized(), net()(*inputs())
    expected, run = model(*inputs()), compile_it(model)
    with torch.inference_mode():
        assert relative_error(run(*inputs()), expected) < FLIPPED_CODES
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(run(*inputs()), reference) < 0.08
    torch.use_deterministic_algorithms(True)
    try:
        assert relative_error(run(*inputs()), expected) < FLIPPED_CODES
    finally:
        torch.use_deterministic_algorithms(False)
    for stance in ("force_eager", "eager_on_recompile", "default"):
        with torch.compiler.set_stance(stance):
            assert relative_error(run(*inputs()), expected) < FLIPPED_CODES
    torch._dynamo.reset()
    assert relative_error(run(*inputs()), expected) < FLIPPED_CODES
    assert relative_error(copy.deepcopy(model)(*inputs()), expected) < FLIPPED_CODES


def test_nothing_to_quantize_and_no_values() -> None:
    with pytest.raises(NothingToQuantize):
        svdq.quantize(nn.Sequential(nn.ReLU()), svdq.Config(**quiet()))
    with pytest.raises(NothingToQuantize):
        svdq.quantize(nn.Sequential(nn.Linear(8, 8)), svdq.Config(**quiet()))
    with pytest.raises(UnsupportedDevice):
        svdq.quantize(net().to("meta"), svdq.Config(**quiet()))


def test_hooks_that_replace_outputs() -> None:
    model = quantized()
    handle = model.blocks[0].up.register_forward_hook(lambda module, args, output: output * 0)
    expected = net()
    expected.blocks[0].up.register_forward_hook(lambda module, args, output: output * 0)
    run = compile_it(model)
    assert relative_error(run(*inputs()), expected(*inputs())) < 0.06
    handle.remove()
    assert relative_error(run(*inputs()), net()(*inputs())) < 0.06
