"""Image transformers in which text and image attend to each other: SD3, Qwen-Image and their neighbours."""

from typing import Any

import torch

from .entry import HEADS, ONE, WIDTH, Draw, common, entry, grid

_AXES = (16, 24, 24)


def _sd3(draw: Draw) -> dict[str, Any]:
    return common(draw.image(16), draw) | {"pooled_projections": draw(draw.batch, WIDTH)}


def _auraflow(draw: Draw) -> dict[str, Any]:
    return common(draw.image(4), draw) | {"timestep": draw.half()}


def _qwen_image(draw: Draw) -> dict[str, Any]:
    return common(draw(draw.batch, draw.tokens, 64), draw) | {
        "encoder_hidden_states_mask": draw.mask(),
        "timestep": draw.half(),
        "img_shapes": [[(1, draw.rows, draw.columns)]] * draw.batch,
    }


def _qwen_image21(draw: Draw) -> dict[str, Any]:
    slots = torch.arange(draw.text + draw.tokens // 4) >= draw.text  # four tokens of the image stand in one slot
    return common(draw(draw.batch, draw.tokens, 64), draw) | {
        "timestep": draw.half(),
        "img_shapes": [[(1, draw.rows, draw.columns)]] * draw.batch,
        "img_mask": slots.expand(draw.batch, -1),
    }


def _nucleus(draw: Draw) -> dict[str, Any]:
    return _qwen_image(draw) | {"img_shapes": [(1, draw.rows, draw.columns)] * draw.batch}


def _sizes(draw: Draw) -> dict[str, Any]:
    """CogView's conditions on the size of the picture, [batch, 2] each."""
    size = torch.tensor([[16.0 * draw.rows, 16.0 * draw.columns]] * draw.batch)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


def _cogview(draw: Draw) -> dict[str, Any]:
    return common(draw.image(16), draw) | _sizes(draw)


def _glm_image(draw: Draw) -> dict[str, Any]:
    inputs = _cogview(draw)
    del inputs["original_size"]
    tokens = draw.integers(64, draw.batch, draw.tokens)
    return inputs | {"prior_token_id": tokens, "prior_token_drop": torch.zeros_like(tokens, dtype=torch.bool)}


def _hidream(draw: Draw) -> dict[str, Any]:
    inputs = common(draw.image(16), draw)
    return {
        "hidden_states": inputs["hidden_states"],
        "timesteps": inputs["timestep"],
        "encoder_hidden_states_t5": inputs["encoder_hidden_states"],
        "encoder_hidden_states_llama3": draw(4, draw.batch, draw.text, WIDTH),
        "pooled_embeds": draw(draw.batch, WIDTH),
        "return_dict": False,
    }


def _hunyuan_image(draw: Draw) -> dict[str, Any]:
    return common(draw.image(64, patch=1), draw) | {
        "timestep": torch.full((draw.batch,), 500.0).to(draw.dtype),
        "encoder_attention_mask": draw.mask().to(draw.dtype),
        "encoder_hidden_states_2": draw.prompt(),
        "encoder_attention_mask_2": draw.mask().to(draw.dtype),
    }


def _ernie_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw.image(32, patch=1),
        "timestep": draw.half(),
        "text_bth": draw.prompt(),
        "text_lens": draw.mask().sum(1),
        "return_dict": False,
    }


def _ideogram4(draw: Draw) -> dict[str, Any]:
    from diffusers.models.transformers import transformer_ideogram4 as published

    length = draw.text + draw.tokens
    is_text = torch.arange(length) < draw.text
    text = torch.arange(draw.text)[:, None].expand(-1, 3)
    image = grid(1, draw.rows, draw.columns).long() + published.IMAGE_POSITION_OFFSET
    tags = torch.where(is_text, published.LLM_TOKEN_INDICATOR, published.OUTPUT_IMAGE_INDICATOR)
    return {
        "hidden_states": draw(draw.batch, length, 64) * ~is_text[:, None],
        "encoder_hidden_states": draw(draw.batch, length, WIDTH) * is_text[:, None],
        "timestep": draw.half(),
        "position_ids": torch.cat([text, image]).expand(draw.batch, -1, -1),
        "segment_ids": torch.ones(draw.batch, length, dtype=torch.long),
        "indicator": tags.expand(draw.batch, -1),
        "return_dict": False,
    }


def _joyimage(draw: Draw) -> dict[str, Any]:
    return common(draw(draw.batch, 16, 1, 2 * draw.rows, 2 * draw.columns), draw)


