"""Every denoiser class of diffusers, and some models beyond it, in small configurations with inputs.

    model, inputs = make("flux")
    (sample,) = model(**inputs)

Inside the blocks every linear has in and out features of at least 128 and a multiple of 64, so all of them qualify for
groups of 64; embedders and output projections keep the narrow latent channels of the published models. Each kind of
block comes at least twice, apart from SD3's last one, which updates no text and is alone in the published models too.
A family has a file; `check.py` says what must hold of each, `sweep.py` runs them all.
"""

from typing import Any

import torch
from torch import nn

from . import audio, beyond, controlnets, dit, entry, flux, mmdit, molecules, unets, video, video_wan
from .entry import ONE, THREE, Draw, Entry, Size

__all__ = ["NOT_DENOISERS", "ONE", "THREE", "ZOO", "Draw", "Entry", "Size", "make", "make_sizes"]

ZOO: dict[str, Entry] = {
    one.name: one
    for family in (flux, mmdit, dit, video_wan, video, audio, unets, controlnets, molecules, beyond)
    for one in family.ENTRIES
}

# What diffusers exports beside its denoisers, by class; autoencoders are left out by their folder (`test_zoo.py`).
NOT_DENOISERS = {
    "ModelMixin": "the base class",
    "MultiAdapter": "a list of T2IAdapters",
    "T2IAdapter": "convolutions, run once for a picture",
    "MotionAdapter": "a holder of weights for UNetMotionModel, without a forward",
    "ControlNetXSAdapter": "a holder of weights for UNetControlNetXSModel, without a forward",
    "MultiControlNetModel": "a list of ControlNets, each compiled by itself",
    "FluxMultiControlNetModel": "a list of ControlNets, each compiled by itself",
    "HunyuanDiT2DMultiControlNetModel": "a list of ControlNets, each compiled by itself",
    "QwenImageMultiControlNetModel": "a list of ControlNets, each compiled by itself",
    "SD3MultiControlNetModel": "a list of ControlNets, each compiled by itself",
    "Kandinsky6SRLatentUpscalerBank": "convolutions, between two models, run once for a video",
    "MiniMaxMusic3ConditionEncoder": "one convolution over three frames, run once for a piece",
}


def make(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of this name and its inputs; `config` changes its configuration."""
    model, (inputs,) = entry.make(ZOO[name], dtype, seed, **config)
    return model, inputs


def make_sizes(name: str, dtype: torch.dtype, *sizes: Size) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model of this name and its inputs in each of the sizes."""
    return entry.make(ZOO[name], dtype, sizes=sizes)
