"""Loading a file of ours into several ranks, each its part: what `parallelize` would leave of the whole, bit for bit.

Each reads slices of the tensors that are split, and the others whole. A checksum is of a whole tensor: so each rank
also reads its share of all tensors, to look at them, and one that finds damage tells all.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .errors import OptionError
from .header import Header, LayerEntry, files_of, read_header
from .holders import Holders
from .kernels.formats import FORMATS
from .parallelize_model import as_facts, check_splittable, finish, put_empty
from .placing import device_of
from .progress import steps
from .reading import TensorFile, opened, unchanged
from .split_plan import Plan, Splits, check_inputs, plan_for
from .splits import INPUTS, OUTPUTS, Part, offset_of
from .summary import tell_to_compile


def load_part(
    model: nn.Module,
    path: str | os.PathLike,
    device: torch.device | None,
    holders: Holders,
    plan: Mapping[str, Any] | None,
    *,
    progress: bool,
) -> None:
    """Load this rank's part of a file of `save` into a model; all holders call this.

    plan  as in `parallelize`. Raises OptionError, SplitRefused, FileNotFoundError, FileRefused, RanksDiffer,
    RankFailed, RanksApart: before the model is changed.
    """
    checkpoint.serve_libraries()
    if holders.ranks is None:
        checkpoint.load(model, path, device, progress=progress)
        return
    ranks, target = holders.ranks, device_of(model) if device is None else device
    header, found = ranks.each(lambda: _planned(model, path, plan, holders.size))
    sums = [(name, str(total)) for name, total in sorted(header.checksums.items())]
    ranks.compare(lambda: {"split": as_facts(found), "tensor": sums})

    def read() -> dict[str, Tensor]:
        with unchanged(path, files_of(path)):
            for _ in checkpoint.intact(header.files, _share(header, holders), f"looking at {path}", progress):
                pass
            return _parts(header, found.splits, holders, target, f"loading {path}", progress)

    tensors = ranks.each(read)
    for name, split in found.splits.items():
        put_empty(model.get_submodule(name), holders.part(split), holders.group)
    checkpoint.put(model, header, tensors)
    checkpoint.settle(model, target)
    finish(model, found, holders, progress)
    tell_to_compile(model, progress)


def _planned(
    model: nn.Module, path: str | os.PathLike, given: Mapping[str, Any] | None, size: int
) -> tuple[Header, Plan]:
    """What the file says, and what is split; all of it fits the model."""
    check_splittable(model)
    header = read_header(path)
    checkpoint.check_fit(model, header, path)
    with ExitStack() as held:
        files = [held.enter_context(opened(file)) for file in set(header.files.values())]
        whole = {name: file.whole(name) for file in files for name in file.dtypes}
    checkpoint.check_tensors(model, header, whole, path)
    plan = plan_for(model, given, size)
    for entry in header.layers:
        if entry.name in plan.splits and entry.expanded:
            raise OptionError(f"plan: {entry.name} is expanded before each use, and cannot be split")
    check_inputs(plan.splits, {entry.name: entry.shared for entry in header.layers})
    return header, plan


def _share(header: Header, holders: Holders) -> dict[str, int]:
    """The tensors that this rank looks at, and their checksums."""
    return dict(sorted(header.checksums.items())[holders.rank :: holders.size])


def _parts(
    header: Header, splits: Splits, holders: Holders, device: torch.device, doing: str, progress: bool
) -> dict[str, Tensor]:
    """This rank's part of all tensors."""
    with ExitStack() as held:
        files = {path: held.enter_context(opened(path)) for path in set(header.files.values())}
        of = {name: files[path] for name, path in header.files.items()}
        cuts: dict[str, Callable[[], Tensor]] = {}
        for name, split in splits.items():
            part = holders.part(split)
            cuts[f"{name}.weight"] = partial(_cut, of, f"{name}.weight", part, split.dim)
            if split.dim == OUTPUTS:
                cuts[f"{name}.bias"] = partial(_cut, of, f"{name}.bias", part, 0)
        for entry in header.layers:
            if entry.name in splits:
                cuts |= _cuts(entry, of, holders.part(splits[entry.name]))
        read = {name: cuts.get(name, partial(of[name].get, name)) for name in header.checksums}
        return {name: read[name]().to(device) for name in steps(read, doing, progress)}


def _cuts(entry: LayerEntry, of: Mapping[str, TensorFile], part: Part) -> dict[str, Callable[[], Tensor]]:
    """How the tensors of a quantized weight are read of which a rank has a part."""
    smooth, down = entry.shared_names()
    names = entry.own_names() | {"smooth": smooth, "down": down}
    dims = part.dims(entry.precision, {field: of[name].shapes[name] for field, name in names.items()})
    cuts: dict[str, Callable[[], Tensor]] = {
        names[field]: partial(_cut, of, names[field], part, dim) for field, dim in dims.items()
    }
    if part.split.dim == INPUTS and entry.has_offset:  # it belongs to the whole

        def offset() -> Tensor:
            fields = (*FORMATS[entry.precision].fields, "smooth", "offset")
            return offset_of(part, entry.precision, {f: of[names[f]].get(names[f]) for f in fields}, entry.shift)

        cuts[names["offset"]] = offset
    return cuts


def _cut(of: Mapping[str, TensorFile], name: str, part: Part, dim: int) -> Tensor:
    return part.cut(of[name].slices(name), dim)
