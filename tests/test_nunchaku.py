"""Nunchaku's checkpoints: what an independent writer has written is loaded number by number, or refused whole."""

import copy
import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import diffusers
import nunchaku_writer as writer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nunchaku_writer import AwqTruth, Truth, Writer
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import svdq_compile as svdq
from svdq_compile import nunchaku_layout as layout
from svdq_compile.cli import app
from svdq_compile.errors import FileRefused, OptionError
from svdq_compile.kernels.formats import nibbles
from svdq_compile.parameter import QuantizedWeight

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
        transformer_layers_per_block=1,
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


@cache
def _made(name: str, precision: str, rank: int, h: torch.dtype) -> tuple[Writer, str]:
    torch.manual_seed(0)
    make, write = MODELS[name]
    w = Writer(make().to(torch.bfloat16), precision, rank, h)
    return w, write(w)


def made(name: str, precision: str = "int4", rank: int = 32, h: torch.dtype = torch.bfloat16) -> tuple[Writer, str]:
    """A writer with a whole file in it, whose tensors may be changed, and the class of its metadata."""
    w, kind = _made(name, precision, rank, h)
    w = copy.copy(w)
    w.tensors = {name: tensor.clone() for name, tensor in w.tensors.items()}
    return w, kind


def saved(folder: Path, name: str, *options) -> tuple[Writer, Path]:
    w, kind = made(name, *options)
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
    linears = {f"{name}.{leaf}" for name in w.weights for leaf in ("weight", "bias")}
    state = {name: p for name, p in model.state_dict().items() if name not in linears}
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


# ** exported again **


def tensors_of(file: Path) -> dict[str, Tensor]:
    return load_file(file)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "flux-new-names"])
def test_what_is_loaded_and_exported_is_the_file_again(tmp_path: Path, name: str, precision: str) -> None:
    _, file = saved(tmp_path, name, precision)
    svdq.export_nunchaku(loaded(name, file), tmp_path / "b.safetensors", progress=False)
    before, after = tensors_of(file), tensors_of(tmp_path / "b.safetensors")
    no_bias = {n for n, t in before.items() if n.endswith(".bias") and n not in after}
    assert all(not bool(layout.unpack_vector(before[n])[:64].any()) for n in no_bias)
    padded = {n for n in before if n.endswith((".wscales", ".wzeros")) and before[n].shape != after[n].shape}
    assert all("norm1.linear" in n for n in padded)  # groups of weight-only linears may be padded, and need not be
    for n in before.keys() - no_bias - padded:
        if not n.endswith(("smooth_orig", "smooth_factor_orig")):
            assert same_bits(after[n], before[n]), n
    assert before.keys() - no_bias == after.keys()


def without_a_bias() -> nn.Module:
    model = flux()
    model.transformer_blocks[0].ff.net[2].bias = None
    return model


