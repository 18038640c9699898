"""Variance, mean and mean square of each row, from one reading of it: what norms need.

x          [M, K]   bf16 or fp16, rows `x.stride(0)` apart; K up to 8192
variance   [M]      fp32, of the population: the mean of (x - mean)^2, taken after the mean is known
mean       [M]      fp32
square     [M]      fp32, the mean of x^2
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launcher import early_launch, launch
from ..runtime.target import launches_early
from .early import gdc_wait

MAX_COLUMNS = 8192  # a row is held in the registers of its warps


@triton.jit(do_not_specialize=["M"])  # a new number of tokens is no new kernel
def _moments_kernel(x, variance, mean, square, M, K, stride, ROWS: tl.constexpr, TK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()
    rm = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rk = tl.arange(0, TK)
    live = (rm < M)[:, None] & (rk < K)[None, :]
    v = tl.load(x + rm.to(tl.int64)[:, None] * stride + rk[None, :], mask=live, other=0.0).to(tl.float32)
    middle = tl.sum(v, 1) / K
    away = tl.where(live, v - middle[:, None], 0.0)
    spread = tl.sum(away * away, 1) / K
    tl.store(variance + rm, spread, mask=rm < M)
    tl.store(mean + rm, middle, mask=rm < M)
    tl.store(square + rm, spread + middle * middle, mask=rm < M)


def row_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as above -> variance, mean, square."""
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x is {x.dtype} with {x.ndim} dimensions, expected a bfloat16 or float16 matrix")
    m, k = x.shape
    if not 0 < k <= MAX_COLUMNS:
        raise ValueError(f"x has {k} columns, expected 1 to {MAX_COLUMNS}")
    if x.stride(1) != 1:
        raise ValueError(f"x has strides {x.stride()}, expected rows with stride 1")
    variance, mean, square = (x.new_empty(m, dtype=torch.float32) for _ in range(3))
    if m:
        tk = triton.next_power_of_2(k)
        rows = max(1, 1024 // tk)
        grid, early = (triton.cdiv(m, rows), 1, 1), launches_early(x.device)
        launch(
            _moments_kernel,
            grid,
            (x, variance, mean, square, m, k, x.stride(0)),
            (rows, tk, early),
            num_warps=4 if tk <= 4096 else 8,
            **early_launch(early),
        )
    return variance, mean, square
