"""What can be quantized: a diffusers pipeline folder, a diffusers model folder, a single file with a model's weights, a
plain state dict.

Everything is read from local files; nothing is downloaded but by `pipeline_folder`, and no code in a folder is run
unless it is trusted.
A model comes in the 16-bit dtype it is stored in, and in bfloat16 if that is another: nobody runs 4-bit weights in
float32.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import FileRefused, OptionError, SvdqError
from .given import DENOISERS
from .header import is_quantized
from .nunchaku_file import is_nunchaku
from .passes.linears import QUANTIZABLE_DTYPES
from .reading import json_object
from .skeleton import most_common, state_dict_model
from .stored import Tensors, converted, stored, weight_files


@dataclass(frozen=True)
class Source:
    """A model whose weights are still in their files.

    path     where it is from; files: those that are read
    model    on the meta device, in the dtypes that its tensors are to have
    tensors  its state dict
    place    what a program would call the model, as in "pipe.transformer"
    """

    path: Path
    files: list[Path]
    model: nn.Module
    tensors: Tensors
    place: str


@dataclass(frozen=True)
class Pipeline:
    """A pipeline that was loaded.

    model  the one to quantize; draw: runs all of it, as in draw(prompt=..., num_inference_steps=...)
    place  what a program would call the model, as in "pipe.transformer"
    """

    model: nn.Module
    draw: Callable[..., Any]
    place: str


def model_folder(path: Path, component: str | None = None) -> tuple[Path, str]:
    """Where a model is, and what a program would call it: in a pipeline folder its folder, else the path itself. Raises
    FileNotFoundError, FileRefused, OptionError.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder (nothing is downloaded)")
    if (path / "model_index.json").is_file():
        component = _component(path, _read_json(path / "model_index.json"), component)
        return path / component, f"pipe.{component}"
    if component is not None:
        raise OptionError(f"--component needs a pipeline folder, and {path} has no model_index.json")
    return path, "model"


@contextmanager
def opened_source(
    path: Path, *, model: str | None = None, component: str | None = None, dtype: torch.dtype | None = None
) -> Iterator[Source]:
    """A model and its weights, none of them read; while this lasts the files are open, and nobody may write to them.

    model      of a single file: whose weights they are, as `empty_model` takes it. Without, it is a state dict of which
               nothing is known but its names
    component  of a pipeline folder: which model; by default the transformer, else the unet
    dtype      of the model, by default the 16-bit one that most of its numbers are stored in, else bfloat16

    Raises FileNotFoundError, FileRefused, OptionError, SvdqError where a package is missing.
    """
    folder, place = model_folder(path, component)
    if folder.is_dir() and model is not None:
        raise OptionError(f"model={model!r} goes with a single file, and {path} has its own config.json")
    _refuse_quantized(folder)
    if folder.is_dir():
        kind, config, described = _described(str(folder))
    elif model is not None:
        kind, config, described = _described(model)
    files = weight_files(folder) if folder.is_dir() else [folder]
    with stored(folder, files) as tensors:
        if not folder.is_dir() and model is None:
            yield Source(folder, files, state_dict_model(path, tensors, dtype), tensors, place)
            return
        found = _on_meta(str(described), kind, config, dtype or most_common(tensors))
        if folder.is_dir():
            found._fix_state_dict_keys_on_load(tensors)  # old names
        elif not tensors.keys() >= found.state_dict().keys():
            tensors = converted(path, kind, dict(found.config), tensors)
        yield Source(folder, files, found, tensors, place)


def empty_model(source: str, *, config: Path | None = None, component: str | None = None) -> nn.Module:
    """A model on the meta device, without weights, in the dtype it would be loaded in.

    source     a pipeline folder, a model folder (its config.json is enough), or the name of a class of diffusers
    config     of a class: a JSON file with what its constructor takes; by default the class's own values
    component  of a pipeline folder: which model; by default the transformer, else the unet
    """
    kind, content, folder = _described(source, config=config, component=component)
    return _on_meta(str(folder), kind, content, _dtype(folder))


def _described(
    source: str, *, config: Path | None = None, component: str | None = None
) -> tuple[Any, dict[str, Any], Path]:
    """The class of a model, its configuration, and the folder that has it, for `empty_model`."""
    path = Path(source)
    if not path.exists():
        if not source.isidentifier():
            raise FileNotFoundError(f"{path}: there is no such folder (nothing is downloaded)")
        return _model_class(path, source), {} if config is None else _read_json(config), path
    if config is not None:
        raise OptionError(f"--config goes with the name of a class, and {path} has its own")
    if (path / "model_index.json").is_file():
        path /= _component(path, _read_json(path / "model_index.json"), component)
    elif component is not None:
        raise OptionError(f"--component needs a pipeline folder, and {path} has no model_index.json")
    if not (path / "config.json").is_file():
        raise FileRefused(path, "neither a pipeline (no model_index.json) nor a model (no config.json)")
    content = _read_json(path / "config.json")
    return _model_class(path, content.get("_class_name")), content, path


def model_of_config(source: Path, name: str, config: Mapping[str, Any]) -> nn.Module:
    """A model on the meta device of a class of diffusers, as a file's own configuration describes it."""
    return _on_meta(str(source), _model_class(source, name or None), dict(config), torch.bfloat16)


