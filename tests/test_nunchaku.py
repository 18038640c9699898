"""Nunchaku's checkpoints: what an independent writer has written is loaded number by number, or refused whole."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nunchaku_writer as writer
import svdq_compile as svdq
from nunchaku_writer import AwqTruth, Truth, Writer
from svdq_compile import nunchaku_layout as layout
from svdq_compile.errors import FileRefused, OptionError
from svdq_compile.kernels.formats import FORMATS, nibbles

HEADS = {"num_attention_heads": 2, "attention_head_dim": 64}


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        in_channels=16,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


def qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        **HEADS, num_layers=1, in_channels=16, joint_attention_dim=64, axes_dims_rope=(16, 24, 24)
    )


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        n_layers=1, n_refiner_layers=1, dim=192, n_heads=3, n_kv_heads=3, cap_feat_dim=64, axes_dims=[16, 24, 24]
    )


def sdxl() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(64, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=(1, 3),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )


def sana() -> nn.Module:
    """Of a width whose parts are padded one by one."""
    return diffusers.SanaTransformer2DModel(
        num_layers=1,
        num_attention_heads=6,
        attention_head_dim=32,
        num_cross_attention_heads=3,
        cross_attention_head_dim=64,
        cross_attention_dim=192,
        caption_channels=64,
        mlp_ratio=2.5,
    )


MODELS = {
    "flux": (flux, writer.flux),
    "flux-new-names": (flux, lambda w: writer.flux(w, old=False)),
    "qwen-image": (qwen, writer.qwen),
    "z-image": (z_image, writer.z_image),
    "z-image-16-bit-refiners": (z_image, lambda w: writer.z_image(w, skip_refiners=True)),
    "sdxl": (sdxl, writer.sdxl),
    "sana": (sana, writer.sana),
}
PRECISIONS = ("int4", "nvfp4")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def made(name: str, precision: str = "int4", **options) -> tuple[Writer, str]:
    """A writer with a whole file in it, and the class of its metadata."""
    make, write = MODELS[name]
    w = Writer(make().to(torch.bfloat16), precision, **options)
    return w, write(w)


def saved(folder: Path, name: str, precision: str = "int4", **options) -> tuple[Writer, Path]:
    w, kind = made(name, precision, **options)
    return w, writer.write(w.tensors, folder / "svdq.safetensors", w.metadata(kind))


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name][0]()


def loaded(name: str, file: Path, **options) -> nn.Module:
    return svdq.load(on_meta(name), file, progress=False, **options)


def close(a: Tensor, b: Tensor, bound: float) -> bool:
    return bool((a.double() - b.double()).norm() <= bound * b.double().norm() + 1e-30)


FP32 = 1e-6  # a few roundings of fp32
BF16 = 2**-8  # one rounding to bfloat16


def check(w: Writer, model: nn.Module) -> None:
    """Every linear of the model is the writer's, and so is every other tensor."""
    for name, expected in w.weights.items():
        module = model.get_submodule(name)
        packed = svdq.packed(module.weight)
        assert close(packed.dequantize(torch.float32), expected, FP32), name
        bias = torch.zeros(len(expected)) if module.bias is None else module.bias.float()
        assert close(bias, w.biases[name], BF16), name
    state = {name: p for name, p in model.state_dict().items() if name not in w.used}
    assert state
    original = w.model.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in state.items())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_is_the_one_that_was_written(tmp_path: Path, name: str, precision: str) -> None:
    w, file = saved(tmp_path, name, precision)
    model = loaded(name, file)
    check(w, model)
    report = {row.name: row.precision for row in svdq.report(model)}
    kinds = {name: "w4a16" if isinstance(w.truths.get(name), AwqTruth) else precision for name in w.weights}
    assert kinds.items() <= report.items()
