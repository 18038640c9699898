"""Loading a quantized file: one of `svdq_compile.save`, or one of Nunchaku's. Which one it is, its content says."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import checkpoint, nunchaku
from .errors import OptionError
from .foreign import groups_of
from .given import device_in, model_in
from .holders import Holders
from .nunchaku_file import is_nunchaku
from .ranks import together
from .split_linear import check_whole
from .split_loading import load_part


def load(
    model: nn.Module,
    path: str | os.PathLike,
    device: str | int | torch.device | None = None,
    *,
    precision: str | None = None,
    mesh: Any = None,
    plan: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Load a quantized file into a model of the same class, on the meta device or with any weights; returns the model,
    in eval mode.

    path       a file that `save` wrote or the folder of `save_pretrained`; or Nunchaku's: a single file, a folder with
               transformer_blocks.safetensors, a folder of diffusers' nunchaku_lite
    device     where the tensors go; by default where the model is, or the CPU for a model on the meta device
    precision  of Nunchaku's files: "w4a8" codes their 4-bit linears anew, which is faster on many GPUs, and says by how
               much the weights change. By default their integers and scales are taken as they are
    mesh       of torch.distributed: each of its ranks, which all call this, gets its part of the model, and reads no
               more; plan: what is split. Both as in `parallelize`

    No 16-bit form of a quantized weight stays anywhere. Raises NotAModel, OptionError, SplitRefused,
    FileNotFoundError, and FileRefused, naming the tensor: before the model is changed.
    """
    holders = None if mesh is None else Holders.of(mesh)

    def checked() -> tuple[nn.Module, torch.device | None, bool]:
        checkpoint.check_order(model, path, "load")
        inner = model_in(model, "load")
        check_whole(inner, "loading into it", "Load into a new one, on the meta device.")
        if any(getattr(group, "cpu_param_dict", None) for group in groups_of(inner)):
            raise OptionError(
                "group offloading on a stream keeps copies of what this model was: load before it is enabled"
            )
        target = None if device is None else device_in(device)
        if plan is not None and mesh is None:
            raise OptionError("plan says how ranks share a model: give the mesh of these ranks too")
        is_theirs = is_nunchaku(path)
        if is_theirs and mesh is not None:
            raise OptionError(f"{path} is Nunchaku's: load it whole, then call svdq_compile.parallelize(model, mesh)")
        if precision is not None and not is_theirs:
            raise OptionError(
                f"precision={precision!r} goes with Nunchaku's files, and {path} is none: a file of ours is loaded as "
                "it is"
            )
        return inner, target, is_theirs

    inner, target, is_theirs = together(None if holders is None else holders.ranks)(checked)
    if is_theirs:
        nunchaku.load(inner, path, target, precision=precision, progress=progress)
    elif holders is None:
        checkpoint.load(inner, path, target, progress=progress)
    else:
        load_part(inner, path, target, holders, plan, progress=progress)
    return model
