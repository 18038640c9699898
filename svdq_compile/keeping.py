"""Where a model's weights go once they are what they will be, while it is filled (filling.py). A journal (journal.py)
is such a place too.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from . import decisions
from .holders import Holders
from .lowering.torch_private import shell
from .parallelize_model import finish, part_of
from .split_linear import become_split
from .split_plan import Plan
from .splits import INPUTS, Cutting

_ELSEWHERE = "another rank has it"


class Keeper(Protocol):
    """keeps: whether it wants the values of weights that stay 16-bit, which not every rank has read."""

    keeps: bool

    def take_up(self) -> set[str]:
        """Let the model hold what was done before. Returns the names of these Parameters."""

    def add(self, weights: Mapping[str, nn.Parameter]) -> None:
        """These Parameters, which may share an input, are what they will be."""

    def flush(self) -> None:
        """All of them are."""


class InMemory:
    """Each on the device where it belongs."""

    keeps = True

    def __init__(self, place: torch.device) -> None:
        self._place = place

    def take_up(self) -> set[str]:
        return set()

    def add(self, weights: Mapping[str, nn.Parameter]) -> None:
        for weight in weights.values():
            weight.data = weight.to(self._place)

    def flush(self) -> None:
        pass


class Nowhere(InMemory):
    """Another rank keeps them."""

    keeps = False

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def add(self, weights: Mapping[str, nn.Parameter]) -> None:
        for weight in weights.values():
            weight.data = shell(weight.shape, weight.stride(), weight.dtype, self._place)
            decisions.leave_alone(weight, _ELSEWHERE)


class Parts(InMemory):
    """This rank's part of each."""

    def __init__(self, model: nn.Module, plan: Plan, holders: Holders, place: torch.device, progress: bool) -> None:
        super().__init__(place)
        self._model, self._plan, self._holders, self._progress = model, plan, holders, progress

    def add(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().add(weights)
        cutting = Cutting()
        for name, weight in weights.items():
            module, _, leaf = name.rpartition(".")
            split = self._plan.splits.get(module)
            if split is None or (leaf == "bias" and split.dim == INPUTS):
                continue
            part = part_of(weight, self._holders.part(split), cutting)
            self._model.get_submodule(module).register_parameter(leaf, part)
            weight.data = part.data  # whoever holds the whole, as its task does, lets go of it

    def flush(self) -> None:
        for name, split in self._plan.splits.items():
            linear = self._model.get_submodule(name)
            become_split(linear, self._holders.part(split), self._holders.group)
        finish(self._model, self._plan, self._holders, self._progress)
