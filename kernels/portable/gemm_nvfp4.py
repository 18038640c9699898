"""y = wtscale * (qx ascales) (q wscales)^T + xd up^T + bias on Blackwell: both operands 4-bit, in the tensor cores.

qx         [M, Kp/2]     uint8           e2m1 codes, two a byte (nvfp4.py); Kp = K rounded up to groups of 16
ascales    [M, Kp/16]    float8_e4m3fn
qweight    [N, Kp/2]     uint8           e2m1 codes, two a byte
wscales    [N, Kp/16]    float8_e4m3fn
wtscale    []            fp32            read on the GPU
xd         [M, r]        bf16 or fp16, rows `xd.stride(0)` apart
up         [N, r]        xd's dtype
bias       [N]           any float dtype, or None
y          [M, N]        bf16, fp16 or fp32; [M, N/2] of an epilogue that gates (gates.py)

The tile is computed transposed, weights [TN, TK/2] by activations [TK/2, TM], which costs nothing on either target.
On sm_120 it becomes `mma.sync ... kind::mxf4nvf4`, scales in registers. On sm_100 it becomes `tcgen05.mma` of that
kind, scales in tensor memory: a product stays in flight only if they get there from shared memory (`tcgen05.cp`), so
they are loaded in the order of that copy; through registers, every step would wait for its product.

No other GPU may see this kernel, see `compute_target`.
"""

import re
import sys
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Gemm
from ..runtime.generated import Generated
from ..runtime.launcher import check_low_rank, check_tensor, launch
from ..runtime.tuning import choose_tile
from .gates import feature, split_halves
from .gemm import stored_features, tile_of
from .unpack import INTERPRETED, nibble

