"""What the command line can quantize: a diffusers pipeline folder, a diffusers model folder, a plain state dict.

Everything is read from local files; nothing is downloaded, and no code in a folder is run unless it is trusted.
A model comes in the 16-bit dtype it is stored in, and in bfloat16 if that is float32: once quantized, it cannot be cast
any more, and nobody runs 4-bit weights in float32.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import FileRefused, OptionError, SvdqError
from .given import DENOISERS
from .header import FORMAT
from .nunchaku_file import is_nunchaku
from .reading import json_object, opened

_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")  # without a variant, as diffusers reads
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model that was loaded.

    draw    runs its whole pipeline: draw(prompt=..., num_inference_steps=...); None if it was loaded alone
    place   what a program would call the model, as in "pipe.transformer"
    """

    model: nn.Module
    draw: Callable[..., Any] | None
    place: str


def open_source(
    path: Path, *, component: str | None = None, device: str | None = None, trust_code: bool = False
) -> Source:
    """Load a model, on the CPU unless a device is given.

    component   of a pipeline folder: which model; by default the transformer, else the unet
    device      load the whole pipeline around the model, too, and move it there
    trust_code  let Python files in a pipeline folder run, if the pipeline needs them
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder (nothing is downloaded)")
    if (path / "model_index.json").is_file():
        return _open_pipeline(path, component, device, trust_code)
    for option, given in (("--component", component), ("--prompt", device)):
        if given is not None:
            raise OptionError(f"{option} needs a pipeline folder, and {path} has no model_index.json")
    return Source(_load_model(path) if path.is_dir() else _load_state_dict(path), None, "model")


def empty_model(source: str, *, config: Path | None = None, component: str | None = None) -> nn.Module:
    """A model on the meta device, without weights, in the dtype it would be loaded in.

    source     a pipeline folder, a model folder (its config.json is enough), or the name of a class of diffusers
    config     of a class: a JSON file with what its constructor takes; by default the class's own values
    component  of a pipeline folder: which model; by default the transformer, else the unet
    """
    path = Path(source)
    if not path.exists():
        if not source.isidentifier():
            raise FileNotFoundError(f"{path}: there is no such folder (nothing is downloaded)")
        return _on_meta(
            source, _model_class(path, source), {} if config is None else _read_json(config), torch.bfloat16
        )
    if config is not None:
        raise OptionError(f"--config goes with the name of a class, and {path} has its own")
    if (path / "model_index.json").is_file():
        path /= _component(path, _read_json(path / "model_index.json"), component)
    elif component is not None:
        raise OptionError(f"--component needs a pipeline folder, and {path} has no model_index.json")
    if not (path / "config.json").is_file():
        raise FileRefused(path, "neither a pipeline (no model_index.json) nor a model (no config.json)")
    content = _read_json(path / "config.json")
    return _on_meta(str(path), _model_class(path, content.get("_class_name")), content, _dtype(path))


def model_of_config(source: Path, name: str, config: Mapping[str, Any]) -> nn.Module:
    """A model on the meta device of a class of diffusers, as a file's own configuration describes it."""
    return _on_meta(str(source), _model_class(source, name or None), dict(config), torch.bfloat16)


