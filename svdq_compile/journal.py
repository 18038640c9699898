"""A long quantization that is cut off goes on where it was: what is done lies on the disk, beside the file that is to
come.

    <number>.safetensors   in its folder (unfinished.py): some of the model's tensors, in the format of a whole file

A part is written whole, and its checksums are looked at before it is used again. A model holds its parts mapped, so it
may be larger than the memory.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from . import checkpoint
from .errors import FileRefused
from .header import read_header
from .parameter import QuantizedWeight
from .placing import put_elsewhere
from .replacing import naming
from .unfinished import unfinished_folder

CHUNK = 2**28  # bytes in memory after which a part is written


class Journal:
    """The parts of a model that is being quantized."""

    keeps = True

    def __init__(self, folder: Path, target: Path, model: nn.Module) -> None:
        self._folder, self._target, self._model = folder, target, model
        self._names: set[str] = set()
        self._nbytes = 0

    def take_up(self) -> set[str]:
        """Let the model hold the parts that are there. Returns the names of these Parameters."""
        done: set[str] = set()
        for part in self._parts():
            try:
                header = read_header(part)
                for _ in checkpoint.intact(header.files, header.checksums, f"looking at {part}", progress=False):
                    pass
            except FileRefused:  # the machine was cut off, not only the process
                part.unlink()
                continue
            mapped = load_file(part)
            checkpoint.put(self._model, header, mapped)
            done |= {entry.weight for entry in header.layers} | mapped.keys()
        return done

    def add(self, names: Iterable[str]) -> None:
        """These Parameters, which may share an input, are what they will be."""
        for name in names:
            weight = self._model.get_parameter(name)
            self._names.add(name)
            self._nbytes += weight._svdq.nbytes() if isinstance(weight, QuantizedWeight) else weight.nbytes
        if self._nbytes >= CHUNK:
            self.flush()

    def flush(self) -> None:
        """Write what was added, and let go of its memory."""
        if not self._names:
            return
        tensors, metadata = checkpoint.contents(self._model, among=self._names)
        new = self._folder / "new"
        part = self._folder / f"{1 + max((int(p.stem) for p in self._parts()), default=0):06}.safetensors"
        with naming(self._target):
            checkpoint.write({new: checkpoint.on_host(tensors.items())}, metadata)
            os.replace(new, part)
        self._names, self._nbytes = set(), 0
        mapped = load_file(part)
        for entry, packed in checkpoint.packs(read_header(part), mapped):
            put_elsewhere(self._model, entry.weight, packed)
        for name, tensor in mapped.items():
            self._model.get_parameter(name).data = tensor

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"))


@contextmanager
def journal_beside(target: Path, model: nn.Module, facts: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a model for a file; facts, and what is raised, as in `unfinished_folder`."""
    with unfinished_folder(target, facts, "quantizing to") as folder:
        try:
            yield Journal(folder, Path(os.path.realpath(target)), model)
        except FileRefused:  # what was read is not what should be
            shutil.rmtree(folder, ignore_errors=True)
            raise
