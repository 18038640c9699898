"""Round a weight to 4 bits: what `Format.quantize_weight` and `dequantize_weight` compute, in one reading of it.

Quantizing a model rounds each weight once a refinement round. In plain torch that moves some 300 bytes an entry, here
17: a group of 64 neighbours is held in registers while the scales that could stand for it are tried.

    w           [N, K]      fp32, K padded to whole groups of 64
    importance  [K]         fp32, see `groups.best_of`; ones where nothing is known
    spans       [N]         fp32, "subscales": the scale of each row
    codes       [N, K/2]    uint8, two nibbles a byte (nibbles.py)
    scales      [N, K/64]   "subscales" (w4a8): int8;  "scales" (int4), "zeros" (w4a16): bf16
    zeros       [N, K/64]   bf16, "zeros": the value of code 0
    rounded     [N, K]      fp32, what codes and scales stand for

Scales that lose the same may be chosen differently than by the reference, whose sums have another order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS, groups, int4, w4a8, w4a16
from ..runtime.launcher import launch
from .codes import nearest

GROUPS = 32  # of 64 entries, a program's
_W4A8_STEPS = tl.constexpr(w4a8.CLIP_STEPS)
_MAX_SUBSCALE = tl.constexpr(float(w4a8.MAX_SUBSCALE))
# How many shares of a span are tried: 1, 0.95, 0.9, ... as in the two modules' CLIP.
_INT4_SHARES = tl.constexpr(len(int4.CLIP))
_W4A16_SHARES = tl.constexpr(len(w4a16.CLIP))


@triton.jit
def _bf16(v):
    """fp32 rounded to what bf16 holds, ties to even. (Triton's interpreter would cut the bits off.)"""
    bits = v.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _signed(v, scale, LOW: tl.constexpr):
    return tl.clamp(nearest(tl.div_rn(v, scale[:, None])), LOW, 7.0)


@triton.jit
def _from_zero(v, scale, zero):
    return tl.clamp(nearest(tl.div_rn(v - zero[:, None], scale[:, None])), 0.0, 15.0)


@triton.jit
def _zero(scale, low, high, constant):
    middle = (low + high) * 0.5
    return _bf16(tl.where(constant, low, middle - 7.5 * scale))


@triton.jit
def _loss(rounded, v, weights):
    error = rounded - v
    return tl.sum(error * error * weights, 1)


@triton.jit
def _better(loss, best_loss, scale, best):
    return tl.minimum(loss, best_loss), tl.where(loss < best_loss, scale, best)


@triton.jit
def _round_to_subscales(v, weights, row_scale):
    """-> codes 0..15, sub-scales, what they stand for."""
    cover = tl.div_rn(tl.div_rn(tl.max(tl.abs(v), 1), 7.0), row_scale) - 1e-4
    cover = tl.clamp(tl.ceil(cover), 1.0, _MAX_SUBSCALE)
    best = cover
    best_loss = tl.full(cover.shape, float("inf"), tl.float32)
    for step in tl.static_range(_W4A8_STEPS + 1):
        s = tl.maximum(cover - step, 1.0)
        loss = _loss(_signed(v, s * row_scale, -8.0) * (s * row_scale)[:, None], v, weights)
        best_loss, best = _better(loss, best_loss, s, best)
    q = _signed(v, best * row_scale, -8.0)
    return q + 8.0, best, q * best[:, None] * row_scale[:, None]


@triton.jit
def _round_to_scales(v, weights):
    """-> codes 1..15, scales, what they stand for."""
    cover = tl.div_rn(tl.max(tl.abs(v), 1), 7.0)
    cover = tl.where(cover > 0, cover, 1.0)
    best = cover
    best_loss = tl.full(cover.shape, float("inf"), tl.float32)
    for i in tl.static_range(_INT4_SHARES):
        scale = _bf16(cover * (1.0 - 0.05 * i))
        loss = _loss(_signed(v, scale, -7.0) * scale[:, None], v, weights)
        best_loss, best = _better(loss, best_loss, scale, best)
    q = _signed(v, best, -7.0)
    return q + 8.0, best, q * best[:, None]


@triton.jit
def _round_to_zeros(v, weights):
    """-> codes 0..15, scales, zeros, what they stand for."""
    low, high = tl.min(v, 1), tl.max(v, 1)
    step = tl.div_rn(high - low, 15.0)
    constant = step == 0
    step = tl.where(constant, 1.0, step)
    best = step
    best_loss = tl.full(step.shape, float("inf"), tl.float32)
    for i in tl.static_range(_W4A16_SHARES):
        scale = _bf16(step * (1.0 - 0.05 * i))
        zero = _zero(scale, low, high, constant)
        loss = _loss(_from_zero(v, scale, zero) * scale[:, None] + zero[:, None], v, weights)
        best_loss, best = _better(loss, best_loss, scale, best)
    zero = _zero(best, low, high, constant)
    q = _from_zero(v, best, zero)
    return q, best, zero, q * best[:, None] + zero[:, None]


@triton.jit
def _round_kernel(
    w, importance, spans, codes, scales, zeros, rounded, total, row_groups, ROUNDING: tl.constexpr, TG: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * TG + tl.arange(0, TG)
    live = group < total
    inside = tl.arange(0, 64)
    entries = group[:, None] * 64 + inside[None, :]
    v = tl.load(w + entries, mask=live[:, None], other=0.0)
    channels = (group % row_groups)[:, None] * 64 + inside[None, :]
    weights = tl.load(importance + channels, mask=live[:, None], other=0.0)
    if ROUNDING == "subscales":
        row_scale = tl.load(spans + group // row_groups, mask=live, other=1.0)
        q, scale, result = _round_to_subscales(v, weights, row_scale)
    elif ROUNDING == "scales":
        q, scale, result = _round_to_scales(v, weights)
    else:
        q, scale, zero, result = _round_to_zeros(v, weights)
        tl.store(zeros + group, zero.to(zeros.dtype.element_ty), mask=live)
    tl.store(scales + group, scale.to(scales.dtype.element_ty), mask=live)
    tl.store(rounded + entries, result, mask=live[:, None])
    even, odd = tl.split(tl.reshape(q.to(tl.int32), (TG, 32, 2)))
    places = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(codes + places, (even | (odd << 4)).to(tl.uint8), mask=live[:, None])


def round_weight(precision: str, w: Tensor, importance: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """w [N, K] fp32 -> the format's tensors, and rounded [N, K]."""
    rounding = FORMATS[precision].rounding
    if rounding is None:
        known = ", ".join(f.name for f in FORMATS.values() if f.rounding is not None)
        raise ValueError(f"no kernel rounds to {precision}; there is one for {known}")
    if w.ndim != 2 or w.dtype != torch.float32:
        raise TypeError(f"w is {w.dtype} with {w.ndim} dimensions, expected a float32 matrix")
    n, k = w.shape
    split = groups.split(w, 64).contiguous()
    row_groups = split.shape[1]
    if importance is None:
        importance = w.new_ones(row_groups * 64)
    elif importance.shape != (k,) or importance.dtype != torch.float32 or importance.device != w.device:
        raise ValueError(f"importance is {tuple(importance.shape)} {importance.dtype} on {importance.device}")
    importance = groups.split(importance, 64).contiguous()
    codes = w.new_empty(n, row_groups * 32, dtype=torch.uint8)
    scales = w.new_empty(n, row_groups, dtype=torch.int8 if rounding == "subscales" else torch.bfloat16)
    zeros = torch.empty_like(scales) if rounding == "zeros" else None
    spans = w4a8.row_scales(w) if rounding == "subscales" else None
    rounded = torch.empty_like(split)
    total = n * row_groups
    if total:
        grid = (triton.cdiv(total, GROUPS), 1, 1)
        launch(
            _round_kernel,
            grid,
            (split, importance, spans, codes, scales, zeros, rounded, total, row_groups),
            (rounding, GROUPS),
            num_warps=4,
        )
    tensors = tuple(t for t in (codes, scales, zeros, spans) if t is not None)
    return tensors, rounded.flatten(1)[:, :k]
