"""LoRA files in the formats people have, loaded into a quantized model by a pipeline of diffusers.

An adapter is drawn for a small model and written under the names of a format, the inverse of what the converter in
diffusers does. What comes out is compared with 16-bit weights that the adapter was added to by hand.
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)
from lora_testing import SAME, Session, products_of_adapters, run_as_rewritten
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchRuntimeError
from transformers import CLIPTextConfig, CLIPTextModel

import svdq_compile as svdq
from conftest import quiet, relative_error
from svdq_compile.errors import WeightsReleased
from svdq_compile.parameter import QuantizedWeight
from zoo import make

RANK = 4
PIPELINES: dict[str, type[DiffusionPipeline]] = {
    "flux": FluxPipeline,
    "sd3": StableDiffusion3Pipeline,
    "sdxl": StableDiffusionXLPipeline,
    "wan": WanPipeline,
    "qwen_image": QwenImagePipeline,
}
# One block of each kind: half the time.
SMALL = {
    "flux": {"num_layers": 1, "num_single_layers": 1},
    "sd3": {"num_layers": 2, "dual_attention_layers": (0,)},
    "sdxl": {
        "block_out_channels": (128,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
    },
    "wan": {"num_layers": 1},
    "qwen_image": {"num_layers": 1},
    "pixart": {"num_layers": 1},
}

TWO_DEVICES = r"found (at least two devices, cpu and|two different devices cpu,) meta"  # of newer torch, of 2.11


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to a weight: alpha / rank * b @ a."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def delta(self) -> Tensor:
        return self.alpha / self.a.shape[0] * self.b @ self.a


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Adapter = dict[str, Factors]  # by the layer's name in diffusers
File = dict[str, Tensor]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    return run_as_rewritten(monkeypatch)


def draw(model: nn.Module, targets: str, seed: int = 0) -> Adapter:
    """Random factors; an alpha that is not the rank, and not the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and re.fullmatch(targets, name):
            n, k = layer.weight.shape
            a = torch.randn(RANK, k, generator=generator) * k**-0.5
            b = torch.randn(n, RANK, generator=generator) * 0.25 * RANK**-0.5
            adapter[name] = Factors(a, b, 10.0 if "attn" in name else 6.0)
    return adapter


def total(parts: list[tuple[Factors, float]]) -> Factors:
    """Several adapters of one layer, each with its strength, as one."""
    a = torch.cat([factors.a for factors, _ in parts])
    b = torch.cat([factors.b * (strength * factors.alpha / RANK) for factors, strength in parts], 1)
    return Factors(a, b, len(a))


def add(model: nn.Module, adapter: Adapter) -> None:
    """An adapter into the 16-bit weights."""
    for name, factors in adapter.items():
        model.get_submodule(name).weight.add_(factors.delta)


def merged(name: str, adapter: Adapter) -> Tensor:
    """The output of the 16-bit model with the adapter in its weights."""
    model, inputs = make(name, **SMALL[name])
    add(model, adapter)
    return model(**inputs)[0]


def pipeline(name: str, model: nn.Module, **components) -> DiffusionPipeline:
    """The pipeline class of diffusers, with nothing in it but the model and what is given."""
    known = inspect.signature(PIPELINES[name]).parameters
    empty = {key: None for key, parameter in known.items() if parameter.default is parameter.empty}
    return PIPELINES[name](**(empty | {"unet" if name == "sdxl" else "transformer": model} | components))


def peft(adapter: Adapter, component: str = "transformer") -> File:
    file = {}
    for name, factors in adapter.items():
        file[f"{component}.{name}.lora_A.weight"] = factors.a
        file[f"{component}.{name}.lora_B.weight"] = factors.b
    return file


def without_alpha(adapter: Adapter) -> Adapter:
    return {name: total([(factors, 1.0)]) for name, factors in adapter.items()}


