"""`save_pretrained` of a quantized model of diffusers or transformers: its configuration and its 4-bit weights, in a
folder from which `svdq_compile.load` fills a model, and, of diffusers' models, `from_pretrained` makes one. Without this
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
from .header import DIFFUSERS_NAME, FILE_NAME, is_ours
from .parameter import has_quantized
from .progress import say

_BASES = (("diffusers.models.modeling_utils", "ModelMixin"), ("transformers.modeling_utils", "PreTrainedModel"))
QUANT_METHOD = "svdquant"  # what config.json says
# Arguments that would ask for something else, and the values that ask for nothing.
_REFUSED = {"safe_serialization": True, "variant": None, "push_to_hub": False, "use_flashpack": False}

Write = Callable[[nn.Module, Path], None]


def serve_save_pretrained(write: Write) -> None:
    """Called before weights are quantized or loaded: from now on the models of the libraries that are there can save
    them, by `write`, which writes a model to a file. Models that hold no quantized weight are saved as ever.
    """
    for module, name in _BASES:
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and not hasattr(base.save_pretrained, "_svdq_serves"):
            base.save_pretrained = _serving(base.save_pretrained, write)


def _serving(original: Callable[..., Any], write: Write) -> Callable[..., Any]:
    @wraps(original)
    def save_pretrained(self: nn.Module, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if not has_quantized(self):
            _say_quantized(self, False)
            result = original(self, save_directory, *args, **kwargs)
            (Path(save_directory) / FILE_NAME).unlink(missing_ok=True)  # of an earlier save: it is this model no more
            return result
        bound = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
        given = bound | bound.get("kwargs", {})
        for option, usual in _REFUSED.items():
            if given.get(option, usual) != usual:
                raise OptionError(
                    f"save_pretrained of a model in 4 bits cannot take {option}={given[option]!r}: leave it out"
                )
        if given.get("is_main_process", True):
            _save(self, Path(save_directory), write)
        return None

    save_pretrained._svdq_serves = True  # type: ignore[attr-defined]
    return save_pretrained


def _save(model: nn.Module, folder: Path, write: Write) -> None:
    if folder.is_file():
        raise OptionError(f"{folder} is a file: give save_pretrained a folder")
    target = folder / (DIFFUSERS_NAME if hasattr(model, "save_config") else FILE_NAME)
    files = [p for p in folder.glob("*") if p.suffix == ".bin" or (p.suffix == ".safetensors" and not is_ours(p))]
    if files:
        raise OptionError(f"{folder} holds other weights ({files[0].name}): give save_pretrained a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    write(model, target)
    _say_quantized(model, True)
    _save_config(model, folder)
    say(f"svdquant: 4-bit weights in {target}; svdq_compile.load(model, {str(folder)!r}) loads them", True)


def _say_quantized(model: Any, is_quantized: bool) -> None:
    """In the configuration of a model of diffusers, from which `from_pretrained` knows whom to ask."""
    config = getattr(model, "_internal_dict", None)
    if config is None:
        return
    if is_quantized:
        model.register_to_config(quantization_config={"quant_method": QUANT_METHOD})
    elif _method(config.get("quantization_config")) == QUANT_METHOD:
        model._internal_dict = type(config)({k: v for k, v in config.items() if k != "quantization_config"})


def _method(quantization_config: Any) -> Any:
    if isinstance(quantization_config, dict):
        return quantization_config.get("quant_method")
    return getattr(quantization_config, "quant_method", None)


def _save_config(model: Any, folder: Path) -> None:
    """As diffusers' models do it, or transformers'."""
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)
