"""`save_pretrained` of a quantized model of diffusers or transformers: its configuration and its 4-bit weights, in a
folder from which `svdq_compile.load` fills a model, and `from_pretrained` makes one, of diffusers' models. Without this
it would begin a folder and then fail.
"""

import inspect
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from .errors import OptionError
from .header import DIFFUSERS_NAME, FILE_NAME, VERSION, is_ours, saved_in
from .parameter import has_quantized
from .progress import say
from .reading import state_of
from .split_linear import SAVE_BEFORE, check_whole

_BASES = (("diffusers.models.modeling_utils", "ModelMixin"), ("transformers.modeling_utils", "PreTrainedModel"))
QUANT_METHOD = "svdquant"  # what config.json says
# Arguments that would ask for something else, and the values that ask for nothing.
_REFUSED = {"safe_serialization": True, "variant": None, "push_to_hub": False, "use_flashpack": False}

Write = Callable[[nn.Module, Path, int | str], None]


def serve_save_pretrained(write: Write) -> None:
    """Called before weights are quantized or loaded: from now on the models of the libraries that are there can save
    them, by `write`, which writes a model to a file, or to shards of so many bytes. Models that hold no quantized
    weight are saved as ever.
    """
    for module, name in _BASES:
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and not hasattr(base.save_pretrained, "_svdq_serves"):
            base.save_pretrained = _serving(base.save_pretrained, write)


def _serving(original: Callable[..., Any], write: Write) -> Callable[..., Any]:
    @wraps(original)
    def save_pretrained(self: nn.Module, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
        given = bound | bound.get("kwargs", {})
        writes = given.get("is_main_process", True)
        check_whole(self, "saving", SAVE_BEFORE)
        if not has_quantized(self):
            _say_quantized(self, False)
            earlier = {file: state_of(file) for file in saved_in(Path(save_directory)) if writes}
            result = original(self, save_directory, *args, **kwargs)
            for file, state in earlier.items():
                if state_of(file) == state:
                    file.unlink()  # it is this model no more
            return result
        for option, usual in _REFUSED.items():
            if given.get(option, usual) != usual:
                raise OptionError(
                    f"save_pretrained of a model in 4 bits cannot take {option}={given[option]!r}: leave it out"
                )
        if writes:
            _save(self, Path(save_directory), given.get("max_shard_size", "10GB"), write)
        return None

    save_pretrained._svdq_serves = True  # type: ignore[attr-defined]
    return save_pretrained


def _save(model: nn.Module, folder: Path, size: int | str, write: Write) -> None:
    if folder.is_file():
        raise OptionError(f"{folder} is a file: give save_pretrained a folder")
    is_diffusers = hasattr(model, "save_config")
    target = folder / (DIFFUSERS_NAME if is_diffusers else FILE_NAME)
    files = [p for p in folder.glob("*") if p.suffix == ".bin" or (p.suffix == ".safetensors" and not is_ours(p))]
    if files:
        raise OptionError(f"{folder} holds other weights ({files[0].name}): give save_pretrained a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    write(model, target, size)
    _say_quantized(model, True)
    _save_config(model, folder)
    kind = type(model).__name__
    way = f"{kind}.from_pretrained({str(folder)!r})" if is_diffusers else f"svdq_compile.load(model, {str(folder)!r})"
    say(f"svdquant: 4-bit weights in {folder}; {way} loads them", True)


def _say_quantized(model: Any, is_quantized: bool) -> None:
    """In the configuration of a model of diffusers, from which `from_pretrained` knows whom to ask."""
    config = getattr(model, "_internal_dict", None)
    if config is None:
        return
    told = config.get("quantization_config") or {}
    told = told if isinstance(told, dict) else told.to_dict()
    is_told = told.get("quant_method") == QUANT_METHOD
    if is_quantized:
        ours = {"quant_method": QUANT_METHOD, "format_version": VERSION}
        model.register_to_config(quantization_config=(told if is_told else {}) | ours)
    elif is_told:
        model._internal_dict = type(config)({k: v for k, v in config.items() if k != "quantization_config"})


def _save_config(model: Any, folder: Path) -> None:
    """As diffusers' models do it, or transformers'."""
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)
