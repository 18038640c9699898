"""Image transformers that read the text by cross-attention, as part of one sequence, or not at all."""

from typing import Any

import torch

from .entry import HEADS, ONE, WIDTH, Draw, common, entry

_AXES = (16, 24, 24)


def _dit(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(draw.batch, 4, 2 * ONE.rows, 2 * ONE.rows),  # it makes no other size
        "timestep": torch.full((draw.batch,), 500),
        "class_labels": draw.integers(8, draw.batch),
        "return_dict": False,
    }


def _pixart(draw: Draw) -> dict[str, Any]:
    return common(draw.image(4), draw) | {"encoder_attention_mask": draw.mask().long()}


def _sana(draw: Draw) -> dict[str, Any]:
    return common(draw.image(32, patch=1), draw) | {"encoder_attention_mask": draw.mask().long()}


def hunyuan_dit(draw: Draw) -> dict[str, Any]:
    """As its ControlNet takes them too. The length of the text is the model's."""
    angle = draw(draw.tokens, WIDTH // 2).float()
    mask = torch.ones(draw.batch, ONE.text)
    return common(draw.image(4), draw) | {
        "timestep": torch.full((draw.batch,), 500.0).to(draw.dtype),
        "encoder_hidden_states": draw(draw.batch, ONE.text, WIDTH),
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": draw(draw.batch, ONE.text, WIDTH),
        "text_embedding_mask_t5": mask,
        "image_meta_size": torch.tensor([[1024, 1024, 16, 16, 0, 0]] * draw.batch, dtype=draw.dtype),
        "style": torch.zeros(draw.batch, dtype=torch.long),
        "image_rotary_emb": [angle.cos(), angle.sin()],
    }


def _lumina(draw: Draw) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": draw.image(4),
        "timestep": draw.half(),
        "encoder_hidden_states": draw.prompt(),
        "encoder_mask": draw.mask().long(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(WIDTH // 2, 16, 16),
        "cross_attention_kwargs": {},
        "return_dict": False,
    }


def _lumina2(draw: Draw) -> dict[str, Any]:
    return common(draw.image(4), draw) | {"timestep": draw.half(), "encoder_attention_mask": draw.mask()}


def _omnigen(draw: Draw) -> dict[str, Any]:
    length = draw.text + 1 + draw.tokens
    return {
        "hidden_states": draw.image(4),
        "timestep": draw.half(),
        "input_ids": draw.integers(64, draw.batch, draw.text),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(draw.batch, length, length, dtype=torch.long),
        "position_ids": torch.arange(length).expand(draw.batch, -1),
        "return_dict": False,
    }


def z_image(draw: Draw) -> dict[str, Any]:
    """As its ControlNet takes them too."""
    return {
        "x": [draw(16, 1, 2 * draw.rows, 2 * draw.columns) for _ in range(draw.batch)],
        "cap_feats": [draw(draw.text, WIDTH) for _ in range(draw.batch)],
        "t": draw.half(),
    }


def _prior(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(draw.batch, WIDTH),
        "timestep": 2,
        "proj_embedding": draw(draw.batch, WIDTH),
        "encoder_hidden_states": draw(draw.batch, ONE.text, WIDTH),  # it has a position for each
        "return_dict": False,
    }


def _transformer_2d(draw: Draw) -> dict[str, Any]:
    return {"hidden_states": draw.image(WIDTH, patch=1), "encoder_hidden_states": draw.prompt(), "return_dict": False}


def _uvit(draw: Draw) -> dict[str, Any]:
    return {
        "input_ids": draw.integers(64, draw.batch, draw.rows, draw.columns),
        "encoder_hidden_states": draw.prompt(),
        "pooled_text_emb": draw(draw.batch, WIDTH),
        "micro_conds": torch.tensor([[16.0, 16, 0, 0, 6]] * draw.batch).to(draw.dtype),
    }


def _anima_text(draw: Draw) -> dict[str, Any]:
    return {
        "source_hidden_states": draw.prompt(),
        "target_input_ids": draw.integers(64, draw.batch, draw.text),
        "target_attention_mask": draw.mask().long(),
        "source_attention_mask": draw.mask().long(),
    }


ENTRIES = (
    entry(
        "dit",
        "DiTTransformer2DModel",
        _dit,
        read_again=True,
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_embeds_ada_norm=8,
        sample_size=2 * ONE.rows,
    ),
    entry(
        "pixart",
        "PixArtTransformer2DModel",
        _pixart,
        **HEADS,
        num_layers=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=2 * ONE.rows,
    ),
    entry(
        "sana",
        "SanaTransformer2DModel",
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
    entry(
        "hunyuan_dit",
        "HunyuanDiT2DModel",
        hunyuan_dit,
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=2 * ONE.rows,
        hidden_size=WIDTH,
        num_layers=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
        text_len=ONE.text,
        text_len_t5=ONE.text,
    ),
    entry(
        "lumina_next",
        "LuminaNextDiT2DModel",
        _lumina,
        sample_size=2 * ONE.rows,
        hidden_size=WIDTH,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        cross_attention_dim=WIDTH,
        learn_sigma=False,
    ),
    entry(
        "lumina2",
        "Lumina2Transformer2DModel",
        _lumina2,
        sample_size=2 * ONE.rows,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        axes_dim_rope=_AXES,
        axes_lens=(64, 64, 64),
        cap_feat_dim=WIDTH,
    ),
    entry(
        "omnigen",
        "OmniGenTransformer2DModel",
        _omnigen,
        hidden_size=WIDTH,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=2 * WIDTH,
        num_layers=2,
        pad_token_id=0,
        vocab_size=64,
        in_channels=4,
        time_step_dim=WIDTH,
        rope_scaling={"long_factor": [1.0] * (WIDTH // 4), "short_factor": [1.0] * (WIDTH // 4)},
    ),
    entry(
        "z_image",
        "ZImageTransformer2DModel",
        lambda draw: z_image(draw) | {"return_dict": False},
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[*_AXES],
        axes_lens=[256, 64, 64],
    ),
    entry(
        "prior",
        "PriorTransformer",
        _prior,
        **HEADS,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=ONE.text,
        additional_embeddings=4,
    ),
    entry(
        "transformer_2d",
        "Transformer2DModel",
        _transformer_2d,
        **HEADS,
        in_channels=WIDTH,
        num_layers=2,
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
    ),
    entry(
        "dreamlite_transformer",
        "DreamLiteTransformer2DModel",
        _transformer_2d,
        **HEADS,
        in_channels=WIDTH,
        num_layers=2,
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
    ),
    entry(
        "uvit",
        "UVit2DModel",
        _uvit,
        hidden_size=WIDTH,
        cond_embed_dim=WIDTH,
        micro_cond_encode_dim=32,
        micro_cond_embed_dim=5 * 32,
        encoder_hidden_size=WIDTH,
        vocab_size=72,
        codebook_size=64,
        in_channels=WIDTH,
        block_out_channels=WIDTH,
        num_res_blocks=2,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        sample_size=ONE.rows,
    ),
    entry(
        "anima_text",
        "AnimaTextConditioner",
        _anima_text,
        source_dim=WIDTH,
        target_dim=WIDTH,
        model_dim=WIDTH,
        num_layers=2,
        num_attention_heads=2,
        target_vocab_size=64,
        min_sequence_length=ONE.text,
    ),
)
