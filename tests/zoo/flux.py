"""FLUX and what was made after it: double-stream blocks, then single-stream blocks, positions by RoPE."""

from typing import Any

import torch

from .entry import HEADS, WIDTH, Draw, common, entry, grid

_AXES = (16, 24, 24)


def _packed(draw: Draw, channels: int) -> dict[str, Any]:
    """Tokens of an image, with the positions of FLUX beside them."""
    return common(draw(draw.batch, draw.tokens, channels), draw) | {
        "timestep": draw.half(),
        "img_ids": grid(1, draw.rows, draw.columns).to(draw.dtype),
        "txt_ids": torch.zeros(draw.text, 3, dtype=draw.dtype),
    }


def _flux(draw: Draw) -> dict[str, Any]:
    guidance = torch.full((draw.batch,), 4.0)
    return _packed(draw, 64) | {"pooled_projections": draw(draw.batch, WIDTH), "guidance": guidance}


def _flux2(draw: Draw) -> dict[str, Any]:
    return _packed(draw, 128) | {
        "guidance": torch.full((draw.batch,), 4.0),
        "img_ids": grid(1, draw.rows, draw.columns, 1),
        "txt_ids": grid(1, 1, 1, draw.text),
    }


def _flux3(draw: Draw) -> dict[str, Any]:
    return _packed(draw, 128) | {
        "img_ids": grid(1, draw.rows, draw.columns, 1),
        "txt_ids": grid(1, 1, 1, draw.text),
        "image_cond_hidden_states": draw(draw.batch, draw.tokens, 128),
        "image_cond_ids": grid(1, draw.rows, draw.columns, 1) + 1,
    }


def _bria_fibo(draw: Draw) -> dict[str, Any]:
    layers = [draw.prompt(WIDTH // 2) for _ in range(4)]
    return _packed(draw, 48) | {"text_encoder_layers": layers, "encoder_hidden_states": draw.prompt(WIDTH)}


def _bria_fibo2(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.image(32),
        "timestep": draw.half(),
        "encoder_hidden_states": draw(draw.batch, 3, draw.text, WIDTH),
        "encoder_attention_mask": draw.mask(),
        "return_dict": False,
    }


def _longcat(draw: Draw) -> dict[str, Any]:
    return _packed(draw, 64) | {"guidance": torch.full((draw.batch,), 4.0)}


_LAYERS = {"num_layers": 2, "num_single_layers": 2}

ENTRIES = (
    entry(
        "flux",
        "FluxTransformer2DModel",
        _flux,
        batch=1,
        **HEADS,
        **_LAYERS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=_AXES,
    ),
    entry(
        "flux2",
        "Flux2Transformer2DModel",
        _flux2,
        batch=1,
        **HEADS,
        **_LAYERS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(16, 16, 16, 16),
    ),
    entry(
        "flux3",
        "Flux3Transformer2DModel",
        _flux3,
        **HEADS,
        **_LAYERS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(16, 16, 16, 16),
    ),
    entry(
        "chroma",
        "ChromaTransformer2DModel",
        lambda draw: _packed(draw, 64),
        **HEADS,
        **_LAYERS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=_AXES,
        approximator_num_channels=64,
        approximator_hidden_dim=WIDTH,
        approximator_layers=2,
    ),
    entry(
        "bria",
        "BriaTransformer2DModel",
        lambda draw: _packed(draw, 64),
        **HEADS,
        **_LAYERS,
        in_channels=64,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=None,
        axes_dims_rope=[*_AXES],
    ),
    entry(
        "bria_fibo",
        "BriaFiboTransformer2DModel",
        _bria_fibo,
        **HEADS,
        **_LAYERS,
        in_channels=48,
        joint_attention_dim=WIDTH,
        text_encoder_dim=WIDTH // 2,
        pooled_projection_dim=None,
        axes_dims_rope=[*_AXES],
    ),
    entry(
        "bria_fibo2",
        "BriaFibo2Transformer2DModel",
        _bria_fibo2,
        dim=WIDTH,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        cap_feat_dim=WIDTH,
        injection_layer_ids=(1, 2),
        min_num_gist_tokens=8,
        max_num_gist_tokens=16,
        gist_step=4,
        gist_min_text_len=8,
        gist_max_text_len=32,
        axes_dims=_AXES,
    ),
    entry(
        "longcat_image",
        "LongCatImageTransformer2DModel",
        _longcat,
        **HEADS,
        **_LAYERS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=[*_AXES],
    ),
    entry(
        "ovis_image",
        "OvisImageTransformer2DModel",
        lambda draw: _packed(draw, 64),
        **HEADS,
        **_LAYERS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=_AXES,
    ),
)
