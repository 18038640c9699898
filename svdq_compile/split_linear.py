"""Linears of which a rank has a part: what a module becomes when it is split.

    ColumnParallelLinear   some of the output channels: y[..., its channels] of a whole input
    RowParallelLinear      some of the input channels: the whole y, summed over the ranks, of its channels of the input

A module keeps its name and its place, and becomes one of them by its class, so compiled code finds an ordinary linear,
and behind it the sum. The bias of a RowParallelLinear is added once, to the sum. Adapters are put around it as around
any linear; what they become then is in split_adapters.py.
"""

import sys
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .errors import SplitRefused
from .lowering.torch_private import sum_over
from .passes.peft_names import is_of_peft
from .split_norm import SplitRMSNorm
from .splits import INPUTS, Part

SAVE_BEFORE = "Write the file before the model is split: it loads into any number of ranks."


class SplitLinear(nn.Linear):
    """A linear of which this rank has a part. in_features and out_features are those of the whole.

    group  torch's name of the ranks that have the other parts
    """

    part: Part
    group: str

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The part of it. Where diffusers compares it with an adapter, and would enlarge what is smaller: a tensor of
        the whole's shape, without values.
        """
        if "weight" not in self._parameters:
            raise AttributeError(f"this {type(self).__name__} has no weight: it was taken out of it")
        own = self._parameters["weight"]
        if torch.compiler.is_compiling() or sys._getframe(1).f_code.co_name != "_calculate_module_shape":
            return own
        return torch.empty(self.out_features, self.in_features, device="meta")


class ColumnParallelLinear(SplitLinear):
    """Has some of the output channels."""


class RowParallelLinear(SplitLinear):
    """Has some of the input channels."""

    def forward(self, input: Tensor) -> Tensor:
        y = sum_over(F.linear(input, self.weight), self.group)
        return y if self.bias is None else y + self.bias


def become_split(module: nn.Module, part: Part, group: str) -> None:
    """Let a linear, or a norm, whose parameters are the part of them that this rank has know that they are."""
    module.__dict__ |= {"part": part, "group": group}
    if isinstance(module, nn.RMSNorm):
        module.__class__ = SplitRMSNorm
        return
    assert isinstance(module, nn.Linear)
    _notice_adapters()
    module.__class__ = RowParallelLinear if part.split.dim == INPUTS else ColumnParallelLinear


def ranks_sharing(model: nn.Module) -> int:
    """Over how many ranks some linear of a model is split; 1 if none is."""
    return max((module.part.size for module in model.modules() if isinstance(module, SplitLinear)), default=1)


def check_whole(model: nn.Module, use: str, instead: str) -> None:
    """Raises SplitRefused for a model that is split; `use` is what was asked for, `instead` what to do."""
    size = ranks_sharing(model)
    if size > 1:
        raise SplitRefused(f"{use} needs the whole {type(model).__name__}, which is split over {size} ranks. {instead}")


@cache
def _notice_adapters() -> None:
    """From now on, in this process, see what is put around a split linear."""
    register_module_module_registration_hook(_put_into)


def _put_into(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(submodule, SplitLinear) and is_of_peft(module):
        from .split_adapters import take_part

        take_part(module, submodule.part, submodule.group)
