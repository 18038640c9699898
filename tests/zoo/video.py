"""Video, with sound or without: HunyuanVideo, LTX, CogVideoX, Cosmos, Kandinsky, SANA and single ones."""

from typing import Any

import torch

from .entry import HEADS, ONE, WIDTH, Draw, common, entry

_AXES = (16, 24, 24)


def _hunyuan(draw: Draw) -> dict[str, Any]:
    return common(draw.video(16), draw) | {
        "encoder_attention_mask": draw.mask().to(draw.dtype),
        "pooled_projections": draw(draw.batch, WIDTH),
        "guidance": torch.full((draw.batch,), 4000.0).to(draw.dtype),
    }


def _hunyuan15(draw: Draw) -> dict[str, Any]:
    return common(draw.video(65), draw) | {
        "timestep": torch.full((draw.batch,), 500.0).to(draw.dtype),
        "encoder_attention_mask": draw.mask().to(draw.dtype),
        "encoder_hidden_states_2": draw.prompt(),
        "encoder_attention_mask_2": draw.mask().to(draw.dtype),
        "image_embeds": draw(draw.batch, 3, WIDTH),
    }


def _framepack(draw: Draw) -> dict[str, Any]:
    size = (draw.rows, draw.columns)
    history = {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 8}
    return (
        _hunyuan(draw)
        | {name: draw(draw.batch, 16, frames, *size) for name, frames in history.items()}
        | {f"indices_{name}": torch.arange(frames) for name, frames in history.items()}
        | {"indices_latents": torch.arange(draw.frames), "image_embeds": draw(draw.batch, 8, WIDTH)}
    )


