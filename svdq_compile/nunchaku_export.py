"""A quantized model as a checkpoint that Nunchaku reads: its single file, or a folder of diffusers' nunchaku_lite.

Integers, scales, smoothing factors and low-rank branches are written as they are, but for powers of two where the
file's dtype is too narrow (nunchaku_range.py). What their formats have no place for
goes in 16 bits, and what they want otherwise is coded anew; both are told.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint import check_order
from .errors import NothingToQuantize, OptionError
from .given import model_in
from .kernels.formats import FORMATS
from .layers import layers
from .lowering.packed import PackedLinear
from .nunchaku_file import LITE, LITE_FILE, OLD_NAMES
from .nunchaku_keys import ARCHITECTURES, SIXTEEN_BIT, W4A16, Architecture, Rule
from .nunchaku_layout import TILE, interleave
from .nunchaku_linear import (
    AWQ_GROUP,
    Linear,
    as_16_bit,
    as_awq,
    fits_16_bit,
    fuses,
    join_rows,
    padded_rank,
    unpack,
    write,
)
from .nunchaku_range import in_range
from .parameter import QuantizedWeight
from .passes.activations import GELU_SHIFT
from .passes.peft_names import is_adapter, without_adapters
from .placing import owner_of
from .progress import say, steps
from .replacing import replacing
from .split_linear import SAVE_BEFORE, check_whole
from .summary import title

W4A4_FORMATS = ("int4", "nvfp4")


@dataclass
class _Content:
    """What is to be written.

    modules  module of the file -> its linear, its rule, and the rows of each part
    plain    16-bit tensors, by the file's names
    held     the model's tensors that are in either
    recoded  linears that were coded anew -> their error; expanded: those that are written in 16 bits
    """

    modules: dict[str, tuple[Linear, Rule, tuple[int, ...]]] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    recoded: dict[str, float] = field(default_factory=dict)
    expanded: list[str] = field(default_factory=list)


def export_nunchaku(model: nn.Module, path: str | os.PathLike, *, progress: bool = True) -> None:
    """Write a model that is quantized in int4 or nvfp4 for Nunchaku.

    path  a name that ends in .safetensors: the single file of Nunchaku's own engine, for the models it runs (FLUX.1,
          Qwen-Image, Z-Image, SDXL, SANA). Any other: a folder of diffusers' nunchaku_lite, for any model of diffusers

    Raises NotAModel, OptionError and NothingToQuantize, which say what does not fit: before anything is written.
    """
    check_order(model, path, "export_nunchaku")
    model, place = model_in(model, "export_nunchaku"), Path(path)
    check_whole(model, "exporting", SAVE_BEFORE)
    if not any(isinstance(parameter, QuantizedWeight) for parameter in model.parameters()):
        raise NothingToQuantize(
            f"no weight of this {type(model).__name__} is quantized: svdq_compile.quantize it, in int4"
        )
    if not hasattr(model, "to_json_string"):
        raise OptionError(f"{type(model).__name__} is no model of diffusers, and Nunchaku's files are of those")
    with torch.no_grad():
        if place.suffix == ".safetensors":
            _write_single(model, place, progress)
        else:
            _write_lite(model, place, progress)


def _write_single(model: nn.Module, path: Path, progress: bool) -> None:
    if path.is_dir():
        raise OptionError(f"{path} is a folder, and has the name of a file: give {LITE} another one")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: there is no such folder to write {path.name} to")
    architecture = _architecture(model)
    content, skipped = _for_engine(model, architecture)
    precision, rank, dtype = _common(content)
    _bring_in_range(content, dtype)
    tensors = _tensors(content, rank, dtype, architecture.legacy, progress)
    metadata = {
        "model_class": architecture.engines[0],
        "config": _config(model),
        "quantization_config": json.dumps(_told(precision, rank, architecture, skipped)),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
    _tell(model, path, content, dtype, progress)


def _write_lite(model: nn.Module, folder: Path, progress: bool) -> None:
    if folder.is_file():
        raise OptionError(f"{folder} is a file: give a folder for {LITE}, or a name that ends in .safetensors")
    others = [p.name for p in folder.glob("*.safetensors")] if folder.is_dir() else []
    if set(others) - {LITE_FILE}:
        raise OptionError(f"{folder} holds other weights ({others[0]}): give a folder of its own")
    content = _for_lite(model)
    precision, rank, dtype = _common(content)
    _bring_in_range(content, dtype)
    tensors = _tensors(content, rank, dtype, False, progress)
    for name, (linear, _, sizes) in content.modules.items():
        tensors.pop(f"{name}.smooth_factor_orig", None)
        if linear.precision == "nvfp4":
            n = sum(sizes)
            tensors.setdefault(f"{name}.wtscale", torch.ones(1, dtype=dtype))
            tensors.setdefault(f"{name}.wcscales", torch.ones(n, dtype=dtype))
    few = [name for name, (linear, *_) in content.modules.items() if linear.precision == "w4a16"]
    many = [name for name in content.modules if name not in set(few)]
    told: dict[str, Any] = {"quant_method": LITE, "compute_dtype": str(dtype).removeprefix("torch.")}
    group = FORMATS[precision].group_size
    told["svdq_w4a4"] = {"precision": precision, "group_size": group, "rank": rank, "targets": many}
    if few:
        told["awq_w4a16"] = {"precision": "int4", "group_size": AWQ_GROUP, "targets": few}
    config = json.loads(_config(model)) | {"quantization_config": told}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / LITE_FILE) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _tell(model, folder, content, dtype, progress)


def _config(model: Any) -> str:
    return model.to_json_string()


def _told(precision: str, rank: int, architecture: Architecture, skipped: bool) -> dict[str, Any]:
    """What a single file says of itself."""
    fp4 = precision == "nvfp4"
    common = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": FORMATS[precision].group_size}
    told: dict[str, Any] = {
        "method": "svdquant",
        "weight": common | {"scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None},
        "activation": common | {"scale_dtype": "fp8_e4m3_nan" if fp4 else None},
        "rank": rank,
    }
    return told | ({"skip_refiners": skipped} if architecture.optional else {})


def _architecture(model: nn.Module) -> Architecture:
    names = {kind.__name__ for kind in type(model).__mro__}
    for candidate in ARCHITECTURES:
        if candidate.stock in names:
            return candidate
    known = ", ".join(candidate.stock for candidate in ARCHITECTURES)
    raise OptionError(
        f"Nunchaku's engine runs {known}, and this is a {type(model).__name__}: give a folder, for {LITE}, "
        "which takes any model"
    )


# ** what goes where **


def _for_engine(model: nn.Module, architecture: Architecture) -> tuple[_Content, bool]:
    """The content of a single file, and whether the optional blocks are in 16 bits."""
    content, skipped = _Content(), set()
    modules = [name for name, _ in without_adapters(model.named_modules())]
    for block, rule in architecture.rules_of(modules):
        parts, name = [block + part for part in rule.parts], block + rule.names[0]
        weights = [_weight_and_bias(model, part)[0] for part in parts]
        is_16_bit = rule.packing == SIXTEEN_BIT
        if architecture.optional and re.match(architecture.optional, block):
            is_16_bit = not any(isinstance(weight, QuantizedWeight) for weight in weights)
            skipped.add(is_16_bit)
            if is_16_bit and rule.apart:
                continue
        content.held |= {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}
        if is_16_bit:
            _add_plain(model, content, name, rule, parts)
        elif rule.packing == W4A16:
            linear = _for_few_rows(model, content, parts[0])
            content.modules[name] = linear, rule, (len(linear.up),)
        else:
            linears = _cut(model, block, rule, [_quantized(model, part) for part in parts])
            content.modules[name] = join_rows(linears), rule, tuple(len(linear.up) for linear in linears)
            if not fuses(linears):
                raise OptionError(
                    f"{' and '.join(parts)} are one linear in Nunchaku's files, and here each has its own smoothing "
                    "factors: quantize the model with calibrate or example_inputs, which show that they share an input"
                )
    if len(skipped) > 1:
        raise OptionError("some refiner blocks are quantized and some are not: Nunchaku has all of them or none")
    _add_rest(model, content)
    return content, skipped == {True}


def _cut(model: nn.Module, block: str, rule: Rule, linears: list[Linear]) -> list[Linear]:
    """The columns that a rule's module has, shifted as its kernel shifts its input."""
    if rule.writer:
        whole, bias = linears[0].unshifted(), linears[0].unshifted().bias
        width = _weight_and_bias(model, block + rule.writer)[0].shape[0]
        k = whole.smooth.shape[0]
        # The second of the two has the bias.
        part = whole.columns(k - width, k) if rule.shifted else whole.columns(0, width)
        own = None if bias is None else bias if rule.shifted else torch.zeros_like(bias)
        linears = [replace(part, bias=own)]
    shift = GELU_SHIFT if rule.shifted and linears[0].precision == "int4" else 0.0
    return [linear.shifted(shift) for linear in linears]


