"""Pipelines as people use them: what diffusers lets one do to a pipeline, before and after its model is quantized.

Each result is compared with 16-bit weights used in the same way. How far those are moved by what is done (an adapter, a
control picture, a cache) is asserted too, and is more than 4 bits cost, so that leaving it out would be noticed.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import svdq_compile as svdq
from conftest import WIDTH, inputs, net, quiet, relative_error
from svdq_compile.errors import FileRefused, NothingToQuantize, WeightsReleased
from svdq_compile.foreign import OFFLOADED
from svdq_compile.parameter import QuantizedWeight
from zoo import make

pytestmark = pytest.mark.usefixtures("without_inductor")

CPU = torch.device("cpu")
OPTIONS = quiet(rank=16, refine=0)
CLOSE = 0.1  # of a few steps of these models in 4 bits: 0.03 to 0.08; without an adapter or a control picture 0.15 up

SAME = 3e-3  # the same arithmetic on tensors that lie otherwise: where rounding differs a few int8 codes flip


def ahead(model: nn.Module) -> None:
    """Quantized by its weights alone; runs eagerly, so nothing is compiled."""
    svdq.quantize(model, **OPTIONS)


def by_blocks(model: nn.Module) -> None:
    svdq.compile(model, **OPTIONS)


def count(model: nn.Module) -> int:
    return sum(isinstance(p, QuantizedWeight) for p in model.parameters())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Two pipelines: FLUX, which is given embeddings, and Stable Diffusion, with all its parts.

FLUX_LAYERS = 20


def flux(dtype: torch.dtype = torch.float32) -> FluxPipeline:
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    transformer = make("flux", dtype, num_layers=1, num_single_layers=1)[0]
    return quietly(FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing))


def draw(pipe: FluxPipeline, steps: int = 3, **more: Any) -> Tensor:
    """Latents of FLUX."""
    dtype = pipe.transformer.dtype if pipe.transformer.dtype.itemsize > 1 else torch.bfloat16
    embeddings = {"prompt_embeds": random(1, 24, WIDTH), "pooled_prompt_embeds": random(1, WIDTH, seed=1)}
    return pipe(
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        height=64,
        width=64,
        output_type="latent",
        **{name: value.to(dtype) for name, value in embeddings.items()},
        **more,
    ).images


def quietly(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


SD_LAYERS = 60


def sd() -> StableDiffusionPipeline:
    tokens = tokenizer()
    scheduler = DDIMScheduler(clip_sample=False)
    unet = make("sd15", sample_size=8)[0]
    nothing = dict.fromkeys(("safety_checker", "feature_extractor"))
    parts = {"vae": vae(), "text_encoder": text_encoder(len(tokens)), "tokenizer": tokens, "unet": unet}
    return quietly(StableDiffusionPipeline(scheduler=scheduler, **parts, **nothing, requires_safety_checker=False))


def tokenizer() -> CLIPTokenizer:
    """Of single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=20)


def text_encoder(tokens: int) -> CLIPTextModel:
    torch.manual_seed(5)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPTextConfig(vocab_size=tokens, max_position_embeddings=20, bos_token_id=52, eos_token_id=53, **sizes)
    model = CLIPTextModel(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(std=module.weight.shape[1] ** -0.5 if isinstance(module, nn.Linear) else 1)
    return model


def vae() -> AutoencoderKL:
    torch.manual_seed(6)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=8, **kinds).eval().requires_grad_(False)


def paint(pipe: Any, prompt: Any = "a dog", steps: int = 2, **more: Any) -> Tensor:
    """Latents of Stable Diffusion."""
    if "strength" not in more:
        more |= {"height": 64, "width": 64}
    more.setdefault("guidance_scale", 2.0)  # more would blow up what two prompts' errors differ in
    noise = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=steps, generator=noise, output_type="latent", **more).images


@cache
def flux_in_16_bit() -> Tensor:
    return draw(flux())


@cache
def sd_in_16_bit() -> Tensor:
    return paint(sd())


def is_close(result: Tensor, reference: Tensor) -> bool:
    """In 4 bits, and near."""
    print("error", relative_error(result, reference))  # pytest shows it where a test fails
    return 1e-3 < relative_error(result, reference) < CLOSE


