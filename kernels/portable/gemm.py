"""y = W x^T scaled, plus low rank and bias, on every GPU from sm_80: plain Triton, int8 tensor cores.

    w4a8   y = (qx (q s)^T) * ascales * wscales + xd up^T + bias               int32 over all of K
    int4   y = sum_g (qx_g q_g^T) * ascales_g * wscales_g - offset + xd up^T + bias   int32 within a group of 64
    then the epilogue

    qx         [M, Kp]           int8
    ascales    [M, 1 | Kp/64]    fp32
    qweight    [N, P/2]          int8, planar (formats/planar.py); P = Kp rounded up to 128
    subscales  [P/128, N]        int16, w4a8 only: two groups' scales in a word; rows any multiple of 8 apart
    wscales    [N] fp32 (w4a8) or [P/64, N] bf16 (int4), the latter's rows likewise
    xd         [M, s r]          bf16 or fp16, rows `xd.stride(0)` apart
    up         [N, r]            xd's dtype; s siblings of N/s features each read r columns of xd
    bias       [N]               any float dtype, or None
    offset     [N]               fp32, or None
    auxiliary  [M, N]            bf16 or fp16, rows `auxiliary.stride(0)` apart: the epilogue's, or None
    y          [M, N]            bf16, fp16 or fp32; [M, N/2] of an epilogue that gates (gates.py)

The tile is computed transposed, weights [TN, 64] by activations [64, TM], so that codes go from registers straight into
the product. On sm_90 kernels/hopper/gemm_w4a8.py is about twice as fast for w4a8; this one takes what that cannot.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import codes_of
from ..formats.layout import GATE_STEP, SIBLING_STEP
from ..operands import Gemm
from ..runtime.generated import Generated
from ..runtime.launcher import check_low_rank, check_tensor, launch
from ..runtime.target import amd_architecture
from .gates import feature, split_halves
from .unpack import WITHOUT_PTX, nibble, scaled

# 16 (u - 8) for four codes at a time: in place in the high half of a byte, made two's complement by one exclusive or.
_LOW = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; }")
_HIGH = tl.constexpr("lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;")


@triton.jit
def tile_of(t, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Grouped order: GROUP token tiles in a row use the same weights, which then come from L2."""
    width = GROUP * tiles_n
    first = t // width * GROUP
    size = min(tiles_m - first, GROUP)
    inside = t % width
    return first + inside % size, inside // size


