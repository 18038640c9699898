"""Roundings and widenings by pairs, against torch: every 16-bit value, ties, what is too large, NaN. Needs CUDA."""

import pytest
import torch
import triton
import triton.language as tl

from svdq_compile.kernels.portable.rounding import narrowed, to_bf16, to_fp16, widened

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@triton.jit
def _round(x, y, both, again, n, N: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, to_bf16(v) if DTYPE == tl.bfloat16 else to_fp16(v), mask=i < n)
    h, wide = narrowed(v, DTYPE)
    tl.store(both + i, h, mask=i < n)
    tl.store(again + i, wide, mask=i < n)


@triton.jit
def _widen(x, y, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, widened(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)


@pytest.mark.parametrize("size", [64, 128, 1024])  # fewer values than threads, one each, several
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)])
def test_roundings(dtype, kind, size):
    every = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype).float()
    x = torch.cat((every, (every[1:] + every[:-1]) / 2, every * 1.003, torch.randn(10_001, device="cuda") * 1e3))
    y, again, both = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    _round[(triton.cdiv(len(x), size),)](x, y, both, again, len(x), size, kind)
    for result in (y, both.float(), again):
        torch.testing.assert_close(result, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [64, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widened(dtype, size):
    x = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(torch.bfloat16).to(dtype)
    y = torch.empty(len(x), device="cuda")
    _widen[(triton.cdiv(len(x), size),)](x, y, len(x), size)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)