def quantized(precision: str = "int4", make=flux, rotate: bool = False, **options) -> nn.Module:
    """FLUX, quantized here, with the linears that share an input found by tracing."""
    model = make().to(torch.bfloat16).eval()
    inputs = {
        "hidden_states": torch.randn(1, 64, 16, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 64, 64, dtype=torch.bfloat16),
        "pooled_projections": torch.randn(1, 64, dtype=torch.bfloat16),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([4.0]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(64, 3),
    }
    chosen = svdq.Config(precision=precision, rotate=rotate, progress=False, refine=0, **options)
    svdq.quantize(model, chosen, example_inputs=inputs)
    return model


def packs(model: nn.Module) -> dict:
    return {n: svdq.packed(p) for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_quantized_here_is_the_same_after_a_round_trip(tmp_path: Path, precision: str) -> None:
    model = quantized(precision)
    svdq.export_nunchaku(model, tmp_path / "x.safetensors", progress=False)
    again = packs(loaded("flux", tmp_path / "x.safetensors"))
    compared = 0
    for name, packed in packs(model).items():
        if packed.precision == precision and "proj_out" not in name:
            other = again[name]
            for a, b in zip(packed.plain_weight, other.plain_weight, strict=True):
                assert same_bits(a, b), name
            assert torch.equal(packed.shared.smooth, other.shared.smooth), name
            assert same_bits(packed.down, other.down), name
            assert same_bits(packed.up, other.up), name
            compared += 1
    assert compared == 16
    name = "single_transformer_blocks.0.proj_out.weight"  # in the file it is two
    assert close(again[name].dequantize(torch.float32), packs(model)[name].dequantize(torch.float32), FP32)
    assert torch.equal(again[name].up, packs(model)[name].up)


LITE = {"flux": (".attn.to_q", ".attn.to_k", ".attn.to_out.0", "ff.net.2", "single_transformer_blocks.0.proj_out")}


def lite_folder(folder: Path, precision: str, rank: int = 32) -> Writer:
    w = Writer(flux().to(torch.bfloat16), precision, rank)
    linears = [n for n, m in w.model.named_modules() if isinstance(m, nn.Linear) and n.endswith(LITE["flux"])]
    config = writer.lite(w, linears, ["transformer_blocks.0.norm1.linear"])
    w.model.save_config(folder)
    told = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(told))
    writer.write(w.tensors, folder / "diffusion_pytorch_model.safetensors")
    return w


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nunchaku_lite_is_loaded_and_exported(tmp_path: Path, precision: str) -> None:
    w = lite_folder(tmp_path / "a", precision)
    model = loaded("flux", tmp_path / "a")
    check(w, model)
    svdq.export_nunchaku(model, tmp_path / "b", progress=False)
    before, after = (tensors_of(tmp_path / x / "diffusion_pytorch_model.safetensors") for x in "ab")
    assert before.keys() == after.keys()
    different = [n for n in before if not same_bits(before[n], after[n])]
    assert different == []
    old, new = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ab")
    diffusers.NunchakuLiteQuantizationConfig(**new["quantization_config"])  # its own checks
    for section in ("svdq_w4a4", "awq_w4a16"):
        a, b = (c["quantization_config"][section] for c in (old, new))
        assert set(a.pop("targets")) == set(b.pop("targets"))
        assert a == b


# ** each formula **


SIZES = st.integers(1, 2), st.integers(1, 3), st.integers(0, 2**32 - 1)


@settings(max_examples=6, deadline=None)
@given(*SIZES)
def test_codes_lie_as_documented(tiles: int, columns: int, seed: int) -> None:
    """Word by word: tiles of 128 x 64, in each the 8 nibbles of a lane's words."""
    torch.manual_seed(seed)
    codes = torch.randint(0, 16, (128 * tiles, 64 * columns), dtype=torch.uint8)
    packed = layout.pack_codes(codes)
    assert packed.dtype == torch.int8
    assert packed.shape == (128 * tiles, 32 * columns)
    words = packed.reshape(-1).view(torch.int32).tolist()
    at = 0
    for nt in range(tiles):
        for kt in range(columns):
            for a in range(8):
                for lane in range(8):
                    for m in range(4):
                        for p in range(2):
                            for q in range(2):
                                n, k = 128 * nt + 16 * a + 8 * p + lane, 64 * kt + 32 * q + 8 * m
                                word = sum(int(c) << 4 * e for e, c in enumerate(codes[n, k : k + 8].tolist()))
                                assert words[at] & 0xFFFFFFFF == word
                                at += 1
    assert torch.equal(layout.unpack_codes(packed), codes)


def is_its_inverse(matrix: Tensor, pack, unpack, expected: Tensor) -> None:
    assert same_bits(pack(matrix), expected)
    assert same_bits(unpack(expected), matrix)


@settings(max_examples=20, deadline=None)
@given(*SIZES)
def test_scales_and_vectors_lie_as_documented(tiles: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    scales = torch.randn(128 * tiles, groups).to(torch.bfloat16)
    is_its_inverse(scales, layout.pack_scales, layout.unpack_scales, writer.put_scales(scales))
    vector = torch.randn(128 * tiles).to(torch.bfloat16)
    is_its_inverse(vector, layout.pack_vector, layout.unpack_vector, writer.put_vector(vector))
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert torch.equal(layout.pack_vector(vector)[:16], vector[order])


@settings(max_examples=20, deadline=None)
@given(*SIZES)
def test_fp8_scales_lie_as_documented(tiles: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    scales = torch.randint(0, 127, (128 * tiles, 4 * groups), dtype=torch.uint8).view(torch.float8_e4m3fn)
    is_its_inverse(scales, layout.pack_fp8_scales, layout.unpack_fp8_scales, writer.put_fp8_scales(scales))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_branch_lies_as_documented(sixteens: int, ranks: int, seed: int) -> None:
    torch.manual_seed(seed)
    down = torch.randn(16 * ranks, 16 * sixteens).to(torch.bfloat16)
    is_its_inverse(down, layout.pack_down, layout.unpack_down, writer.put_down(down))
    up = torch.randn(16 * sixteens, 16 * ranks).to(torch.bfloat16)
    is_its_inverse(up, layout.pack_up, layout.unpack_up, writer.put_up(up))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_weight_only_codes_lie_as_documented(fours: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 16, (4 * fours, 64 * groups), dtype=torch.uint8)
    packed = writer.put_awq_codes(codes.numpy())
    is_its_inverse(codes, layout.pack_awq_codes, layout.unpack_awq_codes, packed)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_rows_are_interleaved_as_documented(channels: int, chunks: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(channels * chunks, 3)
    stored = torch.stack([rows[s * channels + i] for i in range(channels) for s in range(chunks)])
    assert torch.equal(layout.interleave(rows, chunks), stored)
    assert torch.equal(layout.deinterleave(stored, chunks), rows)


# ** numbers **


def codes_of(t: Truth) -> Tensor:
    return t.q & 15 if t.precision == "nvfp4" else t.q


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rank", [0, 16, 48])
def test_integers_scales_smoothing_and_branch_are_the_files(tmp_path: Path, precision: str, rank: int) -> None:
    w, file = saved(tmp_path, "qwen-image", precision, rank)
    model = loaded("qwen-image", file)
    name = "transformer_blocks.0.attn.to_out.0"
    t, packed = w.truths[name], svdq.packed(model.get_submodule(name).weight)
    assert isinstance(t, Truth)
    qweight, scales, *above = packed.plain_weight
    q = nibbles.unpack(qweight).long()
    assert torch.equal(q - 8 if precision == "int4" else q, codes_of(t))
    assert same_bits(scales, t.scales)
    assert [a.item() for a in above] == ([] if t.above is None else [t.above[0].item()])
    assert torch.equal(packed.shared.smooth, t.smooth.float())
    assert same_bits(packed.down, t.down)
    assert same_bits(packed.up, t.up)
    assert packed.offset is None
    assert same_bits(model.get_submodule(name).bias.data, t.bias)


def test_linears_that_were_one_share_their_input(tmp_path: Path) -> None:
    _, file = saved(tmp_path, "flux")
    attention = loaded("flux", file).transformer_blocks[0].attn
    q, k, v = (svdq.packed(getattr(attention, f"to_{x}").weight) for x in "qkv")
    assert q.shared is k.shared is v.shared
    assert [p.rank_start for p in (q, k, v)] == [0, 32, 64]  # rows that follow one another: one product for all three


def test_after_gelu_the_input_is_shifted_and_its_codes_unsigned(tmp_path: Path) -> None:
    """The arithmetic of Nunchaku's kernel, on the stored bias."""
    w, file = saved(tmp_path, "flux")
    linear = loaded("flux", file).transformer_blocks[0].ff.net[2]
    t = w.truths["transformer_blocks.0.mlp_fc2"]
    assert isinstance(t, Truth)
    x = torch.nn.functional.gelu(torch.randn(5, t.q.shape[1]), approximate="tanh").to(torch.bfloat16)
    shifted = ((x.float() + writer.SHIFT) / t.smooth.float()).unflatten(1, (-1, 64))
    scale = shifted.amax(-1, keepdim=True) / 15
    codes = (shifted / scale).round().clamp(0, 15)
    expected = (codes * scale).flatten(1).double() @ t.values().t()
    expected = expected + (x.double() @ t.down.double().t()) @ t.up.double().t() + t.bias.double()
    assert close(linear(x), expected, BF16)
    assert not close(linear(x) + writer.SHIFT, expected, BF16)


def test_float16_files(tmp_path: Path) -> None:
    """Their scales have more digits than bfloat16 holds, and keep them."""
    w, file = saved(tmp_path, "flux", "int4", 32, torch.float16)
    model = loaded("flux", file)
    for name, expected in w.weights.items():
        assert close(svdq.packed(model.get_submodule(name).weight).dequantize(torch.float32), expected, FP32), name
    linear = model.transformer_blocks[0].ff.net[0].proj
    assert linear(torch.randn(2, 128, dtype=torch.float16)).dtype == torch.float16


def test_coded_anew_for_8_bit_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w, file = saved(tmp_path, "flux")
    model = svdq.load(on_meta("flux"), file, precision="w4a8")
    told = capsys.readouterr().err
    assert "coded anew as w4a8: their weights change by" in told
    errors = []
    for name, expected in w.weights.items():
        packed = svdq.packed(model.get_submodule(name).weight)
        got = packed.dequantize(torch.float32).double()
        errors.append(float((got - expected).norm() / expected.norm()))
        assert packed.precision == ("w4a16" if isinstance(w.truths.get(name), AwqTruth) else "w4a8")
        assert close(model.get_submodule(name).bias, w.biases[name], BF16), name
    reported = [row.error for row in svdq.report(model) if row.precision == "w4a8"]
    assert 0.001 < max(errors) < 0.1  # another grid of 15 steps: a few percent
    assert max(reported) == pytest.approx(max(errors), rel=0.01)


def test_a_loaded_model_is_saved_and_loaded_as_any(tmp_path: Path) -> None:
    w, file = saved(tmp_path, "flux", "nvfp4")
    svdq.save(loaded("flux", file), tmp_path / "ours", progress=False)
    check(w, loaded("flux", tmp_path / "ours"))


def test_two_files_in_a_folder(tmp_path: Path) -> None:
    w, kind = made("flux")
    blocks = {n: t for n, t in w.tensors.items() if n.startswith(("transformer_blocks", "single_transformer_blocks"))}
    writer.write(blocks, tmp_path / "transformer_blocks.safetensors")
    rest = {n: t for n, t in w.tensors.items() if n not in blocks}
    writer.write(rest, tmp_path / "unquantized_layers.safetensors")
    (tmp_path / "config.json").write_text(w.metadata(kind)["config"])
    check(w, loaded("flux", tmp_path))
    (tmp_path / "unquantized_layers.safetensors").unlink()
    with pytest.raises(FileRefused, match=r"unquantized_layers\.safetensors is missing"):
        loaded("flux", tmp_path)


def test_a_file_without_metadata_is_told_by_its_tensors(tmp_path: Path) -> None:
    w, _ = made("flux")
    check(w, loaded("flux", writer.write(w.tensors, tmp_path / "x")))


# ** refused, and the model as it was **


def refused(tmp_path: Path, w: Writer, metadata: dict[str, str] | None, message: str, name: str = "flux") -> None:
    file = writer.write(w.tensors, tmp_path / "damaged", metadata)
    still_refused(file, message, name)


@cache
def untouched(name: str) -> tuple[nn.Module, dict[str, tuple[Tensor, int, Tensor]]]:
    """A model that nothing ever changes, and its Parameters, as they are."""
    model = MODELS[name][0]()
    return model, {n: (p, p._version, p.detach().clone()) for n, p in model.named_parameters()}


def still_refused(file: Path, message: str, name: str = "flux") -> None:
    model, before = untouched(name)
    with pytest.raises(FileRefused, match=message):
        svdq.load(model, file, progress=False)
    after = dict(model.named_parameters())
    assert all(after[n] is p and p._version == v and torch.equal(p, old) for n, (p, v, old) in before.items())


FC1, QKV, NORM = "transformer_blocks.0.mlp_fc1", "transformer_blocks.0.qkv_proj", "transformer_blocks.0.norm1.linear"


def resized(t: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape).to(t.dtype)


def changed(change) -> Writer:
    w, _ = made("flux")
    change(w.tensors)
    return w


CHANGES = {
    "a-tensor-missing": (lambda t: t.pop(f"{FC1}.wscales"), "mlp_fc1.wscales is missing"),
    "half-a-branch": (lambda t: t.pop(f"{FC1}.lora_up"), "mlp_fc1 has one half of a low-rank branch"),
    "no-bias": (lambda t: t.pop(f"{FC1}.bias"), "mlp_fc1.bias is missing"),
    "no-smoothing": (lambda t: t.pop(f"{FC1}.smooth"), "mlp_fc1.smooth_factor is missing"),
    "a-plain-tensor-missing": (lambda t: t.pop("proj_out.weight"), r"tensor proj_out\.weight of the model is missing"),
    "a-module-missing": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(FC1)],
        "tensor transformer_blocks.0.ff.net.0.proj",
    ),
    "half-of-a-split-linear": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("single_transformer_blocks.0.out_proj")],
        "proj_out is split in two in the file",
    ),
    "an-extra-tensor": (lambda t: t.update(more=torch.ones(2)), "the model has no tensor more"),
    "an-extra-field": (lambda t: t.update({f"{FC1}.qzeros": torch.ones(2)}), "mlp_fc1.qzeros is none that this"),
    "an-extra-block": (
        lambda t: t.update({n.replace("blocks.0", "blocks.1"): v for n, v in list(t.items()) if n.startswith(FC1)}),
        r"the model has no linear transformer_blocks\.1\.ff",
    ),
    "an-unknown-module": (
        lambda t: t.update({"transformer_blocks.0.extra.qweight": t[f"{FC1}.qweight"]}),
        r"transformer_blocks\.0\.extra is in no key map",
    ),
    "old-and-new-names": (lambda t: t.update({f"{FC1}.smooth_factor": t[f"{FC1}.smooth"]}), "which are one thing"),
    "another-rank": (
        lambda t: t.update(
            {
                f"{FC1}.lora_down": resized(t[f"{FC1}.lora_down"], 128, 64),
                f"{FC1}.lora_up": resized(t[f"{FC1}.lora_up"], 512, 64),
            }
        ),
        "its linears differ in rank",
    ),
    "two-ranks": (
        lambda t: t.update({f"{FC1}.lora_up": resized(t[f"{FC1}.lora_up"], 512, 48)}),
        "not of one rank",
    ),
    "codes-too-short": (lambda t: t.update({f"{FC1}.qweight": t[f"{FC1}.qweight"][:384]}), "mlp_fc1.qweight is"),
    "codes-turned": (
        lambda t: t.update({f"{FC1}.qweight": t[f"{FC1}.qweight"].t().contiguous()}),
        "mlp_fc1.qweight is",
    ),
    "scales-too-few": (lambda t: t.update({f"{FC1}.wscales": t[f"{FC1}.wscales"][:1]}), "mlp_fc1.wscales is"),
    "smoothing-too-long": (lambda t: t.update({f"{FC1}.smooth": torch.ones(256).bfloat16()}), "mlp_fc1.smooth is"),
    "bias-of-another-length": (lambda t: t.update({f"{QKV}.bias": torch.ones(256).bfloat16()}), "qkv_proj.bias is"),
    "a-norm-of-another-shape": (
        lambda t: t.update({"transformer_blocks.0.norm_q.weight": torch.ones(32).bfloat16()}),
        r"tensor transformer_blocks\.0\.norm_q\.weight is",
    ),
    "floating-codes": (lambda t: t.update({f"{FC1}.qweight": t[f"{FC1}.qweight"].float()}), "is F32, not I8"),
    "two-16-bit-dtypes": (lambda t: t.update({f"{FC1}.smooth": t[f"{FC1}.smooth"].half()}), "of two dtypes"),
    "a-float16-linear": (
        lambda t: t.update({n: v.half() for n, v in t.items() if n.startswith(FC1) and v.is_floating_point()}),
        "differ in 16-bit dtype",
    ),
    "one-nvfp4-linear": (
        lambda t: t.update({f"{FC1}.wscales": torch.ones(8, 512).to(torch.float8_e4m3fn)}),
        "its linears differ in precision",
    ),
    "scales-of-nvfp4": (lambda t: t.update({f"{FC1}.wcscales": torch.ones(512).bfloat16()}), "goes with nvfp4"),
    "nan-scale": (lambda t: t[f"{FC1}.wscales"].view(-1)[3:4].fill_(float("nan")), "mlp_fc1.wscales holds 1 NaN"),
    "inf-branch": (lambda t: t[f"{QKV}.lora_up"].view(-1)[:2].fill_(float("inf")), "qkv_proj.lora_up holds 2 NaN"),
    "nan-zero-point": (lambda t: t[f"{NORM}.wzeros"].view(-1)[:1].fill_(float("nan")), "wzeros holds 1 NaN"),
    "zero-smoothing": (lambda t: t[f"{FC1}.smooth"][5:6].zero_(), "mlp_fc1.smooth holds 1 zeros"),
    "a-weight-only-linear-elsewhere": (
        lambda t: t.update({f"{FC1}.qweight": torch.zeros(128, 64, dtype=torch.int32)}),
        "mlp_fc1 is w4a16, which this version knows as w4a4",
    ),
    "weight-only-without-zeros": (lambda t: t.pop(f"{NORM}.wzeros"), "norm1.linear.wzeros is missing"),
    "weight-only-of-another-shape": (
        lambda t: t.update({f"{NORM}.wscales": t[f"{NORM}.wscales"][:1]}),
        "norm1.linear.wscales is",
    ),
    "a-float16-norm": (
        lambda t: t.update({"norm_out.linear.bias": torch.ones(256).half()}),
        "tensor norm_out.linear.bias is of another 16-bit dtype than the linears, BF16",
    ),
    "integers-for-a-norm": (
        lambda t: t.update({"norm_out.linear.bias": torch.ones(256, dtype=torch.int32)}),
        "has another dtype than the model's",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_damaged_file_is_refused_whole(tmp_path: Path, kind: str) -> None:
    change, message = CHANGES[kind]
    refused(tmp_path, changed(change), None, message)


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(PRECISIONS))
def test_a_header_that_was_changed_is_refused_or_loaded(draw: Random, precision: str) -> None:
    """Never an error of Python's."""
    w, kind = made("flux", precision)
    with TemporaryDirectory() as folder:
        file = writer.write(w.tensors, Path(folder) / "x", w.metadata(kind))
        content = file.read_bytes()
        size = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:size])
        told, name = header["__metadata__"], draw.choice([name for name in header if name != "__metadata__"])
        entry, other = header.pop(name), draw.choice(["lost", f"{name}.0", f"{name}.qweight"])
        told[draw.choice(list(told))] = draw.choice(
            ["", "{}", "[]", "null", '{"rank": "a"}', '{"weight": {"dtype": {}}}']
        )
        shape = draw.choice([entry["shape"][::-1], [1, *entry["shape"]], [torch.Size(entry["shape"]).numel()], []])
        dtype = draw.choice(["BF16", "F16", "I8", "U8", "F8_E4M3", "F8_E5M2"])
        header |= draw.choice(
            [{}, {other: entry}, {name: entry}, {name: {**entry, "shape": shape}}, {name: {**entry, "dtype": dtype}}]
        )
        changed_header = json.dumps(header).encode()
        file.write_bytes(len(changed_header).to_bytes(8, "little") + changed_header + content[size:])
        with suppress(FileRefused):
            svdq.load(on_meta("flux"), file, progress=False)


