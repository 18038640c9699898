"""The models of bench/flux_step.py: published configurations, random weights, the inputs of one denoising step.

    model = build("flux", tiny=False, device); call = inputs("flux", tiny=False, device); model(**call)

Two sizes of each: the published one, and a tiny one of the same structure that runs on a CPU in seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16
CALIBRATING = 4  # calls
Randn = Callable[..., Tensor]


@dataclass(frozen=True)
class Model:
    """One architecture.

    class_name   of diffusers
    config       as published, where it differs from the class's defaults
    size         what `inputs` needs: sides in latent pixels or tokens, text tokens, batch
    title        what one step is, for tables
    blocks       class names to compile by, where diffusers names none
    repeats      steps timed
    """

    class_name: str
    title: str
    config: dict[str, Any]
    size: dict[str, int]
    tiny_config: dict[str, Any]
    tiny_size: dict[str, int]
    inputs: Callable[..., dict[str, Any]]
    blocks: tuple[str, ...] = ()
    repeats: int = 20


def _common(randn: Randn, batch: int, text: int, width: int, *latents: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, *latents),
        "encoder_hidden_states": randn(batch, text, width),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }


def _flux(randn: Randn, config: Any, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return _common(randn, batch, text, config.joint_attention_dim, height * width, config.in_channels) | {
        "pooled_projections": randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, dtype=DTYPE),
        "guidance": torch.full((batch,), 4.0),  # times 1000 exact in bf16 too, where eager rounds and Inductor does not
        "img_ids": ids.reshape(-1, 3).to(DTYPE),
        "txt_ids": torch.zeros(text, 3, dtype=DTYPE),
    }


def _sd3(randn: Randn, config: Any, side: int, text: int, batch: int) -> dict[str, Any]:
    return _common(randn, batch, text, config.joint_attention_dim, config.in_channels, side, side) | {
        "pooled_projections": randn(batch, config.pooled_projection_dim)
    }


def _qwen(randn: Randn, config: Any, side: int, text: int, batch: int) -> dict[str, Any]:
    return _common(randn, batch, text, config.joint_attention_dim, side * side, config.in_channels) | {
        "timestep": torch.full((batch,), 0.5, dtype=DTYPE),
        "img_shapes": [[(1, side, side)]] * batch,
    }


def _wan(randn: Randn, config: Any, frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    return _common(randn, batch, text, config.text_dim, config.in_channels, frames, height, width)


def _sd15(randn: Randn, config: Any, side: int, text: int, batch: int) -> dict[str, Any]:
    call = _common(randn, batch, text, config.cross_attention_dim, config.in_channels, side, side)
    return call | {"sample": call.pop("hidden_states"), "timestep": torch.tensor(500.0)}


def _sdxl(randn: Randn, config: Any, side: int, text: int, batch: int) -> dict[str, Any]:
    ids, pixels = 6 * config.addition_time_embed_dim, float(8 * side)
    pooled = config.projection_class_embeddings_input_dim - ids
    return _sd15(randn, config, side, text, batch) | {
        "added_cond_kwargs": {
            "text_embeds": randn(batch, pooled),
            "time_ids": torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch, dtype=DTYPE),
        },
    }


_TINY_HEADS = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2}

_WAN = Model(
    "WanTransformer3DModel",
    "Wan 2.1 14B shape, 832x480, 33 frames: 14040 + 512 tokens, batch 1",
    {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
    {"frames": 9, "height": 60, "width": 104, "text": 512, "batch": 1},
    _TINY_HEADS | {"text_dim": 128, "ffn_dim": 256, "rope_max_seq_len": 16},
    {"frames": 3, "height": 8, "width": 8, "text": 16, "batch": 1},
    _wan,
    repeats=5,
)

MODELS = {
    "flux": Model(
        "FluxTransformer2DModel",
        "FLUX.1-dev shape, 1024x1024, 4096 + 512 tokens, batch 1",
        {"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38},
        {"height": 64, "width": 64, "text": 512, "batch": 1},
        _TINY_HEADS
        | {"num_single_layers": 2, "joint_attention_dim": 128, "pooled_projection_dim": 64, "guidance_embeds": True}
        | {"axes_dims_rope": (16, 24, 24)},
        {"height": 8, "width": 8, "text": 16, "batch": 1},
        _flux,
    ),
    "sd3.5-large": Model(
        "SD3Transformer2DModel",
        "Stable Diffusion 3.5 large shape, 1024x1024, 4096 + 333 tokens, batch 2 (guidance)",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
        | {"qk_norm": "rms_norm"},
        {"side": 128, "text": 333, "batch": 2},
        _TINY_HEADS
        | {"sample_size": 16, "joint_attention_dim": 128, "caption_projection_dim": 128, "pos_embed_max_size": 8}
        | {"pooled_projection_dim": 64, "qk_norm": "rms_norm"},
        {"side": 16, "text": 16, "batch": 2},
        _sd3,
        blocks=("JointTransformerBlock",),
    ),
    "qwen-image": Model(
        "QwenImageTransformer2DModel",
        "Qwen-Image shape, 1024x1024, 4096 + 256 tokens, batch 1",
        {"num_layers": 60},
        {"side": 64, "text": 256, "batch": 1},
        _TINY_HEADS | {"joint_attention_dim": 128, "axes_dims_rope": (16, 24, 24)},
        {"side": 8, "text": 16, "batch": 1},
        _qwen,
        repeats=10,
    ),
    "wan2.1-14b": _WAN,
    "wan2.1-14b-81": replace(
        _WAN,
        title="Wan 2.1 14B shape, 832x480, 81 frames: 32760 + 512 tokens, batch 1",
        size=_WAN.size | {"frames": 21},
        tiny_size=_WAN.tiny_size | {"frames": 4},
        repeats=3,
    ),
    "sdxl": Model(
        "UNet2DConditionModel",
        "SDXL shape, 1024x1024, batch 2 (guidance)",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"side": 128, "text": 77, "batch": 2},
        {
            "sample_size": 16,
            "block_out_channels": (128, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 2),
            "cross_attention_dim": 128,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 64 + 6 * 32,
        },
        {"side": 16, "text": 16, "batch": 2},
        _sdxl,
    ),
    "sd1.5": Model(
        "UNet2DConditionModel",
        "Stable Diffusion 1.5 shape, 512x512, batch 2 (guidance)",
        {"sample_size": 64, "cross_attention_dim": 768},
        {"side": 64, "text": 77, "batch": 2},
        {
            "sample_size": 16,
            "block_out_channels": (128, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 128,
        },
        {"side": 16, "text": 16, "batch": 2},
        _sd15,
    ),
}


def build(name: str, tiny: bool, device: torch.device) -> nn.Module:
    """The model on `device` in bfloat16, what its class keeps in float32 apart; weights are the same every time."""
    spec = MODELS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            model = getattr(diffusers, spec.class_name)(**(spec.tiny_config if tiny else spec.config))
    finally:
        torch.set_default_dtype(before)
    kept = set(model._keep_in_fp32_modules or ())
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in model.named_parameters():
        if not kept.isdisjoint(key.split(".")):
            parameter.data = parameter.data.float()
        _draw(parameter.data, generator)
    model._repeated_blocks = model._repeated_blocks or list(spec.blocks)
    return model.requires_grad_(False).eval()


def _draw(weight: Tensor, generator: torch.Generator) -> None:
    """Linears and convolutions that keep the scale of their input; norms near 1, biases near 0."""
    if weight.dim() >= 2:
        weight.normal_(generator=generator, std=weight[0].numel() ** -0.5)
    else:
        constant = float(weight[0]) if bool((weight == weight[0]).all()) else 0.0
        weight.normal_(generator=generator, mean=constant, std=0.02)


def inputs(
    name: str, tiny: bool, model: nn.Module, device: torch.device, size: dict[str, int] | None = None, seed: int = 1
) -> dict[str, Any]:
    """Random inputs of one step, for a seed the same every time; size: what differs from the model's own."""
    spec = MODELS[name]
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=DTYPE)

    call = spec.inputs(randn, model.config, **(spec.tiny_size if tiny else spec.size) | (size or {}))
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), call)


def others(
    name: str, tiny: bool, model: nn.Module, device: torch.device, size: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    """Inputs of CALIBRATING steps that are not measured, to calibrate on."""
    return [inputs(name, tiny, model, device, size, seed) for seed in range(2, 2 + CALIBRATING)]


def repeated_blocks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The blocks that regional compilation compiles, by the name of their class."""
    found: dict[str, list[nn.Module]] = {name: [] for name in model._repeated_blocks}
    for module in model.modules():
        if type(module).__name__ in found:
            found[type(module).__name__].append(module)
    return found