@triton.jit
def _sixteenfold(p, HIGH: tl.constexpr):
    """p int8 -> 16 (u - 8), u its low or high code, int8: in place, one exclusive or from two's complement."""
    if WITHOUT_PTX:
        return ((nibble(p, HIGH).to(tl.int32) - 8) * 16).to(tl.int8)
    elif HIGH:
        return tl.inline_asm_elementwise(_HIGH, "=r,r", [p], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(_LOW, "=r,r", [p], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _group_scales(wscales, ascales, w, words, rn, live_n, wide_m, live_m, stride, KP):
    """The int4 scales of step w's two groups: of the weights [TN, 1] over 16, of the activations [1, TM]."""
    w = min(w, words - 1)
    s0 = tl.load(wscales + 2 * w * stride + rn, mask=live_n, other=0.0).to(tl.float32) * 0.0625
    s1 = tl.load(wscales + (2 * w + 1) * stride + rn, mask=live_n, other=0.0).to(tl.float32) * 0.0625
    groups = KP // 64
    a0 = tl.load(ascales + wide_m * groups + 2 * w, mask=live_m, other=0.0)
    a1 = tl.load(ascales + wide_m * groups + min(2 * w + 1, groups - 1), mask=live_m, other=0.0)
    return s0, s1, a0, a1


@triton.jit
def _gemm_kernel(
    qx, ascales, qweight, subscales, wscales, xd, up, bias, offset, y, auxiliary, extra, M, N, KP, r, sibling,
    xd_stride, auxiliary_stride, scales_stride,
    TM: tl.constexpr, TN: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, GROUPED: tl.constexpr,
    BIAS: tl.constexpr, OFFSET: tl.constexpr, EPILOGUE: tl.constexpr, AUXILIARY: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(M, TM), tl.cdiv(N, TN), GROUP)
    rm = pm * TM + tl.arange(0, TM)
    rn = pn * TN + tl.arange(0, TN)
    live_m = (rm < M)[None, :]
    live_n = (rn < N)[:, None]
    if GATES:
        rn = feature(rn, N // 2)
    wide_m = rm.to(tl.int64)[None, :]
    wide_n = rn.to(tl.int64)[:, None]
    j = tl.arange(0, 64)
    words = tl.cdiv(KP, 128)
    p_at = qweight + wide_n * (words * 64) + j[None, :]
    x_at = qx + wide_m * KP + j[:, None]
    acc = tl.zeros((TN, TM), tl.float32 if GROUPED else tl.int32)
    # Scales are too narrow for asynchronous copies: the loop loads them a step ahead.
    if GROUPED:
        s0, s1, a0, a1 = _group_scales(
            wscales, ascales, 0, words, rn[:, None], live_n, wide_m, live_m, scales_stride, KP
        )
    else:
        pair = tl.load(subscales + rn[:, None], mask=live_n, other=0).to(tl.int32)
    for w in range(words):
        p = tl.load(p_at + w * 64, mask=live_n, other=0)
        x0 = tl.load(x_at + w * 128, mask=live_m, other=0)
        x1 = tl.load(x_at + min(w * 128 + 64, KP - 64), mask=live_m, other=0)  # past the end: any value times 0
        if GROUPED:
            d0 = tl.dot(_sixteenfold(p, False), x0, out_dtype=tl.int32)
            acc += d0.to(tl.float32) * s0 * a0
            d1 = tl.dot(_sixteenfold(p, True), x1, out_dtype=tl.int32)
            acc += d1.to(tl.float32) * s1 * a1
            s0, s1, a0, a1 = _group_scales(
                wscales, ascales, w + 1, words, rn[:, None], live_n, wide_m, live_m, scales_stride, KP
            )
        else:
            low, high = scaled(p, pair & 0xFF, False), scaled(p, pair >> 8, True)
            at = subscales + min(w + 1, words - 1) * scales_stride
            pair = tl.load(at + rn[:, None], mask=live_n, other=0).to(tl.int32)
            acc = tl.dot(low, x0, acc, out_dtype=tl.int32)
            acc = tl.dot(high, x1, acc, out_dtype=tl.int32)
    if GROUPED:
        out = acc
    else:
        a = tl.load(ascales + rm[None, :], mask=live_m, other=0.0)
        out = acc.to(tl.float32) * a * tl.load(wscales + rn[:, None], mask=live_n, other=0.0)
    if OFFSET:
        out -= tl.load(offset + rn[:, None], mask=live_n, other=0.0)
    if BIAS:
        out += tl.load(bias + rn[:, None], mask=live_n, other=0.0).to(tl.float32)
    if RANK > 0:
        xd += pn * TN // sibling * r
        for first in range(0, r, RANK):
            rr = first + tl.arange(0, RANK)
            u = tl.load(up + wide_n * r + rr[None, :], mask=live_n & (rr < r)[None, :], other=0.0)
            d = tl.load(xd + wide_m * xd_stride + rr[:, None], mask=live_m & (rr < r)[:, None], other=0.0)
            out = tl.dot(u, d, out)
    if GATES:
        N = N // 2
        rn = pn * (TN // 2) + tl.arange(0, TN // 2)
        live_n = (rn < N)[:, None]
    live = live_m & live_n
    if GATES:
        left, right = split_halves(out)
        out = EPILOGUE(left, right, rn[:, None], rm[None, :], live, extra)
    elif AUXILIARY:
        t = tl.load(auxiliary + wide_m * auxiliary_stride + rn[:, None], mask=live, other=0.0).to(tl.float32)
        out = EPILOGUE(out, t, rn[:, None], rm[None, :], live, extra)
    elif EPILOGUE is not None:
        out = EPILOGUE(out, rn[:, None], rm[None, :], live, extra)
    tl.store(y + wide_m * N + rn[:, None], out.to(y.dtype.element_ty), mask=live)


def check_gemm(o: Gemm) -> tuple[int, int, int]:
    """Raise unless the tensors are what the module says, in the planar order; -> M, N, Kp."""
    qx, weight = o.qx, o.weight
    (m, kp), n = qx.shape, o.up.shape[0]
    words, grouped = -(-kp // 128), codes_of(o.precision).by_block
    check_tensor("qx", qx, qx.device, torch.int8, (m, kp))
    check_tensor("ascales", o.ascales, qx.device, torch.float32, (m, kp // 64 if grouped else 1))
    check_tensor("qweight", weight[0], qx.device, torch.int8, (n, words * 64))
    if grouped:
        check_scales("wscales", weight[1], qx.device, torch.bfloat16, (2 * words, n))
    else:
        check_scales("subscales", weight[1], qx.device, torch.int16, (words, n))
        check_tensor("wscales", weight[2], qx.device, torch.float32, (n,))
    if kp % 64:
        raise ValueError(f"qx has {kp} columns, not whole groups of 64")
    if o.bias is not None:
        check_tensor("bias", o.bias, qx.device, o.bias.dtype, (n,))
    if o.offset is not None:
        check_tensor("offset", o.offset, qx.device, torch.float32, (n,))
    return m, n, kp


def check_scales(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """`check_tensor` for scales by group, whose rows may be cut out of longer ones."""
    if tensor.ndim == 2 and tensor.stride(1) == 1 and tensor.stride(0) > tensor.shape[1] and not tensor.stride(0) % 8:
        tensor = tensor.as_strided(tensor.shape, (tensor.shape[1], 1))  # as if nothing lay between the rows
    check_tensor(name, tensor, device, dtype, shape)


def sibling_features(xd: Tensor, up: Tensor, rows: int) -> int:
    """Raise unless xd [rows, s r] (columns side by side, any row stride) and up [N, r] belong together; -> N / s."""
    n, r = up.shape
    if not r:
        return n
    parts = xd.shape[-1] // r
    if parts < 2 or xd.shape[-1] % r:
        check_low_rank(xd, up, rows, n)
        return n
    check_low_rank(xd[:, :r], up, rows, n)
    if n % parts or n // parts % SIBLING_STEP:
        raise ValueError(f"{n} features of {parts} siblings, expected a multiple of {SIBLING_STEP} of each")
    return n // parts


def stored_features(features: int, sibling: int, gates: bool) -> int:
    """How many a product of so many features stores. Raise if its two halves are not what an epilogue can gate."""
    if not gates:
        return features
    if sibling < features:
        raise ValueError(f"an epilogue gates the halves of one linear, these are siblings of {sibling} features")
    if features % (2 * GATE_STEP):
        raise ValueError(f"{features} features, an epilogue gates multiples of {2 * GATE_STEP}")
    return features // 2


def check_auxiliary(auxiliary: Tensor, rows: int, features: int, device: torch.device) -> None:
    """Raise unless an auxiliary input has the result's shape, is 16-bit, and its rows lie in one piece."""
    if auxiliary.device != device:
        raise ValueError(f"auxiliary is on {auxiliary.device}, the other tensors on {device}")
    if auxiliary.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"auxiliary is {auxiliary.dtype}, expected bfloat16 or float16")
    if tuple(auxiliary.shape) != (rows, features):
        raise ValueError(f"auxiliary has shape {tuple(auxiliary.shape)}, expected {(rows, features)}")
    if features > 1 and auxiliary.stride(1) != 1:
        raise ValueError(f"auxiliary has strides {auxiliary.stride()}, expected rows with stride 1")


def gemm(o: Gemm, epilogue: Generated | None = None, config: tuple[int, int, int, int] | None = None) -> Tensor:
    """w4a8 or int4, operands as above -> y [M, N]. config: tokens, features of a tile, warps, stages."""
    qx, xd, weight = o.qx, o.xd, o.weight
    m, n, kp = check_gemm(o)
    sibling = sibling_features(xd, o.up, m)
    function, extra, auxiliary, gates = epilogue or (None, (), None, False)
    if auxiliary is not None:
        check_auxiliary(auxiliary, m, n, qx.device)
    y = qx.new_empty(m, stored_features(n, sibling, gates), dtype=o.out_dtype)
    if m == 0 or n == 0:
        return y
    grouped = codes_of(o.precision).by_block
    subscales, wscales = (weight[1], weight[1]) if grouped else weight[1:]
    r = o.up.shape[1]
    tm, tn, warps, stages = config or tile_for(m, n, grouped, bool(amd_architecture(qx.device)))
    arguments = (
        qx, o.ascales, weight[0], subscales, wscales, xd, o.up, wscales if o.bias is None else o.bias,
        o.ascales if o.offset is None else o.offset, y, y if auxiliary is None else auxiliary, extra, m, n, kp, r,
        sibling, xd.stride(0), n if auxiliary is None else auxiliary.stride(0), weight[1].stride(0),
    )  # fmt: skip
    rank = min(64, max(16, triton.next_power_of_2(r))) if r else 0
    constants = (tm, tn, 8, rank, grouped, o.bias is not None, o.offset is not None, function, auxiliary is not None,
                 gates)  # fmt: skip
    grid = (triton.cdiv(m, tm) * triton.cdiv(n, tn), 1, 1)
    launch(_gemm_kernel, grid, arguments, constants, num_warps=warps, num_stages=stages)
    return y


def tile_for(rows: int, features: int, grouped: bool, amd: bool) -> tuple[int, int, int, int]:
    """TM, TN, warps, stages: the fastest on an H200 of those in bench/gemm.py; for AMD the largest without spills."""
    large = rows > 128 and rows * features > 2**22
    if amd:
        return (128, 128, 8, 2) if large and not grouped else (64, 64, 8, 2)
    if rows <= 128:
        return 64, 64, 4, 4
    if grouped:
        return 128, 64, 4, 4
    return (128, 128, 8, 3) if large else (64, 64, 4, 4)
