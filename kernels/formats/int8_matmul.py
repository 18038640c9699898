"""Exact integer matrix product of two int8 matrices."""

from functools import cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 1024  # products of two int8 numbers, 2^14 at most, whose sum is exact in fp32


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] int8, b [N, K] int8 -> a b^T [M, N] int32, exact.

    `torch._int_mm` wants more than 16 rows and multiples of 8 on CUDA; padding with zeros changes no product.
    """
    m, n = a.shape[0], b.shape[0]
    if m == 0:
        return a.new_zeros(0, n, dtype=torch.int32)
    if a.device.type == "cuda":
        extra_k = -a.shape[1] % 8
        a = F.pad(a, (0, extra_k, 0, max(0, 32 - m)))
        b = F.pad(b, (0, extra_k, 0, -n % 8))
    elif not _has_int8_products():
        parts = zip(a.split(EXACT, 1), b.split(EXACT, 1), strict=True)
        return reduce(torch.add, ((x.float() @ y.float().t()).int() for x, y in parts))
    return torch._int_mm(a, b.t())[:m, :n]


@cache
def _has_int8_products() -> bool:
    """Whether this CPU multiplies int8 faster than fp32: without AVX-512 `_int_mm` takes 15 times as long."""
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
