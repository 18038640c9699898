"""What calibration has observed of a model's linears, as one safetensors file: observed once, used again.

    tensors    <first weight>.span, .rows, .moment   of each input that linears read, under the first one's name, as
                                                     InputStatistics has them
    metadata   format, format_version, model_class, and as JSON: inputs (ObservedInput), others (why each remaining
               linear stays 16-bit), checksums (CRC-32 of each tensor); and digest (of the header, header.py)

A file is checked whole before anything of it is believed.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import checkpoint, decisions
from .errors import FileRefused, OptionError, OtherModel
from .given import model_in
from .header import check_digest, parsed, part, version_in
from .input_statistics import MOMENT_BLOCKS, InputStatistics, Moment
from .layers import BETWEEN, UNASKED, matrices
from .lowering.packed import matrix_shape
from .progress import steps
from .reading import opened, unchanged
from .replacing import replacing
from .task import Task

FORMAT = "svdq-compile statistics"
VERSION = 1


@dataclass(frozen=True)
class ObservedInput:
    """One input, and the linears that read it.

    names, shapes                of the linears, and of their weights
    few_rows, shift, expanded    as in Task
    calls                        how many were observed
    most_rows                    as in InputStatistics; None: nothing was read, and there are no tensors
    moment_rows                  how many rows are in the moment; None: there is none
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    few_rows: bool
    shift: float
    expanded: bool
    calls: int
    most_rows: float | None
    moment_rows: int | None

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class _Metadata:
    """The parts of a file's metadata that are JSON."""

    inputs: list[ObservedInput]
    others: dict[str, str]
    checksums: dict[str, int]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was observed of the inputs of a model's linears. `svdq_compile.observe` makes it.

    model_class  of the model
    inputs       what they are, and what was seen of each
    others       linears that must stay 16-bit, and why; in files from before the option `convolutions` also what that
                 takes, which does not count
    """

    model_class: str
    inputs: tuple[tuple[ObservedInput, InputStatistics], ...]
    others: Mapping[str, str]

    @staticmethod
    def of(model: nn.Module, tasks: Iterable[Task]) -> "Statistics":
        """Of a model whose calls were observed."""
        names = {id(layer.weight): layer.name for layer in matrices(model)}
        inputs = []
        for task in tasks:
            own, seen = [weight for weight in task.weights if id(weight) in names], task.statistics
            if own:
                known = ObservedInput(
                    tuple(names[id(weight)] for weight in own),
                    tuple(tuple(weight.shape) for weight in own),
                    task.few_rows,
                    float(task.shift),
                    task.expanded,
                    seen.calls,
                    None if seen.most_rows is None else float(seen.most_rows),
                    None if seen.moment is None or seen.span is None else seen.moment.rows,
                )
                inputs.append((known, seen))
        reasons = {layer.name: decisions.reason_of(layer.weight) for layer in matrices(model)}
        others = {name: reason for name, reason in reasons.items() if reason not in (None, BETWEEN)}
        return Statistics(type(model_in(model, "observe")).__name__, tuple(inputs), others)

    def tasks(self, model: nn.Module) -> list[Task]:
        """What is to be quantized together in a model that was not observed. Raises OtherModel."""
        found = {layer.name: layer for layer in matrices(model)}
        weights = {name: layer.weight for name, layer in found.items()}
        for name in (*(name for known, _ in self.inputs for name in known.names), *self.others):
            if name not in weights:
                raise OtherModel(f"they have a linear {name}, a {self.model_class}'s, which this model has not")
        for known, _ in self.inputs:
            for name, shape in zip(known.names, known.shapes, strict=True):
                if tuple(weights[name].shape) != shape:
                    raise OtherModel(f"{name} is {shape} in them, {tuple(weights[name].shape)} in this model")
        for name, reason in self.others.items():
            is_unasked = found[name].is_between and reason in UNASKED
            if decisions.is_undecided(weights[name]) and not is_unasked:
                decisions.leave_alone(weights[name], reason)
        tasks = [
            Task(tuple(weights[n] for n in own.names), own.names, own.few_rows, own.shift, seen, own.expanded)
            for own, seen in self.inputs
        ]
        return [task for task in tasks if task.undecided]

    @staticmethod
    def merge(*parts: "Statistics") -> "Statistics":
        """Of one model, what several have observed: other calls, or other layers. Raises OtherModel, OptionError.

        Spans and counts are those of one observation of all calls; so are the rows, up to 1024 of each input, of which
        more are thinned out. Second moments are too, but for the rounding of their sums in float32.
        """
        if not parts:
            raise OptionError("Statistics.merge() was given no statistics")
        together: dict[tuple[str, ...], list[tuple[ObservedInput, InputStatistics]]] = {}
        for one in parts:
            if one.model_class != parts[0].model_class:
                raise OtherModel(f"some of a {parts[0].model_class}, some of a {one.model_class}")
            for known, seen in one.inputs:
                together.setdefault(known.names, []).append((known, seen))
        owner: dict[str, tuple[str, ...]] = {}
        for names in together:
            for name in names:
                if owner.setdefault(name, names) != names:
                    raise OtherModel(f"{name} shares its input with {', '.join(owner[name])} in some, not in others")
        convolutions = {name for one in parts for known, _ in one.inputs if known.expanded for name in known.names}
        others = {
            name: reason
            for one in parts
            for name, reason in one.others.items()
            if not (name in convolutions and reason in UNASKED)
        }
        return Statistics(parts[0].model_class, tuple(_merged(same) for same in together.values()), others)

    def save(self, path: str | os.PathLike, *, progress: bool = True) -> None:
        """Write them to one file. Raises OptionError, OSError that names the path where it cannot be written."""
        target = Path(path)
        if target.is_dir():
            raise OptionError(f"{path} is a folder: give the file to write")
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent}: there is no such folder to write {target.name} to")
        metadata = {
            "format": FORMAT,
            "format_version": str(VERSION),
            "model_class": self.model_class,
            "inputs": json.dumps([asdict(known) for known, _ in self.inputs]),
            "others": json.dumps(dict(self.others)),
        }
        with replacing(target) as temporary:
            tensors = checkpoint.on_host(steps(self._tensors().items(), f"saving {target.name}", progress))
            checkpoint.write({temporary: tensors}, metadata)

    @staticmethod
    def load(path: str | os.PathLike, *, progress: bool = True) -> "Statistics":
        """Read a file of `save`, to the CPU. Raises FileNotFoundError, FileRefused."""
        with unchanged(path, [path]):
            with opened(path) as file:
                metadata = file.metadata
                if metadata.get("format") != FORMAT:
                    raise FileRefused(
                        path, "these are no statistics: svdq_compile.observe(model, calibrate) makes them"
                    )
                version_in(path, metadata, VERSION)
                check_digest(path, metadata.get("digest", ""))
                model_class = part(path, metadata, "model_class")
                inputs = parsed(path, metadata, "inputs", _Metadata)
                others = parsed(path, metadata, "others", _Metadata)
                checksums = parsed(path, metadata, "checksums", _Metadata)
                for name in checksums.keys() ^ file.dtypes.keys():
                    told = "missing" if name in checksums else "not in its metadata"
                    raise FileRefused(path, f"tensor {name} is {told}")
            places = dict.fromkeys(checksums, Path(path))
            tensors = dict(checkpoint.intact(places, checksums, f"loading {path}", progress))
            return Statistics(model_class, _checked(path, inputs, tensors), others)

    def fingerprint(self) -> int:
        """Another one for other statistics."""
        seen = zlib.crc32(repr(([known for known, _ in self.inputs], sorted(self.others.items()))).encode())
        for tensor in self._tensors().values():
            seen = zlib.crc32(checkpoint.checksum(tensor.cpu()).to_bytes(4, "little"), seen)
        return seen

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for known, seen in self.inputs:
            if seen.span is not None:
                tensors |= {f"{known.names[0]}.span": seen.span, f"{known.names[0]}.rows": seen.kept}
            if seen.span is not None and seen.moment is not None:
                tensors[f"{known.names[0]}.moment"] = seen.moment.sum
        return tensors

    def __repr__(self) -> str:
        linears = sum(len(known.names) for known, _ in self.inputs)
        calls = max((known.calls for known, _ in self.inputs), default=0)
        size = sum(tensor.nbytes for tensor in self._tensors().values()) / 2**20
        return (
            f"Statistics of a {self.model_class}: {len(self.inputs)} inputs of {linears} linears, {calls} calls, "
            f"{size:.1f} MiB"
        )


def _merged(same: Sequence[tuple[ObservedInput, InputStatistics]]) -> tuple[ObservedInput, InputStatistics]:
    first = same[0][0]
    for known, _ in same[1:]:
        for field in ("shapes", "shift", "expanded"):
            if getattr(known, field) != getattr(first, field):
                mine, theirs = getattr(first, field), getattr(known, field)
                raise OtherModel(f"{first.names[0]} has {field} {mine} in some, {theirs} in others")
    most = max((known.most_rows for known, _ in same if known.most_rows is not None), default=None)
    seen = [one for _, one in same if one.span is not None]
    moments = [one.moment for one in seen if one.moment is not None]
    whole = InputStatistics.of(
        [one.span for one in seen if one.span is not None],
        [one.kept for one in seen],
        most,
        reduce(add, moments) if len(moments) == len(seen) > 0 else None,
    )
    whole.calls = sum(known.calls for known, _ in same)
    merged = replace(
        first,
        few_rows=all(known.few_rows for known, _ in same),
        calls=whole.calls,
        most_rows=most,
        moment_rows=None if whole.moment is None else whole.moment.rows,
    )
    return merged, whole


def _checked(
    path: str | os.PathLike, inputs: Sequence[ObservedInput], tensors: dict[str, Tensor]
) -> tuple[tuple[ObservedInput, InputStatistics], ...]:
    """The inputs with their tensors, which are what InputStatistics has. Raises FileRefused."""
    found, names = [], set[str]()
    for known in inputs:
        if not known.names or len(known.names) != len(known.shapes) or not names.isdisjoint(known.names):
            raise FileRefused(path, f"its metadata is damaged: inputs has {', '.join(known.names) or 'one'} wrongly")
        names |= set(known.names)
        found.append((known, _seen(path, known, tensors)))
    for name in tensors:
        raise FileRefused(path, f"tensor {name} is of no input")
    return tuple(found)


def _seen(path: str | os.PathLike, known: ObservedInput, tensors: dict[str, Tensor]) -> InputStatistics:
    """Takes out of `tensors` what is of this input."""
    name = known.names[0]
    span, rows, total = (tensors.pop(f"{name}.{kind}", None) for kind in ("span", "rows", "moment"))
    if span is None or rows is None:
        if known.moment_rows is not None or any(tensor is not None for tensor in (span, rows, total)):
            raise FileRefused(path, f"{name}.span or {name}.rows is missing")
        whole = InputStatistics.of([], [], known.most_rows)
    else:
        k = _columns(path, known)
        wanted = {"span": (span, (k,)), "rows": (rows, (max(1, len(rows)) if rows.dim() else 1, k))}
        count = known.moment_rows
        if (total is None) != (count is None) or (count is not None and count < 1):
            raise FileRefused(path, f"{name}.moment and the number of its rows do not go together")
        if total is not None:
            shapes = [Moment.shape(k, most) for most in MOMENT_BLOCKS]
            wanted["moment"] = total, tuple(total.shape) if tuple(total.shape) in shapes else shapes[0]
        for kind, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise FileRefused(path, f"tensor {name}.{kind} is {tuple(tensor.shape)}, where {shape} is wanted")
            dtype = tensor.dtype if kind == "rows" and tensor.is_floating_point() else torch.float32
            if tensor.dtype != dtype or not bool(tensor.float().isfinite().all()):
                raise FileRefused(path, f"tensor {name}.{kind} holds other than finite numbers in {dtype}")
        moment = None if total is None or known.moment_rows is None else Moment(total, known.moment_rows)
        whole = InputStatistics.of([span], [rows], known.most_rows, moment)
    whole.calls = known.calls
    return whole


def _columns(path: str | os.PathLike, known: ObservedInput) -> int:
    """How many channels the input has, by the shapes of all that read it."""
    found = set()
    for name, shape in zip(known.names, known.shapes, strict=True):
        if len(shape) < 2 or min(shape) < 1 or math.prod(shape) > 2**60:
            raise FileRefused(path, f"its metadata is damaged: {name} has the shape {shape}")
        found.add(matrix_shape(shape)[1])
    if len(found) > 1:
        raise FileRefused(path, f"its metadata is damaged: {', '.join(known.names)} cannot share an input")
    return found.pop()
