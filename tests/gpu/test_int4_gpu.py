"""int4 (W4A4) on sm_90: e4m3 products are exact, and the Gluon kernel against the reference. Needs CUDA."""

import pytest
import torch
from kernel_testing import error

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemm, Quantize
from svdq_compile.lowering import reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
)

BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"),
    [(0, 64, 64, 16), (1, 64, 64, 0), (17, 72, 192, 16), (77, 3072, 3072, 32), (333, 1000, 320, 48),
     (512, 200, 15360, 32), (1000, 1032, 448, 256), (130, 8, 100, 0)],
)  # fmt: skip
def test_gluon_int4(m, n, k, rank, unsigned, dtype):
    """Ragged shapes, xd a slice of a wider matrix, outputs in freed memory full of NaN; both forms of every operand."""
    from svdq_compile.kernels.hopper import gemm_int4 as gluon_int4

    fmt = FORMATS["int4"]
    weight = fmt.quantize_weight(normal(n, k) * k**-0.5)
    x = normal(m, k)
    qx, ascales = fmt.quantize_activation(x.abs() if unsigned else x, unsigned=unsigned)
    xd, up = normal(m, rank + 32, dtype=dtype)[:, 16 : 16 + rank], normal(n, rank, dtype=dtype)
    bias, offset = normal(n, dtype=dtype), normal(n)
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, offset, "int4", torch.float32)
    planar, wscales = layout.to_kernel("int4", weight)
    poison = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
    del poison
    operands = Gemm(qx, ascales, xd, (planar, wscales), up, bias, offset, "int4", dtype)
    y = gluon_int4.gemm(operands)
    assert error(y, expected) < BOUND[dtype] or not m
    for tile in gluon_int4.candidates(m):  # each sums in the same order
        assert torch.equal(y, gluon_int4.gemm(operands, tile=tile))
    stored = ascales.new_full((ascales.shape[1], -(-m // 4) * 4), float("nan"))[:, :m]
    stored.copy_(ascales.t())
    words = layout.to_words(planar)
    e4m3 = qx.half().to(torch.float8_e4m3fn)
    assert torch.equal(y, gluon_int4.gemm(operands._replace(qx=e4m3, ascales=stored.t(), weight=(words, wscales))))


@pytest.mark.parametrize("shift", [0.0, 0.171875])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 64, 64, 16), (333, 1000, 3072, 32), (77, 72, 448, 128)])
def test_after_the_quantize_kernel(m, n, k, rank, shift):
    """What quantize writes for this GEMM goes in as it is."""
    from svdq_compile.kernels.hopper import gemm_int4 as gluon_int4
    from svdq_compile.kernels.portable import quantize as triton_quantize

    fmt = FORMATS["int4"]
    x, smooth, down = normal(m, k, dtype=torch.bfloat16), torch.rand(k, device="cuda") + 0.5, normal(rank, k) * k**-0.5
    weight, up = fmt.quantize_weight(normal(n, k) * k**-0.5), normal(n, rank, dtype=torch.bfloat16)
    qx, ascales, xd = triton_quantize.quantize(Quantize(x, smooth, down.bfloat16(), "int4", shift), fp8=True)
    assert gluon_int4._by_group(ascales).data_ptr() == ascales.data_ptr()
    y = gluon_int4.gemm(Gemm(qx, ascales, xd, layout.to_kernel("int4", weight), up, None, None, "int4", torch.bfloat16))
    qx, ascales, xd = reference.quantize(x, smooth, down.bfloat16(), "int4", shift)
    expected = reference.gemm(qx, ascales, xd, list(weight), up, None, None, "int4", torch.float32)
    assert error(y, expected) < BOUND[torch.bfloat16]


@pytest.mark.parametrize("high", [7, 15])
def test_sums_of_a_group_are_exact(high):
    """The largest sums Hopper's fp8 accumulation must hold: 64 * 7 * 15 = 6720, one group, every scale one."""
    from svdq_compile.kernels.hopper import gemm_int4 as gluon_int4

    n = m = 256
    q = torch.where(torch.rand(n, 64, device="cuda") < torch.rand(n, 1, device="cuda"), 7, -7)
    x = torch.where(torch.rand(m, 64, device="cuda") < torch.rand(m, 1, device="cuda"), high, high - 1)
    q[0], x[0] = 7, high
    planar = ((q + 8) | 8 << 4).to(torch.uint8).view(torch.int8)
    wscales = torch.tensor([1.0, 0.0], device="cuda").bfloat16()[:, None].expand(2, n).contiguous()
    want = x.double() @ q.double().t()
    assert want.max() == 64 * 7 * high
    # 16-bit results round sums above 2048, so what is left after taking off the row's largest is compared
    empty = torch.empty(m, 0, device="cuda").half(), torch.empty(n, 0, device="cuda").half()
    for column in range(0, n, 32):
        offset = want[column].float().contiguous()
        given = x.to(torch.int8), torch.ones(m, 1, device="cuda"), empty[0], (planar, wscales), empty[1]
        y = gluon_int4.gemm(Gemm(*given, None, offset, "int4", torch.float16))
        exact = want - offset.double()
        near = exact.abs() <= 2048
        assert torch.equal(y.double()[near], exact[near])