def _on_meta(source: str, kind: Any, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    try:
        with torch.device("meta"):
            model = kind.from_config(config).eval()
    except Exception as error:  # a damaged one gives rise to any
        raise SvdqError(f"{source}: this configuration makes no {kind.__name__} ({error})") from error
    kept = set(kind._keep_in_fp32_modules or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def _component(path: Path, index: Mapping[str, Any], component: str | None) -> str:
    """The folder of a pipeline's model."""
    component = component or next((name for name in DENOISERS if name in index), DENOISERS[0])
    if not isinstance(index.get(component), list) or not (path / component).is_dir():
        models = ", ".join(sorted(f.parent.name for f in path.glob("*/config.json"))) or "none"
        raise FileRefused(path, f"this pipeline has no {component}; its models are: {models}")
    return component


def _open_pipeline(path: Path, component: str | None, device: str | None, trust_code: bool) -> Source:
    index = _read_json(path / "model_index.json")
    component = _component(path, index, component)
    place = f"pipe.{component}"
    if device is None:
        return Source(_load_model(path / component), None, place)
    pipe = _load_pipeline(path, index, _dtype(path / component), trust_code).to(device)
    # One bar a prompt, gone when it is done; none where nobody watches.
    pipe.set_progress_bar_config(desc="calibrating", leave=False, disable=None)
    return Source(getattr(pipe, component), pipe, place)


def _load_pipeline(path: Path, index: Mapping[str, Any], dtype: torch.dtype, trust_code: bool) -> Any:
    own = _code_of_pipeline(path, index.get("_class_name"))
    code = [*([own] if own else []), *_code_of_components(path, index)]
    if code and not trust_code:
        names = ", ".join(str(file.relative_to(path)) for file in code)
        raise SvdqError(
            f"{path} brings its own code ({names}), which running prompts would execute. Read it, then give "
            "--trust-code; or leave --prompt out: quantizing by the weights alone runs no code of the folder"
        )
    custom = {"custom_pipeline": str(own)} if own else {}
    with _default_dtype_kept():
        return _diffusers().DiffusionPipeline.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=bool(code), **custom
        )


@contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """diffusers changes torch's while it loads, and leaves it so when it raises."""
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


def _refuse_nunchaku(path: Path) -> None:
    if is_nunchaku(path):
        raise FileRefused(path, f"this is quantized already, by Nunchaku: svdq convert {path} OUTPUT takes it")


def _load_model(path: Path) -> nn.Module:
    _refuse_nunchaku(path)
    if not (path / "config.json").is_file():
        raise FileRefused(path, "neither a pipeline (no model_index.json) nor a model (no config.json)")
    kind = _model_class(path, _read_json(path / "config.json").get("_class_name"))
    dtype = _dtype(path)
    try:
        with _default_dtype_kept():
            model, found = kind.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:  # damaged configurations and indices give rise to any
        raise FileRefused(path, f"diffusers makes no {kind.__name__} of it ({error})") from error
    for name in found["missing_keys"]:  # diffusers would leave random values there
        raise FileRefused(path, f"tensor {name} is missing, which a {kind.__name__} of its config.json has")
    for name in found["unexpected_keys"]:
        raise FileRefused(path, f"a {kind.__name__} of its config.json has no tensor {name}")
    return model


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
        import diffusers
    except ModuleNotFoundError as missing:
        raise SvdqError(f"reading a diffusers folder needs {missing.name}: pip install diffusers accelerate") from None
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def _read_json(path: Path) -> dict[str, Any]:
    return json_object(path, "it", path.read_bytes())


def _dtype(folder: Path) -> torch.dtype:
    """What to load the model of a folder in."""
    return _DTYPES.get(_stored_in([f for f in folder.iterdir() if _WEIGHTS.fullmatch(f.name)]), torch.bfloat16)


def _stored_in(files: Sequence[Path]) -> str:
    """The dtype that holds most of the numbers, by its name in safetensors: "BF16"; "" without files."""
    counts: Counter[str] = Counter()
    for path in files:
        with opened(path) as file:
            for name, dtype in file.dtypes.items():
                counts[dtype] += math.prod(file.shapes[name])
    return max(counts, key=lambda dtype: counts[dtype], default="")


def _load_state_dict(path: Path) -> nn.Module:
    _refuse_nunchaku(path)
    with opened(path) as file:
        if file.metadata.get("format") == FORMAT:
            raise FileRefused(path, f"this file is quantized already; see svdq inspect {path}")
    mapped = load_file(path)  # a tensor's bytes are read when it is used
    tensors = {name: mapped[name] for name in sorted(mapped, key=_in_order)}
    if _stored_in([path]) == "F32":
        tensors = {n: t.to(torch.bfloat16) if t.dtype == torch.float32 else t for n, t in tensors.items()}
    try:
        return skeleton(tensors)
    except KeyError as error:
        raise FileRefused(path, f"its tensor names are not those of a model's state dict ({error})") from error


def _in_order(name: str) -> list[str]:
    """A sort key: block 2 before block 10, which files do not do."""
    return [part.zfill(6) if part.isdigit() else part for part in name.split(".")]


class StateDict(nn.Module):
    """A tree of modules that holds a state dict and cannot be run."""


def skeleton(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Modules that have these tensors as their state dict, without the model's class.

    `x.weight` of two dimensions becomes an nn.Linear `x`, of four with 1x1 pixels an nn.Conv2d, each with its `x.bias`;
    everything else a plain Parameter. Names cannot tell an embedding table from a linear: both are a `weight` of two
    dimensions. What protects tables is the rule of passes/scope.py that layers outside the repeated blocks stay 16-bit;
    in a file without such blocks, name the tables with `skip`.
    Nor do they tell a grouped or strided 1x1 convolution from a plain one; loading into the real model shows that.
    """
    modules: dict[str, nn.Module] = {"": StateDict()}

    def module(path: str) -> nn.Module:
        if path not in modules:
            parent, _, leaf = path.rpartition(".")
            modules[path] = _module_of(tensors.get(f"{path}.weight"))
            module(parent).add_module(leaf, modules[path])
        return modules[path]

    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module(path)
        if owner._parameters.get(leaf) is None:
            owner.register_parameter(leaf, _frozen(tensor))
    return modules[""].eval()


def _module_of(weight: Tensor | None) -> nn.Module:
    """A linear that holds the weight, without a bias yet; an empty module if it is not a linear's."""
    layer: nn.Module
    if weight is not None and weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    elif weight is not None and weight.dim() == 4 and weight.shape[2:] == (1, 1):
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False, device="meta")
    else:
        return StateDict()
    layer.weight = _frozen(weight)
    return layer


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
