"""Channels rotated in blocks of 64, by Hadamard's matrix over 8: what is loud in one channel is spread over its block,
so that a scale for all 64 fits each of them. Weight and activation are rotated alike, which leaves their product as it
is.

The matrix is its own inverse. Both kernels add in the order written here, and so get the same bits.
"""

import torch
from torch import Tensor

BLOCK = 64


def rotate(x: Tensor) -> Tensor:
    """x [..., K] fp32, K a multiple of 64 -> the same shape."""
    v = x.unflatten(-1, (-1, BLOCK))
    for _ in range(6):  # of neighbours the sums and then the differences: after six times all are where they were
        even, odd = v.unflatten(-1, (BLOCK // 2, 2)).unbind(-1)
        v = torch.cat((even + odd, even - odd), -1)
    return v.flatten(-2) / 8
