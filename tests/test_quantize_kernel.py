"""The quantize kernel: numbers in the interpreter, bad input, and what it compiles to."""

import pytest
import torch
from kernel_testing import HALF, ROUNDING, compiled, error, interpreted, run_interpreted

from svdq_compile.lowering import reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(("m", "k", "rank"), [(1, 64, 0), (3, 72, 16), (17, 100, 32), (70, 320, 48), (5, 1090, 256)])
def test_interpreted_quantize(m, k, rank):
    from svdq_compile.kernels.triton_quantize import quantize_w4a8

    x, smooth, down = torch.randn(m, k).to(HALF), torch.rand(k) + 0.5, torch.randn(rank, k).to(HALF)
    x[0] = 0
    qx, ascales, xd = quantize_w4a8(x, smooth, down)
    q, a, d = reference.quantize(x, smooth, down, "w4a8", 0.0)
    steps = (qx.int() - q.int()).abs()
    assert qx.shape == q.shape
    assert steps.max() <= 1
    assert (steps > 0).double().mean() < 1e-3
    torch.testing.assert_close(ascales, a, rtol=1e-6, atol=0)
    assert not rank or error(xd, d) < ROUNDING


@compiled
def test_quantize_refuses_a_rank_it_cannot_do():
    from svdq_compile.kernels.triton_quantize import quantize_w4a8

    for rank in (8, 272):
        with pytest.raises(ValueError, match="multiple of 16 up to 256"):
            quantize_w4a8(torch.randn(2, 64).to(HALF), torch.ones(64), torch.randn(rank, 64).to(HALF))
