"""What a quantized linear reads: the input after an optional generated prologue, smoothed and quantized, and the
low-rank branch's first product.

    h = prologue([x | right])  or  [x | right],   rounded to x's dtype
    v = h / smooth,  or (h + shift) / smooth where int4 is unsigned, or rotated (formats/rotation.py)
    xd = h down^T,   accumulated in fp32

    int8    ascales = max_k |v| / 127, one a row                  qx = round(v / ascales)
    int4    ascales = -v / 8 of the largest |v|, a row and 64     qx = round(v / ascales), at most 7
            ascales = max v / 15 where it is unsigned             qx = round(v / ascales), at least 0
    fp4     ascales = e4m3(max |v| / 6), one a row and 16         qx = e2m1(v / ascales), two a byte

    x         [M, W]     bf16 or fp16, rows of neighbours, any distance apart
    right     [M, K - W] x's dtype, likewise; or None, and W = K
    smooth    [K]        fp32
    down      [R, K]     x's dtype, contiguous; R a multiple of 16, at most 256, or 0
    qx        [M, Kp]    int8; Kp = K rounded up to groups of 64, zeros beyond K.  fp4: [M, Kp/2] uint8, groups of 16
    ascales   [M, 1]     fp32;  int4: [M, Kp/64] fp32;  fp4: [M, Kp/16] float8_e4m3fn.  1 where all is zero
    xd        [M, R]     x's dtype

With `fp8`, int4 comes as hopper/gemm_int4.py reads it: the same codes in float8_e4m3fn, which holds them exactly, and
the same scales as the transposed view of [Kp/64, M], its rows a multiple of 4 apart.

Rounding is to the nearest, ties to even. int8 multiplies by reciprocals, so a code within rounding of a tie may be one
step off; the scales of the other codes make ties common, and their codes are exactly the reference's.

On sm_90 hopper/quantize.py does int8 and int4 in one kernel that reads x once. Here a launch splits rows and channels
over the GPU: `down` (R K values) must be read once for many rows, or its reads outweigh x. Each program leaves its part
of xd, and the last of a row block adds them up. int8's scale needs the whole row, so its codes are a second launch,
which walks x from its end, which is still in L2.

    peaks     [S, M]     fp32  the largest |v| in each of S parts of a row
    partial   [S, M, R]  fp32  each part's contribution to xd
    counters  [blocks]   int32 the programs of each row block that are done; zero before and after
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import Codes, check_rotation, codes_of
from ..formats.groups import padded
from ..operands import Quantize
from ..runtime.generated import Generated
from ..runtime.launcher import check_tensor, launch, zeroed_counters
from ..runtime.target import processors
from .codes import int4_codes, int8_codes, int8_scale, nvfp4_codes, prologue, quotient, rotated

MAX_RANK = 256
MAX_BLOCKS = 1024  # with a counter each


@triton.jit
def _input(x, right, rm, rk, live, W, x_stride, right_stride, extra, DTYPE: tl.constexpr, JOINED: tl.constexpr,
           PROLOGUE: tl.constexpr):  # fmt: skip
    """A block of what the linear reads.

    Loaded as bits, so that the product takes it from registers: where Triton 3.6 hands `wgmma` the shared buffer of a
    load that is read otherwise too, that buffer has a slot too few and is refilled under the running product.
    """
    columns = rk[None, :]
    at = x + rm[:, None] * x_stride + columns
    if JOINED:
        bits = tl.load(at, mask=live & (columns < W), other=0)
        bits |= tl.load(right + rm[:, None] * right_stride + (columns - W), mask=live & (columns >= W), other=0)
    else:
        bits = tl.load(at, mask=live, other=0)
    return prologue(bits.to(DTYPE, bitcast=True), rm[:, None], columns, live, extra, PROLOGUE)


@triton.jit
def _add_parts(acc, xd, partial, counters, M, R, S):
    """This program's part of xd [TM, RANK] -> the sum, by the program that finds all others' there."""
    TM: tl.constexpr = acc.shape[0]
    rows, rr = tl.arange(0, TM)[:, None], tl.arange(0, acc.shape[1])[None, :]
    block = tl.program_id(0)
    mask = (rows < M - block * TM) & (rr < R)
    first = block.to(tl.int64) * TM * R
    at = rows * R + rr
    if S == 1:
        tl.store(xd + first + at, acc.to(xd.dtype.element_ty), mask=mask)
    else:
        size = M.to(tl.int64) * R
        tl.store(partial + first + tl.program_id(1) * size + at, acc, mask=mask)
        tl.debug_barrier()
        if tl.atomic_add(counters + block, 1) == S - 1:
            total = tl.zeros_like(acc)
            for part in range(S):
                # Past the L1 cache: other multiprocessors wrote these.
                total += tl.load(partial + first + part * size + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(xd + first + at, total.to(xd.dtype.element_ty), mask=mask)
            tl.store(counters + block, 0)


@triton.jit(do_not_specialize=["M", "S"])  # a 1 stays a run-time value
def _measure_kernel(
    x, right, smooth, down, qx, ascales, peaks, partial, counters, xd, M, K, KP, R, S, W, x_stride, right_stride,
    a_row, a_group, chunk, shift, extra,
    DTYPE: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, RANK: tl.constexpr, CODES: tl.constexpr,
    UNSIGNED: tl.constexpr, ROTATE: tl.constexpr, JOINED: tl.constexpr, PROLOGUE: tl.constexpr,
):  # fmt: skip
    """One part of the channels: the product, and either the rows' peaks or the codes of whole groups."""
    rm = tl.program_id(0).to(tl.int64) * TM + tl.arange(0, TM)
    part = tl.program_id(1)
    rr = tl.arange(0, RANK if RANK > 0 else 16)
    alive = (rm < M)[:, None]
    peak = tl.zeros((TM, TK), tl.float32)
    acc = tl.zeros((TM, RANK if RANK > 0 else 16), tl.float32)
    first = part * chunk
    for k in tl.range(first, min(first + chunk, KP), TK):
        rk = k + tl.arange(0, TK)
        live = alive & (rk < K)[None, :]
        v = _input(x, right, rm, rk, live, W, x_stride, right_stride, extra, DTYPE, JOINED, PROLOGUE)
        factors = tl.load(smooth + rk, mask=rk < K, other=1.0)[None, :]
        if CODES == "int8":
            peak = tl.maximum(peak, tl.abs(v.to(tl.float32) * (1.0 / factors)))
        else:
            h = v.to(tl.float32)
            if UNSIGNED:
                h += shift
            h = tl.where(live, quotient(h, factors, tl.div_rn(1.0, factors)), 0.0)
            if ROTATE:
                h = rotated(h)
            if CODES == "int4":
                q, scale = int4_codes(h, UNSIGNED, qx.dtype.element_ty == tl.float8e4nv)
                tl.store(qx + rm[:, None] * KP + rk[None, :], q, mask=alive)
                tl.store(ascales + rm * a_row + k // 64 * a_group, scale, mask=rm < M)
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
    if CODES == "int8":
        tl.store(peaks + part.to(tl.int64) * M + rm, tl.max(peak, 1), mask=rm < M)
    if RANK > 0:
        _add_parts(acc, xd, partial, counters, M, R, S)


@triton.jit(do_not_specialize=["M", "S"])
def _codes_kernel(
    x, right, smooth, qx, ascales, peaks, M, K, KP, S, W, x_stride, right_stride, extra,
    DTYPE: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, PARTS: tl.constexpr, JOINED: tl.constexpr,
    PROLOGUE: tl.constexpr,
):  # fmt: skip
    """int8: the rows' scales from their parts' peaks, and the codes."""
    pk = tl.num_programs(1) - 1 - tl.program_id(1)
    rm = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * TM + tl.arange(0, TM)
    alive = (rm < M)[:, None]
    parts = tl.arange(0, PARTS)
    there = (parts < S)[:, None] & (rm < M)[None, :]
    some = tl.load(peaks + parts.to(tl.int64)[:, None] * M + rm[None, :], mask=there, other=0.0)
    scale, reciprocal = int8_scale(tl.max(some, 0))
    rk = pk * TK + tl.arange(0, TK)
    live = alive & (rk < K)[None, :]
    v = _input(x, right, rm, rk, live, W, x_stride, right_stride, extra, DTYPE, JOINED, PROLOGUE)
    inverse = 1.0 / tl.load(smooth + rk, mask=rk < K, other=1.0)
    q = int8_codes(v, inverse[None, :], reciprocal[:, None])
    tl.store(qx + rm[:, None] * KP + rk[None, :], q, mask=alive & (rk < KP)[None, :])
    if pk == 0:
        tl.store(ascales + rm, scale, mask=rm < M)


def check_quantize(o: Quantize, right: Tensor | None, fp8: bool) -> Codes:
    """The codes of this format. Raise unless the operands are what the module says."""
    x, smooth, down, precision, shift, rotate = o
    codes = codes_of(precision)
    if (shift and not codes.unsigned) or (fp8 and not codes.in_fp8):
        raise ValueError(f"quantize: {precision} has no {'unsigned' if shift else 'fp8'} codes")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype}, expected bfloat16 or float16")
    if x.ndim != 2 or smooth.ndim != 1 or down.ndim != 2:
        raise ValueError(f"x, smooth, down have {x.ndim}, {smooth.ndim}, {down.ndim} dimensions, expected 2, 1, 2")
    (m, w), k, r = x.shape, smooth.shape[0], down.shape[0]
    if rotate:
        check_rotation(precision, k, shift)
    if right is not None:
        if right.dtype != x.dtype or right.device != x.device or right.ndim != 2 or right.shape[0] != m:
            raise ValueError(f"right is {right.dtype} {tuple(right.shape)} on {right.device}, "
                             f"expected {x.dtype} ({m}, ...) on {x.device}")  # fmt: skip
        w += right.shape[1]
    if k == 0 or w != k:
        raise ValueError(f"the input has {w} columns, smooth {k} channels")
    for name, tensor in (("x", x), ("right", right)):
        if tensor is not None and tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"the columns of {name} must be neighbours, its strides are {tensor.stride()}")
    check_tensor("smooth", smooth, x.device, torch.float32, (k,))
    check_tensor("down", down, x.device, x.dtype, (r, k))
    if r % 16 or r > MAX_RANK:
        raise ValueError(f"quantize: rank {r} is not a multiple of 16 up to {MAX_RANK}")
    return codes