METADATA = {
    "another-class": ({"model_class": "NunchakuFoo"}, "of a NunchakuFoo, a class that this version has no key map for"),
    "a-wrong-class": ({"model_class": "NunchakuQwenImageTransformer2DModel"}, "have the names of FLUX models"),
    "another-rank": ({"quantization_config": '{"rank": 64}'}, "says rank 64, and its tensors have 32"),
    "another-precision": (
        {"quantization_config": '{"weight": {"dtype": "fp4_e2m1_all"}}'},
        "says 'fp4_e2m1_all' weights, and its tensors are int4",
    ),
    "an-unknown-precision": ({"quantization_config": '{"weight": {"dtype": "int3"}}'}, "says 'int3' weights"),
    "a-precision-of-another-type": ({"quantization_config": '{"weight": {"dtype": [1]}}'}, r"says \[1\] weights"),
    "no-json": ({"quantization_config": "{"}, "its quantization_config is no JSON"),
    "a-list": ({"config": "[]"}, "its config is no JSON object"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_that_does_not_fit_is_refused(tmp_path: Path, kind: str) -> None:
    change, message = METADATA[kind]
    w, model_class = made("flux")
    refused(tmp_path, w, w.metadata(model_class) | change, message)


@pytest.mark.parametrize("cut", [1, 1000, 0.5])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: float) -> None:
    _, file = saved(tmp_path, "flux")
    content = file.read_bytes()
    file.write_bytes(content[: -cut if isinstance(cut, int) else int(len(content) * cut)])
    still_refused(file, "not a whole safetensors file")


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    _, file = saved(tmp_path, "qwen-image")
    still_refused(file, "the file is of a QwenImageTransformer2DModel, the model a FluxTransformer2DModel")


def test_a_bias_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    w, _ = made("sdxl")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_qkv.bias"
    w.tensors[name] = torch.ones_like(w.tensors[name])
    refused(tmp_path, w, None, f"tensor {name} is a bias, and .* has none", "sdxl")


@pytest.mark.parametrize("wanted", ["nvfp4", "w8a8", "int3", "auto"])
def test_a_precision_that_the_file_cannot_give(tmp_path: Path, wanted: str) -> None:
    _, file = saved(tmp_path, "flux")
    with pytest.raises(OptionError, match=f"precision='{wanted}': .* has int4 linears"):
        loaded("flux", file, precision=wanted)


LITE_CHANGES = {
    "a-target-that-is-not-quantized": (
        lambda c: c["svdq_w4a4"]["targets"].append("x_embedder"),
        "x_embedder quantized",
    ),
    "a-target-that-is-not-named": (lambda c: c["svdq_w4a4"]["targets"].pop(), "which its config.json does not say"),
    "another-rank": (lambda c: c["svdq_w4a4"].update(rank=16), "says rank 16"),
    "another-precision": (lambda c: c["svdq_w4a4"].update(precision="nvfp4"), "says 'nvfp4', and its tensors are int4"),
    "targets-of-another-type": (lambda c: c["svdq_w4a4"].update(targets="all"), "has no list of targets"),
}


@pytest.mark.parametrize("kind", LITE_CHANGES)
def test_a_lite_folder_whose_configuration_does_not_fit(tmp_path: Path, kind: str) -> None:
    lite_folder(tmp_path, "int4")
    change, message = LITE_CHANGES[kind]
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    still_refused(tmp_path, message)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    lite_folder(tmp_path / "a", "int4")
    index = {"weight_map": {"x": "diffusion_pytorch_model.safetensors", "y": name}}
    (tmp_path / "a" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    still_refused(tmp_path / "a", "which is no file of this folder")


def test_a_sharded_lite_folder(tmp_path: Path) -> None:
    w = lite_folder(tmp_path, "int4")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(w.tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        writer.write({n: w.tensors[n] for n in own}, tmp_path / file)
    index = {"weight_map": {n: file for file, own in shards.items() for n in own}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    check(w, loaded("flux", tmp_path))


# ** what cannot be exported **


def test_linears_that_do_not_share_their_input_are_not_one(tmp_path: Path) -> None:
    model = flux().to(torch.bfloat16)
    svdq.quantize(model, precision="int4", rotate=False, progress=False)
    with pytest.raises(Exception, match="are one linear in Nunchaku's files, and here each has its own smoothing"):
        svdq.export_nunchaku(model, tmp_path / "x.safetensors", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "w4a8"}, "is w4a8, which Nunchaku has not: quantize the model with precision='int4'"),
        ({"precision": "int4", "rotate": True}, "reads a rotated input, .* quantize the model with rotate=False"),
        ({"precision": "int4", "skip": ["*.to_out.0"]}, r"attn\.to_out\.0 is 16-bit, and Nunchaku has it in 4 bits"),
    ],
    ids=["w4a8", "rotated", "skipped"],
)
def test_what_nunchaku_has_no_place_for(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        svdq.export_nunchaku(quantized(**options), tmp_path / "x.safetensors", progress=False)


def test_other_models_go_into_a_lite_folder(tmp_path: Path) -> None:
    make = lambda: diffusers.SD3Transformer2DModel(  # noqa: E731
        num_layers=1,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=64,
    )
    model = make().to(torch.bfloat16).eval()
    svdq.quantize(model, precision="int4", rotate=False, progress=False)
    with pytest.raises(OptionError, match="this is a SD3Transformer2DModel: give a folder, for nunchaku_lite"):
        svdq.export_nunchaku(model, tmp_path / "x.safetensors", progress=False)
    svdq.export_nunchaku(model, tmp_path / "x", progress=False)
    again = packs(svdq.load(make(), tmp_path / "x", progress=False))
    assert len(again) > 5
    for name, packed in again.items():
        assert all(same_bits(a, b) for a, b in zip(packed.plain_weight, packs(model)[name].plain_weight, strict=True))


def test_the_converters_own_padding(tmp_path: Path) -> None:
    """It rounds K of nvfp4 to 64 where the engine wants 128."""
    w = Writer(sana().to(torch.bfloat16), "nvfp4")
    w.padding = 64
    writer.sana(w)
    check(w, loaded("sana", writer.write(w.tensors, tmp_path / "x")))


# ** the command line **


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect_and_convert(tmp_path: Path) -> None:
    w, file = saved(tmp_path, "flux")
    told = run("inspect", file, "--layers")
    for expected in ("Nunchaku, single file", "FluxTransformer2DModel", "12 modules, int4, rank 32", "3 modules, int4"):
        assert expected in told
    assert "attn.to_q, attn.to_k, attn.to_v" in told
    ours, again, folder = tmp_path / "ours.safetensors", tmp_path / "again.safetensors", tmp_path / "lite"
    run("convert", file, ours)
    check(w, loaded("flux", ours))
    w.model.save_config(tmp_path / "config")
    run("convert", ours, again, "--to", "nunchaku", "--model", tmp_path / "config")
    kept = {n: t for n, t in tensors_of(file).items() if n.endswith(("qweight", "lora_up", "smooth", ".bias"))}
    assert all(same_bits(tensors_of(again)[n], t) for n, t in kept.items())
    run("convert", again, folder, "--to", "nunchaku-lite")
    assert "nunchaku_lite" in run("inspect", folder)
    run("convert", folder, tmp_path / "w4a8.safetensors", "--precision", "w4a8")
    assert "w4a8" in run("inspect", tmp_path / "w4a8.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x", "--to", "gguf"], "option to='gguf': it can be svdq, nunchaku, nunchaku-lite"),
        (["x", "--to", "nunchaku"], "has a name that ends in .safetensors"),
        (["x.safetensors", "--to", "nunchaku-lite"], "is a folder, and this is the name of a file"),
        (["x.safetensors"], "does not say how its model is built: give --model"),
    ],
    ids=["unknown-format", "not-a-file", "not-a-folder", "no-configuration"],
)
def test_convert_says_what_is_wrong(tmp_path: Path, options: list[str], message: str) -> None:
    w, _ = made("flux")
    file = writer.write(w.tensors, tmp_path / "file")
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / options[0]), *options[1:]])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_what_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    _, file = saved(tmp_path, "flux")
    lite_folder(tmp_path / "lite", "int4")
    for source in (file, tmp_path / "lite"):
        result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out.safetensors")])
        assert result.exit_code == 1
        assert "this is quantized already, by Nunchaku: svdq convert" in " ".join(result.output.split())


