"""int4 weights with zero points, 16-bit activations: for linears with few rows, which wait for bytes and not for
arithmetic.

y = x @ (q * wscales + wzeros)^T

qweight  [N, Kp/2]    uint8    q in 0..15, two nibbles a byte; Kp = K rounded up to whole groups of 64
wscales  [N, Kp/64]   bfloat16
wzeros   [N, Kp/64]   bfloat16 the value of code 0

For kernels (planar.py):

wscales  [P/64, N, 2] bfloat16 a scale and its zero point: the 4 bytes an asynchronous copy needs
wzeros   [0]          bfloat16 nothing: the zero points are with the scales
"""

import torch
from torch import Tensor

from . import groups, nibbles, planar
from .format import Format, Grid

GROUP_SIZE = 64
CLIP = (1.0, 0.95, 0.9, 0.85)  # shares of a group's range that the 16 steps may cover, about its middle


def quantize_weight(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """w [N, K] fp32 -> (qweight, wscales, wzeros). importance: [K], see `groups.best_of`."""
    g = groups.split(w, GROUP_SIZE)
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    step = (high - low) / 15
    is_constant = step == 0  # no range to divide: code 0 stands for the value itself
    step = torch.where(is_constant, 1.0, step)
    middle = (low + high) / 2

    def zero(scale: Tensor) -> Tensor:
        return torch.where(is_constant, low, middle - 7.5 * scale).to(torch.bfloat16).float()

    def reconstruct(v: Tensor, scale: Tensor) -> Tensor:
        return _round(v, scale, zero(scale)) * scale + zero(scale)

    candidates = ((step * share).to(torch.bfloat16).float() for share in CLIP)
    weights = None if importance is None else groups.split(importance, GROUP_SIZE)
    scale = groups.best_of(g, candidates, reconstruct, weights)
    q = _round(g, scale, zero(scale))
    return nibbles.pack(q.flatten(1)), scale.squeeze(-1).to(torch.bfloat16), zero(scale).squeeze(-1).to(torch.bfloat16)


def _round(v: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((v - zero) / scale).round_().clamp_(0, 15)


def _steps(qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> tuple[Tensor, ...]:
    return wscales.float(), wzeros.float()


def _nearest(v: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return _round(v, scale, zero) * scale + zero


def _encode(values: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> tuple[Tensor, ...]:
    scale, zero = (t.unsqueeze(-1) for t in _steps(qweight, wscales, wzeros))
    return nibbles.pack(_round(groups.split(values, GROUP_SIZE), scale, zero).flatten(1)), wscales, wzeros


def dequantize_weight(qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> Tensor:
    """[N, Kp] fp32."""
    q = nibbles.unpack(qweight).float().unflatten(-1, (-1, GROUP_SIZE))
    return (q * wscales.float().unsqueeze(-1) + wzeros.float().unsqueeze(-1)).flatten(-2)


def matmul(x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> Tensor:
    """x [..., K] 16- or 32-bit -> [..., N] fp32. Products of 16-bit weights, as the 16-bit linear would make them."""
    w = dequantize_weight(qweight, wscales, wzeros)[:, : x.shape[-1]]
    return x.float() @ w.t()


def _to_planar(qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> tuple[Tensor, ...]:
    pairs = torch.stack((planar.by_group(wscales), planar.by_group(wzeros)), dim=-1)
    return planar.pack_codes(qweight), pairs, wzeros.new_empty(0)


def _from_planar(groups: int, qweight: Tensor, pairs: Tensor, wzeros: Tensor) -> tuple[Tensor, ...]:
    return planar.unpack_codes(qweight, groups), *(planar.by_row(scales, groups) for scales in pairs.unbind(-1))


def _dequantize_planar(qweight: Tensor, pairs: Tensor, wzeros: Tensor) -> Tensor:
    """[N, P] fp32; a group that pads K has scale and zero point 0."""
    scale, zero = pairs.float().transpose(0, 1).unsqueeze(-1).unbind(2)
    return (planar.codes(qweight) * scale + zero).flatten(1)


W4A16 = Format(
    name="w4a16",
    summary="4-bit weights, activations as they are",
    fields=("qweight", "wscales", "wzeros"),
    quantize_weight=quantize_weight,
    dequantize_weight=dequantize_weight,
    matmul=matmul,
    group_size=GROUP_SIZE,
    planar=planar.Planar(_to_planar, _from_planar, dequantize=_dequantize_planar),
    grid=Grid(_steps, _nearest, _encode),
    rounding="zeros",
)