def _on_meta(source: str, kind: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    try:
        with _default_dtype_kept(), no_init_weights(), init_empty_weights():
            torch.set_default_dtype(dtype)  # of tables that a class computes, which are there, as diffusers has it
            model = kind.from_config(config).eval()
    except Exception as error:  # a damaged one gives rise to any
        raise SvdqError(f"{source}: this configuration makes no {kind.__name__} ({error})") from error
    in_dtype(model, dtype)
    return model


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises OptionError for a dtype that no model in 4 bits computes in."""
    if dtype not in (None, *QUANTIZABLE_DTYPES):
        raise OptionError(f"dtype={dtype!r}: a model in 4 bits computes in torch.bfloat16, float16 or float32")


def in_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model have this dtype, but for what its class keeps in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype if kept.isdisjoint(name.split(".")) else torch.float32)


def _component(path: Path, index: Mapping[str, Any], component: str | None) -> str:
    """The folder of a pipeline's model."""
    component = component or next((name for name in DENOISERS if name in index), DENOISERS[0])
    if not isinstance(index.get(component), list) or not (path / component).is_dir():
        models = ", ".join(sorted(f.parent.name for f in path.glob("*/config.json"))) or "none"
        raise FileRefused(path, f"this pipeline has no {component}; its models are: {models}")
    return component


def pipeline_folder(source: str) -> Path:
    """The folder of a pipeline: itself, or that of a name on the Hugging Face hub, as "owner/name", which is downloaded
    where it is not there yet. Raises FileNotFoundError, SvdqError.
    """
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return Path(source)
    try:
        return Path(_diffusers().DiffusionPipeline.download(source))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{source}: there is no such folder, and the hub does not give it ({reason})"
        ) from error


def open_pipeline(path: Path, device: str, *, component: str | None = None, trust_code: bool = False) -> Pipeline:
    """Load a pipeline folder to a device.

    component   which model; by default the transformer, else the unet
    trust_code  let Python files in the folder run, if the pipeline needs them
    """
    if not (path / "model_index.json").is_file():
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder (nothing is downloaded)")
        raise OptionError(f"--prompt needs a pipeline folder, and {path} has no model_index.json")
    index = _read_json(path / "model_index.json")
    component = _component(path, index, component)
    pipe = _load_pipeline(path, index, _dtype(path / component), trust_code).to(device)
    # One bar a prompt, gone when it is done; none where nobody watches.
    pipe.set_progress_bar_config(desc="calibrating", leave=False, disable=None)
    return Pipeline(getattr(pipe, component), pipe, f"pipe.{component}")


def _load_pipeline(path: Path, index: Mapping[str, Any], dtype: torch.dtype, trust_code: bool) -> Any:
    own = _code_of_pipeline(path, index.get("_class_name"))
    code = [*([own] if own else []), *_code_of_components(path, index)]
    if code and not trust_code:
        names = ", ".join(str(file.relative_to(path)) for file in code)
        raise SvdqError(
            f"{path} brings its own code ({names}), which running prompts would execute. Read it, then give "
            "--trust-code; without --prompt, svdq quantize goes by the weights alone and runs no code of the folder"
        )
    custom = {"custom_pipeline": str(own)} if own else {}
    with _default_dtype_kept():
        return _diffusers().DiffusionPipeline.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=bool(code), **custom
        )


@contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """Who makes a model changes torch's; diffusers leaves it so when it raises."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _code_of_pipeline(path: Path, name: Any) -> Path | None:
    """The file with the pipeline's class; None for one of diffusers' own."""
    if isinstance(name, str) and hasattr(_diffusers(), name):
        return None
    file = path / (f"{name[0]}.py" if isinstance(name, list) else "pipeline.py")
    if not file.is_file():
        raise FileRefused(path, f"its class {name} is not in diffusers, and there is no {file.name} in the folder")
    return file


def _code_of_components(path: Path, index: Mapping[str, Any]) -> list[Path]:
    """The files beside a component's weights that its class comes from."""
    files = [path / name / f"{value[0]}.py" for name, value in index.items() if isinstance(value, list) and value]
    return [file for file in files if file.is_file()]


def _refuse_quantized(path: Path) -> None:
    """Raises FileRefused for a file or folder in 4 bits, or in another form of few bits that diffusers knows."""
    if is_nunchaku(path):
        raise FileRefused(path, f"this is quantized already, by Nunchaku: svdq convert {path} OUTPUT takes it")
    if is_quantized(path):
        raise FileRefused(path, f"this is quantized already; see svdq inspect {path}")
    if (path / "config.json").is_file():
        told = _read_json(path / "config.json").get("quantization_config")
        if told is not None:
            method = told.get("quant_method") if isinstance(told, dict) else told
            raise FileRefused(path, f"its config.json says that it is quantized, by {method}: give the 16-bit model")


def _model_class(path: Path, name: Any) -> Any:
    if name is None:
        raise FileRefused(path, "its config.json names no _class_name: it is not a model of diffusers")
    diffusers = _diffusers()
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise FileRefused(path, f"diffusers {diffusers.__version__} has no model class {name}")
    return kind


def _diffusers() -> Any:
    try:
        import accelerate  # noqa: F401  (without which diffusers makes no model on the meta device)
        import diffusers
    except ModuleNotFoundError as missing:
        raise SvdqError(f"reading a diffusers folder needs {missing.name}: pip install diffusers accelerate") from None
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def _read_json(path: Path) -> dict[str, Any]:
    return json_object(path, "it", path.read_bytes())


def _dtype(folder: Path) -> torch.dtype:
    """What to load the model of a folder in."""
    try:
        with stored(folder, weight_files(folder)) as tensors:
            return most_common(tensors)
    except FileNotFoundError:  # a description of a model may do without weights
        return torch.bfloat16
