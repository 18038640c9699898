"""int4 weights with zero points, 16-bit activations, few rows: w4a16 near the speed of reading the weights once.

    y = epilogue(x (q * wscales + wzeros)^T + xd up^T + bias)

    x        [M, K]       bf16 or fp16, contiguous
    qweight  [N, P/2]     int8, planar (formats/planar.py); P = K rounded up to 128
    wscales  [P/64, N, 2] bf16, of each group the scale and the value of code 0
    xd       [M, r]       x's dtype, rows `xd.stride(0)` apart, or None; up [N, r]
    bias     [N]          any float dtype, or None
    y        [M, N]       bf16, fp16 or fp32

What counts is bytes under way. A program takes 16 features and all of K. Its warps take turns at words (the 64 bytes of
128 channels), and each loads WORDS of them at once, with their scales, up and bias, into the registers where `mma`
wants them, before it waits for any. Only the sums of the warps go through shared memory, in a fixed order.

For that the product is batched, one batch a warp, and its K permuted: a lane's 16 bytes are neighbouring channels of
one feature, and x is loaded to match. `_left` and `_right` say so in shapes; in another order results would be the same
but values would have to move between lanes. Codes become 16-bit values bias + q by a byte permute (unpack.py)
and are multiplied unscaled, so products are exact; each group's sum is scaled in fp32. A product with ones sums x over
the group, for the zero points and for taking the bias off.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Gemv
from ..runtime.generated import Generated
from ..runtime.launcher import check_low_rank, check_tensor, early_launch, launch
from ..runtime.target import capability, launches_early
from .early import gdc_wait
from .unpack import biased

MAX_ROWS = 64  # above, one pass over the weights for every 16 rows costs more than a 16-bit copy of them


@triton.jit
def _left(codes, B: tl.constexpr):
    """[(2, B, 8), 64], features in dims 0 and 2 -> [B, 16, 64], as the left operand that was 8-bit in memory."""
    v = tl.reshape(codes, (2, B, 8, 4, 2, 2, 2, 2))
    v = tl.permute(v, (1, 0, 2, 4, 6, 3, 5, 7))
    return tl.reshape(v, (B, 16, 64))


@triton.jit
def _right(x, B: tl.constexpr, TM: tl.constexpr):
    """[(2, TM/8, B, 8, 4), 8], channels in dims 0, 4, 5, tokens in 1 and 3 -> [B, 64, TM], channels as in `_left`."""
    v = tl.reshape(x, (2, TM // 8, B, 8, 4, 2, 2, 2))
    v = tl.permute(v, (2, 0, 6, 4, 5, 7, 1, 3))
    return tl.reshape(v, (B, 64, TM))


@triton.jit
def _left_wide(up, B: tl.constexpr):
    """[(2, B, 8), 32] -> [B, 16, 32], as the left operand that was 16-bit in memory."""
    v = tl.reshape(up, (2, B, 8, 4, 2, 2, 2))
    v = tl.permute(v, (1, 0, 2, 4, 5, 3, 6))
    return tl.reshape(v, (B, 16, 32))


@triton.jit
def _right_wide(x, B: tl.constexpr, TM: tl.constexpr, PARTS: tl.constexpr):
    """[(PARTS, TM/8, B, 8, 4), 8] -> [B, 32 PARTS, TM], channels as in `_left_wide`."""
    v = tl.reshape(x, (PARTS, TM // 8, B, 8, 4, 2, 2, 2))
    v = tl.permute(v, (2, 0, 5, 6, 4, 7, 1, 3))
    return tl.reshape(v, (B, 32 * PARTS, TM))


@triton.jit
def _load(q_at, q_w, s_at, s_w, first, words, N, WARPS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr):
    """Every warp's next WORDS words: their codes, and two groups' scales of each."""
    codes = ()  # type: tuple
    scales = ()  # type: tuple
    for i in tl.static_range(WORDS):
        w = first + i * WARPS
        if WHOLE:
            codes = codes + (tl.load(q_at + w * 64, eviction_policy="evict_first"),)
        else:  # past the end any code will do: its scale is 0
            codes = codes + (tl.load(q_at + w * 64, mask=q_w + w < words, eviction_policy="evict_first"),)
    for i in tl.static_range(WORDS):
        w = first + i * WARPS
        if WHOLE:
            scales = scales + (tl.load(s_at + 2 * w * N), tl.load(s_at + (2 * w + 1) * N))
        else:
            live = s_w + w < words
            even = tl.load(s_at + 2 * w * N, mask=live, other=0)
            odd = tl.load(s_at + (2 * w + 1) * N, mask=live, other=0)
            scales = scales + (even, odd)
    return codes, scales


@triton.jit
def _multiply(
    acc, codes, scales, x_at, x_k, first, K, TM: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """acc [WARPS, 16, TM] + the products of what `_load` returned."""
    DTYPE: tl.constexpr = x_at.dtype.element_ty
    CODE_BIAS: tl.constexpr = 128.0 if DTYPE == tl.bfloat16 else 1024.0
    ones = tl.full((WARPS, 16, 64), 1.0, DTYPE)
    for i in tl.static_range(WORDS):
        for high in tl.static_range(2):
            k = (first + i * WARPS) * 128 + high * 64
            x = tl.load(x_at + k) if WHOLE else tl.load(x_at + k, mask=x_k + k < K, other=0.0)
            products = tl.dot(_left(biased(codes[i], DTYPE, high == 1), WARPS), _right(x, WARPS, TM))
            sums = tl.dot(ones, _right_wide(x, WARPS, TM, 2))
            pair = scales[2 * i + high][:, :, None]
            scale = (pair << 16).to(tl.float32, bitcast=True)
            zero = (pair & -65536).to(tl.float32, bitcast=True)
            acc += products * scale
            acc += sums * (zero - CODE_BIAS * scale)
    return acc


@triton.jit
def _load_low_rank(u_at, u_k, d_at, d_k, first, r):
    u = tl.load(u_at + first, mask=u_k + first < r, other=0.0)
    return u, tl.load(d_at + first, mask=d_k + first < r, other=0.0)


@triton.jit
def _gemv_kernel(
    x, qweight, pairs, xd, up, bias, y, M, N, K, r, xd_stride, extra,
    TM: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr, ONCE: tl.constexpr,
    RANK_STEPS: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
    n0 = tl.program_id(0) * 16
    m0 = tl.program_id(1) * TM
    words = tl.cdiv(K, 128)
    # The first axis counts lanes, then warps, then what a lane has several of: Triton deals it out in that order.
    # Features and tokens past the end repeat the last one and are not stored: no load needs a mask for them.
    row = tl.arange(0, 16 * WARPS)[:, None]
    q_n = tl.minimum(n0 + row % 8 + row // (8 * WARPS) * 8, N - 1).to(tl.int64)
    q_w = row // 8 % WARPS
    q_at = qweight + q_n * (words * 64) + (q_w * 64 + tl.arange(0, 64)[None, :])
    s_w = tl.arange(0, WARPS)[:, None]
    s_at = pairs + 2 * s_w * N + tl.minimum(n0 + tl.arange(0, 16), N - 1)[None, :]
    eight = tl.arange(0, 8)[None, :]
    part = tl.arange(0, 8 * TM * WARPS)[:, None]
    x_m = tl.minimum(m0 + part // 4 % 8 + part // (32 * WARPS) % (TM // 8) * 8, M - 1).to(tl.int64)
    x_k = part // 32 % WARPS * 128 + part % 4 * 16 + part // (4 * TM * WARPS) * 8 + eight
    x_at = x + x_m * K + x_k
    rn = n0 + tl.arange(0, 16)
    rm = m0 + tl.arange(0, TM)
    acc = tl.zeros((WARPS, 16, TM), tl.float32)
    codes, scales = _load(q_at, q_w, s_at, s_w, 0, words, N, WARPS, WORDS, WHOLE)
    if RANK_STEPS > 0:
        u_k = q_w * 32 + tl.arange(0, 32)[None, :]
        u_at = up + q_n * r + u_k
        part = tl.arange(0, 4 * TM * WARPS)[:, None]
        d_m = tl.minimum(m0 + part // 4 % 8 + part // (32 * WARPS) * 8, M - 1).to(tl.int64)
        d_k = part // 32 % WARPS * 32 + part % 4 * 8 + eight
        d_at = xd + d_m * xd_stride + d_k
        u, d = _load_low_rank(u_at, u_k, d_at, d_k, 0, r)
    if BIAS:
        b = tl.load(bias + tl.minimum(rn, N - 1))
    tl.debug_barrier()  # or ptxas moves each load down to its use
    if RANK_STEPS > 0:
        acc = tl.dot(_left_wide(u, WARPS), _right_wide(d, WARPS, TM, 1), acc)
    acc = _multiply(acc, codes, scales, x_at, x_k, 0, K, TM, WARPS, WORDS, WHOLE)
    if not ONCE:
        for first in range(WARPS * WORDS, words, WARPS * WORDS):
            codes, scales = _load(q_at, q_w, s_at, s_w, first, words, N, WARPS, WORDS, WHOLE)
            tl.debug_barrier()
            acc = _multiply(acc, codes, scales, x_at, x_k, first, K, TM, WARPS, WORDS, WHOLE)
    for i in tl.static_range(1, RANK_STEPS):
        u, d = _load_low_rank(u_at, u_k, d_at, d_k, i * 32 * WARPS, r)
        acc = tl.dot(_left_wide(u, WARPS), _right_wide(d, WARPS, TM, 1), acc)
    out = tl.sum(acc, axis=0)
    if BIAS:
        out += b.to(tl.float32)[:, None]
    live = (rn < N)[:, None] & (rm < M)[None, :]
    if EPILOGUE is not None:
        out = EPILOGUE(out, rn[:, None], rm[None, :], live, extra)
    tl.store(y + rm.to(tl.int64)[None, :] * N + rn[:, None], out.to(y.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class Split:
    """How a program divides K: among how many warps, and how many words each has under way at a time."""

    warps: int
    words: int


def choose_split(m: int, k: int, major: int) -> Split:
    """For m tokens, k channels and a GPU's major capability, the fastest of a few on an H100 (docs/kernels.md)."""
    if m > 8:
        return Split(4, 3)  # a word takes twice the registers
    if 0 < k <= 3072:
        return Split(4, -(-k // 512))
    return Split(4, 6) if major == 10 else Split(8, 3)  # as many words under way: Triton 3.8 spills with 8 warps there


def gemv(o: Gemv, epilogue: Generated | None = None, split: Split | None = None) -> Tensor:
    """Operands as above -> y [M, N], M at most MAX_ROWS. The same operands always give the same bits."""
    x, bias, (qweight, wscales, _) = o.x, o.bias, o.weight
    (m, k), n = x.shape, qweight.shape[0]
    words = -(-k // 128)
    check_tensor("x", x, x.device, x.dtype, (m, k))
    check_tensor("qweight", qweight, x.device, torch.int8, (n, words * 64))
    check_tensor("wscales", wscales, x.device, torch.bfloat16, (2 * words, n, 2))
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype}, expected bfloat16 or float16")
    if bias is not None:
        check_tensor("bias", bias, x.device, bias.dtype, (n,))
    if m > MAX_ROWS:
        raise ValueError(f"gemv is for at most {MAX_ROWS} rows, got {m}")
    if 2 * words * n >= 2**31:  # scales are the one thing with 32-bit offsets
        raise ValueError(f"gemv is for less than 2^31 groups of 64 channels, got {2 * words * n}")
    r, xd_stride, low_rank = 0, 0, (x, x)  # without a branch its pointers are not read
    if o.xd is not None and o.up is not None:
        check_low_rank(o.xd, o.up, m, n)
        if o.xd.dtype != x.dtype:
            raise TypeError(f"xd is {o.xd.dtype}, x is {x.dtype}")
        r, xd_stride, low_rank = o.up.shape[1], o.xd.stride(0), (o.xd, o.up)
    y = x.new_empty(m, n, dtype=o.out_dtype)
    if m == 0 or n == 0:
        return y
    s = split or choose_split(m, k, capability(x.device)[0])
    extra, function = ((), None) if epilogue is None else (epilogue.operands, epilogue.function)
    scales, offsets = wscales.view(torch.int32), wscales if bias is None else bias
    arguments = (x, qweight, scales, *low_rank, offsets, y, m, n, k, r, xd_stride, extra)
    tm, step = (8 if m <= 8 else 16), s.warps * s.words
    whole, once = k > 0 and k % (128 * step) == 0, words <= step
    early = launches_early(x.device)
    constants = (tm, s.warps, s.words, whole, once, -(-r // (32 * s.warps)), bias is not None, function, early)
    grid = (-(-n // 16), -(-m // tm), 1)
    launch(_gemv_kernel, grid, arguments, constants, num_warps=s.warps, num_stages=1, **early_launch(early))
    return y
