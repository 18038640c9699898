"""Video: Wan 2.1 and the models that kept its block."""

from typing import Any

import torch

from .entry import HEADS, WIDTH, Draw, common, entry

_FRAMES_OF_A_FACE = 13


def _wan(draw: Draw) -> dict[str, Any]:
    return common(draw.video(16), draw)


def _skyreels(draw: Draw) -> dict[str, Any]:
    """Diffusion forcing: each frame has its own noise level."""
    return _wan(draw) | {"timestep": torch.full((draw.batch, draw.frames), 500), "enable_diffusion_forcing": True}


def _vace(draw: Draw) -> dict[str, Any]:
    return _wan(draw) | {"control_hidden_states": draw.video(48)}


def _animate(draw: Draw) -> dict[str, Any]:
    frames = 4 * (draw.frames - 2) + 1  # of the face; the motion encoder makes a fourth of them, and one more
    return common(draw.video(36), draw) | {
        "encoder_hidden_states_image": draw(draw.batch, 8, WIDTH),
        "pose_hidden_states": draw(draw.batch, 16, draw.frames - 1, draw.rows, draw.columns),
        "face_pixel_values": draw(draw.batch, 3, frames, 16, 16),
    }


def _animate2(draw: Draw) -> dict[str, Any]:
    """The pass over the reference video, which fills the cache of keys and values."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    size = (draw.frames, draw.rows, draw.columns)
    return {
        "hidden_states": [draw(16, *size) for _ in range(draw.batch)],
        "timestep": torch.full((draw.batch,), 500.0).to(draw.dtype),
        "encoder_hidden_states": [draw(draw.text, WIDTH) for _ in range(draw.batch)],
        "condition_latents": [draw(20, *size) for _ in range(draw.batch)],
        "encoder_hidden_states_image": draw(draw.batch, 8, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": draw.frames * draw.tokens // 4,
        "offset_grid_sizes": torch.tensor([[draw.frames, draw.rows // 2, draw.columns // 2]] * draw.batch),
        "return_dict": False,
    }


def _anyflow(draw: Draw) -> dict[str, Any]:
    size = (draw.batch, draw.frames, 16, draw.rows, draw.columns)
    return common(draw(*size), draw) | {
        "timestep": torch.full((draw.batch, draw.frames), 500.0).to(draw.dtype),
        "r_timestep": torch.full((draw.batch, draw.frames), 250.0).to(draw.dtype),
    }


def _anyflow_far(draw: Draw) -> dict[str, Any]:
    size = (draw.batch, draw.frames + 1, 16, 8, 8)
    return common(draw(*size), draw) | {
        "timestep": torch.full((draw.batch, draw.frames + 1), 500.0).to(draw.dtype),
        "r_timestep": torch.full((draw.batch, draw.frames + 1), 250.0).to(draw.dtype),
        "chunk_partition": [2] * ((draw.frames + 1) // 2),
    }


def _helios(draw: Draw) -> dict[str, Any]:
    size = (draw.rows, draw.columns)
    ids = {
        "hidden_states": draw.frames,
        "latents_history_short": 2,
        "latents_history_mid": 2,
        "latents_history_long": 8,
    }
    return (
        _wan(draw)
        | {f"indices_{name}": torch.ones(draw.batch, frames) for name, frames in ids.items()}
        | {
            name: draw(draw.batch, 16, frames, *size)
            for name, frames in ids.items()
            if name.startswith("latents_history")
        }
    )


_CONFIG = {**HEADS, "num_layers": 2, "text_dim": WIDTH, "ffn_dim": 2 * WIDTH, "rope_max_seq_len": 32}

ENTRIES = (
    entry("wan", "WanTransformer3DModel", _wan, **_CONFIG),
    entry(
        "wan_vace",
        "WanVACETransformer3DModel",
        _vace,
        **_CONFIG | {"num_layers": 4},
        vace_layers=[0, 2],
        vace_in_channels=48,
    ),
    entry(
        "wan_animate",
        "WanAnimateTransformer3DModel",
        _animate,
        **_CONFIG,
        image_dim=WIDTH,
        motion_encoder_channel_sizes={"4": 64, "8": 64, "16": 64},
        motion_encoder_size=16,
        motion_style_dim=WIDTH,
        motion_dim=8,
        motion_encoder_dim=WIDTH,
        face_encoder_hidden_dim=WIDTH,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    ),
    entry(
        "wan_animate2",
        "WanAnimate2Transformer3DModel",
        _animate2,
        text_len=32,
        in_dim=36,
        dim=WIDTH,
        ffn_dim=2 * WIDTH,
        freq_dim=64,
        text_dim=WIDTH,
        out_dim=16,
        num_heads=2,
        num_layers=2,
        use_img_emb=True,
    ),
    entry("skyreels_v2", "SkyReelsV2Transformer3DModel", _skyreels, **_CONFIG),
    entry("chronoedit", "ChronoEditTransformer3DModel", _wan, **_CONFIG, rope_temporal_skip_len=8),
    entry("anyflow", "AnyFlowTransformer3DModel", _anyflow, **_CONFIG),
    entry("anyflow_far", "AnyFlowFARTransformer3DModel", _anyflow_far, **_CONFIG, full_chunk_limit=3),
    entry(
        "helios",
        "HeliosTransformer3DModel",
        _helios,
        **{name: value for name, value in _CONFIG.items() if name != "rope_max_seq_len"},
        rope_dim=(24, 20, 20),
        is_amplify_history=False,
    ),
)
