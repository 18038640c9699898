"""diffusers' own way to load in 4 bits: `SVDQuantConfig` for `Model.from_pretrained(folder, quantization_config=...)`
and `PipelineQuantizationConfig`, and what loads a folder whose config.json names us.

To import it is to register both; `registering.py` sees to that where diffusers is.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from . import checkpoint
from .config import Config
from .deferred import Deferred
from .errors import FileRefused, OptionError
from .filling import fill
from .given import device_in
from .header import VERSION, is_ours
from .model_files import check_dtype, in_dtype
from .parameter import QuantizedWeight
from .pretrained import QUANT_METHOD
from .quantize_model import restore
from .stored import has_scales, here, stored, with_scales
from .summary import tell_again, tell_to_compile

# Options that say how a model is compiled or observed: those go to torch.compile and svdq_compile.quantize.
ELSEWHERE = frozenset(("calibration_steps", "fuse", "attention", "mode", "group"))
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that accelerate makes
# The codes' share of a packed weight, which has scales and a branch beside them: 0.85 and more at rank 32 and up from
# 1536 x 1536.
CODES = 0.85
_CPU = torch.device("cpu")


class Method(str, Enum):
    """diffusers asks a method for its `value`."""

    SVDQUANT = QUANT_METHOD


class SVDQuantConfig(QuantizationConfigMixin):
    """Which 4-bit form a model of diffusers takes while it is loaded, by its weights alone.

        FluxTransformer2DModel.from_pretrained(folder, quantization_config=SVDQuantConfig(), dtype=torch.bfloat16)
        PipelineQuantizationConfig(quant_mapping={"transformer": SVDQuantConfig(precision="int4", rank=64)})

    options         those of `Config` that concern weights
    format_version  of a folder's files, in its config.json

    Raises OptionError for another option, and for a version that is newer than this package.
    """

    def __init__(self, quant_method: str = QUANT_METHOD, format_version: int = VERSION, **options: Any) -> None:
        if quant_method != QUANT_METHOD:
            raise OptionError(f"quant_method={quant_method!r}: SVDQuantConfig is for {QUANT_METHOD!r}")
        if not isinstance(format_version, int) or format_version > VERSION:
            raise OptionError(
                f"quantization_config: format_version={format_version!r}; this svdq-compile reads up to {VERSION}: "
                "update it"
            )
        for name in sorted(ELSEWHERE & options.keys()):
            raise OptionError(
                f"option {name} does not go with loading: it is torch.compile's, as in "
                f"model.compile(backend='svdquant', options={{{name!r}: ...}})"
            )
        self.quant_method = Method.SVDQUANT  # type: ignore[assignment]  # an enum of diffusers', which has none for us
        config = Config(**options).to_dict()
        self.__dict__.update((name, config[name]) for name in options)

    def config(self) -> Config:
        """As the rest of the package knows it."""
        return Config(**{name: value for name, value in self.__dict__.items() if name != "quant_method"})

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it: without what only the call asks for."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("progress", "fallback")}
        return kept | {"quant_method": QUANT_METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class SVDQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads: the model is filled before diffusers would read its weights, from files of
    ours by `checkpoint.load`, from others by `filling.fill`. Of what diffusers does then only placing is left.
    """

    use_keep_in_fp32_modules = True
    quantization_config: SVDQuantConfig
    _dtype: torch.dtype | None = None
    _files: Sequence[Path] = ()
    _filled = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises OptionError for a place where 4-bit weights cannot be."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise OptionError("device_map: 4-bit weights are not offloaded to the disk; give 'cpu', or a GPU")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Without one diffusers takes float32, in which nobody runs 4-bit weights. Raises OptionError for one that no
        model computes in.
        """
        check_dtype(torch_dtype)
        self._dtype = torch_dtype
        return torch_dtype or torch.bfloat16

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, Any]:
        """How wide a number of each tensor is, by which accelerate spreads the model, filled by now, over devices."""
        return {name: _about_as_wide(p) for name, p in (*model.named_parameters(), *model.named_buffers())}

    def adjust_max_memory(self, max_memory: Mapping[str, float | str]) -> dict[str, int | str]:
        """Room for what 4-bit weights have beside their codes. Sizes are as users give them, or accelerate's own for
        "auto": a part of what is free, no whole number.
        """
        from accelerate.utils.modeling import convert_file_size_to_int

        sizes = {place: convert_file_size_to_int(s) if isinstance(s, str) else s for place, s in max_memory.items()}
        return {place: int(size * CODES) for place, size in sizes.items()}

    def get_cuda_warm_up_factor(self) -> int:
        """The weights are there before diffusers would make room for them."""
        return 2**60

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._files = [Path(file) for file in checkpoint_files]
        return [] if self.pre_quantized else loaded_keys

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        return []  # `fill` and `load` have refused them

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self._filled:
            return {}
        if any(name.endswith(".qweight") for name in state_dict):  # of `from_single_file`, before it is converted
            raise OptionError("this checkpoint is in 4 bits already: svdq_compile.load(model, path) loads it")
        if not has_scales(state_dict):
            return state_dict
        return with_scales(Path("the checkpoint"), {name: here(tensor) for name, tensor in state_dict.items()})

    def check_if_quantized_param(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]  # nobody asks
        """Each is in its place already."""

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any = None, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> nn.Module:
        """state_dict: of `from_single_file`, as diffusers' converters have made it; otherwise there are files."""
        place = _one_place(device_map)
        if state_dict is not None:
            self.pre_quantized = False  # diffusers says nothing, and takes it to be
            self._fill(
                model, {name: here(tensor) for name, tensor in state_dict.items()}, Path("the checkpoint"), place
            )
        elif self.pre_quantized:
            self._load(model, place)
        else:
            with stored(self._files[0].parent, self._files) as tensors:
                model._fix_state_dict_keys_on_load(tensors)  # type: ignore[operator]
                self._fill(model, tensors, self._files[0].parent, place)
        self._filled = True
        return model

    def _fill(self, model: nn.Module, tensors: dict[str, Deferred], path: Path, place: torch.device) -> None:
        at = torch.device("cuda") if place == _CPU and torch.cuda.is_available() else place
        in_dtype(model, self.update_torch_dtype(self._dtype))
        fill(model, tensors, path, self.quantization_config.config(), at=at, place=place)

    def _load(self, model: nn.Module, place: torch.device) -> None:
        if not is_ours(self._files[0]):
            raise FileRefused(self._files[0], "config.json says that it is in 4 bits, and it holds other weights")
        path = self._files[0] if len(self._files) == 1 else self._files[0].parent
        checkpoint.load(model, path, place, progress=False)
        if self._dtype is not None:
            in_dtype(model, self._dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        model.is_quantized = False  # diffusers refuses to cast what it calls so; a cast keeps these 4 bits
        visible = self.quantization_config.config().progress
        tell_again(model, visible)
        tell_to_compile(model, visible)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        restore(model, dequantize=True)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _about_as_wide(tensor: Tensor) -> Any:
    """A dtype that takes as much as `tensor` does: of whole bytes or half a one, which is what accelerate can count."""
    from accelerate.utils import CustomDtype

    if not isinstance(tensor, QuantizedWeight):
        return tensor.dtype
    codes = CODES * tensor._svdq.nbytes() / tensor.numel()
    return CustomDtype.INT4 if codes <= 0.5 else CustomDtype.FP8 if codes <= 1 else tensor.dtype


def _one_place(device_map: Any) -> torch.device:
    """The device of a whole model; the CPU where diffusers will spread it."""
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        return device_in(places.pop()) if len(places) == 1 else _CPU
    return _CPU if device_map is None or device_map in _STRATEGIES else device_in(device_map)


# diffusers looks into these dictionaries at each call.
auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SVDQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SVDQuantConfig