def peft_config(adapter: Adapter) -> dict[str, Any]:
    alphas = {name: factors.alpha for name, factors in adapter.items()}
    return {"r": RANK, "lora_alpha": 6.0, "target_modules": list(adapter), "alpha_pattern": alphas}


def metadata(adapter: Adapter, component: str = "transformer") -> dict[str, str]:
    """What diffusers writes into a file beside the tensors, and all it knows of alpha."""
    config = {f"{component}.{key}": value for key, value in peft_config(adapter).items()}
    return {"lora_adapter_metadata": json.dumps(config)}


def with_alphas(adapter: Adapter, down: str = "lora_down", up: str = "lora_up") -> File:
    """layer.lora_down.weight, layer.lora_up.weight, layer.alpha"""
    file = {}
    for name, factors in adapter.items():
        file |= {
            f"{name}.{down}.weight": factors.a.contiguous(),
            f"{name}.{up}.weight": factors.b.contiguous(),
            f"{name}.alpha": torch.tensor(factors.alpha),
        }
    return file


def renamed(adapter: Adapter, *rules: tuple[str, str | Callable]) -> Adapter:
    """With the layers' names as (pattern, replacement) has them, one after the other."""
    result = {}
    for name, factors in adapter.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = factors
    return result


def fused(parts: list[Factors]) -> Factors:
    """Several layers on one input as one: blocks on the diagonal of b, and a rank that the alpha is divided by."""
    a, b = torch.cat([part.a for part in parts]), torch.block_diag(*(part.b for part in parts))
    return Factors(a, b, len(parts) * parts[0].alpha)


