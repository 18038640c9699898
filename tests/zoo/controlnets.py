"""ControlNets: a copy of a denoiser's first blocks, whose results are added to the denoiser's."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dit import hunyuan_dit, z_image
from .entry import HEADS, ONE, WIDTH, Draw, Entry, common, entry, grid
from .unets import CROSS_ATTENTION, SDXL, sdxl, unet

_AXES = (16, 24, 24)


def _picture(draw: Draw, scale: int = 16) -> torch.Tensor:
    """The picture that controls, in pixels; a latent has 8 of them a side, a patch 16."""
    return draw(draw.batch, 3, scale * draw.rows, scale * draw.columns)


def _sd15(draw: Draw) -> dict[str, Any]:
    return unet(draw) | {"controlnet_cond": _picture(draw)}


def _union(draw: Draw) -> dict[str, Any]:
    return sdxl(draw) | {
        "controlnet_cond": [_picture(draw)],
        "control_type": torch.tensor([[1.0, 0, 0, 0, 0, 0]] * draw.batch, dtype=draw.dtype),
        "control_type_idx": [0],
    }


def _xs(draw: Draw) -> dict[str, Any]:
    return unet(draw) | {"controlnet_cond": _picture(draw)}


def _sparse(draw: Draw) -> dict[str, Any]:
    text = draw.prompt().repeat_interleave(draw.frames, dim=0)
    return {
        "sample": draw.video(4),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text,
        "controlnet_cond": draw.video(4),
        "conditioning_mask": draw.video(1),
        "return_dict": False,
    }


def _flux(draw: Draw) -> dict[str, Any]:
    return common(draw(draw.batch, draw.tokens, 64), draw) | {
        "controlnet_cond": draw(draw.batch, draw.tokens, 64),
        "controlnet_mode": torch.zeros(draw.batch, 1, dtype=torch.long),
        "pooled_projections": draw(draw.batch, WIDTH),
        "timestep": draw.half(),
        "guidance": torch.full((draw.batch,), 4.0),
        "img_ids": grid(1, draw.rows, draw.columns).to(draw.dtype),
        "txt_ids": torch.zeros(draw.text, 3, dtype=draw.dtype),
    }


def _sd3(draw: Draw) -> dict[str, Any]:
    return common(draw.image(16), draw) | {
        "controlnet_cond": draw.image(16),
        "pooled_projections": draw(draw.batch, WIDTH),
    }


def _hunyuan_dit(draw: Draw) -> dict[str, Any]:
    return hunyuan_dit(draw) | {"controlnet_cond": draw.image(4)}


def _qwen_image(draw: Draw) -> dict[str, Any]:
    return common(draw(draw.batch, draw.tokens, 64), draw) | {
        "controlnet_cond": draw(draw.batch, draw.tokens, 64),
        "encoder_hidden_states_mask": draw.mask(),
        "timestep": draw.half(),
        "img_shapes": [[(1, draw.rows, draw.columns)]] * draw.batch,
    }


def _sana(draw: Draw) -> dict[str, Any]:
    return common(draw.image(32, patch=1), draw) | {
        "encoder_attention_mask": draw.mask().long(),
        "controlnet_cond": draw.image(32, patch=1),
    }


def _cosmos(draw: Draw) -> dict[str, Any]:
    pixels = (draw.rows, draw.columns)
    return {
        "controls_latents": draw.video(16),
        "latents": draw.video(16),
        "timestep": draw.half(),
        "encoder_hidden_states": (draw.prompt(), draw(draw.batch, 4, WIDTH)),
        "condition_mask": torch.ones(draw.batch, 1, draw.frames, *pixels, dtype=draw.dtype),
        "padding_mask": torch.zeros(1, 1, *pixels, dtype=draw.dtype),
        "return_dict": False,
    }


def _z_image(draw: Draw) -> dict[str, Any]:
    context = [draw(16, 1, 2 * draw.rows, 2 * draw.columns) for _ in range(draw.batch)]
    return z_image(draw) | {"control_context": context}


def _build_z_image() -> nn.Module:
    """Z-Image's ControlNet uses embedders and refiners of the transformer that it controls."""
    from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

    width = {"dim": WIDTH, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2}
    transformer = ZImageTransformer2DModel(
        **width, n_layers=2, cap_feat_dim=WIDTH, axes_dims=[*_AXES], axes_lens=[256, 64, 64]
    )
    control = ZImageControlNetModel(
        **width, control_layers_places=[0, 1], control_refiner_layers_places=[0, 1], control_in_dim=16
    )
    return ZImageControlNetModel.from_transformer(control, transformer)