_TRITON = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
# Compute capability -> the first Triton that has its 4-bit products. Others fail an assertion in their compiler, which
# may end the process, or compute in 16 bits.
_TARGETS = {(10, 0): (3, 6), (10, 3): (3, 6), (12, 0): (3, 6), (12, 1): (3, 8)}
_NEVER = (sys.maxsize,)
# The first Triton that puts a proxy fence between asynchronous copies and the tensor cores of sm_100, which without it
# may read what was there before. Earlier ones are given nothing to copy asynchronously.
_FENCED = (3, 7, 1)


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how.

    chunked  scales come in the order of `tcgen05.cp`; tokens and features are multiples of 128, k of 64
    """

    tokens: int
    features: int
    k: int
    warps: int
    stages: int
    chunked: bool


@triton.jit
def _scale_indices(ROWS: tl.constexpr, TK: tl.constexpr, CHUNKED: tl.constexpr):
    """Row and group of every scale of a tile: [ROWS, TK/16], or [ROWS/128, 8 TK] in the order of tcgen05.cp.

    Its chunks of 512 bytes hold 128 rows x 4 groups: byte 16 a + 4 b + c has row a + 32 b, group c.
    """
    if CHUNKED:
        byte = tl.arange(0, ROWS * TK // 16)[None, :]
        rows = byte // (8 * TK) * 128 + byte // 16 % 32 + byte // 4 % 4 * 32
        return rows, byte // 512 % (TK // 64) * 4 + byte % 4
    else:
        return tl.arange(0, ROWS)[:, None], tl.arange(0, TK // 16)[None, :]


@triton.jit
def _scale_matrix(s, ROWS: tl.constexpr, TK: tl.constexpr, CHUNKED: tl.constexpr):
    """Scales as they were loaded -> [ROWS, TK/16]. The compiler knows this chain and makes it one copy."""
    if CHUNKED:
        return s.reshape(ROWS // 128, TK // 64, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(ROWS, TK // 16)
    else:
        return s


@triton.jit
def _decoded(codes, scales, HIGH: tl.constexpr):
    """codes [R, J] uint8, scales [R, J/8] e4m3 -> the values of the low or the high nibbles, [R, J] fp32."""
    u = nibble(codes, HIGH).to(tl.int32)
    exponent, mantissa = u >> 1 & 3, (u & 1).to(tl.float32)
    magnitude = tl.where(exponent == 0, 0.5 * mantissa, (2 + mantissa) * 0.25 * (1 << exponent).to(tl.float32))
    wide = scales.to(tl.float32)[:, :, None].broadcast_to(scales.shape[0], scales.shape[1], 8)
    return tl.where(u >= 8, -magnitude, magnitude) * wide.reshape(codes.shape[0], codes.shape[1])


@triton.jit
def _product(w, ws, x, xs, acc):
    """acc + (w ws) (x xs)^T, with w [TN, TK/2], ws [TN, TK/16], x [TK/2, TM], xs [TM, TK/16], acc [TN, TM]."""
    if INTERPRETED:  # Triton 3.6 has no dot_scaled there, 3.9 takes e4m3 scales for bare exponents
        acc = tl.dot(_decoded(w, ws, False), _decoded(x.T, xs, False).T, acc)
        return tl.dot(_decoded(w, ws, True), _decoded(x.T, xs, True).T, acc)
    else:
        return tl.dot_scaled(w, ws, "e2m1", x, xs, "e2m1", acc)


@triton.jit
def _gemm_kernel(
    qx, ascales, qweight, wscales, wtscale, xd, up, bias, y, M, N, KP, r, xd_stride, extra,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, CHUNKED: tl.constexpr, ALIGN: tl.constexpr,
    GROUP: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr, GATES: tl.constexpr,
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
    # KP is a multiple of ALIGN, written so that the compiler sees it: asynchronous copies need 4 aligned bytes.
    row, groups = KP // ALIGN * (ALIGN // 2), KP // ALIGN * (ALIGN // 16)
    j = tl.arange(0, TK // 2)
    w_at = qweight + wide_n * row + j[None, :]
    x_at = qx + wide_m * row + j[:, None]
    n, gn = _scale_indices(TN, TK, CHUNKED)
    m, gm = _scale_indices(TM, TK, CHUNKED)
    n += pn * TN
    ws_at = wscales + ((feature(n, N // 2) if GATES else n).to(tl.int64) * groups + gn)
    xs_at = ascales + ((pm * TM + m).to(tl.int64) * groups + gm)
    live_ws, live_xs = n < N, pm * TM + m < M
    WHOLE: tl.constexpr = ALIGN == TK  # whole tiles: no mask along K
    acc = tl.zeros((TN, TM), tl.float32)
    for step in range(tl.cdiv(KP, TK)):
        j0, g0 = step * (TK // 2), step * (TK // 16)
        live_j = (j0 + j < row) | WHOLE
        w = tl.load(w_at + j0, mask=live_n & live_j[None, :], other=0)
        x = tl.load(x_at + j0, mask=live_m & live_j[:, None], other=0)
        ws = tl.load(ws_at + g0, mask=live_ws & ((g0 + gn < groups) | WHOLE), other=0.0)
        xs = tl.load(xs_at + g0, mask=live_xs & ((g0 + gm < groups) | WHOLE), other=0.0)
        ws, xs = _scale_matrix(ws, TN, TK, CHUNKED), _scale_matrix(xs, TM, TK, CHUNKED)
        acc = _product(w, ws, x, xs, acc)
    out = acc * tl.load(wtscale)
    if BIAS:
        out += tl.load(bias + rn[:, None], mask=live_n, other=0.0).to(tl.float32)
    if RANK > 0:
        for first in range(0, r, RANK):
            rr = first + tl.arange(0, RANK)
            u = tl.load(up + wide_n * r + rr[None, :], mask=live_n & (rr < r)[None, :], other=0.0)
            d = tl.load(xd + wide_m * xd_stride + rr[:, None], mask=live_m & (rr < r)[:, None], other=0.0)
            out = tl.dot(u, d, out)
    if GATES:
        N = N // 2
        rn = pn * (TN // 2) + tl.arange(0, TN // 2)
        live_n = (rn < N)[:, None]
        left, right = split_halves(out)
        out = EPILOGUE(left, right, rn[:, None], rm[None, :], live_m & live_n, extra)
    elif EPILOGUE is not None:
        out = EPILOGUE(out, rn[:, None], rm[None, :], live_m & live_n, extra)
    tl.store(y + wide_m * N + rn[:, None], out.to(y.dtype.element_ty), mask=live_m & live_n)


# None of these has run on such a GPU: the best that compiles without spills, for the GPU itself to choose from.
_SM100 = Tile(128, 128, 256, 8, 3, True)  # two programs a multiprocessor
_SM100_LARGE = Tile(256, 128, 256, 8, 3, True)
_SM100_DEEP = Tile(128, 128, 256, 8, 5, True)
_SM100_SYNCHRONOUS = Tile(128, 128, 256, 8, 1, False)
_SM120 = Tile(64, 128, 128, 4, 4, False)
_SM120_LARGE = Tile(128, 128, 128, 8, 5, False)
_SM120_SMALL = Tile(64, 64, 256, 4, 3, False)
_SM120_FEW = Tile(16, 64, 256, 4, 4, False)


def candidates(rows: int, target: int) -> tuple[Tile, ...]:
    """Tiles worth measuring for a product with this many rows on compute capability 10 or 12, best guess first."""
    if target == 10:
        if _TRITON < _FENCED:
            return (_SM100_SYNCHRONOUS,)
        return (_SM100_DEEP, _SM100) if rows <= 128 else (_SM100_LARGE, _SM100, _SM100_DEEP)
    if rows <= 64:
        return (_SM120_FEW, _SM120_SMALL) if rows <= 16 else (_SM120_SMALL, _SM120_FEW, _SM120)
    return _SM120_LARGE, _SM120, _SM120_SMALL


def gemm(o: Gemm, epilogue: Generated | None = None, config: Tile | None = None) -> Tensor:
    """Operands as above on the current device, weight = (qweight, wscales, wtscale), no offset -> y [M, N]."""
    qx, xd, weight = o.qx, o.xd, o.weight
    target = compute_target(torch.cuda.current_device() if qx.is_cuda else None)
    m, n, kp = _check(o)
    function, extra, _, gates = epilogue or (None, (), None, False)
    y = qx.new_empty(m, stored_features(n, n, gates), dtype=o.out_dtype)
    if m == 0 or n == 0:
        return y
    r = o.up.shape[1]
    rank = min(32, max(16, triton.next_power_of_2(r))) if r else 0
    bias = weight[2] if o.bias is None else o.bias
    arguments = (qx, o.ascales, *weight, xd, o.up, bias, y, m, n, kp, r, xd.stride(0), extra)

    def run(t: Tile) -> None:
        align = min(t.k, kp & -kp)
        constants = (t.tokens, t.features, t.k, t.chunked, align, 8, rank, o.bias is not None, function, gates)
        grid = (triton.cdiv(m, t.tokens) * triton.cdiv(n, t.features), 1, 1)
        launch(_gemm_kernel, grid, arguments, constants, num_warps=t.warps, num_stages=t.stages)

    run(config or choose_tile("nvfp4 gemm", m, (n, y.shape[1], kp), candidates(m, target), run, qx.device))
    return y


@cache
def why_not(device: torch.device) -> str | None:
    """Why this GPU or this Triton has no 4-bit floating-point products; None if they have."""
    try:
        compute_target(device.index)
    except RuntimeError as no:
        return str(no)
    return None


@cache
def compute_target(device: int | None) -> int:
    """The major compute capability of a CUDA device, 10 or 12; raises for all else, before anything is compiled."""
    if INTERPRETED:
        return 12
    found = "no NVIDIA GPU"
    if device is not None and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if _TRITON >= _TARGETS.get((major, minor), _NEVER):
            return major
        found = f"sm_{major}{minor} with Triton {triton.__version__}"
    known = ", ".join(f"sm_{x}{y} from Triton {a}.{b}" for (x, y), (a, b) in _TARGETS.items())
    raise RuntimeError(f"nvfp4 products need 4-bit tensor cores: {known}. Here: {found}.")


def _check(o: Gemm) -> tuple[int, int, int]:
    """Raise unless the tensors are what the module says; -> M, N, Kp."""
    qx, (qweight, wscales, wtscale) = o.qx, o.weight
    (m, half), n = qx.shape, o.up.shape[0]
    if half == 0 or half % 8:
        raise ValueError(f"qx has {2 * half} columns, not whole groups of 16")
    check_tensor("qx", qx, qx.device, torch.uint8, (m, half))
    check_tensor("ascales", o.ascales, qx.device, torch.float8_e4m3fn, (m, half // 8))
    check_tensor("qweight", qweight, qx.device, torch.uint8, (n, half))
    check_tensor("wscales", wscales, qx.device, torch.float8_e4m3fn, (n, half // 8))
    check_tensor("wtscale", wtscale, qx.device, torch.float32, ())
    if o.up.shape[1]:
        check_low_rank(o.xd, o.up, m, n)
        if o.xd.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"xd is {o.xd.dtype}, expected 16 bits")
    if o.bias is not None:
        check_tensor("bias", o.bias, qx.device, o.bias.dtype, (n,))
    return m, n, 2 * half
