"""Nunchaku's files of float16 models hold what the model holds, whatever the size of its inputs."""

from pathlib import Path

import pytest
import torch
from test_nunchaku import flux as small_flux
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import relative_error
from svdq_compile.errors import OptionError
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.lowering import ops
from svdq_compile.nunchaku_linear import Linear
from svdq_compile.nunchaku_range import in_range


def linear(size: float, precision: str = "nvfp4", wide: float = 1.0) -> Linear:
    """A weight as it is quantized for an input of this size. wide: what one smoothing factor is more."""
    torch.manual_seed(0)
    smooth = torch.rand(128) + 0.5
    smooth[3] *= wide
    smooth = (size / 16 * smooth).bfloat16().float()
    w = torch.randn(64, 128) / 128**0.5
    weight = FORMATS[precision].quantize_weight(w * smooth)
    down, up = torch.randn(16, 128) / 100, torch.randn(64, 16) / 100
    return Linear(precision, weight, smooth, down.half(), up.half(), None)


def as_written(held: Linear, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype).float() if t.dtype == torch.float32 else t for t in held.weight), held.smooth.to(dtype)


@pytest.mark.parametrize("precision", ["nvfp4", "int4"])
@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0, 1e4, 1e5])
def test_it_is_the_same_linear_and_fits(size: float, precision: str) -> None:
    before = linear(size, precision)
    after = in_range(before, "layer", torch.float16)
    assert torch.equal(after.values / after.smooth, before.values / before.smooth)
    weight, smooth = as_written(after, torch.float16)
    assert torch.equal(smooth.float(), after.smooth)
    for written, held in zip(weight, after.weight, strict=True):
        assert torch.equal(written.float(), held.float())
    wide = in_range(before, "layer", torch.bfloat16)
    assert torch.equal(wide.smooth, before.smooth)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(wide.weight, before.weight, strict=True))


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_the_input_is_moved_as_little_as_can_be(size: float) -> None:
    """Its scales are e4m3: what the weight's scales can take over comes first."""
    before = linear(size)
    after = in_range(before, "layer", torch.float16)
    moved = after.smooth[0] / before.smooth[0]
    assert moved < (2**-14 / before.weight[2]).clamp_min(1.001)
    assert moved == 1 or after.weight[1][after.weight[1].float() > 0].float().min() < 2**-5


def test_zeros_have_no_size() -> None:
    held = linear(1.0)
    zeros = FORMATS["nvfp4"].quantize_weight(torch.zeros(64, 128))
    nothing = Linear("nvfp4", zeros, held.smooth, held.down, held.up, None)
    assert torch.equal(in_range(nothing, "layer", torch.float16).values, torch.zeros(64, 128))
    some = linear(0.02).weight
    both = (torch.cat((some[0], zeros[0])), torch.cat((some[1], zeros[1])), torch.stack((some[2], zeros[2])))
    both = (*both[:2], both[2].repeat_interleave(64)[:, None])
    fused = Linear("nvfp4", both, held.smooth, held.down, torch.cat((held.up, held.up)), None)
    after = in_range(fused, "layer", torch.float16)
    assert after.weight[2].half()[:64].min() >= 2**-14
    assert torch.equal(after.values / after.smooth, fused.values / fused.smooth)


def test_no_power_is_enough() -> None:
    with pytest.raises(OptionError, match=r"^blocks\.0\.q: its scales and smoothing factors do not fit into float16"):
        in_range(linear(1.0, wide=1e12), "blocks.0.q", torch.float16)


def test_a_small_rest_beside_its_branch_is_taken() -> None:
    """Where the branch has the weight, the scale of what is left may be too small for any power."""
    held = linear(1e-9, wide=1e9)
    big = Linear("nvfp4", (*held.weight[:2], held.weight[2] * 1e-20), held.smooth * 1e9, held.down, held.up, None)
    assert in_range(big, "layer", torch.float16) is big


# ** files **


def model(dtype: torch.dtype, size: float = 1.0) -> nn.Module:
    """FLUX whose modulated norms give so large values to q, k, v and the feed-forward."""
    torch.manual_seed(0)
    flux = small_flux()
    double, single = flux.transformer_blocks[0], flux.single_transformer_blocks[0]
    with torch.no_grad():
        for linear, chunks in ((double.norm1.linear, 6), (double.norm1_context.linear, 6), (single.norm.linear, 3)):
            bias = linear.bias.unflatten(0, (chunks, -1))
            linear.weight.mul_(min(size, 1.0) / 100)
            bias.mul_(min(size, 1.0))
            bias[1], bias[-2 if chunks == 6 else 1] = size - 1, size - 1
    return flux.to(dtype).eval()


@pytest.mark.parametrize(
    ("size", "dtype", "target"),
    [
        (0.02, torch.float16, "x.safetensors"),
        (0.02, torch.float16, "folder"),
        (0.02, torch.bfloat16, "x.safetensors"),
        (1.0, torch.float16, "x.safetensors"),
        (2e3, torch.float16, "folder"),  # 1e4 overflows in the model
        (1e4, torch.bfloat16, "x.safetensors"),
    ],
)
def test_a_file_loses_nothing(tmp_path: Path, size: float, dtype: torch.dtype, target: str) -> None:
    flux = model(dtype, size)
    inputs = {
        "hidden_states": torch.randn(1, 64, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 64, 64, dtype=dtype),
        "pooled_projections": torch.randn(1, 64, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([4.0]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(64, 3),
    }
    weights = {n: m.weight.float() for n, m in flux.named_modules() if isinstance(m, nn.Linear)}
    chosen = svdq.Config(precision="nvfp4", rotate=False, refine=0, progress=False)
    svdq.quantize(flux, chosen, calibrate=lambda m: m(**inputs))
    svdq.export_nunchaku(flux, tmp_path / target, progress=False)
    again = svdq.load(model(dtype), tmp_path / target, progress=False)
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"]
    names += ["single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp"]
    for name in names:
        own, other = (svdq.packed(m.get_submodule(name).weight) for m in (flux, again))
        assert own.precision == other.precision == "nvfp4"
        expected = own.dequantize(torch.float32)
        assert relative_error(other.dequantize(torch.float32), expected) < 1e-5, name
        assert relative_error(expected, weights[name]) < 0.2, name
        if name.endswith(("to_q", "to_v", "proj", "proj_mlp")):
            x = (size * torch.randn(32, 128)).to(dtype).float()
            exact = x @ weights[name].t()
            before, after = (
                relative_error(ops.linear(x, packed, None, torch.float32), exact) for packed in (own, other)
            )
            assert after < 1.02 * before < 0.2, name
