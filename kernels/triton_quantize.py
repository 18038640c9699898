"""What a quantized linear reads: the input after an optional generated prologue, smoothed and quantized, and the
low-rank branch's first product.

    h = prologue(x)  or  x,   rounded to x's dtype
    v = h / smooth,  or (h + shift) / smooth where int4 is unsigned
    xd = h down^T,   accumulated in fp32

    w4a8    ascales = max_k |v| / 127, one a row                  qx = round(v / ascales)
    int4    ascales = max |v| / 7 (15 unsigned), one a row and 64 qx = round(v / ascales)
    nvfp4   ascales = e4m3(max |v| / 6), one a row and 16         qx = e2m1(v / ascales), two a byte

    x         [M, W]     bf16 or fp16, contiguous; W = K without a prologue, any width with one
    smooth    [K]        fp32
    down      [R, K]     x's dtype, contiguous; R a multiple of 16, at most 256, or 0
    qx        [M, Kp]    int8; Kp = K rounded up to groups of 64, zeros beyond K.  nvfp4: [M, Kp/2] uint8, groups of 16
    ascales   [M, 1]     fp32;  int4: [M, Kp/64] fp32;  nvfp4: [M, Kp/16] float8_e4m3fn.  1 where all is zero
    xd        [M, R]     x's dtype

Rounding is to the nearest, ties to even. w4a8 multiplies by reciprocals, so a code within rounding of a tie may be one
step off; the scales of the other formats make ties common, and their codes are exactly the reference's.

On sm_90 gluon_quantize.py does w4a8 without a prologue in one kernel that reads x once. Everything else takes up to
three launches, below: a row's scale, and its mean, need the whole row, and `down` (R K values) must be read once for
many rows, or its reads outweigh x. So a launch splits rows and channels over the GPU, each program leaves what it
found, and the next launch combines it. The last one walks x from its end, which is still in L2.

    moments   [S, 2, M]  fp32  mean, and sum of squared deviations from it, of each of S parts of a row
    peaks     [S, M]     fp32  the largest |v| in each part
    partial   [S, M, R]  fp32  each part's contribution to xd
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import padded
from .hooks import Hook
from .triton_launch import check_tensor, launch, processors

MAX_RANK = 256
GROUP_SIZE = {"w4a8": 64, "int4": 64, "nvfp4": 16}
# Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits: no slow float-to-int.
ROUND = tl.constexpr(12582912.0)
LARGEST = tl.constexpr(3.0e38)  # for reciprocals of scales so small that they would overflow


@dataclass(frozen=True, eq=False)
class RowPrologue(Hook):
    """A prologue that needs the mean and the variance (that of the population) of each row of x [M, K]:

    `function(v, mean, variance, rows, columns, live, extra) -> v`, mean and variance [rows, 1] fp32. The mean square
    is variance + mean^2.
    """


@triton.jit
def prologue(v, mean, variance, rows, columns, live, extra, HOOK: tl.constexpr, MOMENTS: tl.constexpr):
    """A block of x -> what the linear reads, in the same dtype; zero where nothing lives."""
    if HOOK is not None:
        if MOMENTS:
            out = HOOK(v.to(tl.float32), mean, variance, rows, columns, live, extra)
        else:
            out = HOOK(v.to(tl.float32), rows, columns, live, extra)
        v = tl.where(live, out, 0.0).to(v.dtype)
    return v


@triton.jit
def merge(means, squares, counts, K):
    """Mean and variance of rows from those of their parts (Chan): [S, rows] each, counts [S, 1] -> [rows] each."""
    mean = tl.sum(means * counts, 0) / K
    away = means - mean[None, :]
    return mean, tl.sum(squares + counts * away * away, 0) / K


@triton.jit
def int8_scale(most):
    """The largest magnitude of a row -> its scale and the reciprocal."""
    scale = tl.where(most > 0, tl.div_rn(most, 127.0), 1.0)
    return scale, tl.minimum(1.0 / scale, LARGEST)


@triton.jit
def int8_codes(v, inverse, reciprocal):
    """v, with one over its smoothing factors and one over its scale -> int8."""
    return (v.to(tl.float32) * inverse * reciprocal + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quotient(a, b, inverse):
    """a / b as a division rounds it, signed zeros too, in three operations; inverse is 1 / b rounded."""
    q = a * inverse
    return tl.fma(-tl.fma(q, b, -a), inverse, q)


@triton.jit
def int4_codes(v, UNSIGNED: tl.constexpr):
    """v [TM, 64] -> codes [TM, 64] int8, scales [TM]."""
    most = tl.max(tl.abs(v), 1)
    scale = tl.where(most > 0, tl.div_rn(most, 15.0 if UNSIGNED else 7.0), 1.0)
    q = quotient(v, scale[:, None], tl.minimum(tl.div_rn(1.0, scale), LARGEST)[:, None])
    if UNSIGNED:
        q = tl.maximum(q, 0.0)
    return (q + ROUND).to(tl.int32, bitcast=True).to(tl.int8), scale


@triton.jit
def e4m3(v):
    """v >= 0 -> the nearest e4m3 code, as int32, at most 448; zero becomes 1. Plain integers: for any GPU."""
    v = tl.minimum(v, 448.0)
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # three bits of mantissa; exponent bias 7, not 127
    small = (v * 512.0 + ROUND).to(tl.int32, bitcast=True) & 15
    code = tl.where(v < 0.015625, small, normal)
    return tl.where(code > 0, code, 0x38)


@triton.jit
def e4m3_value(code):
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, ((code + 960) << 20).to(tl.float32, bitcast=True))


@triton.jit
def e2m1(v):
    """The nearest e2m1 code, as int32; ties to the even code, saturating at 6."""
    m = tl.minimum(tl.abs(v), 6.0)
    # Codes count halves below 2 (from 0), ones below 4 (from 4), twos above (from 6).
    steps = tl.where(m < 2.0, 2.0, tl.where(m < 4.0, 1.0, 0.5))
    first = tl.where(m < 2.0, ROUND, tl.where(m < 4.0, ROUND + 2.0, ROUND + 4.0))
    return ((m * steps + first).to(tl.int32, bitcast=True) & 7) | ((v.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def nvfp4_codes(v, TM: tl.constexpr):
    """v [TM, 64] -> two codes a byte [TM, 32] uint8, scales [TM, 4] uint8."""
    g = tl.reshape(v, (TM, 4, 16))
    code = e4m3(tl.div_rn(tl.max(tl.abs(g), 2), 6.0))
    scale = e4m3_value(code)
    q = e2m1(quotient(g, scale[:, :, None], tl.div_rn(1.0, scale)[:, :, None]))
    low, high = tl.split(tl.reshape(q, (TM, 32, 2)))
    return (low | (high << 4)).to(tl.uint8), code.to(tl.uint8)


@triton.jit
def _input(x, rm, rk, live, stride, width, mean, variance, extra, DTYPE: tl.constexpr, HOOK: tl.constexpr,
           MOMENTS: tl.constexpr):  # fmt: skip
    """A block of what the linear reads.

    Loaded as bits, so that the product takes it from registers: where Triton 3.6 hands `wgmma` the shared buffer of a
    load that is read otherwise too, that buffer has a slot too few and is refilled under the running product.
    """
    columns = rk[None, :]
    bits = tl.load(x + rm[:, None] * stride + columns, mask=live & (columns < width), other=0)
    v = bits.to(DTYPE, bitcast=True)
    return prologue(v, mean, variance, rm[:, None], columns, live, extra, HOOK, MOMENTS)


@triton.jit
def _row_moments(moments, rm, M, K, S, chunk, PARTS: tl.constexpr, MOMENTS: tl.constexpr):
    """Mean and variance of the rows [TM, 1]; zeros where no prologue needs them."""
    if MOMENTS:
        parts = tl.arange(0, PARTS)
        at = moments + parts.to(tl.int64)[:, None] * 2 * M + rm[None, :]
        mask = (parts < S)[:, None] & (rm < M)[None, :]
        counts = tl.minimum(tl.maximum(K - parts * chunk, 0), chunk).to(tl.float32)
        mean, variance = merge(tl.load(at, mask, 0.0), tl.load(at + M, mask, 0.0), counts[:, None], K)
    else:
        mean = tl.zeros_like(rm).to(tl.float32)
        variance = mean
    return mean[:, None], variance[:, None]


@triton.jit
def _moments_kernel(x, moments, M, K, chunk, DTYPE: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr):
    rm = tl.program_id(0).to(tl.int64) * TM + tl.arange(0, TM)
    part = tl.program_id(1)
    first = part * chunk
    last = min(first + chunk, K)
    at = x + rm[:, None] * K
    total = tl.zeros((TM, TK), tl.float32)
    for k in tl.range(first, last, TK):
        rk = k + tl.arange(0, TK)
        bits = tl.load(at + rk[None, :], mask=(rm < M)[:, None] & (rk < last)[None, :], other=0)
        total += bits.to(DTYPE, bitcast=True).to(tl.float32)
    mean = tl.sum(total, 1) / (last - first)
    total = tl.zeros((TM, TK), tl.float32)
    for k in tl.range(first, last, TK):
        rk = k + tl.arange(0, TK)
        live = (rm < M)[:, None] & (rk < last)[None, :]
        away = tl.load(at + rk[None, :], mask=live, other=0).to(DTYPE, bitcast=True).to(tl.float32) - mean[:, None]
        total += tl.where(live, away * away, 0.0)
    out = moments + part.to(tl.int64) * 2 * M + rm
    tl.store(out, mean, mask=rm < M)
    tl.store(out + M, tl.sum(total, 1), mask=rm < M)


@triton.jit
def _measure_kernel(
    x, smooth, down, qx, ascales, moments, peaks, partial, M, K, KP, R, S, stride, width, chunk, shift, extra,
    DTYPE: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    FORMAT: tl.constexpr, UNSIGNED: tl.constexpr, HOOK: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """One part of the channels: the product, and either the rows' peaks or the codes of whole groups."""
    rm = tl.program_id(0).to(tl.int64) * TM + tl.arange(0, TM)
    part = tl.program_id(1)
    rr = tl.arange(0, RANK if RANK > 0 else 16)
    alive = (rm < M)[:, None]
    mean, variance = _row_moments(moments, rm, M, K, S, chunk, PARTS, MOMENTS)
    peak = tl.zeros((TM, TK), tl.float32)
    acc = tl.zeros((TM, RANK if RANK > 0 else 16), tl.float32)
    first = part * chunk
    for k in tl.range(first, min(first + chunk, KP), TK):
        rk = k + tl.arange(0, TK)
        live = alive & (rk < K)[None, :]
        v = _input(x, rm, rk, live, stride, width, mean, variance, extra, DTYPE, HOOK, MOMENTS)
        factors = tl.load(smooth + rk, mask=rk < K, other=1.0)[None, :]
        if FORMAT == "w4a8":
            peak = tl.maximum(peak, tl.abs(v.to(tl.float32) * (1.0 / factors)))
        else:
            h = v.to(tl.float32)
            if UNSIGNED:
                h += shift
            h = tl.where(live, quotient(h, factors, tl.div_rn(1.0, factors)), 0.0)
            if FORMAT == "int4":
                q, scale = int4_codes(h, UNSIGNED)
                tl.store(qx + rm[:, None] * KP + rk[None, :], q, mask=alive)
                tl.store(ascales + rm * (KP // 64) + k // 64, scale, mask=rm < M)
            else:
                q, code = nvfp4_codes(h, TM)
                half = k // 2 + tl.arange(0, 32)
                tl.store(qx + rm[:, None] * (KP // 2) + half[None, :], q, mask=alive & (half < KP // 2)[None, :])
                group = k // 16 + tl.arange(0, 4)
                tl.store(ascales + rm[:, None] * (KP // 16) + group[None, :], code,
                         mask=alive & (group < KP // 16)[None, :])  # fmt: skip
        if RANK > 0:
            d = tl.load(down + rr[None, :] * K + rk[:, None], mask=(rr < R)[None, :] & (rk < K)[:, None], other=0.0)
            acc = tl.dot(v, d, acc)
    if FORMAT == "w4a8":
        tl.store(peaks + part.to(tl.int64) * M + rm, tl.max(peak, 1), mask=rm < M)
    if RANK > 0:
        out = partial + (part.to(tl.int64) * M + rm)[:, None] * R + rr[None, :]
        tl.store(out, acc, mask=alive & (rr < R)[None, :])


@triton.jit
def _finish_kernel(
    x, smooth, qx, ascales, moments, peaks, partial, xd, M, K, KP, R, S, part_size, stride, width, chunk, extra,
    DTYPE: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    FORMAT: tl.constexpr, HOOK: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """The parts put together: a row's scale and codes, and xd."""
    pk = tl.num_programs(1) - 1 - tl.program_id(1)
    rm = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * TM + tl.arange(0, TM)
    alive = (rm < M)[:, None]
    if FORMAT == "w4a8":
        parts = tl.arange(0, PARTS)
        there = (parts < S)[:, None] & (rm < M)[None, :]
        some = tl.load(peaks + parts.to(tl.int64)[:, None] * M + rm[None, :], mask=there, other=0.0)
        scale, reciprocal = int8_scale(tl.max(some, 0))
        mean, variance = _row_moments(moments, rm, M, K, S, chunk, PARTS, MOMENTS)
        rk = pk * TK + tl.arange(0, TK)
        live = alive & (rk < K)[None, :]
        v = _input(x, rm, rk, live, stride, width, mean, variance, extra, DTYPE, HOOK, MOMENTS)
        inverse = 1.0 / tl.load(smooth + rk, mask=rk < K, other=1.0)
        q = int8_codes(v, inverse[None, :], reciprocal[:, None])
        tl.store(qx + rm[:, None] * KP + rk[None, :], q, mask=alive & (rk < KP)[None, :])
        if pk == 0:
            tl.store(ascales + rm, scale, mask=rm < M)
    if RANK > 0 and pk == 0:
        rr = tl.arange(0, RANK)
        mask = alive & (rr < R)[None, :]
        at = partial + rm[:, None] * R + rr[None, :]
        total = tl.zeros((TM, RANK), tl.float32)
        for _ in range(S):
            total += tl.load(at, mask=mask, other=0.0)
            at += part_size
        tl.store(xd + rm[:, None] * R + rr[None, :], total.to(xd.dtype.element_ty), mask=mask)


def _check(x: Tensor, smooth: Tensor, down: Tensor, precision: str, shift: float, prologue: Hook | None) -> None:
    if precision not in GROUP_SIZE:
        raise ValueError(f"quantize: {precision} has no quantized activations, use one of {', '.join(GROUP_SIZE)}")
    if shift and precision != "int4":
        raise ValueError(f"quantize: a shift needs int4's unsigned codes, not {precision}")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype}, expected bfloat16 or float16")
    if x.ndim != 2 or smooth.ndim != 1 or down.ndim != 2:
        raise ValueError(f"x, smooth, down have {x.ndim}, {smooth.ndim}, {down.ndim} dimensions, expected 2, 1, 2")
    (m, w), k, r = x.shape, smooth.shape[0], down.shape[0]
    if k == 0 or (w != k and (prologue is None or isinstance(prologue, RowPrologue))):
        raise ValueError(f"x has {w} columns, smooth {k} channels")
    for name, tensor, dtype, shape in (("x", x, x.dtype, (m, w)), ("smooth", smooth, torch.float32, (k,)),
                                       ("down", down, x.dtype, (r, k))):  # fmt: skip
        check_tensor(name, tensor, x.device, dtype, shape)
    if r % 16 or r > MAX_RANK:
        raise ValueError(f"quantize: rank {r} is not a multiple of 16 up to {MAX_RANK}")


def _outputs(x: Tensor, k: int, r: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    m, kp = x.shape[0], padded(k, GROUP_SIZE[precision])
    xd = x.new_empty(m, r)
    if precision == "nvfp4":
        scales = x.new_empty(m, kp // 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return x.new_empty(m, kp // 2, dtype=torch.uint8), scales, xd
    groups = 1 if precision == "w4a8" else kp // 64
    return x.new_empty(m, kp, dtype=torch.int8), x.new_empty(m, groups, dtype=torch.float32), xd


def quantize(x: Tensor, smooth: Tensor, down: Tensor, precision: str, shift: float = 0.0,
             prologue: Hook | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [M, W], smooth [K], down [R, K] -> qx, ascales, xd as above. With a shift, int4's codes are unsigned.

    An elementwise prologue gets x's first K columns, zeros where x is narrower, and may load more through its operands.
    """
    _check(x, smooth, down, precision, shift, prologue)
    k, r = smooth.shape[0], down.shape[0]
    qx, ascales, xd = _outputs(x, k, r, precision)
    if x.shape[0] == 0:
        return qx, ascales, xd
    if precision == "w4a8" and prologue is None and _one_kernel(x.device):
        from . import gluon_quantize

        if gluon_quantize.can_quantize(x, down):
            gluon_quantize.quantize(x, smooth, down, qx, ascales, xd)
            return qx, ascales, xd
    in_launches(x, smooth, down, precision, shift, prologue, qx, ascales, xd)
    return qx, ascales, xd


@cache
def _one_kernel(device: torch.device) -> bool:
    """Gluon is experimental: a release may lack what gluon_quantize.py needs."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from . import gluon_quantize  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def in_launches(x: Tensor, smooth: Tensor, down: Tensor, precision: str, shift: float, prologue: Hook | None,
                qx: Tensor, ascales: Tensor, xd: Tensor) -> None:  # fmt: skip
    """The kernels of this file, on checked operands, into qx, ascales and xd."""
    (m, w), k, r = x.shape, smooth.shape[0], down.shape[0]
    kp = padded(k, GROUP_SIZE[precision])
    moments = isinstance(prologue, RowPrologue)
    hook, extra = (None, ()) if prologue is None else (prologue.function, prologue.operands)
    dtype = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    rank = triton.next_power_of_2(r) if r else 0
    tm = tk = 64
    blocks, steps = triton.cdiv(m, tm), triton.cdiv(kp, tk)
    chunk = triton.cdiv(steps, max(1, min(steps, 16, 4 * processors(x.device) // blocks))) * tk
    splits = triton.cdiv(kp, chunk)
    parts = triton.next_power_of_2(splits)
    bits, scales = x.view(torch.int16), ascales.view(torch.uint8) if precision == "nvfp4" else ascales
    stats = x.new_empty(splits, 2, m, dtype=torch.float32) if moments else smooth
    peaks, partial = x.new_empty(splits, m, dtype=torch.float32), x.new_empty(splits, m, r, dtype=torch.float32)
    if moments:
        launch(_moments_kernel, (blocks, splits, 1), (bits, stats, m, k, chunk), (dtype, tm, tk), num_warps=4)
    arguments = (bits, smooth, down, qx, scales, stats, peaks, partial, m, k, kp, r, splits, w, min(w, k), chunk,
                 float(shift), extra)  # fmt: skip
    constants = (dtype, tm, tk, rank, parts, precision, bool(shift), hook, moments)
    warps, stages = (4, 4) if r <= 64 else (8, 2)  # no spills, and within the 99 KB of sm_89 and sm_120
    launch(_measure_kernel, (blocks, splits, 1), arguments, constants, num_warps=warps, num_stages=stages)
    if precision != "w4a8" and not r:
        return
    tm, tk = 8, min(1024, triton.next_power_of_2(kp))
    width = triton.cdiv(kp, tk) if precision == "w4a8" else 1
    arguments = (bits, smooth, qx, scales, stats, peaks, partial, xd, m, k, kp, r, splits, m * r, w, min(w, k), chunk,
                 extra)  # fmt: skip
    launch(_finish_kernel, (triton.cdiv(m, tm), width, 1), arguments,
           (dtype, tm, tk, rank, parts, precision, hook, moments), num_warps=4)  # fmt: skip