def _for_lite(model: nn.Module) -> _Content:
    """Every linear that the format can hold; the others go in 16 bits."""
    content = _Content()
    for layer in layers(model):
        module, weight = owner_of(model, layer.name) if layer.is_linear else None, layer.weight
        if not isinstance(weight, QuantizedWeight) or not isinstance(module, nn.Linear) or is_adapter(layer.name):
            continue
        n, k = weight.shape
        rule = Rule((layer.name,), (layer.name,), W4A16 if weight._svdq.precision == "w4a16" else "w4a4")
        if rule.packing == W4A16:
            if n % 4 or k % AWQ_GROUP:
                continue
            linear = _for_few_rows(model, content, layer.name)
        else:
            linear = _quantized(model, layer.name).unshifted()
            if n % TILE or k % TILE:
                continue
            if linear.precision == "nvfp4" and linear.weight[2].dim() and linear.weight[2].shape[1] > 1:
                linear = _with_one_scale_above(content, layer.name, linear)
        content.modules[layer.name] = linear, rule, (n,)
        content.held |= {f"{layer.name}.weight", f"{layer.name}.bias"}
    _add_rest(model, content)
    return content


def _with_one_scale_above(content: _Content, name: str, linear: Linear) -> Linear:
    """The same codes anew, under one scale for all groups."""
    values = linear.values
    coded = replace(linear, weight=FORMATS["nvfp4"].quantize_weight(values))
    content.recoded[name] = float((coded.values - values).norm() / values.norm().clamp_min(1e-30))
    return coded


