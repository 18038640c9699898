"""What a quantized file says of itself, checked before anything is believed.

    digest      SHA-256 of the whole header but itself: the metadata, each tensor's name, dtype, shape and place
    checksums   CRC-32 of each tensor's bytes

Together they cover every byte that means something. Files of version 1 have no digest: the shapes and dtypes of their
layers are held against what the format makes of such a weight. Since version 3 layers have `rotate`, `effect` and
`taps_first`.

A large model may lie in several files (shards): each says all of the model and holds some of the tensors.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from .errors import FileRefused
from .kernels.formats import FORMATS, can_rotate
from .lowering.packed import as_matrix, is_kernel
from .reading import opened, shards_of

FORMAT = "svdq-compile"
# In a folder of save_pretrained: of transformers' models, and of diffusers', whose from_pretrained looks for this.
FILE_NAME, DIFFUSERS_NAME = "model.svdq.safetensors", "diffusion_pytorch_model.safetensors"
INDEX = ".index.json"  # behind the name, where there are shards
VERSION = 3
UNSEALED = "0" * 64  # where the digest will stand, and what it is counted as
_LENGTH = 8  # bytes


@dataclass(frozen=True)
class LayerEntry:
    """One quantized weight in a file.

    weight      the Parameter's name in the model; name: its module's
    shared      the weight under whose name the input's tensors are stored
    dtype       of the 16-bit weight it stands for, as in "bfloat16"
    """

    weight: str
    name: str
    precision: str
    shape: tuple[int, ...]
    dtype: str
    rank: int
    rank_start: int
    shared: str
    shift: float
    has_offset: bool
    error: float
    bytes_before: int
    bytes_after: int
    expanded: bool = False  # as in PackedLinear
    taps_first: bool = False  # likewise
    rotate: bool = False  # as in SharedInput
    effect: float | None = None  # the error that it makes in the model's output, where a target had it measured

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def own_names(self) -> dict[str, str]:
        """Field -> tensor name, of the tensors that no other layer uses."""
        fields = (*FORMATS[self.precision].fields, "up", *(("offset",) if self.has_offset else ()))
        return {field: f"{self.weight}.{field}" for field in fields}

    def shared_names(self) -> tuple[str, str]:
        """The tensor names of smooth and down."""
        return f"{self.shared}.smooth", f"{self.shared}.down"

    def names(self) -> set[str]:
        """All tensor names the layer is made from."""
        return {*self.own_names().values(), *self.shared_names()}


@dataclass(frozen=True)
class Header:
    """What a file, or a model's shards, say of themselves, read without loading a tensor. files: tensor -> its file"""

    version: int
    model_class: str
    config: dict[str, Any]
    layers: list[LayerEntry]
    others: dict[str, str]
    tied: dict[str, str]
    calibrated: dict[str, bool | None]
    checksums: dict[str, int]
    nbytes: int
    files: dict[str, Path]

    @property
    def calibration(self) -> str:
        """What the layers were quantized by."""
        kinds = Counter(self.calibrated.get(entry.weight) for entry in self.layers)
        told = {
            True: "calibrated, on inputs that were observed",
            False: "by the weights alone",
            None: "unknown: the file does not say",
        }
        if len(kinds) == 1:
            return told[next(iter(kinds))]
        return "; ".join(f"{kinds[kind]} layers {text}" for kind, text in told.items() if kind in kinds)


def read_header(path: str | os.PathLike) -> Header:
    """What is in a file or a folder, from its metadata. Raises FileNotFoundError, or FileRefused for a foreign or
    damaged one.
    """
    shards = [_read_shard(file) for file in files_of(path)]
    whole = shards[0]
    for shard in shards[1:]:
        if replace(shard, files=whole.files, nbytes=whole.nbytes) != whole:
            raise FileRefused(path, "its shards are not of one model: save it again")
    found = {name: file for shard in shards for name, file in shard.files.items()}
    for name in whole.checksums.keys() ^ found:
        raise FileRefused(path, f"tensor {name} is {'missing' if name not in found else 'not in its metadata'}")
    if sum(len(shard.files) for shard in shards) > len(found):
        raise FileRefused(path, "its shards hold some tensors twice")
    return replace(whole, files=found, nbytes=sum(shard.nbytes for shard in shards))