# Step caches.

EVERYWHERE = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": (-1, 1001),
    "spatial_attention_block_identifiers": ("transformer_blocks",),
}
CACHES: dict[str, Callable[[Any], object]] = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=3.0),
    "mag": lambda pipe: MagCacheConfig(
        threshold=0.5, max_skip_steps=2, num_inference_steps=6, retention_ratio=0.2, mag_ratios=torch.ones(6)
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=0),
    "taylor lite": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, max_order=0, use_lite_mode=True
    ),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        current_timestep_callback=lambda: pipe._current_timestep, **EVERYWHERE
    ),
    "faster": lambda pipe: FasterCacheConfig(
        current_timestep_callback=lambda: pipe._current_timestep,
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        **EVERYWHERE | {"spatial_attention_timestep_skip_range": (-1, 901)},
    ),
}


@cache
def cached_in_16_bit(kind: str) -> tuple[Tensor, Tensor]:
    """Six steps without the cache and with it."""
    pipe = flux()
    plain = draw(pipe, 6)
    pipe.transformer.enable_cache(CACHES[kind](pipe))
    return plain, draw(pipe, 6)


def acts_as_in_16_bit(pipe: FluxPipeline, kind: str) -> None:
    """With a cache enabled, and after it is disabled; what it skips is skipped as in 16-bit."""
    plain, cached = cached_in_16_bit(kind)
    with_cache = draw(pipe, 6)
    assert is_close(with_cache, cached)
    pipe.transformer.disable_cache()
    without = draw(pipe, 6)
    assert is_close(without, plain)
    assert relative_error(with_cache - without, cached - plain) < 0.5


@pytest.mark.parametrize("kind", CACHES)
def test_a_step_cache_of_a_quantized_model(kind: str) -> None:
    pipe = flux()
    ahead(pipe.transformer)
    pipe.transformer.enable_cache(CACHES[kind](pipe))
    acts_as_in_16_bit(pipe, kind)


@pytest.mark.parametrize(("kind", "when"), [("first block", "before"), ("pyramid", "after")])
def test_a_step_cache_of_a_compiled_model(kind: str, when: str) -> None:
    """Its hooks break the graphs of the blocks."""
    pipe = flux()
    if when == "before":
        pipe.transformer.enable_cache(CACHES[kind](pipe))
    by_blocks(pipe.transformer)
    draw(pipe)
    if when == "after":
        pipe.transformer.enable_cache(CACHES[kind](pipe))
    acts_as_in_16_bit(pipe, kind)
    assert count(pipe.transformer) == FLUX_LAYERS


def test_a_cache_that_keeps_the_compiler_out() -> None:
    """MagCache's hook is not compiled, and what it calls neither: nothing is seen, until it is disabled."""
    pipe = flux()
    pipe.transformer.enable_cache(CACHES["mag"](pipe))
    by_blocks(pipe.transformer)
    assert relative_error(draw(pipe, 6), cached_in_16_bit("mag")[1]) < 1e-5
    assert {row.reason for row in svdq.report(pipe.transformer) if "blocks" in row.name} == {"not reached yet"}
    pipe.transformer.disable_cache()
    draw(pipe)
    pipe.transformer.enable_cache(CACHES["mag"](pipe))
    acts_as_in_16_bit(pipe, "mag")
    assert count(pipe.transformer) == FLUX_LAYERS


# IP-Adapters.


