"""Both halves of a product's features in one tile, for an epilogue that makes one feature of two.

Of a tile's TN rows eight are features of the left half, the next eight the same ones of the right half, and so on. That
is how tensor cores hand out sums: a thread of `mma` and `wgmma` has rows i and i + 8 of each sixteen. So every thread
has both halves of its features, and the weight lies in memory like any other.
"""

import triton
import triton.language as tl

from ..formats.layout import GATE_STEP

STEP = tl.constexpr(GATE_STEP)


@triton.jit
def feature(row, half):
    """Which feature of the product a row is, of `half` features on each side."""
    return row // (2 * STEP) * STEP + row % STEP + row // STEP % 2 * half


@triton.jit
def split_halves(tile):
    """[TN, TM] -> the rows of the left half and those of the right one, [TN/2, TM] each."""
    TN: tl.constexpr = tile.shape[0]
    TM: tl.constexpr = tile.shape[1]
    apart = tl.permute(tl.reshape(tile, (TN // (2 * STEP), 2, STEP, TM)), (0, 2, 3, 1))
    left, right = tl.split(apart)
    return tl.reshape(left, (TN // 2, TM)), tl.reshape(right, (TN // 2, TM))
