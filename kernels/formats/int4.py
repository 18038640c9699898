"""int4 weights and int4 activations, both in groups of 64 channels: the W4A4 of the SVDQuant paper.

    y[m, n] = sum_g ascales[m, g] * wscales[n, g] * sum_{k in g} qx[m, k] * q[n, k]

    qweight  [N, Kp/2]       uint8    q + 8, q in -7..7, two nibbles a byte; Kp = K rounded up to whole groups of 64
    wscales  [N, Kp/64]      bfloat16
    qx       [..., Kp]       int8     -8..7, or 0..15 where the input is known to be non-negative after a shift
    ascales  [..., Kp/64]    fp32     of either sign, so that the largest magnitude of a group has the code -8

A linear after GELU or SiLU reads values that are never far below zero: with a shift they fit an unsigned code of 16
steps instead of 15 signed ones, half of which would be idle (svdq_compile/quantizer.py has the correction).

For kernels (planar.py) wscales are [P/64, N].
"""

import torch
from torch import Tensor

from . import groups, nibbles, planar
from .format import Codes, Format

GROUP_SIZE = 64
CLIP = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of the span a scale may cover; Gaussian groups of 64 do best near 0.9


def quantize_weight(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """w [N, K] fp32 -> (qweight, wscales). importance: [K], see `groups.best_of`."""
    g = groups.split(w, GROUP_SIZE)
    cover = groups.span(g) / 7
    cover = torch.where(cover > 0, cover, 1.0)
    candidates = ((cover * share).to(torch.bfloat16).float() for share in CLIP)
    weights = None if importance is None else groups.split(importance, GROUP_SIZE)
    scale = groups.best_of(g, candidates, lambda v, s: _round(v, s) * s, weights)
    return nibbles.pack((_round(g, scale) + 8).flatten(1)), scale.squeeze(-1).to(torch.bfloat16)


def _round(v: Tensor, scale: Tensor) -> Tensor:
    return (v / scale).round_().clamp_(-7, 7)


def dequantize_weight(qweight: Tensor, wscales: Tensor) -> Tensor:
    """[N, Kp] fp32."""
    q = (nibbles.unpack(qweight).float() - 8).unflatten(-1, (-1, GROUP_SIZE))
    return (q * wscales.float().unsqueeze(-1)).flatten(-2)


def quantize_activation(x: Tensor, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """x [..., K] fp32, already shifted and divided by the smoothing factors -> (qx, ascales)."""
    g = groups.split(x, GROUP_SIZE)
    if unsigned:
        (low, high), scale = (0, 15), groups.span(g) / 15
    else:
        most, least = g.amax(-1, keepdim=True), g.amin(-1, keepdim=True)
        (low, high), scale = (-8, 7), torch.where(most > -least, -most, -least) / 8
    scale = torch.where(scale != 0, scale, 1.0)
    return (g / scale).round_().clamp_(low, high).to(torch.int8).flatten(-2), scale.squeeze(-1)


def dequantize_activation(qx: Tensor, ascales: Tensor) -> Tensor:
    """[..., Kp] fp32."""
    return (qx.float().unflatten(-1, (-1, GROUP_SIZE)) * ascales.unsqueeze(-1)).flatten(-2)


def matmul(qx: Tensor, ascales: Tensor, qweight: Tensor, wscales: Tensor) -> Tensor:
    """[..., N] fp32."""
    return dequantize_activation(qx, ascales) @ dequantize_weight(qweight, wscales).t()


def _to_planar(qweight: Tensor, wscales: Tensor) -> tuple[Tensor, ...]:
    return planar.pack_codes(qweight), planar.by_group(wscales)


def _from_planar(groups: int, qweight: Tensor, wscales: Tensor) -> tuple[Tensor, ...]:
    return planar.unpack_codes(qweight, groups), planar.by_row(wscales, groups)


INT4 = Format(
    name="int4",
    summary="4-bit weights and activations",
    fields=("qweight", "wscales"),
    quantize_weight=quantize_weight,
    dequantize_weight=dequantize_weight,
    matmul=matmul,
    group_size=GROUP_SIZE,
    codes=Codes("int4", torch.int8, torch.float32, GROUP_SIZE, by_block=True, unsigned=True, rotates=True, in_fp8=True),
    quantize_activation=quantize_activation,
    dequantize_activation=dequantize_activation,
    planar=planar.Planar(_to_planar, _from_planar, feature_dims=(0, 1), words=True),
    rounding="scales",
    siblings=True,
)
