"""From a model's 16-bit files to a quantized model, or to a quantized file, without the 16-bit model in between."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .config import Config
from .errors import OptionError
from .filling import fill
from .given import device_in
from .header import VERSION, is_quantized
from .holders import Holders
from .journal import journal_beside
from .keeping import InMemory, Keeper, Nowhere, Parts
from .loading import load
from .model_files import Source, check_dtype, empty_model, in_dtype, model_folder, opened_source
from .parallelize_model import as_facts, check_splittable
from .quantizer import NUMERICS
from .ranks import ranks_of, together
from .reading import fingerprint, state_of
from .skeleton import StateDict
from .split_plan import Plan, check_inputs, plan_for
from .statistics import Statistics
from .summary import tell_again, tell_to_compile
from .task import Task


def from_pretrained(
    path: str | os.PathLike,
    config: Config | Mapping[str, Any] | None = None,
    *,
    model: str | os.PathLike | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | int | torch.device | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    mesh: Any = None,
    plan: Mapping[str, Any] | None = None,
    statistics: Statistics | None = None,
    **options: Any,
) -> nn.Module:
    """A model of diffusers in 4 bits, from local files: one group of its linears at a time is there in 16 bits.

    path             a model folder, whole or in shards, which may be in 4 bits already; a pipeline folder; a single
                     file (safetensors, GGUF) with a model's weights, as diffusers or as the model's authors name them
    config, options  as in `quantize`
    model            of a single file: the folder with the model's config.json, or its class
    component        of a pipeline folder: which model; by default the transformer, else the unet
    dtype            of the model; by default the 16-bit one that it is stored in, else bfloat16
    device           where the model goes, and the work is done; by default the CPU
    example_inputs   as in `quantize`; statistics: likewise. Without, the weights alone are looked at
    mesh             of torch.distributed: its ranks, which all call this, share the work, and each gets its part of the
                     model; plan: what is split. Both as in `parallelize`, with its errors

    Raises FileNotFoundError, FileRefused, OptionError, NothingToQuantize, NonFiniteWeight, and SvdqError where a
    package is missing.
    """
    holders = None if mesh is None else Holders.of(mesh)
    ranks = None if holders is None else holders.ranks
    each = together(ranks)
    name = None if model is None else os.fspath(model)

    def checked() -> tuple[Config, torch.device, Path, nn.Module | None]:
        chosen = Config.of(config, options)
        target = torch.device("cpu") if device is None else device_in(device)
        check_dtype(dtype)
        folder, _ = model_folder(Path(path), component)
        if plan is not None and mesh is None:
            raise OptionError("plan says how ranks share a model: give the mesh of these ranks too")
        return chosen, target, folder, _for_4_bits(folder, name, chosen, statistics) if is_quantized(folder) else None

    chosen, target, folder, empty = each(checked)
    if ranks is not None:
        ranks.compare(lambda: {"file": [("weights", "16 bits" if empty is None else "4 bits")]})
    if empty is not None:
        load(empty, folder, target, mesh=mesh, plan=plan, progress=chosen.progress)
        if dtype is not None:
            in_dtype(empty, dtype)
        return empty
    with ExitStack() as held:
        source = each(lambda: held.enter_context(opened_source(folder, model=name, dtype=dtype)))
        keeper: Keeper = InMemory(target)
        check = None
        if holders is not None and ranks is not None:
            found = each(lambda: _planned(source.model, plan, holders.size))
            ranks.compare(lambda: {"file": _prints(source, statistics), "split": as_facts(found)})
            keeper = Parts(source.model, found, holders, target, chosen.progress)
            check = partial(_check_inputs, found)
        fill(
            source.model,
            source.tensors,
            folder,
            chosen,
            example_inputs=example_inputs,
            statistics=statistics,
            at=target,
            place=target,
            keeper=keeper,
            ranks=ranks,
            check=check,
        )
        each(held.close)
    tell_again(source.model, chosen.progress)
    tell_to_compile(source.model, chosen.progress)
    return source.model


def _planned(model: nn.Module, given: Mapping[str, Any] | None, size: int) -> Plan:
    """What is split of a model whose formats are not chosen yet."""
    check_splittable(model)
    return plan_for(model, given, size)


def _check_inputs(plan: Plan, tasks: Sequence[Task]) -> None:
    check_inputs(plan.splits, {name: place for place, task in enumerate(tasks) for name in task.names})


def _for_4_bits(path: Path, name: str | None, config: Config, statistics: Statistics | None) -> nn.Module:
    """The model without weights of a folder, or of a file and the model that is named, that is in 4 bits already."""
    if statistics is not None:
        raise OptionError(f"{path} is in 4 bits already: leave statistics out")
    if replace(config, progress=True) != Config():
        raise OptionError(f"{path} is in 4 bits already, in whatever way it was quantized: leave the options out")
    return empty_model(name or str(path))


def quantize_file(
    path: Path,
    output: Path,
    config: Config,
    device: torch.device,
    *,
    model: str | None = None,
    component: str | None = None,
    statistics: Statistics | None = None,
) -> str:
    """Quantize a model by its weights, and what was observed of it before, and write it to a file. What was done before
    an interruption is taken up by the next call with the same arguments, which ends with the same file, by as many
    ranks as there are then.

    Neither the 16-bit model nor the quantized one is in memory: what is done is on the disk, twice for a moment.
    Several ranks (option group) share the work, and the first one writes the file.

    path, model, component  as in `opened_source`. Returns what a program would call the model.
    """
    ranks = ranks_of(config)
    each, is_first = together(ranks), ranks is None or ranks.own == 0
    with ExitStack() as kept, ExitStack() as held:
        source = each(lambda: held.enter_context(opened_source(path, model=model, component=component)))
        each(lambda: _check_convolutions(source, config))
        if ranks is not None:
            ranks.compare(lambda: {"file": _prints(source, statistics)})

        def keeper() -> Keeper:
            if not is_first:
                return Nowhere()
            facts = _facts(source, config, device)
            facts |= {} if statistics is None else {"statistics": statistics.fingerprint()}
            return kept.enter_context(journal_beside(output, source.model, facts))

        keeping = each(keeper)
        fill(
            source.model,
            source.tensors,
            source.path,
            config,
            statistics=statistics,
            at=device,
            keeper=keeping,
            ranks=ranks,
        )
        each(held.close)

        def save() -> None:
            if is_first:
                checkpoint.save(source.model, output, config=config, progress=config.progress)

        each(save)
    tell_again(source.model, config.progress)
    return source.place


def _check_convolutions(source: Source, config: Config) -> None:
    """Raises OptionError where nothing tells which tensors are convolutions."""
    if config.convolutions and isinstance(source.model, StateDict):
        raise OptionError(
            f"option convolutions: {source.path.name} does not say of which class its model is, so nothing tells its "
            "convolutions; give --model, or a folder with its config.json"
        )


def _prints(source: Source, statistics: Statistics | None) -> list[tuple[str, Any]]:
    known = [] if statistics is None else [("statistics", statistics.fingerprint())]
    return [*((file.name, fingerprint(file)) for file in source.files), *known]


def _facts(source: Source, config: Config, device: torch.device) -> dict[str, Any]:
    """All that the file depends on."""
    options = {k: v for k, v in config.to_dict().items() if k not in ("progress", "fallback", "group")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    state = source.model.state_dict(keep_vars=True)
    return {
        "versions": [version("svdq-compile"), version("diffusers"), torch.__version__, VERSION, NUMERICS],
        "options": options,
        "device": name,
        "files": [[os.path.realpath(file), *state_of(file)] for file in source.files],
        "model": [[key, list(tensor.shape), str(tensor.dtype)] for key, tensor in state.items()],
    }
