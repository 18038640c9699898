"""What a caller gave as a model, a device: taken if it is one, else refused with what to give instead."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import NotAModel, OptionError

DENOISERS = ("transformer", "transformer_2", "unet")  # of a pipeline, the first it has where one is wanted


def denoisers(given: Any, function: str) -> dict[str, nn.Module]:
    """The models to work on, by the name of the attribute that holds each: those of a pipeline that denoise, or "" for
    a model itself. `function` is what was called, for the NotAModel that anything else raises.
    """
    if isinstance(given, nn.Module):
        return {"": given}
    parts = {name: getattr(given, name, None) for name in DENOISERS}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not found:
        raise NotAModel(_what_instead(given, function))
    return found


def model_in(given: Any, function: str) -> nn.Module:
    """A model, out of the wrapper that torch.compile may have put around it. Raises NotAModel, which says of a pipeline
    what attribute to give.
    """
    if isinstance(given, nn.Module):
        return getattr(given, "_orig_mod", given)
    raise NotAModel(_what_instead(given, function))


def device_in(device: str | int | torch.device) -> torch.device:
    """A device that torch can use here, "cuda" with its number. Raises OptionError."""
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise OptionError(f"device={device!r} is no device: give 'cpu', 'cuda' or 'cuda:1'") from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise OptionError(f"device={str(wanted)!r}: this PyTorch sees no CUDA GPU; give device='cpu'")
        if wanted.index is not None and wanted.index >= count:
            raise OptionError(f"device={str(wanted)!r}: the last GPU that this PyTorch sees is 'cuda:{count - 1}'")
    return torch.empty(0, device=wanted).device


def _what_instead(given: Any, function: str) -> str:
    call, kind = f"svdq_compile.{function}", type(given).__name__
    if inspect.isclass(given):
        return f"{given.__name__} is a class, not a model: give {call} an instance, as from_pretrained makes one"
    if isinstance(given, str | os.PathLike):
        return f"{str(given)!r} is a path, not a model: load it first, with from_pretrained, and give {call} the model"
    if isinstance(given, Mapping):
        return f"{kind} is not a model: give {call} the nn.Module that the state dict belongs to"
    empty = [name for name in DENOISERS if hasattr(given, name)]
    if empty and not any(isinstance(getattr(given, name), nn.Module) for name in empty):
        return (
            f"the {empty[0]} of this {kind} is {getattr(given, empty[0])!r:.60}, not a model: load the pipeline with it"
        )
    parts = [name for name, part in _components(given).items() if isinstance(part, nn.Module)]
    wanted = [name for name in parts if name in DENOISERS] or parts
    if wanted:
        ways = " or ".join(f"{call}(pipe.{name})" for name in wanted)
        return f"{kind} is a pipeline, not a model: give the model in it, as in {ways}"
    shown = kind if "\n" in repr(given) else f"{given!r:.60}"
    return f"{shown} is not a model: give {call} an nn.Module, as in {call}(pipe.transformer)"


def _components(given: Any) -> dict[str, Any]:
    """The parts of a pipeline, by name."""
    return dict(getattr(given, "components", None) or getattr(given, "__dict__", {}))
