"""Reading files that somebody else may have written, damaged, or be writing to: nothing in them is believed.

A tensor's bytes are read into memory of their own. A file that is mapped instead changes a tensor after it was checked,
and ends the process where it has become shorter.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FileRefused

# How safetensors names dtypes.
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_PLACES, _AT_A_PLACE = 256, 4096  # where a file is looked at, and how many bytes of it there
_BELOW_A_BYTE = ("F4", "F6_E2M3", "F6_E3M2")  # safetensors reads some of these with one backend and not with another


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file.

    dtypes  tensor -> its dtype, as safetensors names it; shapes: likewise
    """

    path: str | os.PathLike
    metadata: Mapping[str, str]
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    _file: Any = field(repr=False)

    def whole(self, name: str) -> Tensor:
        """A tensor's shape and dtype: on the meta device. Raises FileRefused."""
        dtype = getattr(torch, _TORCH.get(self.dtypes[name], ""), None)
        if dtype is None:
            raise FileRefused(self.path, f"tensor {name} is {self.dtypes[name]}, which this torch does not know")
        return torch.empty(self.shapes[name], dtype=dtype, device="meta")

    def slices(self, name: str) -> "Slices":
        """What reads slices of a tensor."""
        return Slices(self, name)

    def get(self, name: str) -> Tensor:
        """A tensor, read now. Raises FileRefused."""
        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise FileRefused(self.path, f"tensor {name} cannot be read ({error})") from error


@dataclass(frozen=True)
class Slices:
    """Of a tensor in a file, the part that an index names is read, as of a tensor in memory."""

    _file: TensorFile
    _name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self._file.shapes[self._name]

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        try:
            return self._file._file.get_slice(self._name)[index]
        except SafetensorError as error:
            raise FileRefused(self._file.path, f"tensor {self._name} cannot be read ({error})") from error


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[TensorFile]:
    """A safetensors file; nothing but its header is read. Raises FileNotFoundError, FileRefused."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (the file is no mapping)
            dtypes = {name: view.get_dtype() for name, view in views.items()}
            for name, dtype in dtypes.items():
                if dtype in _BELOW_A_BYTE:
                    raise FileRefused(path, f"tensor {name} is {dtype}: dtypes of less than a byte are not read")
            shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
            yield TensorFile(path, file.metadata() or {}, dtypes, shapes, file)
    except SafetensorError as error:
        raise FileRefused(path, f"not a whole safetensors file ({error})") from error


@contextmanager
def unchanged(path: str | os.PathLike, files: Sequence[str | os.PathLike]) -> Iterator[None]:
    """While files are read, that nobody writes to them or replaces them. Raises FileRefused, which names `path`, at the
    end, or instead of what was wrong with them.
    """
    before = [state_of(file) for file in files]
    reason = "it was written to while it was read: load it again"
    try:
        yield
    except FileRefused as error:
        if [state_of(file) for file in files] != before:
            raise FileRefused(path, reason) from error
        raise
    if [state_of(file) for file in files] != before:
        raise FileRefused(path, reason)


def state_of(file: str | os.PathLike) -> tuple[int, ...]:
    """What changes when a file is written to or replaced; nothing where there is none."""
    try:
        state = os.stat(file)
    except FileNotFoundError:
        return ()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def fingerprint(file: Path) -> str:
    """What tells files apart, of equal names and sizes too, without reading all of them: the bytes at some places."""
    size = file.stat().st_size
    total = 0
    with open(file, "rb") as opened:
        for place in range(_PLACES):
            opened.seek(size * place // _PLACES)
            total = zlib.crc32(opened.read(_AT_A_PLACE), total)
    return f"{size} bytes, {total:08x}"


def shards_of(index: Path) -> list[Path]:
    """The files beside an index that it names, in order. Raises FileNotFoundError, FileRefused."""
    places = json_object(index, "it", index.read_bytes()).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FileRefused(index, "it has no weight_map, which names a file for each tensor")
    files = []
    for name in sorted(set(places.values())):
        if name in ("", ".", "..") or Path(name).name != name:
            raise FileRefused(index, f"it points to {name!r}: shards lie beside their index, whatever it says")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name}: there is no such file, and {index.name} names it")
        files.append(index.parent / name)
    return files


def json_object(path: str | os.PathLike, what: str, text: str | bytes) -> dict[str, Any]:
    """A JSON object. what: the part of the file that it is, as in "its config". Raises FileRefused."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileRefused(path, f"{what} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise FileRefused(path, f"{what} is no JSON object")
    return found
