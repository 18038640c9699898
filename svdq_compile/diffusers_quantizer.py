"""diffusers' own way to load in 4 bits: `SVDQuantConfig` for `Model.from_pretrained(folder, quantization_config=...)` and
`PipelineQuantizationConfig`, and what loads a folder whose config.json names us.

Imported where diffusers is: `registering.py` sees to that.
"""

from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from . import checkpoint
from .config import Config
from .errors import OptionError
from .given import device_in
from .header import is_ours
from .pretrained import QUANT_METHOD
from .quantize_model import quantize

# Options that say how a model is compiled or observed: those go to torch.compile and svdq_compile.quantize.
ELSEWHERE = frozenset(("calibration_steps", "fuse", "attention", "mode"))


class Method(str, Enum):
    """diffusers asks a method for its `value`."""

    SVDQUANT = QUANT_METHOD


class SVDQuantConfig(QuantizationConfigMixin):
    """Which 4-bit form a model of diffusers takes when it is loaded, by its weights alone.

        FluxTransformer2DModel.from_pretrained(folder, quantization_config=SVDQuantConfig(), dtype=torch.bfloat16)
        PipelineQuantizationConfig(quant_mapping={"transformer": SVDQuantConfig(precision="int4", rank=64)})

    options  those of `Config` that concern weights. Raises OptionError for another
    """

    def __init__(self, quant_method: str = QUANT_METHOD, **options: Any) -> None:
        if quant_method != QUANT_METHOD:
            raise OptionError(f"quant_method={quant_method!r}: SVDQuantConfig is for {QUANT_METHOD!r}")
        for name in ELSEWHERE & options.keys():
            raise OptionError(
                f"option {name} does not go with loading: it is torch.compile's, as in "
                f"model.compile(backend='svdquant', options={{{name!r}: ...}})"
            )
        self.quant_method = Method.SVDQUANT
        config = Config(**options).to_dict()
        self.__dict__.update((name, config[name]) for name in options)

    def config(self) -> Config:
        """As the rest of the package knows it."""
        return Config(**{name: value for name, value in self.__dict__.items() if name != "quant_method"})

    def to_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"quant_method": QUANT_METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class SVDQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads. A model that is quantized already is read by `svdq_compile.load`, past
    diffusers' own reading, which knows of no packed tensors.
    """

    use_keep_in_fp32_modules = True
    quantization_config: SVDQuantConfig
    _files: list[Path]
    _device_map: Any = None

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Nobody runs 4-bit weights in float32, which is what diffusers takes if nothing is said."""
        return torch.bfloat16 if torch_dtype in (None, torch.float32) else torch_dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Weights that are not there yet cannot be dispatched: a quantized model is placed after it is read."""
        if not self.pre_quantized:
            return device_map
        self._device_map = device_map
        return None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files = [Path(file) for file in checkpoint_files]
        return [] if self.pre_quantized else loaded_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        return [] if self.pre_quantized else missing_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {} if self.pre_quantized else state_dict

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            quantize(model, self.quantization_config.config())
            return model
        (file,) = self._files
        if not is_ours(file):
            raise OptionError(f"{file}: config.json says that it is in 4 bits, and it holds other weights")
        checkpoint.load(model, file, _first_device(self._device_map), progress=False)
        if isinstance(self._device_map, dict) and len(set(self._device_map.values())) > 1:
            from accelerate import dispatch_model

            dispatch_model(model, self._device_map)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _first_device(device_map: Any) -> torch.device | None:
    """Where a quantized model goes that `from_pretrained` was given this for."""
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, dict):
        places = set(device_map.values())
        return device_in(places.pop()) if len(places) == 1 else torch.device("cpu")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_in(device_map)


def register() -> None:
    """Let diffusers know of both classes: it looks into these dictionaries at each call."""
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SVDQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SVDQuantConfig
