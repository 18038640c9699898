"""Proteins: RFdiffusion4's denoiser, over residues and over pairs of residues."""

from typing import Any

import torch

from .entry import WIDTH, Draw, entry


def _proteina(draw: Draw) -> dict[str, Any]:
    tokens = draw.text
    shape = (draw.batch, tokens)
    return {
        "bb_ca": draw(*shape, 3).float(),
        "local_latents": draw(*shape, 32).float(),
        "bb_ca_time": torch.full((draw.batch,), 0.5),
        "local_latents_time": torch.full((draw.batch,), 0.5),
        "padding_mask": torch.ones(shape, dtype=torch.bool),
        "token_type": torch.zeros(shape, dtype=torch.long),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(shape, dtype=torch.bool),
            "supports_local_latent": torch.ones(shape, dtype=torch.bool),
        },
        "return_dict": False,
    }


ENTRIES = (
    entry(
        "rfd4_proteina",
        "RFD4ProteinaTransformer",
        _proteina,
        nlayers=4,
        token_dim=WIDTH,
        nheads=2,
        dim_cond=WIDTH,
        pair_repr_dim=64,
        tri_mult_c=64,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",),
    ),
)
