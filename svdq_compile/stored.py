"""The tensors of files that other programs wrote, none of them read yet: safetensors and pickles, whole and in shards,
GGUF, 8-bit checkpoints with scales; and those of a model's authors under diffusers' names.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .deferred import Deferred
from .errors import FileRefused, SvdqError
from .header import DIFFUSERS_NAME, INDEX
from .reading import TensorFile, opened, shards_of, unchanged

Tensors = dict[str, Deferred]

_NAMES = (DIFFUSERS_NAME, "diffusion_pytorch_model.bin")  # of a folder of diffusers', without a variant
# What 8-bit and 4-bit checkpoints have beside a weight, without which its numbers are wrong.
_SCALES = (".weight_scale", ".weight_scale_2", ".input_scale", ".scale_weight", ".scale_input")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of a folder of diffusers': the shards that an index names, or one. Raises
    FileNotFoundError, FileRefused.
    """
    for name in _NAMES:
        index = folder / f"{name}{INDEX}"
        if index.is_file():
            return shards_of(index)
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder}: there is no {DIFFUSERS_NAME} in it, nor an index of its shards")


@contextmanager
def stored(path: Path, files: Sequence[Path]) -> Iterator[Tensors]:
    """The tensors of some files, which stay open, by name. Raises FileRefused: for `path` if somebody writes to one."""
    with unchanged(path, files), ExitStack() as held:
        tensors: Tensors = {}
        for file in files:
            for name, tensor in _reader(file)(file, held).items():
                if name in tensors:
                    raise FileRefused(path, f"tensor {name} is in two of its files")
                tensors[name] = tensor
        yield with_scales(path, tensors)


def _reader(file: Path) -> Callable[[Path, ExitStack], Tensors]:
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return _pickle
    return _gguf if file.suffix == ".gguf" else _safetensors


def _safetensors(path: Path, held: ExitStack) -> Tensors:
    file = held.enter_context(opened(path))
    return {name: _of_file(file, name) for name in file.dtypes}


def _of_file(file: TensorFile, name: str) -> Deferred:
    whole = file.whole(name)
    return Deferred.of(tuple(whole.shape), whole.dtype, lambda: file.get(name))


def _pickle(path: Path, held: ExitStack) -> Tensors:
    """torch's own files, which are mapped; nothing but tensors is unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged ones give rise to any
        raise FileRefused(path, f"torch.load(weights_only=True, mmap=True) does not read it ({error})") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping):
        raise FileRefused(path, f"it holds a {type(state).__name__}, not tensors by name")
    named = {name: value for name, value in state.items() if isinstance(name, str)}
    return {name: here(tensor) for name, tensor in named.items() if isinstance(tensor, Tensor)}


def here(tensor: Tensor) -> Deferred:
    """A tensor that is in memory, or mapped, as those that are not."""
    return tensor if isinstance(tensor, Deferred) else Deferred.of(tuple(tensor.shape), tensor.dtype, tensor.clone)


def _gguf(path: Path, held: ExitStack) -> Tensors:
    """Blocks of 2 to 8 bits, expanded by diffusers' arithmetic when they are read."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise SvdqError(f"{path}: reading GGUF files needs gguf: pip install gguf") from None
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter, dequantize_gguf_tensor

    def expanded(tensor: Any) -> Tensor:
        values = torch.from_numpy(tensor.data.copy())
        if values.is_floating_point():
            return values
        return dequantize_gguf_tensor(GGUFParameter(values, quant_type=tensor.tensor_type))

    try:
        found = GGUFReader(path).tensors
        shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in found}
        tensors = {t.name: Deferred.of(shapes[t.name], torch.float32, partial(expanded, t)) for t in found}
    except Exception as error:  # damaged ones give rise to any
        raise FileRefused(path, f"not a whole GGUF file ({error})") from error
    for tensor in found:
        if tensor.data.dtype.kind != "f" and tensor.tensor_type not in SUPPORTED_GGUF_QUANT_TYPES:
            kind = tensor.tensor_type.name
            raise FileRefused(path, f"tensor {tensor.name} is of GGUF's type {kind}, which diffusers does not expand")
    return tensors


def with_scales(path: Path, tensors: Tensors) -> Tensors:
    """Weights that have scales beside them, multiplied when they are read. Raises FileRefused for scales of another
    kind.
    """
    named = [name for name in tensors if _is_of_scales(name)]
    for name in named:
        module, _, kind = name.rpartition(".")
        weight = tensors.get(f"{module}.weight")
        if kind == "weight_scale" and weight is not None and _is_a_scale_a_row(weight, tensors[name]):
            tensors[f"{module}.weight"] = _scaled(weight, tensors[name])
        elif kind != "input_scale":
            raise FileRefused(path, f"{name} says that its weights are scaled in a way that is not known here")
    return {name: tensor for name, tensor in tensors.items() if name not in named}


def has_scales(tensors: Mapping[str, Any]) -> bool:
    """Whether there is something beside the weights without which their numbers are wrong."""
    return any(map(_is_of_scales, tensors))


def _is_of_scales(name: str) -> bool:
    return name.endswith(_SCALES) or name == "scaled_fp8"


def _is_a_scale_a_row(weight: Deferred, scale: Deferred) -> bool:
    return weight.dtype == torch.float8_e4m3fn and scale.shape == weight.shape[:1]


def _scaled(weight: Deferred, scale: Deferred) -> Deferred:
    """fp8, with a scale for each row."""
    return Deferred.of(
        tuple(weight.shape), torch.float32, lambda: weight.now().float() * scale.now().float().unsqueeze(1)
    )


def converted(path: Path, kind: Any, config: dict[str, Any], tensors: Tensors) -> Tensors:
    """A checkpoint as its authors name it, cut and named as a class of diffusers has it. Raises FileRefused."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    diffusers, classes = importlib.import_module("diffusers"), cast(dict[str, Any], SINGLE_FILE_LOADABLE_CLASSES)
    name = next((name for name in classes if issubclass(kind, getattr(diffusers, name))), None)
    if name is None:
        raise FileRefused(path, f"its tensors are not named as a {kind.__name__}'s, and diffusers converts none")
    try:
        found = classes[name]["checkpoint_mapping_fn"](config=config, checkpoint=dict(tensors))
    except Exception as error:  # of a checkpoint of another model any
        raise FileRefused(
            path, f"diffusers makes no {kind.__name__} of it ({type(error).__name__}: {error})"
        ) from error
    return {name: here(tensor) for name, tensor in found.items()}