def test_a_precision_for_a_file_of_ours(tmp_path: Path) -> None:
    _, file = saved(tmp_path, "flux")
    svdq.save(loaded("flux", file), tmp_path / "ours", progress=False)
    with pytest.raises(OptionError, match="precision='w4a8' goes with Nunchaku's files"):
        loaded("flux", tmp_path / "ours", precision="w4a8")


# ** sisters of what is above **


def test_codes_of_minus_eight_are_taken(tmp_path: Path) -> None:
    """No quantizer makes them, and the format has them."""
    w, _ = made("flux")
    w.tensors[f"{FC1}.qweight"].view(-1)[:8] = 0x88 - 256
    model = loaded("flux", writer.write(w.tensors, tmp_path / "x"))
    qweight, *_ = svdq.packed(model.transformer_blocks[0].ff.net[0].proj.weight).plain_weight
    assert int((nibbles.unpack(qweight) == 0).sum()) == 16


@pytest.mark.parametrize("alike", [True, False], ids=["a-scale-each", "a-scale-a-row"])
def test_halves_of_one_linear_keep_their_own_scales(tmp_path: Path, alike: bool) -> None:
    """In nvfp4 they may differ above the groups' scales; together they are exact still, and come apart again."""
    w, _ = made("flux", "nvfp4")
    block = "single_transformer_blocks.0"
    halves = [w.truths[f"{block}.{name}"] for name in ("out_proj", "mlp_fc2")]
    if not alike:
        halves = [copy.copy(t) for t in halves]
        for name, t in zip(("out_proj", "mlp_fc2"), halves, strict=True):
            assert isinstance(t, Truth)
            t.above = (torch.rand(128) + 0.5).to(torch.bfloat16)
            del w.tensors[f"{block}.{name}.wtscale"]
            w.add(f"{block}.{name}", writer.w4a4(t))
    file = writer.write(w.tensors, tmp_path / "a.safetensors")
    model = loaded("flux", file)
    expected = torch.cat([t.weight() for t in halves], 1)
    got = svdq.packed(model.get_submodule(f"{block}.proj_out").weight).dequantize(torch.float32)
    assert close(got, expected, FP32)
    svdq.export_nunchaku(model, tmp_path / "b.safetensors", progress=False)
    again = tensors_of(tmp_path / "b.safetensors")
    assert all(same_bits(again[n], t) for n, t in w.tensors.items() if block in n and n.endswith(("scale", "scales")))
    svdq.export_nunchaku(model, tmp_path / "lite", progress=False)
    got = packs(loaded("flux", tmp_path / "lite"))[f"{block}.proj_out.weight"].dequantize(torch.float32)
    assert close(got, expected, 0.2)  # one scale above all of them: coded anew


