"""int4 weights with zero points, 16-bit activations, few rows: w4a16 at the speed of reading the weights once.

    y = x (q * wscales + wzeros)^T + xd up^T + bias

    x        [M, K]       bf16 or fp16, contiguous
    qweight  [N, P/2]     int8, planar (layout.py); P = K rounded up to 128
    wscales  [P/64, N, 2] bf16, of each group the scale and the value of code 0
    xd       [M, r]       x's dtype, rows `xd.stride(0)` apart, or None; up [N, r]
    bias     [N]          any float dtype, or None
    y        [M, N]       bf16, fp16 or fp32

Codes become 16-bit values bias + q by a byte permute (triton_unpack.py) and go to the tensor cores unscaled, so the
products are exact; each group's sum is then scaled in fp32. A product with ones sums x over the group, for the zero
points and for taking the bias off. Every load of a step is asynchronous and STAGES steps ahead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import check_low_rank, check_tensor, launch
from .triton_unpack import biased

MAX_ROWS = 64  # above, one pass over the weights for every 16 rows costs more than a 16-bit copy of them


@triton.jit
def _scaled(products, sums, pair, CODE_BIAS: tl.constexpr):
    """sum (bias + q) x, sum x, and a group's scale and zero as the bits of pair -> sum (q * scale + zero) x."""
    scale = (pair << 16).to(tl.float32, bitcast=True)
    zero = (pair & -65536).to(tl.float32, bitcast=True)
    return products * scale + sums * (zero - CODE_BIAS * scale)


@triton.jit
def _gemv_kernel(
    x, qweight, pairs, xd, up, bias, y, M, N, K, r, xd_stride,
    TM: tl.constexpr, TN: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rn = tl.program_id(0) * TN + tl.arange(0, TN)
    rm = tl.program_id(1) * TM + tl.arange(0, TM)
    live_m = (rm < M)[None, :]
    live_n = (rn < N)[:, None]
    wide_m = rm.to(tl.int64)[None, :]
    wide_n = rn.to(tl.int64)[:, None]
    j = tl.arange(0, 64)
    words = tl.cdiv(K, 128)
    DTYPE: tl.constexpr = x.dtype.element_ty
    CODE_BIAS: tl.constexpr = 128.0 if DTYPE == tl.bfloat16 else 1024.0
    ones = tl.full((TN, 64), 1.0, DTYPE)
    acc = tl.zeros((TN, TM), tl.float32)
    for w in tl.range(0, words, num_stages=STAGES):
        p = tl.load(qweight + wide_n * (words * 64) + (w * 64 + j)[None, :], mask=live_n, other=0)
        k = w * 128 + j[:, None]
        x0 = tl.load(x + wide_m * K + k, mask=live_m & (k < K), other=0.0)
        x1 = tl.load(x + wide_m * K + k + 64, mask=live_m & (k + 64 < K), other=0.0)
        even = tl.load(pairs + 2 * w * N + rn[:, None], mask=live_n, other=0)
        odd = tl.load(pairs + (2 * w + 1) * N + rn[:, None], mask=live_n, other=0)
        acc += _scaled(tl.dot(biased(p, DTYPE, False), x0), tl.dot(ones, x0), even, CODE_BIAS)
        acc += _scaled(tl.dot(biased(p, DTYPE, True), x1), tl.dot(ones, x1), odd, CODE_BIAS)
    if BIAS:
        acc += tl.load(bias + rn[:, None], mask=live_n, other=0.0).to(tl.float32)
    if RANK > 0:
        for first in range(0, r, RANK):
            rr = first + tl.arange(0, RANK)
            u = tl.load(up + wide_n * r + rr[None, :], mask=live_n & (rr < r)[None, :], other=0.0)
            d = tl.load(xd + wide_m * xd_stride + rr[:, None], mask=live_m & (rr < r)[:, None], other=0.0)
            acc = tl.dot(u, d, acc)
    tl.store(y + wide_m * N + rn[:, None], acc.to(y.dtype.element_ty), mask=live_m & live_n)


def gemv(x: Tensor, xd: Tensor | None, weight: tuple[Tensor, ...], up: Tensor | None, bias: Tensor | None,
         out_dtype: torch.dtype, config=None) -> Tensor:  # fmt: skip
    """Tensors as above -> y [M, N], M at most MAX_ROWS."""
    qweight, wscales, _ = weight
    (m, k), n = x.shape, qweight.shape[0]
    words = -(-k // 128)
    check_tensor("x", x, x.device, x.dtype, (m, k))
    check_tensor("qweight", qweight, x.device, torch.int8, (n, words * 64))
    check_tensor("wscales", wscales, x.device, torch.bfloat16, (2 * words, n, 2))
    if bias is not None:
        check_tensor("bias", bias, x.device, bias.dtype, (n,))
    if m > MAX_ROWS:
        raise ValueError(f"gemv is for at most {MAX_ROWS} rows, got {m}")
    y = x.new_empty(m, n, dtype=out_dtype)
    if m == 0 or n == 0:
        return y
    r, xd_stride, low_rank = 0, 0, (x, x)  # without a branch its pointers are not read
    if xd is not None and up is not None:
        check_low_rank(xd, up, m, n)
        r, xd_stride, low_rank = up.shape[1], xd.stride(0), (xd, up)
    scales, offsets = wscales.view(torch.int32), wscales if bias is None else bias
    arguments = (x, qweight, scales, *low_rank, offsets, y, m, n, k, r, xd_stride)
    tn, warps, stages = config or (64, 4, 5)
    constants = (16, tn, min(64, triton.next_power_of_2(r)) if r else 0, bias is not None, stages)
    launch(_gemv_kernel, (triton.cdiv(n, tn), triton.cdiv(m, 16), 1), arguments, constants, num_warps=warps)
    return y