def ip_adapter(keys: list[int], biases: bool, seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """Of random weights: one image becomes 4 tokens, and each attention reads them."""
    projection = random(4 * WIDTH, WIDTH, seed=seed) * WIDTH**-0.5
    adapter: dict[str, Tensor] = {}
    for key in keys:
        for i, name in enumerate(("to_k_ip", "to_v_ip")):
            adapter[f"{key}.{name}.weight"] = random(WIDTH, WIDTH, seed=10 * key + i) * WIDTH**-0.5
            adapter |= {f"{key}.{name}.bias": torch.zeros(WIDTH)} if biases else {}
    norm = {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    return {
        "image_proj": {"proj.weight": projection, "proj.bias": torch.zeros(4 * WIDTH)} | norm,
        "ip_adapter": adapter,
    }


def load_sd_adapter(pipe: Any) -> None:
    layers = sum("attn2" in name for name in pipe.unet.attn_processors)
    pipe.unet._load_ip_adapter_weights([ip_adapter([1 + 2 * i for i in range(layers)], biases=False)])
    pipe.set_ip_adapter_scale(2.0)


def load_flux_adapter(pipe: Any) -> None:
    pipe.transformer._load_ip_adapter_weights([ip_adapter([0], biases=True)])
    pipe.set_ip_adapter_scale(0.7)


SD_IMAGE = {"ip_adapter_image_embeds": [random(2, 1, WIDTH, seed=4)]}
FLUX_IMAGE = {
    "ip_adapter_image_embeds": [random(1, 1, WIDTH, seed=4)],
    "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, WIDTH)],
}
ADAPTERS: dict[str, tuple] = {
    "stable diffusion": (sd, "unet", load_sd_adapter, partial(paint, **SD_IMAGE), paint),
    "flux": (flux, "transformer", load_flux_adapter, partial(draw, **FLUX_IMAGE), draw),
}


@cache
def adapted_in_16_bit(model: str) -> tuple[Tensor, Tensor, Tensor]:
    """Without an IP-Adapter, with it, and with less of it."""
    make_pipe, _, load, with_image, without = ADAPTERS[model]
    pipe = make_pipe()
    plain = without(pipe)
    load(pipe)
    adapted = with_image(pipe)
    pipe.set_ip_adapter_scale(0.1)
    return plain, adapted, with_image(pipe)


@pytest.mark.parametrize(
    ("model", "when", "way"),
    [
        ("stable diffusion", "before", ahead),
        ("stable diffusion", "after", ahead),
        ("flux", "before", ahead),
        ("flux", "after", ahead),
        ("flux", "after", by_blocks),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_ip_adapter(model: str, when: str, way: Callable) -> None:
    make_pipe, part, load, with_image, without = ADAPTERS[model]
    plain, adapted, less = adapted_in_16_bit(model)
    assert relative_error(adapted, plain) > 1.5 * CLOSE
    pipe = make_pipe()
    if when == "before":
        load(pipe)
    way(getattr(pipe, part))
    if when == "after":
        assert without(pipe).shape == plain.shape
        load(pipe)
    assert is_close(with_image(pipe), adapted)
    assert is_close(with_image(pipe), adapted)
    pipe.set_ip_adapter_scale(0.1)
    assert is_close(with_image(pipe), less)
    pipe.unload_ip_adapter()
    assert is_close(without(pipe), plain)


def test_a_file_of_a_model_with_an_ip_adapter(tmp_path: Path) -> None:
    pipe, path = flux(), tmp_path / "adapted.safetensors"
    load_flux_adapter(pipe)
    ahead(pipe.transformer)
    svdq.save(pipe.transformer, path, progress=False)
    other = flux()
    with pytest.raises(FileRefused, match=r"no weight .*_ip.*do the same first, such as .* loading an IP-Adapter"):
        svdq.load(other.transformer, path, progress=False)
    assert torch.equal(draw(other), flux_in_16_bit())
    load_flux_adapter(other)
    svdq.load(other.transformer, path, progress=False)
    assert torch.equal(draw(other, **FLUX_IMAGE), draw(pipe, **FLUX_IMAGE))


# Fused projections.


def test_projections_fused_before() -> None:
    pipe = flux()
    pipe.transformer.fuse_qkv_projections()
    by_blocks(pipe.transformer)
    for _ in range(2):
        result = draw(pipe)
    assert is_close(result, flux_in_16_bit())
    names = {row.name for row in svdq.report(pipe.transformer) if not row.reason}
    assert "transformer_blocks.0.attn.to_qkv" in names
    assert "transformer_blocks.0.attn.to_q" not in names
    pipe.transformer.unfuse_qkv_projections()
    draw(pipe)
    assert is_close(draw(pipe), flux_in_16_bit())
    assert count(pipe.transformer) == FLUX_LAYERS


@pytest.mark.parametrize("model", ["flux", "stable diffusion"])
def test_projections_fused_after(model: str) -> None:
    """Their weights are gone; and there is nothing to gain."""
    pipe, part, run = (flux(), "transformer", draw) if model == "flux" else (sd(), "unet", paint)
    ahead(getattr(pipe, part))
    before = run(pipe)
    with pytest.raises(WeightsReleased, match=r"fusing q, k and v needs .*It need not be: .*Or fuse before"):
        getattr(pipe, part).fuse_qkv_projections()
    assert torch.equal(run(pipe), before)
    getattr(pipe, part).unfuse_qkv_projections()
    assert torch.equal(run(pipe), before)


def test_a_file_of_fused_projections(tmp_path: Path) -> None:
    fused, plain = flux(), flux()
    fused.transformer.fuse_qkv_projections()
    for pipe, name in ((fused, "fused"), (plain, "plain")):
        ahead(pipe.transformer)
        svdq.save(pipe.transformer, tmp_path / name, progress=False)
    loaded = flux()
    with pytest.raises(FileRefused, match=r"to_(added_)?qkv.* do the same first, such as fuse_qkv_projections"):
        svdq.load(loaded.transformer, tmp_path / "fused", progress=False)
    assert torch.equal(draw(loaded), flux_in_16_bit())
    loaded.transformer.fuse_qkv_projections()
    with pytest.raises(FileRefused, match=r"to_(added_)?qkv.* is missing"):
        svdq.load(loaded.transformer, tmp_path / "plain", progress=False)
    svdq.load(loaded.transformer, tmp_path / "fused", progress=False)
    assert torch.equal(draw(loaded), draw(fused))
    again = flux()
    svdq.load(again.transformer, tmp_path / "plain", progress=False)
    with pytest.raises(WeightsReleased, match="fusing q, k and v"):
        again.transformer.fuse_qkv_projections()
    assert torch.equal(draw(again), draw(plain))


# ControlNets.


@pytest.mark.parametrize("control", ["quantized", "16-bit"])
def test_a_controlnet(control: str) -> None:
    pipe = sd()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    controlnet = make("controlnet_sd15")[0]
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        block.weight.normal_(std=WIDTH**-0.5, generator=torch.Generator().manual_seed(7))
    controlled = quietly(
        StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False)
    )
    image = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))}
    strong, weak = (paint(controlled, **image, controlnet_conditioning_scale=scale) for scale in (1.0, 0.1))
    assert relative_error(strong, sd_in_16_bit()) > 1.5 * CLOSE
    ahead(pipe.unet)
    if control == "quantized":
        ahead(controlnet)
        assert count(controlnet) > 20
    assert is_close(paint(controlled, **image), strong)
    assert is_close(paint(controlled, **image, controlnet_conditioning_scale=0.1), weak)
    assert is_close(paint(pipe), sd_in_16_bit())


