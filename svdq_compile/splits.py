"""The part of a linear that each of several ranks has, in 16 or in 4 bits.

    by output channels   y[its rows] = (Q[its rows] + U[its rows] D) x             D is on every rank
    by input channels    y = sum over ranks of (Q[:, its channels] + U D[:, its channels]) x[its channels]
                                                                                   U is on every rank

So the branch needs nothing sent of its own: U is linear, and the sum of the ranks' products is the product. What a
shift of the input adds to a product, each rank takes out of its part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .kernels.formats import FORMATS
from .lowering.launch import in_device_order
from .lowering.packed import PackedLinear, SharedInput

# Input channels that no format parts: those of a group of the weight, and of a block of the activation's codes. Of a
# 16-bit weight neither are they parted, so that what is split does not depend on what is quantized, and how.
TOGETHER = 64
OUTPUTS, INPUTS = 0, 1  # of a weight [N, K], the dimension that is split


@dataclass(frozen=True)
class Split:
    """How the ranks of a mesh share a linear.

    dim     OUTPUTS or INPUTS
    blocks  sizes of what lies side by side along it, each of which is split for itself: gate and value, say
    """

    dim: int
    blocks: tuple[int, ...]

    def why_not(self, size: int) -> str | None:
        """Why this many ranks cannot share it; None if they can."""
        step = TOGETHER if self.dim == INPUTS else 1
        for block in self.blocks:
            if block % (size * step):
                kind = "input" if self.dim == INPUTS else "output"
                whole = f"groups of {step} of " if step > 1 else ""
                return f"{whole}its {block} {kind} channels cannot be shared by {size} ranks"
        return None


@dataclass(frozen=True)
class Part:
    """One rank's."""

    split: Split
    rank: int
    size: int

    @property
    def channels(self) -> int:
        return sum(self.split.blocks) // self.size

    def windows(self, size: int) -> tuple[tuple[int, int], ...]:
        """From where to where its channels lie along a dimension of this size, which counts those that are split, or
        some of them together.
        """
        total, start, found = sum(self.split.blocks), 0, []
        for block in self.split.blocks:
            begin, step = start * size // total, block * size // total // self.size
            found.append((begin + self.rank * step, begin + (self.rank + 1) * step))
            start += block
        return tuple(found)

    def cut(self, tensor: Any, dim: int) -> Tensor:
        """The part of a tensor, one of whose dimensions `windows` knows; of a tensor, or of what reads a slice of one
        from a file.
        """
        windows = self.windows(tensor.shape[dim])
        return within(tensor, dim, windows) if len(windows) > 1 else within(tensor, dim, windows).clone()

    def dims(self, precision: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Which dimension of a pack's tensors is split, by name; those that are not named are on every rank.

        shapes  in the plain order, with `smooth` and `down`
        """
        fields = FORMATS[precision].fields
        if self.split.dim == OUTPUTS:
            rows = [name for name in (*fields, "offset") if name in shapes and shapes[name] and shapes[name][0] > 1]
            return dict.fromkeys((*rows, "up"), 0)
        columns = [name for name in fields if len(shapes[name]) == 2 and shapes[name][1] > 1]
        return dict.fromkeys((*columns, "down"), 1) | {"smooth": 0}


def within(tensor: Any, dim: int, windows: Sequence[tuple[int, int]]) -> Tensor:
    """What lies within some windows of a dimension, side by side; of one window a view."""
    cuts = [tensor[(*(slice(None),) * dim, slice(*window))] for window in windows]
    return torch.cat(cuts, dim) if len(cuts) > 1 else cuts[0]


class Cutting:
    """Cuts packs; linears that share an input go on sharing the part of it."""

    def __init__(self) -> None:
        self._shared: dict[tuple[SharedInput, Part], SharedInput] = {}

    def part_of(self, packed: PackedLinear, part: Part) -> PackedLinear:
        """One rank's part of a packed linear."""
        shared = packed.shared
        tensors = packed.plain_tensors()
        whole = tensors | {"smooth": shared.smooth, "down": shared.down}
        dims = part.dims(packed.precision, {name: tensor.shape for name, tensor in whole.items()})
        own = {name: part.cut(t, dims[name]) if name in dims else t for name, t in tensors.items()}
        if part.split.dim == INPUTS:
            key = shared, part
            if key not in self._shared:
                smooth, down = part.cut(shared.smooth, 0), part.cut(shared.down, 1)
                self._shared[key] = replace(shared, smooth=smooth, down=down)
            own |= {} if packed.offset is None else {"offset": offset_of(part, packed.precision, whole, shared.shift)}
            shared = self._shared[key]
        weight = tuple(own[name] for name in FORMATS[packed.precision].fields)
        return PackedLinear(
            shared,
            in_device_order(packed.precision, weight),
            own["up"],
            packed.rank_start,
            own.get("offset"),
        )


def offset_of(part: Part, precision: str, tensors: Mapping[str, Tensor], shift: float) -> Tensor:
    """[N] fp32: what a rank takes out of its part of a product, split by input channels. That is what the shift adds to
    it; and the first rank takes what the offset of the whole is beyond that: files of others have biases in there.

    tensors  of the whole, in the plain order, with `smooth`
    """
    smooth = tensors["smooth"]
    codes = (tensors[name] for name in FORMATS[precision].fields)
    unsmoothed = FORMATS[precision].dequantize_weight(*codes)[:, : smooth.shape[0]] / smooth
    parts = [replace(part, rank=rank).cut(unsmoothed, 1).sum(1) * shift for rank in range(part.size)]
    rest = tensors["offset"] - torch.stack(parts).sum(0)
    return parts[part.rank] + rest if part.rank == 0 else parts[part.rank]
