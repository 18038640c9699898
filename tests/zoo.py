"""Twelve diffusers models in small configurations, with inputs, for tests that run them through the backend.

    model, inputs = make("flux")
    (sample,) = model(**inputs)

Inside the blocks every linear has in and out features of at least 128 and a multiple of 64, so all of them qualify for
groups of 64; embedders and output projections keep the narrow latent channels of the published models. Each kind of
block comes at least twice, apart from SD3's last one, which updates no text and is alone in the published models too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

WIDTH = 128
TEXT = 24  # text tokens
ROWS, COLUMNS, FRAMES = 8, 6, 3  # an image has ROWS x COLUMNS tokens, each video frame half of each side
_HEADS = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}


@dataclass(frozen=True)
class Entry:
    """One model: how to build it, what to call it with, and whether its class names blocks to compile regionally."""

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    regional: bool


def make(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its inputs; `config` changes its configuration. Weights are drawn in float32 under `seed`, then
    cast; the global RNG does not move.
    """
    entry = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = entry.build(**config).eval().requires_grad_(False)
        _draw_weights(model)
    _cast(model, dtype)
    return model, entry.inputs(dtype)


def _draw_weights(model: nn.Module) -> None:
    """Redraw what would hide mistakes: linears that shrink their input, parameters that are zero or one throughout.

    nn.Linear's own draw has a third of this variance, and gates multiply the loss. Dropping the median block linear
    then moved the output by only 0.004% (auraflow) to 3%; with this draw it is 0.9% to 22%.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
    for parameter in model.parameters():
        if (parameter == parameter.flatten()[0]).all():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast as `from_pretrained(torch_dtype=dtype)` does: what the class keeps in float32 stays so (Wan's norms)."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.to(dtype)


def _normal(dtype: torch.dtype) -> Callable[..., Tensor]:
    """A `randn(*shape)` with its own generator, so that each call of an entry's `inputs` draws the same values."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype)


def _common(randn: Callable[..., Tensor], *latents: int) -> dict[str, Any]:
    """What all the transformers take. Timestep 500, or 0.5 where a model counts in thousands, is exact in bfloat16."""
    return {
        "hidden_states": randn(*latents),
        "encoder_hidden_states": randn(latents[0], TEXT, WIDTH),
        "timestep": torch.full((latents[0],), 500),
        "return_dict": False,
    }


def _prefix_mask(*lengths: int) -> Tensor:
    """Which text tokens are real, the first lengths[i] of row i: [len(lengths), TEXT] bool."""
    return torch.arange(TEXT) < torch.tensor(lengths)[:, None]


def _grid(*sizes: int) -> Tensor:
    """Positions of a row-major grid: [prod(sizes), len(sizes)] float32."""
    return torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in sizes))


def _flux_inputs(dtype: torch.dtype) -> dict[str, Any]:
    randn = _normal(dtype)
    return _common(randn, 1, ROWS * COLUMNS, 64) | {
        "pooled_projections": randn(1, WIDTH),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([4.0]),
        "img_ids": _grid(1, ROWS, COLUMNS).to(dtype),
        "txt_ids": torch.zeros(TEXT, 3, dtype=dtype),
    }


def _flux2_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return _common(_normal(dtype), 1, ROWS * COLUMNS, 128) | {
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([4.0]),
        "img_ids": _grid(1, ROWS, COLUMNS, 1),
        "txt_ids": _grid(1, 1, 1, TEXT),
    }


def _sd3_inputs(dtype: torch.dtype) -> dict[str, Any]:
    randn = _normal(dtype)
    return _common(randn, 2, 16, 2 * ROWS, 2 * COLUMNS) | {"pooled_projections": randn(2, WIDTH)}


def _sdxl_inputs(dtype: torch.dtype) -> dict[str, Any]:
    randn = _normal(dtype)
    inputs = _common(randn, 2, 4, 2 * ROWS, 2 * COLUMNS)
    size = [16 * ROWS, 16 * COLUMNS]
    time_ids = torch.tensor([[*size, 0, 0, *size]] * 2, dtype=dtype)
    return inputs | {
        "sample": inputs.pop("hidden_states"),
        "timestep": torch.tensor(500),
        "added_cond_kwargs": {"text_embeds": randn(2, 64), "time_ids": time_ids},
    }


def _pixart_inputs(dtype: torch.dtype) -> dict[str, Any]:
    inputs = _common(_normal(dtype), 2, 4, 2 * ROWS, 2 * COLUMNS)
    return inputs | {"encoder_attention_mask": _prefix_mask(5, 17).long()}


