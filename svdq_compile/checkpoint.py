"""A quantized model in one safetensors file, and back.

    tensors     <weight>.qweight, <weight>.wscales, ...  the format's fields and `up` of each quantized weight
                <first weight>.smooth, .down             what linears with one input share, under the first one's name
                everything else                          under the model's own names, buffers included
    metadata    format, format_version, and as JSON: model_class, config, layers (one entry a quantized weight), others
                (why each remaining linear is 16-bit), tied (alias -> name), calibrated (weight -> whether its inputs
                were observed; older files have none), checksums (CRC-32 of each tensor); and digest (of the header)

Nothing is pickled. A file is checked whole before the model is touched.
"""

import json
import os
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import decisions
from .config import Config
from .errors import FileRefused, NothingToQuantize, OptionError
from .given import model_in
from .header import (
    FILE_NAME,
    FORMAT,
    INDEX,
    UNSEALED,
    VERSION,
    Header,
    LayerEntry,
    check_layout,
    files_of,
    read_header,
    saved_in,
    seal,
)
from .kernels.formats import FORMATS
from .layers import layers
from .lowering.launch import in_device_order
from .lowering.packed import PackedLinear, SharedInput
from .parameter import QuantizedWeight
from .passes.peft_names import is_adapter, without_adapters
from .placing import assign, device_of, own_buffers, owner_of, put_plain, put_quantized
from .pretrained import serve_save_pretrained
from .progress import steps
from .reading import opened, unchanged
from .replacing import replacing
from .split_linear import SAVE_BEFORE, check_whole
from .summary import tell_to_compile, title

_HALVES = (torch.bfloat16, torch.float16)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    config: Config | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Write a quantized model to one file. A save that is cut off leaves an older file as it was.

    config  to be noted in the file: a Config or a dict of options

    Raises NotAModel, OptionError, SplitRefused, FileNotFoundError where there is no folder to write to, and
    NothingToQuantize if no weight of the model is quantized: before anything is written. OSError, which names the path,
    if it cannot be.
    """
    check_order(model, path, "save")
    model = model_in(model, "save")
    check_whole(model, "saving", SAVE_BEFORE)
    if Path(path).is_dir():
        raise OptionError(f"{path} is a folder: give the file to write, as in {Path(path) / FILE_NAME}")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{Path(path).parent}: there is no such folder to write {Path(path).name} to")
    tensors, metadata = contents(model, None if config is None else Config.of(config))
    with replacing(Path(path)) as temporary:
        write({temporary: on_host(steps(tensors.items(), f"saving {title(model)}", progress))}, metadata)


def save_in_shards(model: nn.Module, path: Path, size: int | str) -> None:
    """Write a quantized model to one file, or to several and an index beside it where it takes more than `size` bytes
    ("10GB"). The index comes last; files that an earlier save left there and that are no part of this one are removed.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    check_whole(model, "saving", SAVE_BEFORE)
    tensors, metadata = contents(model)
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{path.stem}{{suffix}}{path.suffix}", max_shard_size=size
    )
    index = path.with_name(f"{path.name}{INDEX}")
    with ExitStack() as written:  # what is entered first takes its place last
        if plan.is_sharded:
            places = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            written.enter_context(replacing(index)).write_text(json.dumps(places, indent=2, sort_keys=True) + "\n")
        shards = {
            written.enter_context(replacing(path.with_name(name))): on_host((n, tensors[n]) for n in names)
            for name, names in plan.filename_to_tensors.items()
        }
        write(shards, metadata)
    new = {path.with_name(name) for name in plan.filename_to_tensors} | ({index} if plan.is_sharded else set())
    for old in {index, *saved_in(path.parent)} - new:
        old.unlink(missing_ok=True)


def on_host(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """In CPU memory, no two in the same: safetensors refuses that, and a later load would untie them."""
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    end = 0
    for name in sorted(host, key=lambda name: host[name].data_ptr()):
        start = host[name].data_ptr()
        if start < end:
            host[name] = host[name].clone()
        end = max(end, start + host[name].nbytes)
    return host


def write(files: Mapping[Path, dict[str, Tensor]], metadata: dict[str, str]) -> None:
    """Files that say the same and hold these tensors."""
    checksums = {name: checksum(tensor) for tensors in files.values() for name, tensor in tensors.items()}
    for file, tensors in files.items():
        save_file(tensors, file, metadata | {"digest": UNSEALED, "checksums": json.dumps(checksums)})
        seal(file)


def serve_libraries() -> None:
    """Let `save_pretrained` of diffusers and transformers write quantized models."""
    serve_save_pretrained(save_in_shards)


def check_order(model: object, path: object, function: str) -> None:
    """That a model and a path were given, in this order. Raises OptionError."""
    call = f"svdq_compile.{function}(model, path)"
    if isinstance(path, nn.Module):
        raise OptionError(f"the model comes first, then the file: {call}")
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"path={path!r:.60} is no path: {call}")


