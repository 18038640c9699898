"""int4 weights with integer sub-scales, int8 activations with one scale a token.

    y = (qx @ (q * s)^T) * ascales * wscales

The expanded weight q * s (|q| <= 7, s <= 16, so at most 112) is an int8 matrix: the product accumulates in int32 over
the whole of K and both scales wait until the end, which is what lets int8 tensor cores run at full rate.

    qweight    [N, Kp/2]    uint8   q + 8, two nibbles a byte (nibbles.py); Kp = K rounded up to whole groups of 64
    subscales  [N, Kp/64]   int8    s, 1..16
    wscales    [N]          fp32    one scale an output channel
    qx         [..., Kp]    int8    -127..127
    ascales    [..., 1]     fp32
"""

import torch
from torch import Tensor

from . import groups, nibbles
from .format import Format
from .int8_matmul import int8_matmul

GROUP_SIZE = 64
MAX_SUBSCALE = 16
# A sub-scale below the one that just covers a group's span clips its largest values and rounds the others finer.
# On Gaussian groups of 64 the best scale clips a little; steps beyond two never won in trials.
CLIP_STEPS = 2


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
    return (v / scale).round_().clamp_(-7, 7)


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


W4A8 = Format(
    "w4a8",
    ("qweight", "subscales", "wscales"),
    quantize_weight,
    dequantize_weight,
    matmul,
    GROUP_SIZE,
    quantize_activation,
    dequantize_activation,
)