def _sana_inputs(dtype: torch.dtype) -> dict[str, Any]:
    inputs = _common(_normal(dtype), 2, 32, ROWS, COLUMNS)
    return inputs | {"encoder_attention_mask": _prefix_mask(5, 17).long()}


def _qwen_image_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return _common(_normal(dtype), 2, ROWS * COLUMNS, 64) | {
        "encoder_hidden_states_mask": _prefix_mask(5, 17),
        "timestep": torch.full((2,), 0.5, dtype=dtype),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * 2,
    }


def _wan_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return _common(_normal(dtype), 2, 16, FRAMES, ROWS, COLUMNS)


def _hunyuan_video_inputs(dtype: torch.dtype) -> dict[str, Any]:
    randn = _normal(dtype)
    return _common(randn, 1, 16, FRAMES, ROWS, COLUMNS) | {
        "encoder_attention_mask": _prefix_mask(17).to(dtype),
        "pooled_projections": randn(1, WIDTH),
        "guidance": torch.tensor([4000.0], dtype=dtype),
    }


def _ltx_video_inputs(dtype: torch.dtype) -> dict[str, Any]:
    rows, columns = ROWS // 2, COLUMNS // 2
    return _common(_normal(dtype), 2, FRAMES * rows * columns, 128) | {
        "encoder_attention_mask": _prefix_mask(5, 17).long(),
        "num_frames": FRAMES,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _cogvideox_inputs(dtype: torch.dtype) -> dict[str, Any]:
    grid = (ROWS // 2, COLUMNS // 2)
    rotary = get_3d_rotary_pos_embed(WIDTH // 2, ((0, 0), grid), grid, FRAMES)
    return _common(_normal(dtype), 2, FRAMES, 16, ROWS, COLUMNS) | {"image_rotary_emb": rotary}


def _auraflow_inputs(dtype: torch.dtype) -> dict[str, Any]:
    inputs = _common(_normal(dtype), 2, 4, 2 * ROWS, 2 * COLUMNS)
    return inputs | {"timestep": torch.full((2,), 0.5, dtype=dtype)}


def _entry(name: str, model: type[ModelMixin], inputs: Callable[[torch.dtype], dict[str, Any]], **config: Any) -> Entry:
    return Entry(name, partial(model, **config), inputs, regional=bool(model._repeated_blocks))


ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        _entry(
            "flux",
            FluxTransformer2DModel,
            _flux_inputs,
            **_HEADS,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(16, 24, 24),
        ),
        _entry(
            "flux2",
            Flux2Transformer2DModel,
            _flux2_inputs,
            **_HEADS,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(16, 16, 16, 16),
        ),
        _entry(
            "sd3",
            SD3Transformer2DModel,
            _sd3_inputs,
            **_HEADS,
            num_layers=3,
            sample_size=2 * ROWS,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=ROWS,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        _entry(
            "sdxl",
            UNet2DConditionModel,
            _sdxl_inputs,
            block_out_channels=(WIDTH, WIDTH),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 2),
            cross_attention_dim=WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=64 + 6 * 32,
        ),
        _entry(
            "pixart",
            PixArtTransformer2DModel,
            _pixart_inputs,
            **_HEADS,
            num_layers=2,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
            sample_size=2 * ROWS,
        ),
        _entry(
            "sana",
            SanaTransformer2DModel,
            _sana_inputs,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=WIDTH // 4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=WIDTH // 2,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
            sample_size=ROWS,
        ),
        _entry(
            "qwen_image",
            QwenImageTransformer2DModel,
            _qwen_image_inputs,
            **_HEADS,
            num_layers=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(16, 24, 24),
        ),
        _entry(
            "wan",
            WanTransformer3DModel,
            _wan_inputs,
            **_HEADS,
            num_layers=2,
            text_dim=WIDTH,
            ffn_dim=2 * WIDTH,
            rope_max_seq_len=16,
        ),
        _entry(
            "hunyuan_video",
            HunyuanVideoTransformer3DModel,
            _hunyuan_video_inputs,
            **_HEADS,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=2,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(16, 24, 24),
        ),
        _entry(
            "ltx_video",
            LTXVideoTransformer3DModel,
            _ltx_video_inputs,
            **_HEADS,
            num_layers=2,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
        ),
        _entry(
            "cogvideox",
            CogVideoXTransformer3DModel,
            _cogvideox_inputs,
            **_HEADS,
            num_layers=2,
            time_embed_dim=WIDTH,
            text_embed_dim=WIDTH,
            max_text_seq_length=TEXT,
            use_rotary_positional_embeddings=True,
        ),
        _entry(
            "auraflow",
            AuraFlowTransformer2DModel,
            _auraflow_inputs,
            **_HEADS,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pos_embed_max_size=ROWS * ROWS,
        ),
    )
}