def _quantized(model: nn.Module, name: str) -> Linear:
    """A linear that must be W4A4. Raises OptionError for another."""
    weight, bias = _weight_and_bias(model, name)
    if not isinstance(weight, QuantizedWeight):
        raise OptionError(
            f"{name} is 16-bit, and Nunchaku has it in 4 bits: quantize it too (svdq_compile.report(model) says why it "
            "was not)"
        )
    packed = weight._svdq
    if packed.precision not in W4A4_FORMATS:
        raise OptionError(
            f"{name} is {packed.precision}, which Nunchaku has not: quantize the model with precision='int4' or 'nvfp4'"
        )
    linear = _unpacked(name, packed, bias)
    # A shift that is taken out leaves nothing but rounding where the module has no bias.
    return linear if bias is not None else replace(linear.unshifted(), bias=None)


def _unpacked(name: str, packed: PackedLinear, bias: Tensor | None) -> Linear:
    """Raises OptionError for a linear whose input is rotated."""
    if packed.shared.rotate:
        raise OptionError(
            f"{name} reads a rotated input, which Nunchaku's kernels do not: quantize the model with rotate=False"
        )
    return unpack(packed, bias)


def _for_few_rows(model: nn.Module, content: _Content, name: str) -> Linear:
    """A linear as weight-only codes without a branch: its own, or anew."""
    weight, bias = _weight_and_bias(model, name)
    if isinstance(weight, QuantizedWeight):
        linear = _unpacked(name, weight._svdq, bias)
        if linear.precision == "w4a16" and not linear.up.shape[1]:
            return linear
        values = as_16_bit(linear, linear.up.dtype)
    else:
        values = weight.detach().cpu()
    linear, content.recoded[name] = as_awq(values, None if bias is None else bias.detach().cpu())
    return linear