def contents(
    model: nn.Module, config: Config | None = None, among: Container[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file of a model holds: tensors, and what is said of them.

    among  names of Parameters: a part of the model, for a file with these alone. Raises NothingToQuantize for a whole
           model that holds no quantized weight
    """
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    entries: list[LayerEntry] = []
    calibrated: dict[str, bool | None] = {}
    owner: dict[int, str] = {}  # of a shared input
    for name, parameter in without_adapters(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in names:
            tied[name] = names[id(parameter)]
            continue
        names[id(parameter)] = name
        if among is not None and name not in among:
            continue
        if not isinstance(parameter, QuantizedWeight):
            tensors[name] = parameter
            continue
        packed = parameter._svdq
        if id(packed.shared) not in owner:
            owner[id(packed.shared)] = name
            tensors |= {f"{name}.smooth": packed.shared.smooth, f"{name}.down": packed.shared.down}
        tensors |= {f"{name}.{field}": tensor for field, tensor in packed.plain_tensors().items()}
        entries.append(_entry(name, parameter, owner[id(packed.shared)]))
        calibrated[name] = parameter._svdq_calibrated
    if among is None and not entries:
        raise NothingToQuantize(
            f"no weight of this {type(model).__name__} is quantized: "
            "run the compiled model, or svdq_compile.quantize it"
        )
    if among is None:
        tensors |= dict(without_adapters(model.named_buffers()))
    kept = [layer for layer in layers(model) if not is_adapter(layer.name)]
    kept = [layer for layer in kept if among is None or names.get(id(layer.weight)) in among]
    others = {layer.name: decisions.reason_of(layer.weight) or layer.reason or "" for layer in kept}
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "model_class": type(model).__name__,
        "config": json.dumps(config.to_dict() if config else {}),
        "layers": json.dumps([asdict(entry) for entry in entries]),
        "others": json.dumps({name: reason for name, reason in others.items() if reason}),
        "tied": json.dumps(tied),
        "calibrated": json.dumps(calibrated),
    }
    return tensors, metadata


def _entry(name: str, weight: QuantizedWeight, shared: str) -> LayerEntry:
    packed = weight._svdq
    return LayerEntry(
        weight=name,
        name=name.rpartition(".")[0],
        precision=packed.precision,
        shape=tuple(weight.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        rank=packed.rank,
        rank_start=packed.rank_start,
        shared=shared,
        shift=packed.shared.shift,
        rotate=packed.shared.rotate,
        expanded=packed.expanded,
        taps_first=packed.taps_first,
        has_offset=packed.offset is not None,
        error=weight._svdq_error,
        effect=weight._svdq_effect,
        bytes_before=weight.numel() * weight.element_size(),
        bytes_after=packed.nbytes(),
    )


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def load(
    model: nn.Module, path: str | os.PathLike, device: torch.device | None = None, *, progress: bool = True
) -> None:
    """Load a file of `save` into a model of the same class, on the meta device or with any weights.

    path    the file, or the folder that `save_pretrained` of a quantized model has made
    device  where the tensors go; by default where the model is, or the CPU for a model on the meta device

    No 16-bit form of a quantized weight is made anywhere. Raises FileNotFoundError, and FileRefused, naming the tensor:
    before the model is changed.
    """
    serve_libraries()
    target = device_of(model) if device is None else device
    with unchanged(path, files_of(path)):
        header = read_header(path)
        check_fit(model, header, path)
        tensors = {
            name: tensor.to(target)
            for name, tensor in intact(header.files, header.checksums, f"loading {path}", progress)
        }
        check_tensors(model, header, tensors, path)
    put(model, header, tensors)
    settle(model, target)
    tell_to_compile(model, progress)


def settle(model: nn.Module, device: torch.device) -> None:
    """What is left to do for a model whose tensors are there: buffers that no file has go to the device too."""
    for name, buffer in list(without_adapters(model.named_buffers())):
        put_plain(model, name, buffer.to(device))
    decisions.place(model)
    model.eval()  # a model that was made on the meta device is in training mode


def put(model: nn.Module, header: Header, tensors: dict[str, Tensor]) -> None:
    """Let a model hold what a file does. Everything has been checked: nothing is refused any more."""
    for entry, packed in packs(header, tensors):
        put_quantized(
            model,
            entry.weight,
            packed,
            getattr(torch, entry.dtype),
            error=entry.error,
            calibrated=header.calibrated.get(entry.weight),
            effect=entry.effect,
        )
    for name, tensor in tensors.items():
        put_plain(model, name, tensor)
    for alias, name in header.tied.items():
        module, _, leaf = name.rpartition(".")
        assign(model, alias, owner_of(model, module).get_parameter(leaf))
    for layer in layers(model):
        if layer.name in header.others:
            decisions.leave_alone(layer.weight, header.others[layer.name])


def intact(
    places: Mapping[str, Path], checksums: Mapping[str, int], doing: str, progress: bool
) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they were saved. places: tensor -> its file. Raises FileRefused."""
    with ExitStack() as held:
        files = {path: held.enter_context(opened(path)) for path in {places[name] for name in checksums}}
        for name in steps(checksums, doing, progress):
            file = files[places[name]]
            tensor = file.get(name)
            if checksum(tensor) != checksums[name]:
                raise FileRefused(file.path, f"tensor {name} is damaged: its checksum differs")
            yield name, tensor


def packs(header: Header, tensors: dict[str, Tensor]) -> list[tuple[LayerEntry, PackedLinear]]:
    """The quantized weights; their tensors are taken out, and what is left is plain."""
    shared: dict[str, SharedInput] = {}
    found = []
    for entry in header.layers:
        if entry.shared not in shared:
            smooth, down = (tensors.pop(name) for name in entry.shared_names())
            shared[entry.shared] = SharedInput(entry.precision, smooth, down, entry.shift, entry.rotate)
        own = {field: tensors.pop(name) for field, name in entry.own_names().items()}
        weight = in_device_order(entry.precision, tuple(own[field] for field in FORMATS[entry.precision].fields))
        packed = PackedLinear(
            shared[entry.shared],
            weight,
            own["up"],
            entry.rank_start,
            own.get("offset"),
            expanded=entry.expanded,
            taps_first=entry.taps_first,
        )
        found.append((entry, packed))
    return found


def check_tensors(model: nn.Module, header: Header, tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """That shapes and dtypes are right. The digest knows of damage already; files of version 1 have none."""
    inputs: dict[str, LayerEntry] = {}
    for entry in header.layers:
        check_layout(entry, tensors, path)
        other = inputs.setdefault(entry.shared, entry)
        if (other.precision, other.shift, other.rotate) != (entry.precision, entry.shift, entry.rotate):
            raise FileRefused(path, f"{entry.weight} and {other.weight} share an input, and quantize it differently")
    dtypes = {getattr(torch, entry.dtype) for entry in header.layers}
    own = dict(without_adapters((*model.named_parameters(remove_duplicate=False), *model.named_buffers())))
    for name in tensors.keys() - _quantized_names(header):
        here, there = tensors[name], own[name]
        if here.shape != there.shape:
            raise FileRefused(path, f"{name} is {tuple(here.shape)} in the file, {tuple(there.shape)} in the model")
        is_other_half = here.dtype in _HALVES and here.dtype not in dtypes | {there.dtype}
        if here.is_floating_point() != there.is_floating_point() or is_other_half:
            raise FileRefused(path, f"{name} is {here.dtype} in the file, {there.dtype} in the model")


def _quantized_names(header: Header) -> set[str]:
    return {name for entry in header.layers for name in entry.names()}


def check_fit(model: nn.Module, header: Header, path: str | os.PathLike) -> None:
    """Every tensor of the model must be in the file, the file's layers in the model, and each layer complete."""
    parameters: dict[str, Tensor] = dict(without_adapters(model.named_parameters(remove_duplicate=False)))
    state = parameters | dict(without_adapters(model.named_buffers()))
    hint = f"the file is of a {header.model_class}, the model a {type(model).__name__}"
    if header.model_class == type(model).__name__:
        hint += "; before it was saved that was changed, or made of another configuration: do the same first, such as "
        hint += "fuse_qkv_projections, or loading an IP-Adapter"
    entries = {entry.weight: entry for entry in header.layers}
    if len(entries) < len(header.layers):
        raise FileRefused(path, "its metadata is damaged: layers has one weight twice")
    for name, entry in entries.items():
        if name not in parameters:
            raise FileRefused(path, f"the model has no weight {name} ({hint})")
        shape = tuple(parameters[name].shape)
        if shape != entry.shape:
            raise FileRefused(path, f"{name} is {entry.shape} in the file, {shape} in the model ({hint})")
        if len(shape) < 2:
            raise FileRefused(path, f"{name} is quantized in the file, and no matrix: it has the shape {shape}")
        dtype = getattr(torch, entry.dtype, None)
        if entry.precision not in FORMATS or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise FileRefused(path, f"{name} is {entry.precision!r} of {entry.dtype!r}, unknown to this version")
        for tensor in entry.names() - header.checksums.keys():
            raise FileRefused(path, f"tensor {tensor} is missing")
    for name in state.keys() - entries.keys() - header.checksums.keys() - header.tied.keys() - own_buffers(model):
        raise FileRefused(path, f"tensor {name} of the model is missing ({hint})")
    for name in header.checksums.keys() - _quantized_names(header) - state.keys():
        raise FileRefused(path, f"the model has no tensor {name} ({hint})")
    for alias, name in header.tied.items():
        if alias not in parameters or name not in parameters:
            raise FileRefused(path, f"the model has not both {alias} and {name}, which are one in the file ({hint})")
        if name not in entries and name not in header.checksums:
            raise FileRefused(path, f"tensor {name} is missing, which {alias} is too")
        if alias in entries or alias in header.checksums or parameters[alias].shape != parameters[name].shape:
            raise FileRefused(path, f"{alias} and {name} are one in the file, and cannot be one")
