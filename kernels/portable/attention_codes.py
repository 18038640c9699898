"""q, k and v of an attention in e4m3, a scale for each head of each sample, as FlashAttention-3 multiplies them.

    q [B, H, S, D], k, v [B, H, T, D]   bf16 or fp16, a head's channels side by side
    ->  qq [B, S, H, D], kq, vq [B, T, H, D]   float8_e4m3fn
        scales of q, k, v [B, H]               fp32: a value is its code times its head's scale

    k less its mean over the tokens, channel by channel: that moves all logits of a row alike, which softmax does not
    see, and what all keys share takes no bits (SageAttention, arXiv 2410.02367)
    scale = the largest magnitude of a head / 448, 1 where all is zero

A first launch leaves each channel's least, greatest and sum in CHUNKS parts of the tokens; a second one adds these up,
program by program, and writes codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launcher import launch

CHUNKS = 8
STEP, BLOCK = 32 * 128, 128 * 128  # values of a step of the first launch, and of a program of the second
LARGEST = tl.constexpr(448.0)


@triton.jit
def _operand(q, k, v, S, T, q_strides, k_strides, v_strides, H):
    """Where this program's head begins, its rows' stride and number; q, k and v take turns along the third axis."""
    which, head = tl.program_id(2), tl.program_id(1)
    if which == 0:
        x, strides, rows = q, q_strides, S
    elif which == 1:
        x, strides, rows = k, k_strides, T
    else:
        x, strides, rows = v, v_strides, T
    start = (head // H).to(tl.int64) * strides[0] + (head % H).to(tl.int64) * strides[1]
    return x + start, strides[2], rows


@triton.jit(do_not_specialize=["S", "T", "H"])
def _spans_kernel(
    q, k, v, spans, S, T, H, D, q_strides, k_strides, v_strides,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    x, stride, rows = _operand(q, k, v, S, T, q_strides, k_strides, v_strides, H)
    columns = tl.arange(0, WIDTH)
    size = tl.cdiv(rows, CHUNKS)
    first = tl.program_id(0) * size
    last = tl.minimum(first + size, rows)
    least = tl.full((WIDTH,), float("inf"), tl.float32)
    most = tl.full((WIDTH,), float("-inf"), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for begin in tl.range(first, last, ROWS):
        r = begin + tl.arange(0, ROWS)
        live = (r < last)[:, None] & (columns < D)[None, :]
        value = tl.load(x + r.to(tl.int64)[:, None] * stride + columns[None, :], mask=live, other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.min(tl.where(live, value, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(live, value, float("-inf")), 0))
        total += tl.sum(value, 0)
    part = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * CHUNKS + tl.program_id(0)
    at = spans + part.to(tl.int64) * (3 * D) + columns
    tl.store(at, least, mask=columns < D)
    tl.store(at + D, most, mask=columns < D)
    tl.store(at + 2 * D, total, mask=columns < D)


@triton.jit(do_not_specialize=["S", "T", "H"])
def _codes_kernel(
    q, k, v, spans, qq, kq, vq, scales, S, T, H, D, q_strides, k_strides, v_strides,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    which, head = tl.program_id(2), tl.program_id(1)
    x, stride, rows = _operand(q, k, v, S, T, q_strides, k_strides, v_strides, H)
    target = qq if which == 0 else (kq if which == 1 else vq)
    columns = tl.arange(0, WIDTH)
    own = which * tl.num_programs(1) + head
    at = spans + (own.to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS))[:, None] * (3 * D) + columns[None, :]
    there = (columns < D)[None, :]
    least = tl.min(tl.load(at, mask=there, other=0.0), 0)
    most = tl.max(tl.load(at + D, mask=there, other=0.0), 0)
    mean = tl.sum(tl.load(at + 2 * D, mask=there, other=0.0), 0) / rows
    mean = tl.where(which == 1, mean, 0.0)
    largest = tl.max(tl.maximum(most - mean, mean - least), 0)
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    if tl.program_id(0) == 0:
        tl.store(scales + own, scale)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (r < rows)[:, None] & there
    value = tl.load(x + r[:, None] * stride + columns[None, :], mask=live, other=0.0).to(tl.float32)
    code = (value - mean[None, :]) * (1.0 / scale)
    code = tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    lines = ((head // H).to(tl.int64) * rows + r) * H + head % H
    tl.store(target + lines[:, None] * D + columns[None, :], code.to(tl.float8e4nv), mask=live)


def attention_codes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """-> qq, kq, vq, and the three scales, as above. No dimension may be empty."""
    (b, h, s, d), t = q.shape, k.shape[2]
    codes = [x.new_empty(b, x.shape[2], h, d, dtype=torch.float8_e4m3fn) for x in (q, k, v)]
    scales = q.new_empty(3, b, h, dtype=torch.float32)
    spans = q.new_empty(3, b * h, CHUNKS, 3, d, dtype=torch.float32)
    strides = tuple(x.stride()[:3] for x in (q, k, v))
    width = triton.next_power_of_2(d)
    launch(_spans_kernel, (CHUNKS, b * h, 3), (q, k, v, spans, s, t, h, d, *strides),
           (width, STEP // width, CHUNKS), num_warps=8, num_stages=2)  # fmt: skip
    rows = BLOCK // width
    launch(_codes_kernel, (triton.cdiv(max(s, t), rows), b * h, 3),
           (q, k, v, spans, *codes, scales, s, t, h, d, *strides), (width, rows, CHUNKS), num_warps=8)  # fmt: skip
    return *codes, *scales.unbind()
