"""A long quantization that is cut off goes on where it was: what is done lies on the disk, beside the file that is to
come.

    .<name>.<whose>.<key>.unfinished/   locked by the process that works on it
        <number>.safetensors            some of the model's tensors, in the format of a whole file

The name may be shortened, so `whose` is a digest of it. The key is a digest of all that the result depends on: what
other options or other files have left is never taken up. A part is written whole, and its checksums are looked at
before it is used again. A model holds its parts mapped, so it may be larger than the memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from . import checkpoint
from .errors import FileRefused, SvdqError
from .header import read_header
from .parameter import QuantizedWeight
from .placing import put_elsewhere
from .progress import say
from .replacing import beginning, lock, naming, remove_leftovers

CHUNK = 2**28  # bytes in memory after which a part is written
_ENDING = ".unfinished"


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
                for _ in checkpoint.intact(header, f"looking at {part}", progress=False):
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
    """The journal of a model for a file. At the end it is removed, with those that were kept for the same file; if the
    end is not reached it stays.

    facts  what the result depends on, as JSON
    Raises SvdqError while another process has it, OSError that names the target where there can be none.
    """
    target = Path(os.path.realpath(target))
    start = f"{beginning(target)}{_digest(target.name)}."
    folder = target.with_name(f"{start}{_digest(facts)}{_ENDING}")
    with ExitStack() as held:
        with naming(target):
            _make_and_lock(folder, target, held)
        try:
            yield Journal(folder, target, model)
        except FileRefused:  # what was read is not what should be
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            if any(folder.glob("*.safetensors")):
                say(f"svdquant: what is done is kept in {folder}: the same again goes on from there", True)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    remove_leftovers(target.parent, start, _ENDING)


def _make_and_lock(folder: Path, target: Path, held: ExitStack) -> None:
    while True:
        folder.mkdir(exist_ok=True)
        try:
            made = folder.stat().st_ino
            held.enter_context(lock(folder))
            if folder.stat().st_ino == made:
                return
        except FileNotFoundError:  # who had it has come to the end, and removed it
            continue
        except BlockingIOError:
            raise SvdqError(f"{target}: another process is quantizing to it: wait for it, or end it") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
