"""The w4a16 kernel on a GPU, through the function the operator calls, against the reference. Needs CUDA."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_testing import error

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemv
from svdq_compile.kernels.portable import gemv as triton_gemv
from svdq_compile.kernels.runtime.generated import Generated
from svdq_compile.lowering import launch, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Half a unit in the last place of bf16 is 2^-9, on average about 1.7e-3 of the value.
BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17, 64, 65, 300])
@pytest.mark.parametrize(
    ("n", "k", "rank", "dtype"),
    [
        (9216, 3072, 32, torch.bfloat16), (77, 2432, 144, torch.bfloat16), (3072, 12288, 32, torch.bfloat16),
        (1, 3, 0, torch.bfloat16), (64, 64, 0, torch.float16), (100, 1000, 16, torch.float16),
        (1000, 320, 128, torch.float16),
    ],
)  # fmt: skip
def test_gemv(m, n, k, rank, dtype):
    """Either order of the weight; xd is a slice of a wider matrix."""
    weight = FORMATS["w4a16"].quantize_weight(normal(n, k) * k**-0.5)
    x, bias = normal(m, k, dtype=dtype), normal(n, dtype=dtype)
    wide, up = normal(m, rank + 32, dtype=dtype), normal(n, rank, dtype=dtype)
    xd, up = (wide[:, 16 : 16 + rank], up) if rank else (None, None)
    expected = reference.gemv(x, xd, list(weight), up, bias, "w4a16", torch.float32)
    y = launch.gemv(x, xd, list(layout.to_kernel("w4a16", weight)), up, bias, "w4a16", dtype)
    assert y.dtype == dtype
    assert error(y, expected) < BOUND[dtype]
    assert torch.equal(y, launch.gemv(x, xd, list(weight), up, bias, "w4a16", dtype))


@pytest.mark.parametrize("m", [2, 16])
def test_full_precision_result(m):
    """What the kernel adds up itself, before the result is rounded."""
    weight = FORMATS["w4a16"].quantize_weight(normal(500, 1536) * 1536**-0.5)
    x, xd, up = (normal(*s, dtype=torch.bfloat16) for s in ((m, 1536), (m, 48), (500, 48)))
    expected = reference.gemv(x, xd, list(weight), up, None, "w4a16", torch.float32)
    y = triton_gemv.gemv(Gemv(x, xd, layout.to_kernel("w4a16", weight), up, None, "w4a16", torch.float32))
    assert error(y, expected) < 1e-4


@pytest.mark.parametrize("lead", [(0,), (2, 0), (2, 3, 5), ()])
def test_leading_dimensions(lead):
    """Zero rows, several leading dimensions, none at all."""
    weight = FORMATS["w4a16"].quantize_weight(normal(64, 128))
    x = normal(*lead, 128, dtype=torch.bfloat16)
    assert launch.gemv(x, None, list(weight), None, None, "w4a16", x.dtype).shape == (*lead, 64)


@triton.jit
def gate_residual(out, features, tokens, live, extra):
    gate, residual, stride = extra
    g = tl.load(gate + features, mask=live, other=0.0).to(tl.float32)
    return out * g + tl.load(residual + tokens * stride + features, mask=live, other=0.0).to(tl.float32)


@pytest.mark.parametrize("m", [1, 16])
def test_epilogue(m):
    weight = FORMATS["w4a16"].quantize_weight(normal(1000, 320) * 320**-0.5)
    x, bias = normal(m, 320, dtype=torch.bfloat16), normal(1000)
    gate, residual = normal(1000, dtype=torch.bfloat16), normal(m, 1000, dtype=torch.bfloat16)
    expected = reference.gemv(x, None, list(weight), None, bias, "w4a16", torch.float32) * gate + residual
    epilogue = Generated(gate_residual, (gate, residual, 1000))
    y = triton_gemv.gemv(
        Gemv(x, None, layout.to_kernel("w4a16", weight), None, bias, "w4a16", torch.bfloat16), epilogue
    )
    assert error(y, expected) < BOUND[torch.bfloat16]


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1001, 200), (13, 333, 3072)])
def test_every_element_is_written_and_the_bits_repeat(m, n, k):
    """Freed memory full of NaN is what torch.empty hands out next."""
    weight = layout.to_kernel("w4a16", FORMATS["w4a16"].quantize_weight(normal(n, k)))
    x, xd, up = normal(m, k, dtype=torch.float16), normal(m, 32, dtype=torch.float16), normal(n, 32).half()
    first = None
    for _ in range(5):
        poison = torch.full((m, n), float("nan"), device="cuda", dtype=torch.float16)
        del poison
        y = triton_gemv.gemv(Gemv(x, xd, weight, up, None, "w4a16", torch.float16))
        assert torch.isfinite(y).all()
        assert first is None or torch.equal(first, y)
        first = y
