"""Linears of which a rank has a part: what a module becomes when it is split.

    ColumnParallelLinear   some of the output channels: y[..., its channels] of a whole input
    RowParallelLinear      some of the input channels: the whole y, summed over the ranks, of its channels of the input

A module keeps its name and its place, and becomes one of them by its class, so compiled code finds an ordinary linear,
and behind it the sum. The bias of a RowParallelLinear is added once, to the sum.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import SplitRefused
from .lowering.stack import frames
from .lowering.torch_private import sum_over
from .splits import INPUTS, Part

SAVE_BEFORE = "Write the file before the model is split: it loads into any number of ranks."
_HOW = "Fuse the adapter into the 16-bit model before it is quantized, or give the ranks tokens or pictures instead."


class SplitLinear(nn.Linear):
    """A linear of which this rank has a part."""

    part: Part

    @property
    def in_features(self) -> int:  # type: ignore[override]
        _refuse_adapters(self)
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        _refuse_adapters(self)
        return self.weight.shape[0]


class ColumnParallelLinear(SplitLinear):
    """Has some of the output channels."""


class RowParallelLinear(SplitLinear):
    """Has some of the input channels. group: torch's name of the ranks that have the others."""

    group: str

    def forward(self, input: Tensor) -> Tensor:
        y = sum_over(F.linear(input, self.weight), self.group)
        return y if self.bias is None else y + self.bias


def become_split(linear: nn.Module, part: Part, group: str) -> None:
    """Let a linear whose parameters are the part of them that this rank has know that they are."""
    kept = {name: value for name, value in linear.__dict__.items() if name not in ("in_features", "out_features")}
    linear.__dict__ = kept | {"part": part, "group": group}
    linear.__class__ = RowParallelLinear if part.split.dim == INPUTS else ColumnParallelLinear


def ranks_sharing(model: nn.Module) -> int:
    """Over how many ranks some linear of a model is split; 1 if none is."""
    return max((module.part.size for module in model.modules() if isinstance(module, SplitLinear)), default=1)


def check_whole(model: nn.Module, use: str, instead: str) -> None:
    """Raises SplitRefused for a model that is split; `use` is what was asked for, `instead` what to do."""
    size = ranks_sharing(model)
    if size > 1:
        raise SplitRefused(f"{use} needs the whole {type(model).__name__}, which is split over {size} ranks. {instead}")


def _refuse_adapters(linear: Any) -> None:
    """PEFT asks for these before it puts an adapter around a linear."""
    if any("/peft/" in frame.f_code.co_filename.replace("\\", "/") for frame in frames()):
        raise SplitRefused(
            f"an adapter needs whole linears, and this one is split over {linear.part.size} ranks: its own matrices "
            f"would not be. {_HOW}"
        )
