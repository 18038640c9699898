"""A quantized linear as tensors: what replaces a 16-bit weight."""

from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ..kernels import FORMATS, layout
from . import launch


@dataclass(frozen=True, eq=False)
class SharedInput:
    """What linears that read the same tensor share, so that it is quantized once for all of them.

    smooth  [K]     fp32             the input is divided by it, the weight was multiplied by it
    down    [R, K]  model dtype      the low-rank branches' first matrices, one under the other; they read the raw input
    shift   added to the input before an unsigned code; 0 for signed codes
    """

    precision: str
    smooth: Tensor
    down: Tensor
    shift: float = 0.0
    _moved: "WeakValueDictionary[torch.device, SharedInput]" = field(default_factory=WeakValueDictionary, repr=False)

    def to(self, device: torch.device) -> "SharedInput":
        """The same on another device; every linear that shares this one gets the same copy."""
        if device == self.smooth.device:
            return self
        moved = self._moved.get(device)
        if moved is None:
            smooth, down = self.smooth.to(device), self.down.to(device)
            moved = replace(self, smooth=smooth, down=down, _moved=WeakValueDictionary())
            # Both ways, or a linear that goes and comes back would no longer share with those that stayed.
            self._moved[device], moved._moved[self.smooth.device] = moved, self
        return moved


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """One linear, W diag(smooth) = dequantize(weight) + up @ down[rank_start : rank_start + rank] diag(smooth).

    weight      the format's tensors (`Format.fields`), in the order that the device's kernels want
    up          [N, r]  model dtype
    offset      [N]     fp32 or None: what the input's shift adds to each output; the GEMM subtracts it
    """

    shared: SharedInput
    weight: tuple[Tensor, ...]
    up: Tensor
    rank_start: int = 0
    offset: Tensor | None = None
    # What compiled graphs look up once for the block this linear comes first in; it goes when the weights go.
    resolved: "WeakKeyDictionary[Any, Any]" = field(default_factory=WeakKeyDictionary, repr=False)

    @property
    def precision(self) -> str:
        return self.shared.precision

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def in_features(self) -> int:
        return self.shared.smooth.shape[0]

    @property
    def out_features(self) -> int:
        return self.up.shape[0]

    @property
    def device(self) -> torch.device:
        return self.up.device

    @property
    def down(self) -> Tensor:
        """[r, K], this linear's own rows of the shared matrix."""
        return self.shared.down[self.rank_start : self.rank_start + self.rank]

    @property
    def plain_weight(self) -> tuple[Tensor, ...]:
        """The format's tensors in the order that its reference and files hold."""
        return layout.to_plain(self.precision, self.weight, self.in_features)

    def plain_tensors(self) -> dict[str, Tensor]:
        """`own_tensors` in that order."""
        plain = zip(FORMATS[self.precision].fields, self.plain_weight, strict=True)
        return self.own_tensors() | dict(plain)

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors no other linear uses, by name."""
        named = dict(zip(FORMATS[self.precision].fields, self.weight, strict=True), up=self.up)
        return named if self.offset is None else named | {"offset": self.offset}

    def nbytes(self) -> int:
        """Bytes of its own tensors and of its rows of `down`; the few of `smooth` are counted too."""
        own = sum(t.nbytes for t in self.own_tensors().values())
        return own + self.down.nbytes + self.shared.smooth.nbytes

    def to(self, device: torch.device) -> "PackedLinear":
        """The same on another device; linears that share an input go on sharing it."""
        if device == self.device:
            return self
        return replace(
            self,
            shared=self.shared.to(device),
            weight=launch.in_device_order(self.precision, tuple(t.to(device) for t in self.weight)),
            up=self.up.to(device),
            resolved=WeakKeyDictionary(),
            offset=None if self.offset is None else self.offset.to(device),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The plain [N, K] matrix this linear now multiplies by: quantized part plus low-rank branch."""
        q = FORMATS[self.precision].dequantize_weight(*self.plain_weight)[:, : self.in_features]
        return (q / self.shared.smooth + self.up.float() @ self.down.float()).to(dtype)

    def signature(self) -> tuple:
        """What a compiled graph depends on: equal signatures can run the same code."""
        tensors = (*self.own_tensors().values(), self.shared.smooth, self.shared.down)
        return (
            self.precision,
            self.shared.shift,
            self.rank_start,
            *((t.dtype, tuple(t.shape), t.device) for t in tensors),
        )
