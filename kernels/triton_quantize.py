"""Per-token int8 activations and the low-rank branch's first product, for w4a8.

    v = x / smooth,   ascales = max_k |v| / 127,   qx = round(v / ascales),   xd = x down^T

    x         [M, K]     bf16 or fp16, contiguous
    smooth    [K]        fp32
    down      [R, K]     x's dtype; R a multiple of 16, at most 256, or 0
    qx        [M, Kp]    int8; Kp = K rounded up to 64, zeros beyond K
    ascales   [M, 1]     fp32; 1 for a row of zeros
    xd        [M, R]     down's dtype, accumulated in fp32

A row's scale needs the whole row, and `down` (R K values) must be read once for many rows, or its reads from L2
outweigh x itself. So two kernels: the first splits rows and channels over the GPU and leaves each part's maximum and
partial product, the second reduces those and quantizes. The second walks x from its end, which is still in L2.

    peaks     [S, M]     fp32  the largest |v| in each of S parts of the channels
    partial   [S, M, R]  fp32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import padded
from .triton_launch import check_tensor, launch, processors

MAX_RANK = 256
GROUP_SIZE = 64
# Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits: no slow float-to-int.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _measure_kernel(
    x, smooth, down, peaks, partial, M, K, R, chunk,
    TM: tl.constexpr, TK: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rm = tl.program_id(0) * TM + tl.arange(0, TM)
    part = tl.program_id(1)
    rr = tl.arange(0, RANK if RANK > 0 else 16)
    rows = x + rm.to(tl.int64)[:, None] * K
    live = (rm < M)[:, None]
    peak = tl.zeros((TM, TK), tl.float32)
    acc = tl.zeros((TM, RANK if RANK > 0 else 16), tl.float32)
    first = part * chunk
    rk = first + tl.arange(0, TK)
    divisor = tl.load(smooth + rk, mask=rk < K, other=1.0)
    for k in tl.range(first, min(first + chunk, K), TK):
        rk = k + tl.arange(0, TK)
        # As bits, so that the product takes v from registers: where Triton 3.6 hands `wgmma` the shared buffer of a
        # load that is read otherwise too, that buffer has a slot too few and is refilled under the running product.
        bits = tl.load(rows + rk[None, :], mask=live & (rk < K)[None, :], other=0)
        v = bits.to(down.dtype.element_ty, bitcast=True)
        inverse = 1.0 / divisor
        divisor = tl.load(smooth + rk + TK, mask=rk + TK < K, other=1.0)  # a step ahead: no asynchronous copy here
        peak = tl.maximum(peak, tl.abs(v.to(tl.float32) * inverse[None, :]))
        if RANK > 0:
            d = tl.load(down + rr[None, :] * K + rk[:, None], mask=(rr < R)[None, :] & (rk < K)[:, None], other=0.0)
            acc = tl.dot(v, d, acc)
    tl.store(peaks + part.to(tl.int64) * M + rm, tl.max(peak, 1), mask=rm < M)
    if RANK > 0:
        out = partial + (part.to(tl.int64) * M + rm)[:, None] * R + rr[None, :]
        tl.store(out, acc, mask=live & (rr < R)[None, :])


@triton.jit
def _quantize_kernel(
    x, smooth, peaks, partial, qx, ascales, xd, M, K, KP, R, S, part_size,
    TM: tl.constexpr, TK: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    pm = tl.num_programs(0) - 1 - tl.program_id(0)
    pk = tl.num_programs(1) - 1 - tl.program_id(1)
    rm = pm * TM + tl.arange(0, TM)
    wide = rm.to(tl.int64)
    live = (rm < M)[:, None]
    parts = tl.arange(0, PARTS)
    some = tl.load(peaks + parts.to(tl.int64)[:, None] * M + rm[None, :], mask=(parts < S)[:, None] & (rm < M)[None, :],
                   other=0.0)  # fmt: skip
    peak = tl.max(some, 0)
    scale = tl.where(peak > 0, peak / 127.0, 1.0)
    rk = pk * TK + tl.arange(0, TK)
    v = tl.load(x + wide[:, None] * K + rk[None, :], mask=live & (rk < K)[None, :], other=0.0).to(tl.float32)
    inverse = 1.0 / tl.load(smooth + rk, mask=rk < K, other=1.0)
    steps = v * inverse[None, :] * (1.0 / scale)[:, None]
    q = (steps + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(qx + wide[:, None] * KP + rk[None, :], q, mask=live & (rk < KP)[None, :])
    if pk == 0:
        tl.store(ascales + rm, scale, mask=rm < M)
        if RANK > 0:
            rr = tl.arange(0, RANK)
            mask = live & (rr < R)[None, :]
            at = partial + wide[:, None] * R + rr[None, :]
            total = tl.zeros((TM, RANK), tl.float32)
            for _ in range(S):
                total += tl.load(at, mask=mask, other=0.0)
                at += part_size
            tl.store(xd + wide[:, None] * R + rr[None, :], total.to(xd.dtype.element_ty), mask=mask)


def quantize_w4a8(x: Tensor, smooth: Tensor, down: Tensor, config=None) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], smooth [K], down [R, K] -> qx, ascales, xd."""
    m, k = x.shape
    r = down.shape[0]
    for name, tensor, dtype, shape in (("x", x, x.dtype, (m, k)), ("smooth", smooth, torch.float32, (k,)),
                                       ("down", down, x.dtype, (r, k))):  # fmt: skip
        check_tensor(name, tensor, x.device, dtype, shape)
    if r % 16 or r > MAX_RANK:
        raise ValueError(f"quantize_w4a8: rank {r} is not a multiple of 16 up to {MAX_RANK}")
    kp = padded(k, GROUP_SIZE)
    qx = x.new_empty(m, kp, dtype=torch.int8)
    ascales = x.new_empty(m, 1, dtype=torch.float32)
    xd = x.new_empty(m, r, dtype=down.dtype)
    if m == 0:
        return qx, ascales, xd
    rank = triton.next_power_of_2(r) if r else 0
    tm, tk, stages, per_processor, warps = config or (64, 64, 4, 4, 4)
    blocks = triton.cdiv(m, tm)
    steps = triton.cdiv(k, tk)
    splits = max(1, min(steps, 16, per_processor * processors(x.device) // blocks))
    chunk = triton.cdiv(steps, splits) * tk
    splits = triton.cdiv(k, chunk)
    peaks = x.new_empty(splits, m, dtype=torch.float32)
    partial = x.new_empty(splits, m, r, dtype=torch.float32)
    to_measure = (x.view(torch.int16), smooth, down, peaks, partial, m, k, r, chunk)
    launch(_measure_kernel, (blocks, splits, 1), to_measure, (tm, tk, rank), num_warps=warps, num_stages=stages)
    tm, tk = 8, min(1024, triton.next_power_of_2(kp))
    to_round = (x, smooth, peaks, partial, qx, ascales, xd, m, k, kp, r, splits, m * r)
    constants = (tm, tk, triton.next_power_of_2(splits), rank)
    launch(_quantize_kernel, (triton.cdiv(m, tm), triton.cdiv(kp, tk), 1), to_round, constants, num_warps=4)
    return qx, ascales, xd
