"""Round channels one after another, each error carried to those behind it: the loop of GPTQ (svdq_compile/feedback.py)
over as many channels as fit in registers.

    target   [G, C, N]  fp32: C channels of N rows of a weight, of each of G blocks
    wanted   [G, C, N]  fp32: the same as the errors of channels before these want it
    weights  [G, C, C]  fp32, read above the diagonal: what of channel k's error a later channel takes
    scale    [G, C, N]  fp32, of each entry
    zero     [G, C, N]  fp32, the value of code 0 (w4a16)
    rounded  [G, C, N]  fp32, the values of the codes
    lost     [G, C, N]  fp32, the target less these

In plain torch each channel is some launches of its own, thousands a weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS
from ..runtime.launcher import launch
from .codes import nearest

CHANNELS = 64  # at most
ROWS = 128  # a program's


@triton.jit
def _on_grid(v, scale, zero, GRID: tl.constexpr):
    if GRID == "zeros":
        return tl.clamp(nearest(tl.div_rn(v - zero, scale)), 0.0, 15.0) * scale + zero
    return tl.clamp(nearest(tl.div_rn(v, scale)), -8.0, 7.0) * scale


@triton.jit
def _round_columns_kernel(
    target, wanted, weights, scale, zero, rounded, lost, channels, rows,
    GRID: tl.constexpr, C: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1).to(tl.int64) * channels
    row = tl.program_id(0) * TN + tl.arange(0, TN)
    live = row < rows
    channel = tl.arange(0, C)
    entries = (block + channel)[:, None] * rows + row[None, :]
    goal = tl.load(wanted + entries, mask=(channel < channels)[:, None] & live[None, :], other=0.0)
    for k in range(channels):
        place = (block + k) * rows + row
        size = tl.load(scale + place, mask=live, other=1.0)
        start = tl.load(zero + place, mask=live, other=0.0) if GRID == "zeros" else size
        value = _on_grid(tl.sum(tl.where((channel == k)[:, None], goal, 0.0), 0), size, start, GRID)
        error = tl.load(target + place, mask=live, other=0.0) - value
        tl.store(rounded + place, value, mask=live)
        tl.store(lost + place, error, mask=live)
        behind = (channel > k) & (channel < channels)
        share = tl.load(weights + (block + k) * channels + channel, mask=behind, other=0.0)
        goal += share[:, None] * error[None, :]


def round_columns(
    precision: str, target: Tensor, wanted: Tensor, weights: Tensor, scale: Tensor, zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> rounded, lost, on the grid of a format that has one."""
    if FORMATS[precision].grid is None:
        raise ValueError(f"{precision} has no grid")
    blocks, channels, rows = target.shape
    if channels > CHANNELS:
        raise ValueError(f"{channels} channels do not fit in registers: at most {CHANNELS}")
    target, wanted, weights, scale = (t.contiguous() for t in (target, wanted, weights, scale))
    zero = None if zero is None else zero.contiguous()
    rounded, lost = torch.empty_like(target), torch.empty_like(target)
    if target.numel():
        launch(
            _round_columns_kernel,
            (triton.cdiv(rows, ROWS), blocks, 1),
            (target, wanted, weights, scale, zero, rounded, lost, channels, rows),
            (FORMATS[precision].rounding, max(triton.next_power_of_2(channels), 2), ROWS),
            num_warps=4,
        )
    return rounded, lost
