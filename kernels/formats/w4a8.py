"""int4 weights with integer sub-scales, int8 activations with one scale a token.

    y = (qx @ (q * s)^T) * ascales * wscales

The expanded weight q * s (-8 <= q <= 7, s <= 16, so -128 at least) is an int8 matrix: the product accumulates in int32
over the whole of K and both scales wait until the end, which is what lets int8 tensor cores run at full rate.

    qweight    [N, Kp/2]    uint8   q + 8, q in -8..7, two nibbles a byte (nibbles.py); Kp = K in whole groups of 64
    subscales  [N, Kp/64]   int8    s, 1..16
    wscales    [N]          fp32    one scale an output channel
    qx         [..., Kp]    int8    -127..127
    ascales    [..., 1]     fp32

For kernels (planar.py) two groups' sub-scales share a word:

    subscales  [P/128, N]   int16   the even group's in the low byte
"""

import torch
from torch import Tensor

from . import groups, nibbles, planar
from .format import Codes, Format, Grid
from .int8_matmul import int8_matmul

GROUP_SIZE = 64
MAX_SUBSCALE = 16
# A sub-scale below the one that just covers a group's span clips its largest values and rounds the others finer.
# On Gaussian groups of 64 the best scale clips a little, and the code -8 reaches further down. The mean squared error
# is 0.0103 without -8 and with two steps, 0.0096 with it, 0.0093 with three steps too; a fourth one gains 0.3 %.
CLIP_STEPS = 3


def quantize_weight(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """w [N, K] fp32 -> (qweight, subscales, wscales). importance: [K], see `groups.best_of`."""
    g = groups.split(w, GROUP_SIZE)
    ideal = groups.span(g) / 7
    wscales = row_scales(w)[:, None, None]
    cover = (ideal / wscales - 1e-4).ceil().clamp(1, MAX_SUBSCALE)
    candidates = ((cover - step).clamp_min(1) for step in range(CLIP_STEPS + 1))
    weights = None if importance is None else groups.split(importance, GROUP_SIZE)
    s = groups.best_of(g, candidates, lambda v, c: _round(v, c * wscales) * (c * wscales), weights)
    q = _round(g, s * wscales)
    return nibbles.pack((q + 8).flatten(1)), s.squeeze(-1).to(torch.int8), wscales.flatten()


def row_scales(w: Tensor) -> Tensor:
    """[N]: the scale with which the largest sub-scale just covers each row of w [N, K]."""
    span = torch.linalg.vector_norm(w, torch.inf, dim=1)
    return (span / 7 / MAX_SUBSCALE).clamp_min(torch.finfo(torch.float32).tiny)


def _round(v: Tensor, scale: Tensor) -> Tensor:
    return (v / scale).round_().clamp_(-8, 7)


def _steps(qweight: Tensor, subscales: Tensor, wscales: Tensor) -> tuple[Tensor, ...]:
    return (subscales * wscales.unsqueeze(-1),)


def _nearest(v: Tensor, scale: Tensor) -> Tensor:
    return _round(v, scale) * scale


def _encode(values: Tensor, qweight: Tensor, subscales: Tensor, wscales: Tensor) -> tuple[Tensor, ...]:
    (scale,) = _steps(qweight, subscales, wscales)
    codes = _round(groups.split(values, GROUP_SIZE), scale.unsqueeze(-1)) + 8
    return nibbles.pack(codes.flatten(1)), subscales, wscales


def expand_weight(qweight: Tensor, subscales: Tensor) -> Tensor:
    """The int8 matrix q * s, [N, Kp]."""
    q = nibbles.unpack(qweight).to(torch.int8) - 8
    return (q.unflatten(-1, (-1, GROUP_SIZE)) * subscales.unsqueeze(-1)).flatten(-2)


def dequantize_weight(qweight: Tensor, subscales: Tensor, wscales: Tensor) -> Tensor:
    """[N, Kp] fp32."""
    return expand_weight(qweight, subscales).float() * wscales.unsqueeze(-1)


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] fp32, already divided by the smoothing factors -> (qx, ascales). A row of zeros has scale 1."""
    x = groups.split(x, GROUP_SIZE).flatten(-2)
    ascales = groups.span(x) / 127
    ascales = torch.where(ascales > 0, ascales, 1.0)
    return (x / ascales).round_().to(torch.int8), ascales


def dequantize_activation(qx: Tensor, ascales: Tensor) -> Tensor:
    """[..., Kp] fp32."""
    return qx.float() * ascales


def matmul(qx: Tensor, ascales: Tensor, qweight: Tensor, subscales: Tensor, wscales: Tensor) -> Tensor:
    """[..., N] fp32: the exact integer product, scaled."""
    rows = qx.reshape(-1, qx.shape[-1])
    acc = int8_matmul(rows, expand_weight(qweight, subscales)).float()
    return acc.view(*qx.shape[:-1], qweight.shape[0]) * ascales * wscales


def _to_planar(qweight: Tensor, subscales: Tensor, wscales: Tensor) -> tuple[Tensor, ...]:
    pairs = planar.by_group(subscales).unflatten(0, (-1, 2)).transpose(1, 2).contiguous()
    return planar.pack_codes(qweight), pairs.view(torch.int16).squeeze(-1), wscales


def _from_planar(groups: int, qweight: Tensor, pairs: Tensor, wscales: Tensor) -> tuple[Tensor, ...]:
    subscales = pairs.unsqueeze(-1).view(torch.int8).transpose(1, 2).flatten(0, 1)
    return planar.unpack_codes(qweight, groups), planar.by_row(subscales, groups), wscales


INT8 = Codes("int8", torch.int8, torch.float32, GROUP_SIZE, by_block=False)
W4A8 = Format(
    name="w4a8",
    summary="4-bit weights, int8 activations",
    fields=("qweight", "subscales", "wscales"),
    quantize_weight=quantize_weight,
    dequantize_weight=dequantize_weight,
    matmul=matmul,
    group_size=GROUP_SIZE,
    codes=INT8,
    quantize_activation=quantize_activation,
    dequantize_activation=dequantize_activation,
    planar=planar.Planar(_to_planar, _from_planar, feature_dims=(0, 1, 0)),
    grid=Grid(_steps, _nearest, _encode),
    rounding="subscales",
    siblings=True,
    tiles=True,
)
