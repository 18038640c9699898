"""q, k and v of an attention in e4m3, a scale for each head of each sample, as FlashAttention-3 multiplies them.

    q [B, H, S, D], k, v [B, H, T, D]   bf16 or fp16, a head's channels side by side
    ->  qq [B, S, H, D], kq, vq [B, T, H, D]   float8_e4m3fn
        scales of q, k, v [B, H]               fp32: a value is its code times its head's scale

    k less its mean over the tokens, channel by channel: that moves all logits of a row alike, which softmax does not
    see, and what all keys share takes no bits (SageAttention, arXiv 2410.02367)
    scale = the largest magnitude of a head / 448, 1 where all is zero

A first launch leaves each channel's least, greatest and sum in CHUNKS parts of the tokens, a second one makes means and
scales of them, a third one codes. Heads and rows begin at multiples of 16 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launcher import launch

CHUNKS = 8
STEP, BLOCK = 32 * 128, 128 * 128  # values of a step of the first launch, and of a program of the last
E4M3_MAX = tl.constexpr(448.0)


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
    return tl.multiple_of(x + start, 16), tl.multiple_of(strides[2].to(tl.int64), 8), rows


@triton.jit(do_not_specialize=["S", "T", "H"])
def _attention_spans_kernel(
    q, k, v, spans, S, T, H, D, q_strides, k_strides, v_strides,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    x, stride, rows = _operand(q, k, v, S, T, q_strides, k_strides, v_strides, H)
    columns = tl.arange(0, WIDTH)
    size = tl.cdiv(rows, CHUNKS)
    first = tl.program_id(0) * size
    last = tl.minimum(first + size, rows)
    # Reduced once: in the loop it would have Triton load numbers one by one.
    least = tl.full((ROWS, WIDTH), float("inf"), tl.float32)
    most = tl.full((ROWS, WIDTH), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in tl.range(first, last, ROWS):
        r = begin + tl.arange(0, ROWS)
        live = (r < last)[:, None] & (columns < D)[None, :]
        at = tl.max_contiguous(tl.multiple_of(x + r[:, None] * stride + columns[None, :], (1, 16)), (1, 8))
        value = tl.load(at, mask=live, other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.where(live, value, float("inf")))
        most = tl.maximum(most, tl.where(live, value, float("-inf")))
        total += value
    part = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * CHUNKS + tl.program_id(0)
    at = spans + part.to(tl.int64) * (3 * D) + columns
    tl.store(at, tl.min(least, 0), mask=columns < D)
    tl.store(at + D, tl.max(most, 0), mask=columns < D)
    tl.store(at + 2 * D, tl.sum(total, 0), mask=columns < D)


@triton.jit(do_not_specialize=["S", "T"])
def _attention_scales_kernel(spans, means, scales, S, T, D, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    which = tl.program_id(1)
    own = which * tl.num_programs(0) + tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    there = (columns < D)[None, :]
    at = spans + (own.to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS))[:, None] * (3 * D) + columns[None, :]
    least = tl.min(tl.load(at, mask=there, other=0.0), 0)
    most = tl.max(tl.load(at + D, mask=there, other=0.0), 0)
    mean = tl.sum(tl.load(at + 2 * D, mask=there, other=0.0), 0) / tl.where(which == 0, S, T)
    mean = tl.where(which == 1, mean, 0.0)
    largest = tl.max(tl.maximum(most - mean, mean - least), 0)
    tl.store(means + own * D + columns, mean, mask=columns < D)
    tl.store(scales + own, tl.where(largest > 0, largest / E4M3_MAX, 1.0))


@triton.jit(do_not_specialize=["S", "T", "H"])
def _attention_codes_kernel(
    q, k, v, means, scales, qq, kq, vq, S, T, H, D, q_strides, k_strides, v_strides,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    x, stride, rows = _operand(q, k, v, S, T, q_strides, k_strides, v_strides, H)
    which, head = tl.program_id(2), tl.program_id(1)
    target = qq if which == 0 else (kq if which == 1 else vq)
    own = which * tl.num_programs(1) + head
    columns = tl.arange(0, WIDTH)
    mean = tl.load(means + own * D + columns, mask=columns < D, other=0.0)
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (r < rows)[:, None] & (columns < D)[None, :]
    value = tl.load(x + r[:, None] * stride + columns[None, :], mask=live, other=0.0).to(tl.float32)
    code = (value - mean[None, :]) * (1.0 / tl.load(scales + own))
    code = tl.minimum(tl.maximum(code, -E4M3_MAX), E4M3_MAX)
    lines = ((head // H).to(tl.int64) * rows + r) * H + head % H
    tl.store(tl.multiple_of(target, 16) + lines[:, None] * D + columns[None, :], code.to(tl.float8e4nv), mask=live)


def attention_codes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """-> qq, kq, vq, and the three scales, as above. No dimension may be empty; D a multiple of 16 up to 128."""
    (b, h, s, d), t = q.shape, k.shape[2]
    codes = [x.new_empty(b, x.shape[2], h, d, dtype=torch.float8_e4m3fn) for x in (q, k, v)]
    scales = q.new_empty(3, b, h, dtype=torch.float32)
    spans = q.new_empty(3, b * h, CHUNKS, 3, d, dtype=torch.float32)
    means = q.new_empty(3, b * h, d, dtype=torch.float32)
    strides = tuple(x.stride()[:3] for x in (q, k, v))
    width = triton.next_power_of_2(d)
    launch(_attention_spans_kernel, (CHUNKS, b * h, 3), (q, k, v, spans, s, t, h, d, *strides),
           (width, STEP // width, CHUNKS), num_warps=8, num_stages=2)  # fmt: skip
    launch(_attention_scales_kernel, (b * h, 3, 1), (spans, means, scales, s, t, d), (width, CHUNKS), num_warps=2)
    rows = BLOCK // width
    launch(_attention_codes_kernel, (triton.cdiv(max(s, t), rows), b * h, 3),
           (q, k, v, means, scales, *codes, s, t, h, d, *strides), (width, rows), num_warps=8)  # fmt: skip
    return *codes, *scales.unbind()