def allocate_results(x: Tensor, k: int, r: int, codes: Codes, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for qx, ascales and xd."""
    return *codes.empty(x, x.shape[:1], k, fp8), x.new_empty(x.shape[0], r)


def quantize(
    o: Quantize, prologue: Generated | None = None, right: Tensor | None = None, fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, W], right [M, K - W], smooth [K], down [R, K] -> qx, ascales, xd as above.

    With a shift, int4's codes are unsigned. A prologue sees x and right side by side.
    """
    codes = check_quantize(o, right, fp8)
    x, smooth, down, _, shift, rotate = o
    qx, ascales, xd = allocate_results(x, smooth.shape[0], down.shape[0], codes, fp8)
    if x.shape[0] == 0:
        return qx, ascales, xd
    (m, w), k, r = x.shape, smooth.shape[0], down.shape[0]
    kp = padded(k, codes.block)
    function, extra = (None, ()) if prologue is None else (prologue.function, prologue.operands)
    dtype = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    tm = tk = 64
    blocks, steps = triton.cdiv(m, tm), triton.cdiv(kp, tk)
    parts = max(1, min(steps, 16, 4 * processors(x.device) // blocks)) if blocks <= MAX_BLOCKS else 1
    chunk = triton.cdiv(steps, parts) * tk
    splits = triton.cdiv(kp, chunk)
    bits, scales = x.view(torch.int16), ascales.view(torch.uint8) if codes.name == "fp4" else ascales
    more = bits if right is None else right.view(torch.int16)
    peaks, partial = x.new_empty(splits, m, dtype=torch.float32), x.new_empty(splits, m, r, dtype=torch.float32)
    counters = zeroed_counters(x.device, blocks)
    arguments = (bits, more, smooth, down, qx, scales, peaks, partial, counters, xd, m, k, kp, r, splits, w,
                 bits.stride(0), more.stride(0), *ascales.stride(), chunk, float(shift), extra)  # fmt: skip
    constants = (
        dtype,
        tm,
        tk,
        triton.next_power_of_2(r) if r else 0,
        codes.name,
        bool(shift),
        rotate,
        right is not None,
        function,
    )
    # No spills (with 4 warps a rotation has some on RDNA 3), and within the 99 KB of sm_89 and sm_120.
    warps, stages = 8 if rotate or r > 64 else 4, 4 if r <= 64 else 2
    launch(_measure_kernel, (blocks, splits, 1), arguments, constants, num_warps=warps, num_stages=stages)
    if codes.by_block:
        return qx, ascales, xd
    tm, tk = codes_tile(kp)
    arguments = (bits, more, smooth, qx, scales, peaks, m, k, kp, splits, w, bits.stride(0), more.stride(0), extra)
    launch(_codes_kernel, (triton.cdiv(m, tm), triton.cdiv(kp, tk), 1), arguments,
           (dtype, tm, tk, triton.next_power_of_2(splits), right is not None, function), num_warps=4)  # fmt: skip
    return qx, ascales, xd


def codes_tile(kp: int) -> tuple[int, int]:
    """Rows and channels of a program that writes int8's codes, 8192 numbers: as many channels as leave no more than an
    eighth of them past a row's end.
    """
    tk = 1024
    while padded(kp, tk) * 8 > kp * 9:
        tk //= 2
    return 8192 // tk, tk
