"""A packed weight in another order: the plain one, or the one that GPU kernels want, and back.

Files, the references and the CPU hold every format in the plain order: two neighbouring input channels share a byte,
and scales are [N, groups]. Kernels of some formats want another one (planar.py), which the format's file describes. On
sm_90 int4 goes one step further, to words of sign and magnitude (`to_words`), from which one instruction makes four fp8
numbers. The dtype tells the orders apart: a plain qweight of 4-bit codes is uint8, a planar one int8, words are int32.
"""

import torch
from torch import Tensor

from . import FORMATS
from .planar import GROUP_SIZE

SIBLING_STEP = 128  # features of linears that lie side by side are a multiple of this: a tile belongs to one of them
GATE_STEP = 8  # features of one half, then of the other: how a tile holds both halves of a result


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
    """Which dimension of each tensor counts output channels, in any order; for formats whose siblings are merged."""
    planar = FORMATS[precision].planar
    return (0,) * len(weight) if planar is None or weight[0].dtype == torch.uint8 else planar.feature_dims


def to_kernel(precision: str, weight: tuple[Tensor, ...], words: bool = False) -> tuple[Tensor, ...]:
    """A weight in any order -> the kernel order, as words if asked to. Formats without one stay as they are."""
    planar = FORMATS[precision].planar
    if planar is None:
        return weight
    if weight[0].dtype == torch.int32:
        return weight if words else (from_words(weight[0]), *weight[1:])
    if not is_planar(weight[0]):
        weight = planar.pack(*weight)
    return (to_words(weight[0]), *weight[1:]) if words and planar.words else weight


def to_plain(precision: str, weight: tuple[Tensor, ...], in_features: int) -> tuple[Tensor, ...]:
    """A weight in any order -> the plain one. in_features: K, which says how many groups are not padding."""
    planar = FORMATS[precision].planar
    if planar is None or weight[0].dtype == torch.uint8:
        return weight
    return planar.unpack(-(-in_features // GROUP_SIZE), *to_kernel(precision, weight))


def dequantize(precision: str, weight: tuple[Tensor, ...], in_features: int) -> Tensor:
    """[N, K] fp32: what the codes of a weight in any order stand for."""
    form = FORMATS[precision]
    if form.planar is not None and form.planar.dequantize is not None and is_planar(weight[0]):
        return form.planar.dequantize(*weight)[:, :in_features]
    return form.dequantize_weight(*to_plain(precision, weight, in_features))[:, :in_features]