def _build_cosmos() -> nn.Module:
    """Cosmos's ControlNet resizes its mask by torchvision, which nothing else here needs: where it is not installed, a
    stand-in does the same.
    """
    from diffusers.models.controlnets import controlnet_cosmos

    if not hasattr(controlnet_cosmos, "transforms"):
        nearest = SimpleNamespace(NEAREST="nearest")
        resize = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size, mode=interpolation))
        controlnet_cosmos.transforms = SimpleNamespace(functional=resize, InterpolationMode=nearest)
    return controlnet_cosmos.CosmosControlNetModel(
        **HEADS,
        n_controlnet_blocks=2,
        in_channels=18,
        latent_channels=18,
        model_channels=WIDTH,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        adaln_lora_dim=64,
        max_size=(8, 32, 32),
        img_context_dim_in=WIDTH,
        img_context_dim_out=WIDTH,
    )


_DOWN = {name: value for name, value in CROSS_ATTENTION.items() if name != "up_block_types"}

ENTRIES = (
    entry("controlnet_sd15", "ControlNetModel", _sd15, float32_on_cpu=True, **_DOWN | {"layers_per_block": 2}),
    entry(
        "controlnet_union",
        "ControlNetUnionModel",
        _union,
        float32_on_cpu=True,
        **_DOWN | {"layers_per_block": 2},
        **SDXL,
        conditioning_embedding_out_channels=(16, 32, 96, 128),
        num_trans_channel=WIDTH,
        num_trans_head=2,
        num_trans_layer=2,
        num_proj_channel=WIDTH,
    ),
    entry(
        "controlnet_xs",
        "UNetControlNetXSModel",
        _xs,
        float32_on_cpu=True,
        block_out_channels=(WIDTH, WIDTH),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        upcast_attention=False,
        ctrl_block_out_channels=(64, 64),
        ctrl_num_attention_heads=2,
    ),
    entry(
        "controlnet_sparse",
        "SparseControlNetModel",
        _sparse,
        float32_on_cpu=True,
        block_out_channels=(WIDTH, WIDTH),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        motion_num_attention_heads=2,
    ),
    entry(
        "controlnet_flux",
        "FluxControlNetModel",
        _flux,
        batch=1,
        **HEADS,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=[*_AXES],
        num_mode=4,
    ),
    entry(
        "controlnet_sd3",
        "SD3ControlNetModel",
        _sd3,
        **HEADS,
        num_layers=2,
        sample_size=2 * ONE.rows,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=ONE.rows,
    ),
    entry(
        "controlnet_hunyuan_dit",
        "HunyuanDiT2DControlNetModel",
        _hunyuan_dit,
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=2 * ONE.rows,
        hidden_size=WIDTH,
        transformer_num_layers=6,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
        text_len=ONE.text,
        text_len_t5=ONE.text,
    ),
    entry(
        "controlnet_qwen_image",
        "QwenImageControlNetModel",
        _qwen_image,
        **HEADS,
        num_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=_AXES,
    ),
    entry(
        "controlnet_sana",
        "SanaControlNetModel",
        _sana,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=ONE.rows,
    ),
    Entry("controlnet_cosmos", "CosmosControlNetModel", _build_cosmos, _cosmos),
    Entry("controlnet_z_image", "ZImageControlNetModel", _build_z_image, _z_image),
)
