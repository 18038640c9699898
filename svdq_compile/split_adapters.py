"""LoRA adapters around linears of which a rank has a part.

PEFT gives every rank the whole of A [r, K] and B [N, r], so an adapter is loaded, saved, swapped and scaled as on one
GPU. A rank multiplies by what belongs to its part of the linear:

    ColumnParallelLinear   y[its rows] += s B[its rows] (A x)
    RowParallelLinear      y += s B (sum over ranks of A[:, its columns] x[its columns])

In a graph of ours that sum goes away: passes/fold_adapters.py adds the product to the linear's own, before the ranks'
are summed.
"""

import sys
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from .errors import SplitRefused
from .lowering.torch_private import sum_over
from .splits import INPUTS, Part, within

# Of PEFT's ways to begin an adapter, those that read neither weights nor what training has left beside them.
_WITHOUT_WEIGHTS = ("gaussian", "orthogonal", "eva")
_HOW = "Put it into the 16-bit model before that is quantized, or give the ranks tokens or pictures instead of parts."


class RowsOfB(nn.Linear):
    """B of an adapter around a ColumnParallelLinear. windows: where this rank's rows are"""

    windows: tuple[tuple[int, int], ...]

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else within(self.bias, 0, self.windows)
        return F.linear(input, within(self.weight, 0, self.windows), bias)


class ColumnsOfA(nn.Linear):
    """A of an adapter around a RowParallelLinear. windows: where this rank's columns are; group: of the ranks"""

    windows: tuple[tuple[int, int], ...]
    group: str

    def forward(self, input: Tensor) -> Tensor:
        return sum_over(F.linear(input, within(self.weight, 1, self.windows)), self.group)


class Matrices(nn.ModuleDict):
    """Those of all adapters around a linear that are cut, by the adapters' names: A or B."""

    def __init__(self, part: Part, group: str) -> None:
        super().__init__()
        self.kind = ColumnsOfA if part.split.dim == INPUTS else RowsOfB
        self.own = {"windows": part.windows(sum(part.split.blocks)), "group": group}

    def add_module(self, name: str, module: nn.Module | None) -> None:
        assert module is not None
        module.__dict__ |= self.own
        module.__class__ = self.kind
        super().add_module(name, module)


class SplitLora(LoraLinear):
    """PEFT's layer with the adapters around a split linear."""

    base_layer: Any

    def __setattr__(self, name: str, value: Any) -> None:
        part: Part = self.base_layer.part
        is_cut = name == ("lora_A" if part.split.dim == INPUTS else "lora_B")
        super().__setattr__(name, Matrices(part, self.base_layer.group) if is_cut else value)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise _refused(self.base_layer.part, type(variant).__name__)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        initial = getattr(kwargs.get("config"), "init_lora_weights", kwargs.get("init_lora_weights"))
        if isinstance(initial, str) and initial.lower() not in _WITHOUT_WEIGHTS:
            raise SplitRefused(
                f"init_lora_weights={initial!r} makes an adapter from whole weights, and this linear is split over "
                f"{self.base_layer.part.size} ranks. Make it around the 16-bit model, or give init_lora_weights=True "
                "where its values are loaded afterwards."
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def scale_layer(self, scale: float) -> None:
        if sys._getframe(1).f_code.co_name == "_fuse_lora_apply":  # diffusers scales what it merges next
            self.merge()
        super().scale_layer(scale)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise SplitRefused(
            f"fusing an adapter needs whole linears, and this model is split over {self.base_layer.part.size} ranks. "
            "It need not be fused: beside the weight it runs in the same kernel, and set_adapters changes its strength."
        )


def take_part(layer: nn.Module, part: Part, group: str) -> None:
    """Called when one of PEFT's layers is being put around a split linear. Raises SplitRefused for what is not LoRA."""
    if type(layer) is not LoraLinear:
        raise _refused(part, ".".join([*type(layer).__module__.split(".")[-2:-1], type(layer).__name__]))
    layer.__class__ = SplitLora


def _refused(part: Part, kind: str) -> SplitRefused:
    return SplitRefused(
        f"an adapter of this kind ({kind}) needs whole linears, and this one is split over {part.size} ranks: of "
        f"adapters only LoRA is split with it. {_HOW}"
    )