# Textual inversion.


@pytest.mark.parametrize("when", ["before", "after"])
def test_textual_inversion(when: str) -> None:
    """Adds rows to the table of the quantized text encoder, and takes them away."""
    embedding, reference = random(2, WIDTH, seed=8), sd()
    reference.load_textual_inversion(embedding, token="<cat>")
    expected = paint(reference, "a <cat>")
    pipe = sd()
    if when == "before":
        pipe.load_textual_inversion(embedding, token="<cat>")
    ahead(pipe.text_encoder)
    ahead(pipe.unet)
    assert (count(pipe.text_encoder), count(pipe.unet)) == (12, SD_LAYERS)
    if when == "after":
        pipe.load_textual_inversion(embedding, token="<cat>")
    assert is_close(paint(pipe, "a <cat>"), expected)
    pipe.unload_textual_inversion()
    assert is_close(paint(pipe), sd_in_16_bit())
    assert count(pipe.text_encoder) == 12


# Offloading, casting.


@pytest.mark.parametrize(("when", "way"), [("before", by_blocks), ("after", ahead)], ids=["before", "after"])
def test_model_offload(when: str, way: Callable) -> None:
    pipe = flux()
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
    way(pipe.transformer)
    if when == "after":
        pipe.enable_model_cpu_offload(device="cpu")
    draw(pipe)
    assert is_close(draw(pipe), flux_in_16_bit())
    pipe.remove_all_hooks()
    assert is_close(draw(pipe), flux_in_16_bit())
    assert count(pipe.transformer) == FLUX_LAYERS


