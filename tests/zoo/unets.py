"""UNets, with text and without, of pictures, video and sound."""

from typing import Any

import torch

from .entry import ONE, WIDTH, Draw, entry


def unet(draw: Draw) -> dict[str, Any]:
    """A UNet that reads text by cross-attention."""
    return {
        "sample": draw.image(4),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw.prompt(),
        "return_dict": False,
    }


def sdxl(draw: Draw) -> dict[str, Any]:
    """And SDXL's conditions on the size of the picture."""
    size = [16 * draw.rows, 16 * draw.columns]
    time_ids = torch.tensor([[*size, 0, 0, *size]] * draw.batch, dtype=draw.dtype)
    return unet(draw) | {"added_cond_kwargs": {"text_embeds": draw(draw.batch, 64), "time_ids": time_ids}}


def _unconditional(draw: Draw) -> dict[str, Any]:
    return {"sample": draw.image(4), "timestep": torch.tensor(500), "return_dict": False}


def _unet1d(draw: Draw) -> dict[str, Any]:
    sample = draw(draw.batch, 2, 64 * draw.rows)
    return {"sample": sample, "timestep": torch.full((draw.batch,), 500), "return_dict": False}


def _video(draw: Draw) -> dict[str, Any]:
    return unet(draw) | {"sample": draw.video(4)}


def _i2vgen(draw: Draw) -> dict[str, Any]:
    return _video(draw) | {
        "fps": torch.full((draw.batch,), 16),
        "image_latents": draw.video(4),
        "image_embeddings": draw(draw.batch, WIDTH),
    }


def _motion(draw: Draw) -> dict[str, Any]:
    text = draw.prompt().repeat_interleave(draw.frames, dim=0)
    return _video(draw) | {"encoder_hidden_states": text}


def _svd(draw: Draw) -> dict[str, Any]:
    return {
        "sample": draw(draw.batch, draw.frames, 8, 2 * draw.rows, 2 * draw.columns),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw(draw.batch, 1, WIDTH),
        "added_time_ids": torch.tensor([[6, 127, 0.02]] * draw.batch, dtype=draw.dtype),
        "return_dict": False,
    }


def _kandinsky3(draw: Draw) -> dict[str, Any]:
    mask = draw.mask().to(draw.dtype)
    return unet(draw) | {"timestep": torch.full((draw.batch,), 500), "encoder_attention_mask": mask}


def _cascade(draw: Draw) -> dict[str, Any]:
    return {
        "sample": draw.image(16),
        "timestep_ratio": draw.half(),
        "clip_text_pooled": draw(draw.batch, 1, WIDTH),
        "clip_text": draw.prompt(),
        "clip_img": draw(draw.batch, 1, WIDTH),
        "return_dict": False,
    }


CROSS_ATTENTION = {
    "block_out_channels": (WIDTH, WIDTH),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (2, 2),
    "cross_attention_dim": WIDTH,
}
SDXL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 64 + 6 * 32,
}


def _of_video(kind: str) -> dict[str, Any]:
    """Two resolutions, the first with attention over the text."""
    return {
        "block_out_channels": (WIDTH, WIDTH),
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
    }


# Layers in time beside those in space: twice as many roundings in a row.
_TWICE = 1.5

ENTRIES = (
    entry(
        "sdxl",
        "UNet2DConditionModel",
        sdxl,
        float32_on_cpu=True,
        **CROSS_ATTENTION,
        **SDXL,
        transformer_layers_per_block=(1, 2),
    ),
    entry("sd15", "UNet2DConditionModel", unet, float32_on_cpu=True, **CROSS_ATTENTION | {"layers_per_block": 2}),
    entry(
        "unet_2d",
        "UNet2DModel",
        _unconditional,
        float32_on_cpu=True,
        in_channels=4,
        out_channels=4,
        block_out_channels=(WIDTH, WIDTH),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=WIDTH // 2,
    ),
    entry(
        "unet_1d",
        "UNet1DModel",
        _unet1d,
        float32_on_cpu=True,
        block_out_channels=(WIDTH, WIDTH, WIDTH),
        extra_in_channels=2 * WIDTH,
    ),
    entry(
        "unet_3d",
        "UNet3DConditionModel",
        _video,
        float32_on_cpu=True,
        tolerance=_TWICE,
        **_of_video("3D"),
        attention_head_dim=WIDTH // 2,
    ),
    entry(
        "i2vgen_xl",
        "I2VGenXLUNet",
        _i2vgen,
        float32_on_cpu=True,
        tolerance=_TWICE,
        **_of_video("3D"),
        attention_head_dim=WIDTH // 2,
    ),
    entry(
        "unet_motion",
        "UNetMotionModel",
        _motion,
        float32_on_cpu=True,
        tolerance=_TWICE,
        **_of_video("Motion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
    ),
    entry(
        "svd",
        "UNetSpatioTemporalConditionModel",
        _svd,
        float32_on_cpu=True,
        tolerance=_TWICE,
        **_of_video("SpatioTemporal"),
        num_attention_heads=(2, 2),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=ONE.frames,
    ),
    entry(
        "dreamlite_unet",
        "DreamLiteUNetModel",
        unet,
        float32_on_cpu=True,
        block_out_channels=(WIDTH, WIDTH, WIDTH),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        use_linear_projection=True,
    ),
    entry(
        "kandinsky3",
        "Kandinsky3UNet",
        _kandinsky3,
        tolerance=3.6,
        note="amplifies: noise of the layers' own size moves the 16-bit output by 0.79",
        float32_on_cpu=True,
        time_embedding_dim=WIDTH,
        attention_head_dim=WIDTH // 2,
        layers_per_block=2,
        block_out_channels=(WIDTH, WIDTH, WIDTH),
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
    ),
    entry(
        "stable_cascade",
        "StableCascadeUNet",
        _cascade,
        float32_on_cpu=True,
        conditioning_dim=WIDTH,
        block_out_channels=(WIDTH, WIDTH),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(2, 2),
        up_num_layers_per_block=(2, 2),
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
        clip_image_in_channels=WIDTH,
    ),
)
