"""A product of two matrices in plain Triton, int8 or bf16: what the tensor cores give with no 4-bit code in the way.

y = a b^T      a [M, K], b [N, K] int8, summed in int32; or bf16, summed in fp32      y [M, N] bf16
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdq_compile.kernels.portable.gemm import tile_of
from svdq_compile.kernels.runtime.launcher import launch


class Tile(NamedTuple):
    """Rows, columns and a step along K of a program; its warps, and the stages of its copies."""

    tm: int
    tn: int
    tk: int
    warps: int
    stages: int


INT8 = [
    Tile(*t)
    for t in (
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 128, 8, 2), (128, 256, 128, 8, 3), (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4), (256, 128, 128, 8, 2), (128, 128, 64, 4, 4), (128, 128, 128, 4, 3), (128, 128, 128, 8, 3),
    )
]  # fmt: skip
BF16 = [
    Tile(*t)
    for t in (
        (128, 256, 32, 8, 3), (128, 256, 32, 8, 4), (128, 256, 64, 8, 2), (128, 256, 64, 8, 3), (256, 128, 32, 8, 3),
        (256, 128, 32, 8, 4), (256, 128, 64, 8, 2), (128, 128, 32, 4, 4), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3),
    )
]  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _plain_gemm_kernel(a, b, y, M, N, K, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, SUMS: tl.constexpr):
    pm, pn = tile_of(tl.program_id(0), tl.cdiv(M, TM), tl.cdiv(N, TN), 8)
    rm = pm * TM + tl.arange(0, TM)
    rn = pn * TN + tl.arange(0, TN)
    rk = tl.arange(0, TK)
    a_at = a + tl.minimum(rm, M - 1).to(tl.int64)[:, None] * K + rk[None, :]
    b_at = b + tl.minimum(rn, N - 1).to(tl.int64)[None, :] * K + rk[:, None]
    acc = tl.zeros((TM, TN), SUMS)
    for k in range(0, K, TK):
        acc = tl.dot(tl.load(a_at + k), tl.load(b_at + k), acc, out_dtype=SUMS)
    live = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(y + rm.to(tl.int64)[:, None] * N + rn[None, :], acc.to(y.dtype.element_ty), mask=live)


def plain_gemm(a: Tensor, b: Tensor, t: Tile) -> Tensor:
    """As above; K a multiple of the tile's step."""
    (m, k), n = a.shape, b.shape[0]
    y = a.new_empty(m, n, dtype=torch.bfloat16)
    sums = tl.int32 if a.dtype == torch.int8 else tl.float32
    grid = (triton.cdiv(m, t.tm) * triton.cdiv(n, t.tn), 1, 1)
    launch(_plain_gemm_kernel, grid, (a, b, y, m, n, k), (t.tm, t.tn, t.tk, sums), num_warps=t.warps,
           num_stages=t.stages)  # fmt: skip
    return y