def flux_original(adapter: Adapter) -> Adapter:
    adapter = renamed(
        adapter,
        (r"^single_transformer_blocks\.(\d+)\.proj_out$", r"single_blocks.\1.linear2"),
        (r"^single_transformer_blocks\.(\d+)\.norm\.linear$", r"single_blocks.\1.modulation.lin"),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj$", r"double_blocks.\1.img_mlp.0"),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.2$", r"double_blocks.\1.img_mlp.2"),
        (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj$", r"double_blocks.\1.txt_mlp.0"),
        (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2$", r"double_blocks.\1.txt_mlp.2"),
        (r"^transformer_blocks\.(\d+)\.norm1\.linear$", r"double_blocks.\1.img_mod.lin"),
        (r"^transformer_blocks\.(\d+)\.norm1_context\.linear$", r"double_blocks.\1.txt_mod.lin"),
        (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"double_blocks.\1.img_attn.proj"),
        (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"double_blocks.\1.txt_attn.proj"),
        (r"^transformer_blocks\.(\d+)\.attn\.to_([qkv])$", r"double_blocks.\1.img_attn.qkv.\2"),
        (r"^transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj$", r"double_blocks.\1.txt_attn.qkv.\2"),
    )
    parts: dict[str, list[Factors]] = {}
    for name, factors in adapter.items():
        parts.setdefault(re.sub(r"\.qkv\.[qkv]$", ".qkv", name), []).append(factors)
    return {name: fused(of) if len(of) > 1 else of[0] for name, of in parts.items()}


def wan_original(adapter: Adapter) -> Adapter:
    return renamed(
        adapter,
        (r"attn1", "self_attn"),
        (r"attn2", "cross_attn"),
        (r"to_([qkv])$", r"\1"),
        (r"to_out\.0$", "o"),
        (r"ffn\.net\.0\.proj$", "ffn.0"),
        (r"ffn\.net\.2$", "ffn.2"),
    )


def sdxl_original(adapter: Adapter) -> Adapter:
    """Blocks counted from end to end, after conv_in: two to a block of one layer, for its resampler or skip."""
    return renamed(
        adapter,
        (r"^down_blocks\.(\d+)\.(\w+)\.(\d+)", lambda m: f"input_blocks.{1 + 2 * int(m[1]) + int(m[3])}.{m[2]}"),
        (r"^up_blocks\.(\d+)\.(\w+)\.(\d+)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[3])}.{m[2]}"),
        (r"^((?:in|out)put_blocks\.\d+)\.resnets", r"\1.0"),
        (r"^((?:in|out)put_blocks\.\d+)\.attentions", r"\1.1"),
        (r"time_emb_proj$", "emb_layers.1"),
    )


def kohya(adapter: Adapter, prefix: str = "lora_unet_") -> File:
    return with_alphas({prefix + name.replace(".", "_"): factors for name, factors in adapter.items()})


def comfyui(adapter: Adapter, *suffixes: str) -> File:
    return with_alphas({f"diffusion_model.{name}": factors for name, factors in adapter.items()}, *suffixes)


# Not in kohya's files for flux: `linear1` of a single block, which the converter splits where a width of 3072 has it,
# and the embedders, which come out of it without their prefix and are dropped.
FLUX = r"transformer_blocks.*|single_.*(norm\.linear|proj_out)"
# Whole or by blocks, the layers that adapters are for, and how files with them are written in formats besides that of
# diffusers. Among the layers are some that stay 16-bit.
CASES: list[tuple[str, bool, str, dict[str, Callable[[Adapter], File]]]] = [
    ("flux", False, FLUX, {"kohya": lambda adapter: kohya(flux_original(adapter))}),
    ("flux", True, FLUX, {"comfyui": lambda adapter: comfyui(flux_original(adapter))}),
    ("sd3", False, r"transformer_blocks\.0.*|proj_out", {}),
    (
        "sdxl",
        False,
        r".*(attn1\.to_[qk]|attn2|ff|proj_in|emb_proj).*",
        {"kohya": lambda adapter: kohya(sdxl_original(adapter)), "kohya and diffusers": kohya},
    ),
    (
        "wan",
        False,
        r"blocks.*",
        {
            "kohya": lambda adapter: kohya(wan_original(adapter)),
            "comfyui": lambda adapter: comfyui(wan_original(adapter)),
        },
    ),
    (
        "qwen_image",
        False,
        r"transformer_blocks.*|img_in",
        {"kohya": kohya, "comfyui": lambda adapter: comfyui(adapter, "lora_A", "lora_B")},
    ),
]


class Loaded:
    """A quantized model in a pipeline of its own, an adapter for it, and what to expect of them."""

    def __init__(self, name: str, targets: str, regional: bool = False, **options) -> None:
        self.name = name
        self.session = Session(name, regional=regional, config=SMALL[name], **options)
        self.pipe = pipeline(name, self.session.model)
        self.adapter = draw(self.session.model, targets)
        self.error = relative_error(self.session.before, merged(name, {}))

    def load(self, folder: Path, file: File, about: dict[str, str] | None = None, name: str = "style") -> None:
        save_file(file, folder / "style.safetensors", about)
        self.pipe.load_lora_weights(folder, weight_name="style.safetensors", adapter_name=name)

    def check(self, output: Tensor, adapter: Adapter) -> None:
        """As far from 16-bit as without adapters, and nothing was quantized again."""
        exact = merged(self.name, adapter)
        assert relative_error(output, exact) < 1.5 * self.error
        assert relative_error(self.session.before, exact) > 2 * self.error, "the adapter does something"
        self.session.check_nothing_was_quantized_again()


@pytest.mark.parametrize(
    ("name", "regional", "layers", "formats"),
    [pytest.param(*case, id="-".join([case[0], "regional" if case[1] else "whole", *case[3]])) for case in CASES],
)
def test_formats(name: str, regional: bool, layers: str, formats: dict, graphs: list, tmp_path: Path, subtests) -> None:
    loaded = Loaded(name, layers, regional, observe=regional)
    session, pipe, adapter = loaded.session, loaded.pipe, loaded.adapter
    graphs.clear()
    if name == "sdxl":  # of all converters only this one hands alpha on, so here it is the same graph
        loaded.load(tmp_path, peft(adapter, "unet"), metadata(adapter, "unet"))
    else:
        loaded.load(tmp_path, peft(without_alpha(adapter)))
    expected = session.run()
    loaded.check(expected, adapter)
    weights = [session.model.get_submodule(layer).weight for layer in adapter]
    in_16_bit = 0 if regional else sum(not isinstance(weight, QuantizedWeight) for weight in weights)
    assert sum(products_of_adapters(gm) for gm in graphs) == 2 * in_16_bit, "the rest is folded"
    pipe.unload_lora_weights()
    assert torch.equal(session.run(), session.before)
    for title, write in formats.items():
        with subtests.test(title):
            loaded.load(tmp_path, write(adapter))
            assert relative_error(session.run(), expected) < SAME
            session.check_nothing_was_quantized_again()
            pipe.unload_lora_weights()
            assert torch.equal(session.run(), session.before)


@pytest.mark.parametrize("title", ["linear1", "lora_transformer_"])
def test_what_comes_out_of_the_converter_for_flux(title: str) -> None:
    """Single blocks: q, k, v and the MLP in one, which takes the published width, and an older spelling of kohya's."""
    sizes = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    adapter = {
        f"single_transformer_blocks.0.{name}": Factors(torch.randn(RANK, 3072), torch.randn(n, RANK), 10.0)
        for name, n in sizes.items()
    }
    if title == "linear1":
        file = kohya({"single_blocks.0.linear1": fused(list(adapter.values()))})
    else:
        del adapter["single_transformer_blocks.0.proj_mlp"]  # not known to the converter by this name
        file = kohya(adapter, "lora_transformer_")
    converted = FluxPipeline.lora_state_dict(file)
    x = torch.randn(3072)
    for name, factors in adapter.items():
        a, b = (converted[f"transformer.{name}.lora_{letter}.weight"] for letter in "AB")
        assert relative_error(b @ (a @ x), factors.delta @ x) < 1e-5


def test_the_calls_of_a_pipeline(graphs: list, tmp_path: Path, subtests) -> None:
    loaded = Loaded("wan", "blocks.*", regional=True, observe=False)
    session, pipe, first = loaded.session, loaded.pipe, loaded.adapter
    second = draw(session.model, r".*(attn1|ffn).*", seed=1)
    loaded.load(tmp_path, peft(first), metadata(first), "first")
    loaded.load(tmp_path, peft(second), metadata(second), "second")
    with subtests.test("set_adapters"):
        pipe.set_adapters(["first", "second"], [0.7, -0.4])
        mixed = session.run()
        both = {layer: [(first[layer], 0.7)] + ([(second[layer], -0.4)] if layer in second else []) for layer in first}
        loaded.check(mixed, {layer: total(parts) for layer, parts in both.items()})
    with subtests.test("disable_lora"):
        pipe.disable_lora()
        assert torch.equal(session.run(), session.before)
        pipe.enable_lora()
        assert torch.equal(session.run(), mixed)
    with subtests.test("fuse_lora"):
        with pytest.raises(WeightsReleased, match=r"attn1\.\w+, .*A LoRA need not be fused.*set_adapters"):
            pipe.fuse_lora(lora_scale=0.5)
        pipe.unfuse_lora()
        pipe.set_adapters(["first", "second"], [0.7, -0.4])  # the scale of a layer had become 0.5 before the refusal
        assert torch.equal(session.run(), mixed)
        assert pipe.num_fused_loras == 0
    with subtests.test("delete_adapters"):
        pipe.delete_adapters("second")
        pipe.set_adapters("first")
        loaded.check(session.run(), first)
        pipe.delete_adapters("first")
        assert torch.equal(session.run(), session.before)
    with subtests.test("unload_lora_weights"):
        pipe.unload_lora_weights()
        assert torch.equal(session.run(), session.before)
    session.check_nothing_was_quantized_again()


def test_files_that_do_not_fit(graphs: list, subtests) -> None:
    loaded = Loaded("wan", r".*attn1.*", regional=True, observe=False)
    session, pipe, good = loaded.session, loaded.pipe, peft(loaded.adapter)
    layer = "transformer.blocks.0.attn1.to_k"

    def with_factors(a: Tensor, b: Tensor) -> File:
        return good | {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}

    a, b = good[f"{layer}.lora_A.weight"], good[f"{layer}.lora_B.weight"]
    mismatch = r"size mismatch for blocks\.0\.attn1\.to_k\.lora_"
    for title, file, message in [
        ("a narrow A", with_factors(a[:, :64], b), mismatch),
        ("a narrow B", with_factors(a, b[:64]), mismatch),
        ("two ranks", with_factors(a[:3], b), mismatch),
        ("three dimensions", with_factors(a[..., None], b), mismatch),
        ("no rank", with_factors(a[:0], b[:, :0]), "`r` should be a positive integer"),
        ("no adapter", {"blocks.0.attn1.to_k.weight": b @ a}, "Invalid LoRA checkpoint"),
    ]:
        with subtests.test(title):
            with pytest.raises((RuntimeError, ValueError), match=message):
                pipe.load_lora_weights(file, adapter_name="bad")
            pipe.unload_lora_weights()  # what a refused file leaves behind in PEFT's layers, in 16-bit too
            assert torch.equal(session.run(), session.before)
    with subtests.test("half of a layer is missing"):
        del good[f"{layer}.lora_B.weight"]
        pipe.load_lora_weights(good, adapter_name="incomplete")  # diffusers warns, and leaves B on the meta device
        with pytest.raises(TorchRuntimeError, match=TWO_DEVICES):
            session.run()
        pipe.unload_lora_weights()
        assert torch.equal(session.run(), session.before)
    session.check_nothing_was_quantized_again()


def test_adapters_on_another_device(graphs: list) -> None:
    """An inactive one may lie anywhere, as set_lora_device is there for; an active one is refused."""
    loaded = Loaded("wan", r".*attn1.*", regional=True, observe=False)
    session, pipe = loaded.session, loaded.pipe
    for name in ("here", "there"):
        pipe.load_lora_weights(peft(loaded.adapter), adapter_name=name)
    pipe.set_adapters("here")
    expected = session.run()
    pipe.set_lora_device(["there"], "meta")
    assert torch.equal(session.run(), expected)
    pipe.set_adapters("there")
    with pytest.raises(TorchRuntimeError, match=TWO_DEVICES):
        session.run()
    pipe.set_adapters("here")
    assert torch.equal(session.run(), expected)


@pytest.mark.parametrize("weights", ["release", "offload", "keep"])
def test_loading_and_fusing_on_flux(weights: str) -> None:
    """Its loader takes .data of every linear, to see whether the adapter is for a wider one."""
    model, inputs = make("flux", **SMALL["flux"])
    svdq.quantize(model, svdq.Config(**quiet(rank=0, refine=0, weights=weights)))
    before = {name: p._svdq for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
    model.requires_grad_(True)
    pipe = pipeline("flux", model)
    adapter = draw(model, ".*")
    with torch.enable_grad():
        pipe.load_lora_weights(peft(without_alpha(adapter)), adapter_name="style")
        after = {n: p._svdq for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
        assert {name.replace(".base_layer", ""): pack for name, pack in after.items()} == before
        if weights == "release":
            with pytest.raises(WeightsReleased, match="transformer_blocks"):
                pipe.fuse_lora()
            return
        pipe.fuse_lora()
    assert relative_error(model(**inputs)[0], merged("flux", adapter)) < 1e-5


def test_a_wider_input_as_control_adapters_have_it(graphs: list) -> None:
    """The loader of flux puts a wider linear in the place of x_embedder, which stayed 16-bit, not of others."""
    loaded = Loaded("flux", "x_embedder", regional=True, observe=False)
    session, pipe = loaded.session, loaded.pipe
    a, b = torch.randn(RANK, 128) * 0.1, loaded.adapter["x_embedder"].b
    pipe.load_lora_weights(peft({"x_embedder": Factors(a, b, RANK)}), adapter_name="control")
    x = session.inputs["hidden_states"]
    session.inputs["hidden_states"] = torch.cat([x, x], -1)
    exact, inputs = make("flux", **SMALL["flux"])
    exact.x_embedder.weight.add_(b @ (a[:, :64] + a[:, 64:]))
    assert relative_error(session.run(), exact(**inputs)[0]) < 1.5 * loaded.error
    session.check_nothing_was_quantized_again()
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    session.inputs["hidden_states"] = x
    assert torch.equal(session.run(), session.before)
    layer = "transformer_blocks.0.attn.to_q"
    with pytest.raises(WeightsReleased, match=r"attn\.to_q"):
        pipe.load_lora_weights(peft({layer: Factors(torch.zeros(RANK, 192), b, RANK)}), adapter_name="wide")
    assert torch.equal(session.run(), session.before)


def test_pixart_through_peft(graphs: list, tmp_path: Path) -> None:
    """Neither the model nor its pipelines load adapters; PEFT does, into the model that the pipeline has."""
    session = Session("pixart", config=SMALL["pixart"], observe=False)
    adapter = draw(session.model, r"transformer_blocks.*|proj_out")
    save_file(peft(adapter, "base_model.model"), tmp_path / "adapter_model.safetensors")
    LoraConfig(**peft_config(adapter)).save_pretrained(tmp_path)
    graphs.clear()
    wrapped = PeftModel.from_pretrained(session.model, tmp_path, adapter_name="style")
    output = session.run()
    error = relative_error(session.before, merged("pixart", {}))
    assert relative_error(output, merged("pixart", adapter)) < 1.5 * error
    assert products_of_adapters(graphs[-1]) == 2, "that of proj_out"
    wrapped.unload()
    assert torch.equal(session.run(), session.before)
    session.check_nothing_was_quantized_again()


def text_encoder() -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPTextModel(CLIPTextConfig(vocab_size=100, max_position_embeddings=16, **sizes))
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("compiled", [False, True])
def test_text_encoders(compiled: bool, graphs: list, tmp_path: Path, subtests) -> None:
    encoder, tokens = text_encoder(), torch.arange(16)[None]
    plain = encoder(tokens)[0]
    if compiled:
        encoder.compile(backend="svdquant", fullgraph=True, options=quiet(rank=16, refine=0, precision="w4a8"))
        encoder(tokens)
    before = encoder(tokens)[0]
    pipe = pipeline("flux", make("flux", **SMALL["flux"])[0], text_encoder=encoder)
    adapter = draw(encoder, r".*(_proj|fc1|fc2)")
    exact = text_encoder()
    add(exact, adapter)
    expected = exact(tokens)[0]
    bound = 1.5 * relative_error(before, plain) if compiled else 1e-5
    old_names = {f"text_model.{name}": factors for name, factors in adapter.items()}
    for title, file, about in [
        ("diffusers", peft(adapter, "text_encoder"), metadata(adapter, "text_encoder")),
        ("kohya", kohya(old_names, "lora_te1_"), None),
    ]:
        with subtests.test(title):
            save_file(file, tmp_path / "style.safetensors", about)
            pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
            graphs.clear()
            assert relative_error(encoder(tokens)[0], expected) < bound
            assert not any(products_of_adapters(gm) for gm in graphs)
            if compiled:
                with pytest.raises(WeightsReleased, match=r"encoder\.layers\.0\.\w+\.\w+, .*set_adapters"):
                    pipe.fuse_lora(components=["text_encoder"])
            pipe.unload_lora_weights()
            assert torch.equal(encoder(tokens)[0], before)