def _ltx(draw: Draw) -> dict[str, Any]:
    rows, columns = draw.rows // 2, draw.columns // 2
    return common(draw(draw.batch, draw.frames * rows * columns, 128), draw) | {
        "encoder_attention_mask": draw.mask().long(),
        "num_frames": draw.frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx2(draw: Draw) -> dict[str, Any]:
    inputs = _ltx(draw)
    del inputs["rope_interpolation_scale"]
    return inputs | {
        "audio_hidden_states": draw(draw.batch, 9, 128),
        "audio_encoder_hidden_states": draw.prompt(),
        "audio_encoder_attention_mask": draw.mask().long(),
        "timestep": torch.full((draw.batch,), 500.0).to(draw.dtype),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def _sana_wm_refiner(draw: Draw) -> dict[str, Any]:
    length = draw.frames * draw.tokens // 4
    angle = draw(draw.batch, length, WIDTH).float()
    return common(draw(draw.batch, length, 128), draw) | {
        "encoder_attention_mask": draw.mask().long(),
        "timestep": torch.full((draw.batch, length), 500.0).to(draw.dtype),
        "video_rotary_emb": (angle.cos(), angle.sin()),
    }


def _cogvideox(draw: Draw) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    size = (draw.rows // 2, draw.columns // 2)
    rotary = get_3d_rotary_pos_embed(WIDTH // 2, ((0, 0), size), size, draw.frames)
    return common(draw(draw.batch, draw.frames, 16, draw.rows, draw.columns), draw) | {"image_rotary_emb": rotary}


def _consisid(draw: Draw) -> dict[str, Any]:
    return _cogvideox(draw) | {
        "id_vit_hidden": [draw(draw.batch, 4, WIDTH) for _ in range(2)],
        "id_cond": draw(draw.batch, WIDTH),
    }


def _mochi(draw: Draw) -> dict[str, Any]:
    return common(draw.video(12), draw) | {"encoder_attention_mask": draw.mask()}


def _allegro(draw: Draw) -> dict[str, Any]:
    return common(draw.video(4), draw) | {"encoder_attention_mask": draw.mask().long()}


def _latte(draw: Draw) -> dict[str, Any]:
    return common(draw(draw.batch, 4, ONE.frames, 2 * ONE.rows, 2 * ONE.rows), draw)


def _cosmos(draw: Draw) -> dict[str, Any]:
    return common(draw.video(16), draw) | {
        "attention_mask": draw.mask().to(draw.dtype),
        "fps": 30,
    }


def _cosmos3(draw: Draw) -> dict[str, Any]:
    """One sequence with the text first; the model knows no batch, so a larger one is a larger picture."""
    rows, columns = draw.rows, draw.batch * draw.columns
    vision = torch.arange(draw.text, draw.text + rows * columns)
    length = len(vision) + draw.text
    return {
        "input_ids": draw.integers(64, draw.text),
        "text_indexes": torch.arange(draw.text),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": draw.text,
        "sequence_length": length,
        "vision_tokens": [draw(1, 16, 1, 2 * rows, 2 * columns)],
        "vision_token_shapes": [(1, rows, columns)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.ones(len(vision)),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
        "return_dict": False,
    }


def _easyanimate(draw: Draw) -> dict[str, Any]:
    return common(draw.video(16), draw)


def _kandinsky5(draw: Draw) -> dict[str, Any]:
    visual = [torch.arange(draw.frames), torch.arange(draw.rows // 2), torch.arange(draw.columns // 2)]
    latents = draw(draw.batch, draw.frames, draw.rows, draw.columns, 16)
    return common(latents, draw) | {
        "pooled_projections": draw(draw.batch, WIDTH),
        "visual_rope_pos": visual,
        "text_rope_pos": torch.arange(draw.text),
    }


def _kandinsky6(draw: Draw) -> dict[str, Any]:
    latents = draw(draw.batch, draw.frames, draw.rows, draw.columns, 33)
    return common(latents, draw) | {
        "pooled_projections": draw(draw.batch, WIDTH),
        "audio_hidden_states": draw(draw.batch, 9, 20),
    }


def _kandinsky6_sr(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(draw.batch, draw.frames, 16, 8, 129),
        "timestep": torch.full((draw.batch,), 500),
        "return_dict": False,
    }


def _motif(draw: Draw) -> dict[str, Any]:
    return common(draw.video(33), draw) | {
        "encoder_attention_mask": draw.mask(),
        "image_embeds": draw(draw.batch, 4, WIDTH),
    }


def _minimax_h3(draw: Draw) -> dict[str, Any]:
    """Text, sound and video in one sequence, each token with its tag and its noise level."""
    audio, video = 6, draw.frames * draw.tokens // 4
    tags = torch.cat([torch.full((n,), tag) for n, tag in ((draw.text, 1), (audio, 2), (video, 0))])
    everything = torch.arange(len(tags))
    return {
        "hidden_states": draw(draw.batch, video, 64),
        "audio_hidden_states": draw(draw.batch, audio, 64),
        "encoder_hidden_states": draw.prompt(),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.stack([everything, everything % 4, everything % 2], dim=1).float(),
        "video_indices": everything[tags == 0],
        "audio_indices": everything[tags == 2],
        "text_indices": everything[tags == 1],
        "return_dict": False,
    }


def _temporal(draw: Draw) -> dict[str, Any]:
    latents = draw(draw.batch * draw.frames, WIDTH, draw.rows // 2, draw.columns // 2)
    return {"hidden_states": latents, "num_frames": draw.frames, "return_dict": False}


def _sana_video(draw: Draw) -> dict[str, Any]:
    return common(draw.video(16), draw) | {"encoder_attention_mask": draw.mask().long()}


def _sana_wm(draw: Draw) -> dict[str, Any]:
    camera = torch.eye(4).flatten().expand(draw.batch, draw.frames, -1)
    lens = torch.tensor([8.0, 8.0, 4.0, 4.0]).expand(draw.batch, draw.frames, -1)
    return {
        "hidden_states": draw.video(16),
        "timestep": torch.full((draw.batch, 1, draw.frames), 500),
        "encoder_hidden_states": draw(draw.batch, 1, draw.text, WIDTH),
        "encoder_attention_mask": draw.mask().long(),
        "camera_conditions": torch.cat([camera, lens], dim=-1).to(draw.dtype),
        "chunk_plucker": draw.video(48),
        "return_dict": False,
    }


_LTX2 = {
    **HEADS,
    "num_layers": 2,
    "cross_attention_dim": WIDTH,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": WIDTH // 2,
    "audio_cross_attention_dim": WIDTH,
    "caption_channels": WIDTH,
    "rope_double_precision": False,
}
_KANDINSKY6 = {"model_dim": WIDTH, "ff_dim": 2 * WIDTH, "time_dim": WIDTH, "axes_dims": _AXES, "num_visual_blocks": 2}
_COGVIDEOX = {
    **HEADS,
    "num_layers": 2,
    "time_embed_dim": WIDTH,
    "text_embed_dim": WIDTH,
    "max_text_seq_length": ONE.text,
}

ENTRIES = (
    entry(
        "hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        _hunyuan,
        batch=1,
        **HEADS,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=_AXES,
    ),
    entry(
        "hunyuan_video15",
        "HunyuanVideo15Transformer3DModel",
        _hunyuan15,
        **HEADS,
        num_layers=2,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=_AXES,
    ),
    entry(
        "framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        _framepack,
        batch=1,
        **HEADS,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=_AXES,
        has_image_proj=True,
        image_proj_dim=WIDTH,
        has_clean_x_embedder=True,
    ),
    entry(
        "ltx_video",
        "LTXVideoTransformer3DModel",
        _ltx,
        **HEADS,
        num_layers=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
    ),
    entry("ltx2", "LTX2VideoTransformer3DModel", _ltx2, **_LTX2),
    entry("sana_wm_refiner", "SanaWMLTX2RefinerTransformer3DModel", _sana_wm_refiner, **_LTX2),
    entry("cogvideox", "CogVideoXTransformer3DModel", _cogvideox, **_COGVIDEOX, use_rotary_positional_embeddings=True),
    entry(
        "consisid",
        "ConsisIDTransformer3DModel",
        _consisid,
        **_COGVIDEOX | {"num_attention_heads": 3},  # the face encoder's width is two thirds of the model's
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=WIDTH // 2,
        cross_attn_num_heads=2,
        LFE_id_dim=WIDTH,
        LFE_vit_dim=WIDTH,
        LFE_depth=2,
        LFE_dim_head=WIDTH // 2,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=WIDTH,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    ),
    entry(
        "mochi",
        "MochiTransformer3DModel",
        _mochi,
        **HEADS,
        num_layers=3,
        pooled_projection_dim=WIDTH,
        text_embed_dim=WIDTH,
        time_embed_dim=WIDTH,
        max_sequence_length=ONE.text,
    ),
    entry(
        "allegro",
        "AllegroTransformer3DModel",
        _allegro,
        num_attention_heads=2,
        attention_head_dim=96,
        num_layers=2,
        cross_attention_dim=192,
        caption_channels=WIDTH,
        sample_height=ONE.rows,
        sample_width=ONE.rows,
        sample_frames=5,
    ),
    entry(
        "latte",
        "LatteTransformer3DModel",
        _latte,
        **HEADS,
        num_layers=2,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
        sample_size=2 * ONE.rows,
        video_length=ONE.frames,
    ),
    entry(
        "cosmos",
        "CosmosTransformer3DModel",
        _cosmos,
        **HEADS,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        adaln_lora_dim=64,
        max_size=(8, 32, 32),
        concat_padding_mask=False,  # with it the class needs torchvision
    ),
    entry(
        "cosmos3",
        "Cosmos3OmniTransformer",
        _cosmos3,
        head_dim=WIDTH // 2,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        latent_channel=16,
        latent_patch_size=2,
        patch_latent_dim=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        rope_axes_dim=[12, 10, 10],
        vocab_size=64,
    ),
    entry(
        "easyanimate",
        "EasyAnimateTransformer3DModel",
        _easyanimate,
        **HEADS,
        in_channels=16,
        out_channels=16,
        patch_size=2,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=WIDTH,
        text_embed_dim=WIDTH,
    ),
    entry(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        _kandinsky5,
        in_visual_dim=16,
        out_visual_dim=16,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        num_text_blocks=2,
        **_KANDINSKY6,
    ),
    entry(
        "kandinsky6",
        "Kandinsky6Transformer3DModel",
        _kandinsky6,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        num_text_blocks=2,
        **_KANDINSKY6,
    ),
    entry("kandinsky6_sr", "Kandinsky6SRTransformer3DModel", _kandinsky6_sr, **_KANDINSKY6),
    entry(
        "motif_video",
        "MotifVideoTransformer3DModel",
        _motif,
        **HEADS,
        num_layers=2,
        num_single_layers=2,
        num_decoder_layers=2,
        text_embed_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=_AXES,
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    ),
    entry(
        "minimax_h3",
        "MiniMaxH3Transformer3DModel",
        _minimax_h3,
        **HEADS,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=2,
        ffn_dim=2 * WIDTH,
        in_channels=16,
        audio_in_channels=64,
        text_dim=WIDTH,
        freq_dim=64,
        time_embed_hidden_dim=WIDTH,
        time_embed_dim=WIDTH,
        rope_freq_dim=8,
    ),
    entry(
        "transformer_temporal",
        "TransformerTemporalModel",
        _temporal,
        **HEADS,
        in_channels=WIDTH,
        num_layers=2,
    ),
    entry(
        "sana_video",
        "SanaVideoTransformer3DModel",
        _sana_video,
        **HEADS,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=ONE.rows,
        rope_max_seq_len=32,
    ),
    entry(
        "sana_wm",
        "SanaWMTransformer3DModel",
        _sana_wm,
        float32_on_cpu=True,
        in_channels=16,
        num_layers=4,
        hidden_size=WIDTH,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=WIDTH // 2,
        chunk_plucker_post_attn_blocks=4,
        caption_channels=WIDTH,
    ),
)