LEVELS: dict[str, dict[str, Any]] = {"leaf_level": {}, "block_level": {"num_blocks_per_group": 1}}


def offload_groups(pipe: FluxPipeline, level: str, **more: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type=level, **LEVELS[level], **more
    )


@pytest.mark.parametrize("level", LEVELS)
def test_group_offload_to_disk_before(level: str, tmp_path: Path) -> None:
    """16-bit values come from a file at each call, and between calls there are none: it stays as it is."""
    pipe = flux()
    offload_groups(pipe, level, offload_to_disk_path=str(tmp_path))
    for way in (ahead, by_blocks):
        with pytest.raises(NothingToQuantize, match="group offloading puts its 16-bit values back at each call"):
            way(pipe.transformer)
    pipe.transformer.single_transformer_blocks[0].compile(backend="svdquant", options=OPTIONS)
    assert relative_error(draw(pipe), flux_in_16_bit()) < 1e-5
    assert count(pipe.transformer) == 0
    assert {row.reason for row in svdq.report(pipe.transformer)} == {OFFLOADED}


@pytest.mark.parametrize("level", LEVELS)
def test_group_offload_to_disk_after(level: str, tmp_path: Path) -> None:
    pipe = flux()
    ahead(pipe.transformer)
    before = draw(pipe)
    with pytest.raises(WeightsReleased, match=r"through a file needs .*Leave out offload_to_disk_path"):
        offload_groups(pipe, level, offload_to_disk_path=str(tmp_path))
    assert relative_error(draw(pipe), before) < SAME
    offload_groups(pipe, level)
    assert relative_error(draw(pipe), before) < SAME
    assert count(pipe.transformer) == FLUX_LAYERS


@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting_ahead_of_time(when: str) -> None:
    """By the weights alone, which are in fp8 between calls."""

    def cast(pipe: FluxPipeline) -> None:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    reference, pipe = flux(torch.bfloat16), flux(torch.bfloat16)
    cast(reference)
    if when == "before":
        cast(pipe)
    ahead(pipe.transformer)
    assert count(pipe.transformer) == FLUX_LAYERS
    if when == "after":
        cast(pipe)
    for _ in range(2):
        assert is_close(draw(pipe), draw(reference))


# Several pipelines of one model.


def from_image(pipe: Any, image: Tensor) -> Tensor:
    return paint(pipe, steps=4, image=image, strength=0.7)


@pytest.mark.parametrize("when", ["before", "after"])
def test_pipelines_that_share_a_model(when: str) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = from_image(quietly(AutoPipelineForImage2Image.from_pipe(sd())), image)
    pipe = sd()
    if when == "before":
        other = AutoPipelineForImage2Image.from_pipe(pipe)
    ahead(pipe.unet)
    if when == "after":
        other = AutoPipelineForImage2Image.from_pipe(pipe)
    back = AutoPipelineForText2Image.from_pipe(other)
    assert pipe.unet is other.unet is back.unet
    assert is_close(from_image(quietly(other), image), expected)
    for each in (pipe, quietly(back)):
        assert is_close(paint(each), sd_in_16_bit())
    assert count(pipe.unet) == SD_LAYERS


# What is given to a call.


def stop_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A callback after each step, as diffusers' documentation has it: half of the batch is left out."""
    if step == 0:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
    return tensors


CALLS: dict[str, dict[str, Any]] = {
    "guidance stops": {
        "callback_on_step_end": stop_guidance,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    },
    "no guidance": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a very very long one"},
    "two prompts": {"prompt": ["a dog", "b"]},
    "two pictures": {"num_images_per_prompt": 2},
}