def _weight_and_bias(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Of a linear, a convolution or a norm."""
    parameters = owner_of(model, name)._parameters
    weight = parameters["weight"]
    assert weight is not None
    return weight, parameters.get("bias")


def _add_plain(model: nn.Module, content: _Content, name: str, rule: Rule, parts: Sequence[str]) -> None:
    found = [_weight_and_bias(model, part) for part in parts]
    values = {
        "weight": [_plain(content, part, weight) for part, (weight, _) in zip(parts, found, strict=True)],
        "bias": [bias.detach().cpu() for _, bias in found if bias is not None],
    }
    for leaf, own in values.items():
        if own:
            joined = interleave(torch.cat(own), rule.chunks)
            content.plain[f"{name}.{leaf}"] = joined.reshape(rule.shape) if rule.shape and leaf == "weight" else joined


def _plain(content: _Content, name: str, weight: Tensor) -> Tensor:
    """The 16-bit values of a weight."""
    if not isinstance(weight, QuantizedWeight):
        return weight.detach().cpu()
    content.expanded.append(name)
    return weight._svdq.values(weight).cpu()


def _add_rest(model: nn.Module, content: _Content) -> None:
    """Everything that is in no module, under its own name."""
    temporary = {
        f"{prefix}.{buffer}".lstrip(".")
        for prefix, module in model.named_modules()
        for buffer in module._non_persistent_buffers_set
    }
    for name, tensor in without_adapters((*model.named_parameters(), *model.named_buffers())):
        if name not in content.held and name not in temporary:
            content.plain[name] = _plain(content, name.removesuffix(".weight"), tensor)


# ** what they have in common **


def _common(content: _Content) -> tuple[str, int, torch.dtype]:
    """Precision, rank and 16-bit dtype of all 4-bit linears."""
    linears = {n: linear for n, (linear, *_) in content.modules.items() if linear.precision in W4A4_FORMATS}
    if not linears:
        raise OptionError("no linear of the model is int4 or nvfp4, which is what Nunchaku has: quantize it so")
    names: dict[str, str] = {}
    for name, linear in linears.items():
        names.setdefault(linear.precision, name)
    if len(names) > 1:
        told = " and ".join(f"{name} is {precision}" for precision, name in names.items())
        raise OptionError(f"{told}: a checkpoint of Nunchaku's is of one precision")
    rank = padded_rank(max(linear.up.shape[1] for linear in linears.values()))
    dtype = next(iter(linears.values())).up.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise OptionError(
            f"the model is {dtype}, and Nunchaku's files are bfloat16 or float16: cast it first, with .to"
        )
    return next(iter(names)), rank, dtype


def _bring_in_range(content: _Content, dtype: torch.dtype) -> None:
    for name, (linear, rule, sizes) in content.modules.items():
        if linear.precision in W4A4_FORMATS:
            content.modules[name] = in_range(linear, name, dtype), rule, sizes


def _tensors(content: _Content, rank: int, dtype: torch.dtype, legacy: bool, progress: bool) -> dict[str, Tensor]:
    """By the file's names."""
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in content.plain.items()
    }
    for name, (linear, rule, sizes) in steps(content.modules.items(), "packing", progress):
        for leaf, tensor in write(linear, rule, sizes, rank, dtype).items():
            tensors[f"{name}.{OLD_NAMES.get(leaf, leaf) if legacy else leaf}"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _tell(model: nn.Module, path: Path, content: _Content, dtype: torch.dtype, progress: bool) -> None:
    rounded = [name for name, (linear, *_) in content.modules.items() if not fits_16_bit(linear, dtype)]
    text = f"svdquant: {title(model)}: {len(content.modules)} linears of 4 bits in {path}"
    if rounded:
        text += f"; scales or smoothing factors of {len(rounded)} were rounded to {str(dtype).removeprefix('torch.')}"
    text += _list_of("coded anew", content.recoded)
    if content.expanded:
        text += f"; {len(content.expanded)} that are 16-bit there were expanded"
    say(text, progress)


def _list_of(what: str, errors: Mapping[str, float]) -> str:
    if not errors:
        return ""
    worst = max(errors, key=lambda name: errors[name])
    return f"; {len(errors)} {what}, with an error of {100 * errors[worst]:.2f} % at most ({worst})"