def _read_shard(path: Path) -> Header:
    with opened(path) as file:
        metadata, tensors = file.metadata, file.dtypes.keys()
    if metadata.get("format") != FORMAT:
        raise FileRefused(
            path,
            "this is a safetensors file, but svdq_compile.save did not write it; load 16-bit weights into the model "
            "as ever, then give it to svdq_compile.quantize",
        )
    version = version_in(path, metadata, VERSION)
    if "digest" in metadata or version > 1:
        check_digest(path, metadata.get("digest", ""))
    return Header(
        version=version,
        model_class=part(path, metadata, "model_class"),
        config=parsed(path, metadata, "config"),
        layers=parsed(path, metadata, "layers"),
        others=parsed(path, metadata, "others"),
        tied=parsed(path, metadata, "tied"),
        calibrated=parsed(path, {"calibrated": "{}", **metadata}, "calibrated"),
        checksums=parsed(path, metadata, "checksums"),
        nbytes=path.stat().st_size,
        files=dict.fromkeys(tensors, path),
    )


def version_in(path: str | os.PathLike, metadata: Mapping[str, str], newest: int) -> int:
    """The format version that a file says. Raises FileRefused for what is none, or newer than this program."""
    version = metadata.get("format_version", "")
    if not (version.isascii() and version.isdigit() and len(version) < 9):
        raise FileRefused(path, f"its format version is {version!r:.40}, which is no number")
    if int(version) > newest:
        raise FileRefused(path, f"it has format version {version}; this svdq-compile reads up to {newest}: update it")
    return int(version)


def part(path: str | os.PathLike, metadata: Mapping[str, str], key: str) -> str:
    if key not in metadata:
        raise FileRefused(path, f"its metadata is damaged: it has no {key!r}")
    return metadata[key]


def parsed(path: str | os.PathLike, metadata: Mapping[str, str], key: str, kind: type | None = None) -> Any:
    """A part of the metadata that is JSON, in the types that `kind` says of its fields; by default `Header`."""
    from pydantic import ValidationError

    try:
        return _schemas(kind or Header)[key].validate_json(part(path, metadata, key), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = "".join(f"[{step!r:.40}]" for step in first["loc"])
        raise FileRefused(path, f"its metadata is damaged: {key}{at}: {first['msg']}") from error


@cache
def _schemas(kind: type) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return {key: TypeAdapter(hint) for key, hint in get_type_hints(kind).items()}


def seal(path: Path) -> None:
    """Bring the metadata, which safetensors writes in any order, into one order, so that equal models are equal files;
    and write the digest into the room there is for it: `UNSEALED` stands in its place.
    """
    raw = _raw(path)
    header = json.loads(raw)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(raw))
    assert len(ordered) == len(raw), "safetensors writes JSON as Python does, but for spaces"
    assert ordered.count(UNSEALED.encode()) == 1, "the place of the digest is not the only one of its kind"
    with open(path, "r+b") as file:
        file.seek(_LENGTH)
        file.write(ordered.replace(UNSEALED.encode(), hashlib.sha256(ordered).hexdigest().encode()))


def check_digest(path: str | os.PathLike, digest: str) -> None:
    """That a file's header is as it was sealed. Raises FileRefused."""
    raw, place = _raw(path), digest.encode()
    if len(digest) != len(UNSEALED) or raw.count(place) != 1:
        raise FileRefused(path, "its metadata is damaged: it has no digest")
    if hashlib.sha256(raw.replace(place, UNSEALED.encode())).hexdigest() != digest:
        raise FileRefused(path, "its header is damaged: a name, shape, dtype or the metadata is not as it was saved")


