"""Filling a model out of 16-bit files, in 4 bits: only one group of linears is ever there in 16 bits.

Each weight is quantized as `svdq_compile.quantize` would do it in the loaded model, to the same bits. What becomes of
it then is the journal's to say (journal.py): without one it stays in memory, on the device where it belongs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import decisions, stages
from .config import ALONE, Config
from .convert import convert, warn_of_skip
from .deferred import Deferred
from .errors import FileRefused, NothingToQuantize
from .journal import Journal
from .lowering.torch_private import shell
from .parameter import has_quantized
from .placing import assign, put_plain
from .progress import say
from .quantize_model import planned
from .report import why_nothing
from .summary import title

_CPU = torch.device("cpu")


def fill(
    model: nn.Module,
    tensors: Mapping[str, Deferred],
    path: Path,
    config: Config,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    at: torch.device = _CPU,
    place: torch.device = _CPU,
    journal: Journal | None = None,
) -> None:
    """Quantize a model, by its weights alone, while it is loaded.

    model    on the meta device, in the dtypes that its tensors are to have
    tensors  its state dict; path: where it is from, for what is refused
    at       where the work is done; place: where the model ends up
    journal  keeps what is done on the disk; what it has is not done again

    Raises FileRefused before anything is read if the tensors do not fit the model, and what `quantize` raises.
    """
    alone = replace(config, group=ALONE)  # each of several processes reads for itself, and comes to the same bits
    tensors = _fitting(model, tensors, path)
    _without_memory(model)
    done = journal.take_up() if journal else set()
    decisions.place(model)
    warn_of_skip([model], config)
    stages.begin_anew(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if done:
        say(f"svdquant: {title(model)}: going on, {len(done)} of {len(names)} weights are done", config.progress)

    def fetch(weights: Sequence[nn.Parameter]) -> None:
        for weight in weights:
            if names[id(weight)] not in done:
                weight.data = _read(tensors[names[id(weight)]], weight, path)

    def keep(weights: Sequence[nn.Parameter]) -> None:
        own = [weight for weight in weights if names[id(weight)] not in done]
        done.update(names[id(weight)] for weight in own)
        if journal:
            journal.add(names[id(weight)] for weight in own)
        else:
            for weight in own:
                weight.data = weight.to(place)

    tasks = planned(model, example_inputs)
    if not has_quantized(model) and not any(decisions.is_undecided(w) for task in tasks for w in task.weights):
        raise NothingToQuantize(why_nothing(model))
    convert(tasks, alone, at, lambda task: fetch(task.weights), lambda task: keep(task.weights))
    for parameter in list(model.parameters()):
        fetch([parameter])
        keep([parameter])
    if journal:
        journal.flush()
    for name, buffer in list(model.named_buffers()):
        put_plain(model, name, (_read(tensors[name], buffer, path) if name in tensors else buffer).to(place))
    decisions.place(model)
    model.eval()


def _without_memory(model: nn.Module) -> None:
    """Let the Parameters of a model on the meta device be on the CPU. Nobody may read them before they are filled."""
    empty: dict[int, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        values = shell(old.shape, old.stride(), old.dtype, _CPU)
        assign(model, name, empty.setdefault(id(old), nn.Parameter(values, old.requires_grad)))


def _read(tensor: Deferred, like: Tensor, path: Path) -> Tensor:
    """The values of one tensor of a model, in memory of its own."""
    values = tensor.now().to(like.dtype).contiguous()
    if values.shape != like.shape:
        raise FileRefused(path, f"a tensor became {tuple(values.shape)} as it was read, not {tuple(like.shape)}")
    return values.clone() if values.untyped_storage().nbytes() > values.nbytes else values


def _fitting(model: nn.Module, tensors: Mapping[str, Deferred], path: Path) -> dict[str, Deferred]:
    """The tensors of a model, by the names of its Parameters and buffers. Raises FileRefused."""
    kind = type(model).__name__
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    state = model.state_dict(keep_vars=True)
    for name in tensors.keys() - state.keys():
        if not any(re.search(pattern, name) for pattern in ignored):
            raise FileRefused(path, f"a {kind} of its config.json has no tensor {name}")
    found = {id(state[name]): tensor for name, tensor in tensors.items() if name in state}
    for name, tensor in state.items():
        if id(tensor) not in found:
            raise FileRefused(path, f"tensor {name} is missing, which a {kind} of its config.json has")
        here = found[id(tensor)]
        if here.shape != tensor.shape:
            raise FileRefused(path, f"{name} is {tuple(here.shape)} in the file, {tuple(tensor.shape)} in the model")
        if here.is_floating_point() != tensor.is_floating_point():
            raise FileRefused(path, f"{name} is {here.dtype} in the file, {tensor.dtype} in the model")
    return {name: found[id(tensor)] for name, tensor in state.items()}
