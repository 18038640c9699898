"""The w4a16 kernel: numbers in the interpreter, and what it compiles to."""

import pytest
import torch
from kernel_testing import HALF, ROUNDING, compiled, error, interpreted, run_interpreted

from svdq_compile.kernels import FORMATS, layout
from svdq_compile.lowering import reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 64, 64, 0), (3, 70, 200, 16), (17, 65, 320, 96)])
def test_interpreted_gemv(m, n, k, rank):
    from svdq_compile.kernels import triton_gemv

    weight = FORMATS["w4a16"].quantize_weight(torch.randn(n, k))
    x, bias = torch.randn(m, k).to(HALF), torch.randn(n).to(HALF)
    xd, up = (torch.randn(m, rank).to(HALF), torch.randn(n, rank).to(HALF)) if rank else (None, None)
    expected = reference.gemv(x, xd, list(weight), up, bias, "w4a16", torch.float32)
    y = triton_gemv.gemv(x, xd, layout.to_kernel("w4a16", weight), up, bias, HALF)
    assert error(y, expected) < ROUNDING