def _raw(path: str | os.PathLike) -> bytes:
    """The header of a safetensors file, which begins with its length."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        return file.read(min(length, os.fstat(file.fileno()).st_size))


def files_of(path: str | os.PathLike) -> list[Path]:
    """A file itself, or those that `save_pretrained` has put into a folder. Raises FileNotFoundError, FileRefused."""
    if not Path(path).is_dir():
        return [Path(path)]
    files = _quantized_in(Path(path))
    if not files:
        raise FileRefused(path, "no file in this folder is quantized: give the file that svdq_compile.save wrote")
    return files


def is_quantized(path: Path) -> bool:
    """Whether a file is of `svdq_compile.save`, or a folder of `save_pretrained` in 4 bits. Raises FileNotFoundError,
    FileRefused for a damaged index.
    """
    return bool(_quantized_in(path)) if path.is_dir() else is_ours(path)


def _quantized_in(folder: Path) -> list[Path]:
    for name in (DIFFUSERS_NAME, FILE_NAME):  # which was diffusers' models' too, once
        index = folder / f"{name}{INDEX}"
        files = shards_of(index) if index.is_file() else [folder / name]
        if is_ours(files[0]):
            return files
    return []


def saved_in(folder: Path) -> list[Path]:
    """All files that earlier `save_pretrained` of quantized models have left in a folder, and nothing else."""
    found: list[Path] = []
    for path in (folder / DIFFUSERS_NAME, folder / FILE_NAME):
        index = path.with_name(f"{path.name}{INDEX}")
        shards = [file for file in folder.glob(f"{path.stem}-?????-of-?????{path.suffix}") if is_ours(file)]
        found += [file for file in (path, *shards) if is_ours(file)]
        found += [index] if shards and index.is_file() else []
    return found


def is_ours(file: Path) -> bool:
    """Whether `svdq_compile.save` wrote a file."""
    try:
        with opened(file) as found:
            return found.metadata.get("format") == FORMAT
    except (FileNotFoundError, FileRefused):
        return False


def check_layout(entry: LayerEntry, found: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """That a layer's tensors are of the shapes and dtypes that its format makes of such a weight. Raises FileRefused.

    found  tensors by name
    """
    n, k = as_matrix(torch.empty(entry.shape, device="meta")).shape
    if entry.taps_first and not is_kernel(entry.shape):
        raise FileRefused(path, f"{entry.weight} has the columns of a convolution, and the shape {entry.shape}")
    if entry.rotate and (entry.shift or not can_rotate(entry.precision, k)):
        raise FileRefused(
            path, f"{entry.weight} reads a rotated input, which {entry.precision} has not for {k} channels"
        )
    own, (smooth, down) = entry.own_names(), entry.shared_names()
    branch = found[own["up"]].dtype
    wanted = {smooth: ((k,), torch.float32), own["up"]: ((n, entry.rank), branch)}
    wanted |= {own["offset"]: ((n,), torch.float32)} if entry.has_offset else {}
    codes = _codes(entry.precision, k)
    for field, (columns, dtype) in zip(FORMATS[entry.precision].fields, codes, strict=True):
        got = found[own[field]]
        shape = () if columns is None else (n, *columns)
        if columns is None and got.dim() == 2:  # nvfp4 from elsewhere: a scale for each row, or for each row and group
            groups = codes[1][0] or ()
            shape = tuple(size if size == 1 else whole for size, whole in zip(got.shape, (n, *groups), strict=True))
        is_half = dtype.itemsize == got.dtype.itemsize == 2 and got.is_floating_point()
        wanted[own[field]] = shape, got.dtype if is_half else dtype
    for name, (shape, dtype) in wanted.items():
        got = found[name]
        if tuple(got.shape) != shape:
            raise FileRefused(path, f"tensor {name} is {tuple(got.shape)}, where {shape} is wanted")
        if got.dtype != dtype:
            raise FileRefused(path, f"tensor {name} is {got.dtype}, where {dtype} is wanted")
    rows = tuple(found[down].shape)
    if len(rows) != 2 or rows[1] != k or not 0 <= entry.rank_start <= rows[0] - entry.rank:
        raise FileRefused(path, f"tensor {down} is {rows}, which {entry.weight} cannot use")
    if found[down].dtype != branch or not branch.is_floating_point:
        raise FileRefused(path, f"tensor {down} is {found[down].dtype}, and {own['up']} {branch}: they go together")


@cache
def _codes(precision: str, k: int) -> list[tuple[tuple[int, ...] | None, torch.dtype]]:
    """Of each of a format's tensors, the shape behind its rows (None: it has none) and the dtype."""
    codes = FORMATS[precision].quantize_weight(torch.zeros(1, k), None)  # a meta tensor would bring Dynamo in: seconds
    return [(tuple(code.shape[1:]) if code.dim() else None, code.dtype) for code in codes]
