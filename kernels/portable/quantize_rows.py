"""quantize.py's int8 codes and low-rank product where there are few rows, or short ones: in one launch, by programs that
have whole rows and so never wait for one another.

A program goes over its rows twice: for their largest magnitudes and the product, and, what it read being in the caches
still, for the codes. `down` is read by each program from L2, which many rows would not repay.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..formats.groups import padded
from ..operands import Quantize
from ..runtime.generated import Generated
from ..runtime.launcher import launch
from .codes import int8_codes, int8_scale
from .quantize import allocate_results, as_bits, check_quantize, load_input


@triton.jit(do_not_specialize=["M"])
def _rows_kernel(
    x, right, smooth, down, qx, ascales, xd, M, K, KP, R, W, x_stride, right_stride, extra,
    DTYPE: tl.constexpr, TM: tl.constexpr, TK: tl.constexpr, RANK: tl.constexpr, JOINED: tl.constexpr,
    PROLOGUE: tl.constexpr,
):  # fmt: skip
    rm = tl.program_id(0).to(tl.int64) * TM + tl.arange(0, TM)
    rr = tl.arange(0, RANK if RANK > 0 else 16)
    alive = (rm < M)[:, None]
    peak = tl.zeros((TM, TK), tl.float32)
    acc = tl.zeros((TM, RANK if RANK > 0 else 16), tl.float32)
    for k in tl.range(0, KP, TK):
        rk = k + tl.arange(0, TK)
        live = alive & (rk < K)[None, :]
        v = load_input(x, right, rm, rk, live, W, x_stride, right_stride, extra, DTYPE, JOINED, PROLOGUE)
        inverse = 1.0 / tl.load(smooth + rk, mask=rk < K, other=1.0)
        peak = tl.maximum(peak, tl.abs(v.to(tl.float32) * inverse[None, :]))
        if RANK > 0:
            d = tl.load(down + rr[None, :] * K + rk[:, None], mask=(rr < R)[None, :] & (rk < K)[:, None], other=0.0)
            acc = tl.dot(v, d, acc)
    if RANK > 0:
        tl.store(xd + rm[:, None] * R + rr[None, :], acc.to(xd.dtype.element_ty), mask=alive & (rr < R)[None, :])
    scale, reciprocal = int8_scale(tl.max(peak, 1))
    tl.store(ascales + rm, scale, mask=rm < M)
    for k in tl.range(0, KP, TK):
        rk = k + tl.arange(0, TK)
        live = alive & (rk < K)[None, :]
        v = load_input(x, right, rm, rk, live, W, x_stride, right_stride, extra, DTYPE, JOINED, PROLOGUE)
        inverse = 1.0 / tl.load(smooth + rk, mask=rk < K, other=1.0)
        q = int8_codes(v, inverse[None, :], reciprocal[:, None])
        tl.store(qx + rm[:, None] * KP + rk[None, :], q, mask=alive & (rk < KP)[None, :])


class Tile(NamedTuple):
    """Rows of a program, channels of a step, warps, steps in flight."""

    tm: int
    tk: int
    warps: int
    stages: int


def quantize_rows(
    o: Quantize, prologue: Generated | None = None, right: Tensor | None = None, tile: Tile = Tile(16, 128, 4, 3)
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `quantize` of quantize.py, for int8 codes."""
    codes = check_quantize(o, right, fp8=False)
    if codes.name != "int8":
        raise ValueError(f"quantize_rows: {o.precision} has no int8 codes")
    x, smooth, down, *_ = o
    (r, k), m = down.shape, x.shape[0]
    qx, ascales, xd = allocate_results(x, k, r, codes, fp8=False)
    if m == 0:
        return qx, ascales, xd
    function, extra = (None, ()) if prologue is None else (prologue.function, prologue.operands)
    bits, more, dtype = as_bits(x, right)
    arguments = (bits, more, smooth, down, qx, ascales, xd, m, k, padded(k, codes.block), r, x.shape[1],
                 bits.stride(0), more.stride(0), extra)  # fmt: skip
    constants = (dtype, tile.tm, tile.tk, triton.next_power_of_2(r) if r else 0, right is not None, function)
    launch(_rows_kernel, (triton.cdiv(m, tile.tm), 1, 1), arguments, constants,
           num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
    return qx, ascales, xd