def test_what_calls_are_given_and_schedulers() -> None:
    pipe, reference = sd(), sd()
    ahead(pipe.unet)
    for given in CALLS.values():
        assert is_close(paint(pipe, **given), paint(reference, **given))
    for scheduler in (EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        for each in (pipe, reference):
            each.scheduler = scheduler.from_config(each.scheduler.config)
        assert is_close(paint(pipe), paint(reference))


def test_guidance_on_and_off_of_a_compiled_model() -> None:
    pipe, reference = flux(), flux()
    negative = {"negative_prompt_embeds": random(1, 24, WIDTH, seed=5)}
    guided = {"true_cfg_scale": 2.0, "negative_pooled_prompt_embeds": random(1, WIDTH, seed=6)} | negative
    by_blocks(pipe.transformer)
    draw(pipe)
    for given in ({}, guided, {}):
        assert is_close(draw(pipe, **given), draw(reference, **given))


# Adapters beside these.


def lora() -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, name in enumerate(("to_q", "to_v", "add_k_proj")):
        layer = f"transformer.transformer_blocks.0.attn.{name}"
        state |= {
            f"{layer}.lora_A.weight": random(4, WIDTH, seed=i),
            f"{layer}.lora_B.weight": random(WIDTH, 4, seed=i + 9) / 4,
        }
    return state


@pytest.mark.parametrize("beside", ["ip-adapter", "step cache"])
def test_a_lora_beside(beside: str) -> None:
    results = []
    for way in (lambda model: None, ahead):
        pipe = flux()
        way(pipe.transformer)
        image = FLUX_IMAGE if beside == "ip-adapter" else {}
        if beside == "ip-adapter":
            load_flux_adapter(pipe)
        else:
            pipe.transformer.enable_cache(CACHES["taylor"](pipe))
        before = draw(pipe, **image)
        pipe.load_lora_weights(lora(), adapter_name="style")
        results.append((before, draw(pipe, **image)))
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe, **image), before)
    (plain, adapted), (_, result) = results
    assert relative_error(adapted, plain) > 1.5 * CLOSE
    assert is_close(result, adapted)


# Weights of another library.


class Int8Tensor(Tensor):
    """As torchao's: the matrix is in tensors of its own, and whatever is asked of it comes to its dispatch."""

    __module__ = "torchao.quantization"
    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Int8Tensor":
        outer = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)
        outer.values = values
        return outer

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, *sizes: Any) -> "Int8Tensor":
        return Int8Tensor(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        plain = [a.values if isinstance(a, Int8Tensor) else a for a in args]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.t.default, torch.ops.aten.alias.default):
            return Int8Tensor(func(*plain))
        if func not in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.linear.default):
            raise NotImplementedError(f"Int8Tensor dispatch: attempting to run unimplemented operator: {func}")
        return func(*plain, **(kwargs or {}))


def quantized_by_torchao(model: nn.Module, only: str = "") -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and only in name:
            module.weight = nn.Parameter(Int8Tensor(module.weight.detach()), requires_grad=False)
    return model


REASON = "its weight is of torchao's class Int8Tensor: to quantize it here, load the model in 16-bit"


def test_a_model_that_torchao_quantized() -> None:
    model, expected = quantized_by_torchao(net()), net()(*inputs())
    for way in (ahead, by_blocks, lambda m: svdq.quantize(m, **OPTIONS, calibrate=lambda m: m(*inputs()))):
        with pytest.raises(NothingToQuantize, match=REASON):
            way(model)
        assert torch.equal(model(*inputs()), expected)
    run = torch.compile(model, backend="svdquant", options=OPTIONS)
    for _ in range(2):
        assert relative_error(run(*inputs()), expected) < 1e-5
    assert {row.reason for row in svdq.report(model)} == {REASON}
    assert {type(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} == {Int8Tensor}


@pytest.mark.parametrize("way", [ahead, by_blocks])
def test_a_model_that_torchao_quantized_in_part(way: Callable) -> None:
    model, expected = quantized_by_torchao(net(), only="to_q"), net()(*inputs())
    way(model)
    for _ in range(2):
        result = model(*inputs())
    assert is_close(result, expected)
    assert count(model) == 8
    reasons = {row.name: row.reason for row in svdq.report(model)}
    assert reasons["blocks.0.to_q"] == reasons["blocks.1.to_q"] == REASON
    assert svdq.restore(model, net().state_dict(), progress=False) == 8
    assert torch.equal(model(*inputs()), expected)


def test_a_class_of_ones_own() -> None:
    """As of bitsandbytes and GGUF, whose Parameters hold bytes."""

    class Params4bit(nn.Parameter):
        pass

    model = net()
    model.blocks[0].up.weight = Params4bit(model.blocks[0].up.weight.detach(), requires_grad=False)
    ahead(model)
    assert count(model) == 9
    assert type(model.blocks[0].up.weight) is Params4bit
