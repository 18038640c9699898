"""Filling a model out of 16-bit files, in 4 bits: only one group of linears is ever there in 16 bits.

Each weight is quantized as `svdq_compile.quantize` would do it in the loaded model, to the same bits. What becomes of
it then is the keeper's to say (keeping.py): without one it stays in memory, on the device where it belongs.

Several ranks share the work (sharing.py): each reads what it quantizes, and all get the packs of a round. Then either
the first keeps them in its journal, and the others nothing; or each keeps its part.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import decisions, stages
from .config import ALONE, Config
from .convert import convert, warn_of_skip
from .deferred import Deferred
from .errors import FileRefused, NothingToQuantize, OptionError
from .keeping import InMemory, Keeper
from .lowering.torch_private import has_memory, shell
from .parameter import QuantizedWeight
from .placing import assign, put_plain
from .progress import say
from .quantize_model import check_given, planned
from .ranks import Ranks, together
from .report import why_nothing
from .statistics import Statistics
from .summary import title
from .task import Task

_CPU = torch.device("cpu")


def fill(
    model: nn.Module,
    tensors: Mapping[str, Deferred],
    path: Path,
    config: Config,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    statistics: Statistics | None = None,
    at: torch.device = _CPU,
    place: torch.device = _CPU,
    keeper: Keeper | None = None,
    ranks: Ranks | None = None,
    check: Callable[[Sequence[Task]], None] | None = None,
) -> None:
    """Quantize a model while it is loaded, by its weights alone or by what was observed of it before.

    model    on the meta device, in the dtypes that its tensors are to have
    tensors  its state dict; path: where it is from, for what is refused
    at       where the work is done; place: where the model ends up
    keeper   where weights go when they are done, by default to `place`; what it has from before is not done again
    ranks    that do this together; where only one keeps the weights, the first does
    check    of the groups that there are, before anything is read; what it raises, this does

    Raises FileRefused before anything is read if the tensors do not fit the model, OptionError for weights="keep", and
    what `quantize` raises.
    """
    each = together(ranks)

    def checked() -> dict[str, Deferred]:
        _check_options(config, ranks)
        check_given(model, None, example_inputs, statistics)
        return _fitting(model, tensors, path)

    found = each(checked)
    without_memory(model)
    keeper = keeper or InMemory(place)
    done = keeper.take_up() if ranks is None else ranks.told(keeper.take_up)[0]
    if not keeper.keeps:
        keeper.add({name: model.get_parameter(name) for name in done})
    decisions.place(model)
    if not config.convolutions:
        decisions.leave_convolutions(model)
    warn_of_skip([model], config)
    stages.begin_anew(model)
    filling = _Filling(model, found, path, place, keeper, done)
    if done:
        all_of_them = len(list(model.parameters()))
        say(f"svdquant: {title(model)}: going on, {len(done)} of {all_of_them} weights are done", config.progress)

    def grouped() -> list[Task]:
        tasks = planned(model, example_inputs, statistics, ranks)
        if not done and not any(decisions.is_undecided(w) for task in tasks for w in task.weights):
            raise NothingToQuantize(why_nothing(model))
        if check is not None:
            check(tasks)
        return tasks

    tasks = each(grouped)
    # Each of several processes that do not share the work reads for itself, and comes to the same bits.
    own = replace(config, group=ALONE if ranks is None else ranks.members)
    convert(
        tasks,
        own,
        at,
        fetch=lambda task: filling.fetch(task.weights),
        keep=lambda task: each(lambda: filling.keep(task.weights)),
    )
    each(filling.fill_the_rest)
    decisions.place(model)
    model.eval()


def _check_options(config: Config, ranks: Ranks | None) -> None:
    """Raises OptionError for those that need all 16-bit values."""
    if config.weights == "keep":
        raise OptionError(
            "option weights='keep' does not go with loading in 4 bits: load the model in 16 bits, and give it to "
            "svdq_compile.quantize"
        )
    config.refuse_target("needs the whole model in 16 bits, of which loading in 4 bits has a layer at a time")
    if config.weights == "offload" and ranks is not None:
        raise OptionError(
            "option weights='offload' does not go with several ranks, none of which has all 16-bit values"
        )


class _Filling:
    """A model whose tensors are there for the time that they are needed.

    done  names of the Parameters that are what they will be
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, Deferred],
        path: Path,
        place: torch.device,
        keeper: Keeper,
        done: set[str],
    ) -> None:
        self._model, self._tensors, self._path = model, tensors, path
        self._place, self._keeper, self._done = place, keeper, done
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def fetch(self, weights: Iterable[nn.Parameter]) -> None:
        """Give these Parameters their 16-bit values."""
        self._fetch(self._undone(weights))

    def keep(self, weights: Iterable[nn.Parameter]) -> None:
        """These Parameters are what they will be."""
        self._keep(self._undone(weights))

    def _undone(self, weights: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
        named = {self._names[id(weight)]: weight for weight in weights}
        return {name: weight for name, weight in named.items() if name not in self._done}

    def _fetch(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            weight.data = self._read(name, weight)

    def _keep(self, weights: Mapping[str, nn.Parameter]) -> None:
        if self._keeper.keeps:  # what another rank has looked at, and left 16-bit
            plain = {name: weight for name, weight in weights.items() if not isinstance(weight, QuantizedWeight)}
            self._fetch({name: weight for name, weight in plain.items() if not has_memory(weight)})
        self._done |= weights.keys()
        self._keeper.add(weights)

    def fill_the_rest(self) -> None:
        """What is not quantized."""
        if not self._keeper.keeps:
            return
        for name, parameter in list(self._model.named_parameters()):
            if name not in self._done:
                self._keep({name: parameter})
        self._keeper.flush()
        for name, buffer in list(self._model.named_buffers()):
            values = self._read(name, buffer) if name in self._tensors else buffer
            put_plain(self._model, name, values.to(self._place))

    def _read(self, name: str, like: Tensor) -> Tensor:
        """The values of a tensor of the model, in memory of its own."""
        values = self._tensors[name].now().to(like.dtype).contiguous()
        if values.shape != like.shape:
            raise FileRefused(
                self._path, f"{name} is {tuple(values.shape)} in the file, {tuple(like.shape)} in the model"
            )
        return values.clone() if values.untyped_storage().nbytes() > values.nbytes else values


def without_memory(model: nn.Module) -> None:
    """Let the Parameters of a model on the meta device be on the CPU. Nobody may read them before they are filled."""
    empty: dict[int, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        values = shell(old.shape, old.stride(), old.dtype, _CPU)
        assign(model, name, empty.setdefault(id(old), nn.Parameter(values, old.requires_grad)))


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