def _joyimage_edit_plus(draw: Draw) -> dict[str, Any]:
    shapes = [[(1, draw.rows, draw.columns // 2)] * 2] * draw.batch
    return common(draw(draw.batch, draw.tokens, 16, 1, 2, 2), draw) | {"shape_list": shapes}


def _krea2(draw: Draw) -> dict[str, Any]:
    positions = torch.cat([torch.zeros(draw.text, 3), grid(1, draw.rows, draw.columns)])
    return {
        "hidden_states": draw(draw.batch, draw.tokens, 64),
        "encoder_hidden_states": draw(draw.batch, draw.text, 3, WIDTH),
        "timestep": draw.half(),
        "position_ids": positions,
        "encoder_attention_mask": draw.mask(),
        "return_dict": False,
    }


def _prx(draw: Draw) -> dict[str, Any]:
    return common(draw.image(16), draw) | {"timestep": draw.half()}


ENTRIES = (
    entry(
        "sd3",
        "SD3Transformer2DModel",
        _sd3,
        **HEADS,
        num_layers=3,
        sample_size=2 * ONE.rows,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=ONE.rows,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
    entry(
        "auraflow",
        "AuraFlowTransformer2DModel",
        _auraflow,
        **HEADS,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=ONE.rows * ONE.rows,
    ),
    entry(
        "qwen_image",
        "QwenImageTransformer2DModel",
        _qwen_image,
        **HEADS,
        num_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=_AXES,
    ),
    entry(
        "qwen_image21",
        "QwenImage21Transformer2DModel",
        _qwen_image21,
        **HEADS,
        num_layers=2,
        context_in_dim=WIDTH,
        axes_dims_rope=_AXES,
    ),
    entry(
        "nucleus_moe",
        "NucleusMoEImageTransformer2DModel",
        _nucleus,
        **HEADS,
        in_channels=64,
        out_channels=16,
        num_layers=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=_AXES,
        num_experts=4,
        moe_intermediate_dim=WIDTH,
        capacity_factors=[2.0] * 3,
    ),
    entry(
        "cogview3plus",
        "CogView3PlusTransformer2DModel",
        _cogview,
        **HEADS,
        num_layers=2,
        text_embed_dim=WIDTH,
        time_embed_dim=WIDTH,
        condition_dim=WIDTH,
        pos_embed_max_size=2 * ONE.rows,
        sample_size=2 * ONE.rows,
    ),
    entry(
        "cogview4",
        "CogView4Transformer2DModel",
        _cogview,
        **HEADS,
        num_layers=2,
        text_embed_dim=WIDTH,
        time_embed_dim=WIDTH,
        condition_dim=WIDTH,
    ),
    entry(
        "glm_image",
        "GlmImageTransformer2DModel",
        _glm_image,
        **HEADS,
        num_layers=2,
        in_channels=16,
        text_embed_dim=WIDTH,
        time_embed_dim=WIDTH,
        condition_dim=WIDTH,
        prior_vq_quantizer_codebook_size=64,
    ),
    entry(
        "hidream",
        "HiDreamImageTransformer2DModel",
        _hidream,
        **HEADS,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(32, 16, 16),
        max_resolution=(2 * ONE.rows, 2 * ONE.rows),
        llama_layers=(0, 1, 2, 3),
        force_inference_output=True,
    ),
    entry(
        "hunyuan_image",
        "HunyuanImageTransformer2DModel",
        _hunyuan_image,
        **HEADS,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(32, 32),
    ),
    entry(
        "ernie_image",
        "ErnieImageTransformer2DModel",
        _ernie_image,
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=2 * WIDTH,
        in_channels=32,
        out_channels=32,
        patch_size=1,
        text_in_dim=WIDTH,
        rope_axes_dim=_AXES,
    ),
    entry(
        "ideogram4",
        "Ideogram4Transformer2DModel",
        _ideogram4,
        **HEADS,
        in_channels=64,
        num_layers=2,
        intermediate_size=2 * WIDTH,
        adaln_dim=WIDTH,
        llm_features_dim=WIDTH,
        mrope_section=(16, 8, 8),
    ),
    entry(
        "joyimage",
        "JoyImageEditTransformer3DModel",
        _joyimage,
        hidden_size=WIDTH,
        num_attention_heads=2,
        text_dim=WIDTH,
        num_layers=2,
        rope_dim_list=[16, 24, 24],
    ),
    entry(
        "joyimage_edit_plus",
        "JoyImageEditPlusTransformer3DModel",
        _joyimage_edit_plus,
        hidden_size=WIDTH,
        num_attention_heads=2,
        text_dim=WIDTH,
        num_layers=2,
        rope_dim_list=[16, 24, 24],
    ),
    entry(
        "krea2",
        "Krea2Transformer2DModel",
        _krea2,
        **HEADS,
        in_channels=64,
        num_layers=2,
        num_key_value_heads=2,
        intermediate_size=2 * WIDTH,
        timestep_embed_dim=WIDTH,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=2 * WIDTH,
        num_layerwise_text_blocks=2,
        num_refiner_text_blocks=2,
        axes_dims_rope=(32, 16, 16),
    ),
    entry(
        "prx",
        "PRXTransformer2DModel",
        _prx,
        context_in_dim=WIDTH,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[32, 32],
    ),
)
