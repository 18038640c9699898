"""How the bytes of a packed weight lie for the GPU kernels, and back.

Files, the references and the CPU hold every format in the plain order: two neighbouring input channels share a byte,
and scales are [N, groups]. A kernel wants, from one 16-byte load, codes that all belong to one group, and the scales
of neighbouring output channels side by side. `Planar` is that order, the same for every integer format:

    qweight    [N, P/2]      int8   P = Kp rounded up to 128. Of each 64 bytes, which hold 128 channels, byte j has
                                    channel j in its low and 64 + j in its high nibble: one group of 64 in each half
    w4a8   subscales [P/128, N]     int16  two groups' int8 scales, the even group's in the low byte
    int4   wscales   [P/64, N]      bf16
    w4a16  wscales   [P/64, N, 2]   bf16   a scale and its zero point: the 4 bytes an asynchronous copy needs
           wzeros    [0]            bf16   nothing: the zero points are with the scales

On sm_90 int4 goes one step further, to words of sign and magnitude (`to_words`), from which one instruction makes four
fp8 numbers. The dtype tells the orders apart: a plain qweight is uint8, words are int32. Groups that pad Kp to P have
scale 0 and so add nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nibbles

GROUP_SIZE = 64
PLANAR_FORMATS = ("w4a8", "int4", "w4a16")
SIBLING_STEP = 128  # features of linears that lie side by side are a multiple of this: a tile belongs to one of them
_NO_CODE = 8  # what pads the codes; its scale is 0


@dataclass(frozen=True)
class Planar:
    """The kernel order of one weight, whose plain form has `groups` groups of 64 input channels."""

    precision: str
    groups: int

    def pack(self, weight: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Plain tensors, in the order of `Format.fields` -> the kernel's; the inverse of `unpack`."""
        qweight, scales, *rest = weight
        codes = F.pad(nibbles.unpack(qweight), (0, GROUP_SIZE * self._padding), value=_NO_CODE)
        low, high = codes.unflatten(-1, (-1, 2, GROUP_SIZE)).unbind(-2)
        planar = (low | (high << 4)).flatten(-2).view(torch.int8)
        by_group = self._by_group(scales)
        if self.precision == "w4a8":
            pairs = by_group.unflatten(0, (-1, 2)).transpose(1, 2).contiguous()
            return planar, pairs.view(torch.int16).squeeze(-1), *rest
        if self.precision == "w4a16":
            zeros = self._by_group(rest[0])
            return planar, torch.stack((by_group, zeros), dim=-1), zeros.new_empty(0)
        return planar, by_group

    def unpack(self, weight: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The kernel's tensors -> plain ones, bit for bit what was packed."""
        qweight, scales, *rest = weight
        planar = qweight.view(torch.uint8).unflatten(-1, (-1, GROUP_SIZE))
        codes = torch.stack((planar & 0xF, planar >> 4), dim=-2).flatten(-3)
        plain = nibbles.pack(codes[..., : GROUP_SIZE * self.groups])
        if self.precision == "w4a8":
            by_group = scales.unsqueeze(-1).view(torch.int8).transpose(1, 2).flatten(0, 1)
            return plain, self._by_row(by_group), *rest
        if self.precision == "w4a16":
            return plain, *(self._by_row(s) for s in scales.unbind(-1))
        return plain, self._by_row(scales)

    @property
    def _padding(self) -> int:
        return self.groups % 2

    def _by_group(self, scales: Tensor) -> Tensor:
        """[N, groups] -> [groups and padding, N]."""
        return F.pad(scales, (0, self._padding)).t().contiguous()

    def _by_row(self, scales: Tensor) -> Tensor:
        return scales[: self.groups].t().contiguous()


def to_words(planar: Tensor) -> Tensor:
    """an int4 qweight in the planar order [N, P/2] int8 -> [N, P/8] int32; the inverse of `from_words`.

    Four bytes b hold codes A_b (low nibbles) and B_b (high nibbles) of two groups: |A_b| in bits 0..2, A_b's sign in
    bit 7, |B_b| in bits 4..6, and B_b's sign in bit 3 of byte b + 1 (of byte 0 for b = 3). So bits 0..2 and 7 of each
    byte are four e4m3 numbers, and after a rotation of the word by 4 bits four others.
    """
    b = planar.view(torch.uint8)
    if ((b & 0xF == 0) | (b >> 4 == 0)).any():
        raise ValueError("an int4 code of -8: this order holds -7..7")
    low, high = (b & 0xF).to(torch.int8) - 8, (b >> 4).to(torch.int8) - 8
    signs = (high < 0).unflatten(-1, (-1, 4)).roll(1, -1).flatten(-2)
    parts = (low < 0).to(torch.uint8) << 7 | high.abs().to(torch.uint8) << 4 | signs.to(torch.uint8) << 3
    return (parts | low.abs().to(torch.uint8)).view(torch.int32)


def from_words(words: Tensor) -> Tensor:
    """[N, P/8] int32 -> the planar qweight [N, P/2] int8."""
    b = words.view(torch.uint8)
    signs = (b >> 3 & 1).unflatten(-1, (-1, 4)).roll(-1, -1).flatten(-2).bool()
    low, high = (b & 7).to(torch.int8), (b >> 4 & 7).to(torch.int8)
    low, high = torch.where(b >> 7 != 0, -low, low) + 8, torch.where(signs, -high, high) + 8
    return low | high << 4


def is_planar(qweight: Tensor) -> bool:
    """Whether a qweight lies in the kernel order."""
    return qweight.dtype == torch.int8


def feature_dims(precision: str, weight: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Which dimension of each tensor counts output channels, in either order; for w4a8 and int4."""
    if weight[0].dtype == torch.uint8:
        return (0,) * len(weight)
    return (0, 1, 0) if precision == "w4a8" else (0, 1)


def to_kernel(precision: str, weight: tuple[Tensor, ...], words: bool = False) -> tuple[Tensor, ...]:
    """A weight in any order -> the kernel order, int4 as words if asked to. Formats without one stay as they are."""
    if precision not in PLANAR_FORMATS:
        return weight
    if weight[0].dtype == torch.int32:
        return weight if words else (from_words(weight[0]), *weight[1:])
    if not is_planar(weight[0]):
        weight = Planar(precision, 2 * weight[0].shape[1] // GROUP_SIZE).pack(weight)
    return (to_words(weight[0]), *weight[1:]) if words and precision == "int4" else weight


def to_plain(precision: str, weight: tuple[Tensor, ...], in_features: int) -> tuple[Tensor, ...]:
    """A weight in any order -> the plain one. in_features: K, which says how many groups are not padding."""
    if precision not in PLANAR_FORMATS or weight[0].dtype == torch.uint8:
        return weight
    return Planar(precision, -(-in_features // GROUP_SIZE)).unpack(to_kernel(precision, weight))
