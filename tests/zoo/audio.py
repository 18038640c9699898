"""Sound and music."""

from typing import Any

import torch

from .entry import HEADS, WIDTH, Draw, entry


def _length(draw: Draw) -> int:
    return draw.rows * draw.columns


def _stable_audio(draw: Draw) -> dict[str, Any]:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = get_1d_rotary_pos_embed(WIDTH // 4, _length(draw) + 1, use_real=True, repeat_interleave_real=False)
    return {
        "hidden_states": draw(draw.batch, 64, _length(draw)),
        "timestep": draw.half(),
        "encoder_hidden_states": draw.prompt(),
        "global_hidden_states": draw(draw.batch, 1, WIDTH),
        "rotary_embedding": rotary,
        "return_dict": False,
    }


def _stable_audio3(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(draw.batch, 64, _length(draw)),
        "timestep": draw.half(),
        "encoder_hidden_states": draw.prompt(),
        "global_hidden_states": draw(draw.batch, WIDTH),
        "return_dict": False,
    }


def _ace_step(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(draw.batch, _length(draw), 64),
        "timestep": draw.half(),
        "timestep_r": draw.half(),
        "encoder_hidden_states": draw.prompt(),
        "context_latents": draw(draw.batch, _length(draw), 128),
        "return_dict": False,
    }


def _longcat(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(draw.batch, _length(draw), 64),
        "encoder_hidden_states": draw.prompt(),
        "encoder_attention_mask": draw.mask(),
        "timestep": draw.half(),
        "attention_mask": torch.ones(draw.batch, _length(draw), dtype=torch.bool),
        "return_dict": False,
    }


def _minimax_music(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(draw.batch, 64, _length(draw)),
        "encoder_hidden_states": draw(draw.batch, _length(draw), WIDTH),
        "timestep": draw.half(),
        "return_dict": False,
    }


def _rvq(draw: Draw) -> dict[str, Any]:
    return {"inputs_embeds": draw(draw.batch, min(draw.text, 16), WIDTH)}


def _t5_film(draw: Draw) -> dict[str, Any]:
    encodings = (draw.prompt(), torch.ones(draw.batch, draw.text, dtype=torch.long))
    return {
        "encodings_and_masks": [encodings],
        "decoder_input_tokens": draw(draw.batch, _length(draw), WIDTH),
        "decoder_noise_time": draw.half(),
    }


ENTRIES = (
    entry(
        "stable_audio",
        "StableAudioDiTModel",
        _stable_audio,
        **HEADS,
        num_layers=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=WIDTH,
        cross_attention_input_dim=WIDTH,
        global_states_input_dim=WIDTH,
    ),
    entry(
        "stable_audio3",
        "StableAudio3DiTModel",
        _stable_audio3,
        io_channels=64,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        num_memory_tokens=4,
        ff_mult=2.0,
    ),
    entry(
        "ace_step",
        "AceStepTransformer1DModel",
        _ace_step,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=WIDTH // 2,
        in_channels=192,
        audio_acoustic_hidden_dim=64,
        patch_size=2,
        sliding_window=16,
    ),
    entry(
        "longcat_audio",
        "LongCatAudioDiTTransformer",
        _longcat,
        dit_dim=WIDTH,
        dit_depth=2,
        dit_heads=2,
        dit_text_dim=WIDTH,
        latent_dim=64,
    ),
    entry(
        "minimax_music",
        "MiniMaxMusic3Transformer1DModel",
        _minimax_music,
        **HEADS,
        in_channels=64,
        condition_dim=WIDTH,
        num_layers=2,
        ff_inner_dim=2 * WIDTH,
        rotary_dim=32,
        fourier_embedding_dim=64,
    ),
    entry(
        "minimax_rvq",
        "MiniMaxMusic3RVQDepthDecoder",
        _rvq,
        hidden_size=WIDTH,
        num_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        audio_vocab_size=64,
    ),
    entry(
        "t5_film",
        "T5FilmDecoder",
        _t5_film,
        tolerance=2.0,  # like T5, it does not divide its attention's scores
        input_dims=WIDTH,
        targets_length=64,
        d_model=WIDTH,
        num_layers=2,
        num_heads=2,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
    ),
)