def test_a_lite_folder_without_branches(tmp_path: Path) -> None:
    w = lite_folder(tmp_path, "int4", rank=0)
    for name in [n for n in w.tensors if n.endswith("qweight") and "norm1" not in n]:
        module, (n, half) = name.removesuffix(".qweight"), w.tensors[name].shape
        w.tensors |= {
            f"{module}.proj_down": torch.zeros(2 * half, 0).bfloat16(),
            f"{module}.proj_up": torch.zeros(n, 0).bfloat16(),
        }
    writer.write(w.tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    check(w, loaded("flux", tmp_path))


@pytest.mark.parametrize("target", ["norm_out.norm", "transformer_blocks.0", "no.such"])
def test_a_lite_target_that_is_no_linear(tmp_path: Path, target: str) -> None:
    w = lite_folder(tmp_path, "int4")
    name = "transformer_blocks.0.attn.to_q"
    moved = {n.replace(name, target, 1): t for n, t in w.tensors.items() if n.startswith(f"{name}.")}
    writer.write(w.tensors | moved, tmp_path / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["svdq_w4a4"]["targets"].append(target)
    (tmp_path / "config.json").write_text(json.dumps(config))
    still_refused(tmp_path, f"the model has no linear {target}, which {target} is for")


def test_the_documents_formulas() -> None:
    """docs/files.md gives each element's place; they are those of the packed tensors."""
    text = (Path(__file__).parents[1] / "docs" / "files.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.+?) \| `\[.*?\| (?:.*?word |)`([^`]+)`", text, re.MULTILINE))
    n, k, r = torch.arange(256), torch.arange(128), torch.arange(32)
    sizes = {"N": 256, "K": 128, "R": 32}

    def places(row: str, **index: Tensor) -> Tensor:
        return eval(re.sub(r"(?<!/)/(?!/)", "//", rows[row]), sizes | index)

    def number(pack, *shape: int) -> Tensor:
        """Where the packed tensor has each element."""
        packed = pack(torch.arange(shape[0] * shape[1]).reshape(shape)).reshape(-1)
        return packed.argsort().reshape(shape)

    assert torch.equal(places("`wscales`, int4", n=n[:, None], k=64 * r[None, :2]), number(layout.pack_scales, 256, 2))
    assert torch.equal(places("`proj_down`", r=r[:, None], k=k[None]), number(layout.pack_down, 32, 128))
    assert torch.equal(places("`proj_up`", n=n[:, None], r=r[None]), number(layout.pack_up, 256, 32))
    fp8 = layout._FP8_SCALES
    expected = fp8.pack(torch.arange(256 * 8).reshape(256, 8)).argsort().reshape(256, 8)
    assert torch.equal(places("`wscales`, nvfp4", n=n[:, None], k=16 * r[None, :8]), expected)
    word = places("`qweight`", n=n[:, None], k=k[None])
    assert torch.equal(
        word * 8 + k % 8, layout._CODES.pack(torch.arange(256 * 128).reshape(256, 128)).argsort().reshape(256, 128)
    )
    word = places("AWQ `qweight`", n=n[:, None], k=k[None])
    assert torch.equal(
        word * 4 + k % 32 // 8,
        layout._AWQ_CODES.pack(torch.arange(256 * 128).reshape(256, 128)).argsort().reshape(256, 128),
    )


@pytest.mark.parametrize("target", ["x.safetensors", "x"])
def test_a_shifted_linear_without_a_bias(tmp_path: Path, target: str) -> None:
    """The single file has the shift's correction in a bias; nunchaku_lite has no shift, so no bias either."""
    model = quantized(make=without_a_bias)
    svdq.export_nunchaku(model, tmp_path / target, progress=False)
    again = svdq.load(without_a_bias(), tmp_path / target, progress=False)
    name = "transformer_blocks.0.ff.net.2"
    linear, other = model.get_submodule(name), again.get_submodule(name)
    assert other.bias is None
    x = torch.nn.functional.gelu(torch.randn(8, 512)).to(torch.bfloat16)
    exact = x.float() @ svdq.packed(linear.weight).dequantize(torch.float32).t()
    for got in (linear(x), other(x)):
        assert close(got, exact, 0.2)  # activations of 15 or 16 steps
    if target == "x.safetensors":
        assert close(other(x), linear(x), 2 * BF16)  # the correction is rounded to 16 bits
