"""The quantize kernels on a GPU against the reference: one kernel on sm_90, and in launches. Needs CUDA."""

import pytest
import torch
import triton
import triton.language as tl

from svdq_compile.kernels.hopper import quantize as gq
from svdq_compile.kernels.operands import Quantize
from svdq_compile.kernels.portable import quantize as tq
from svdq_compile.kernels.runtime.generated import Generated
from svdq_compile.lowering import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DTYPES = [torch.bfloat16, torch.float16]
# Half a unit in the last place of bf16 is 2^-9.
BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
BF16, FP16 = DTYPES
FORMATS = [("w4a8", 0.0), ("int4", 0.0), ("int4", 0.171875), ("nvfp4", 0.0)]
# Each compiles kernels of its own: shapes that fill programs and that do not, and of all ranks' classes.
CASES = [
    (1, 64, 0, "w4a8", 0.0, FP16), (1, 3072, 32, "w4a8", 0.0, BF16), (17, 72, 16, "w4a8", 0.0, BF16),
    (77, 320, 48, "w4a8", 0.0, FP16), (333, 3072, 96, "w4a8", 0.0, BF16), (130, 15360, 32, "w4a8", 0.0, FP16),
    (512, 1000, 256, "w4a8", 0.0, BF16), (40, 16384, 32, "w4a8", 0.0, BF16), (4608, 3072, 128, "w4a8", 0.0, BF16),
    (4608, 12288, 32, "w4a8", 0.0, FP16), (1, 64, 0, "int4", 0.0, BF16), (77, 320, 48, "int4", 0.171875, FP16),
    (333, 3072, 96, "int4", 0.0, BF16), (4608, 3072, 32, "int4", 0.171875, BF16), (512, 1000, 256, "int4", 0.0, FP16),
    (17, 100, 16, "nvfp4", 0.0, BF16), (333, 3072, 96, "nvfp4", 0.0, FP16), (4608, 3072, 128, "nvfp4", 0.0, BF16),
]  # fmt: skip
IN_LAUNCHES = [(1, 64, 0, "int4", 0.0, FP16), (77, 320, 48, "int4", 0.171875, BF16), (333, 3072, 96, "w4a8", 0.0, FP16),
               (4608, 12288, 32, "w4a8", 0.0, BF16)]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@triton.jit
def gelu(v, rows, columns, live, extra):
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def modulated(v, rows, columns, live, extra):
    mean, rstd, scale, shift, residual, stride, m = extra
    inside = rows < m
    r = tl.load(residual + rows * stride + columns, mask=live, other=0.0).to(tl.float32)
    s = tl.load(scale + columns, mask=live, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=live, other=0.0).to(tl.float32)
    centred = v + r - tl.load(mean + rows, mask=inside, other=0.0)
    return centred * tl.load(rstd + rows, mask=inside, other=0.0) * (1.0 + s) + b


def error(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def operands(m, k, rank, dtype):
    x, down = torch.randn(m, k, device="cuda").to(dtype), torch.randn(rank, k, device="cuda").to(dtype)
    return x, torch.rand(k, device="cuda") + 0.5, down


def fastest(o, prologue=None, right=None, fp8=False):
    one_kernel = o.precision != "nvfp4" and gq.can_quantize(o, prologue, right)
    return (gq if one_kernel else tq).quantize(o, prologue, right, fp8)


def check(result, x, smooth, down, precision, shift, rotate=False):
    qx, ascales, xd = result
    q, a, d = reference.quantize(x, smooth, down, precision, shift, rotate)
    torch.testing.assert_close(ascales.float(), a.float(), rtol=1e-6, atol=0)
    if precision == "w4a8":
        assert (qx.int() - q.int()).abs().max() <= 1
    assert (qx != q).double().mean() < 2e-4
    assert xd.shape == d.shape
    assert not down.shape[0] or error(xd, x.double() @ down.double().t()) < BOUND[x.dtype]


@pytest.mark.parametrize(
    ("m", "k", "rank", "precision", "shift", "dtype", "run"),
    [(*case, fastest) for case in CASES] + [(*case, tq.quantize) for case in IN_LAUNCHES],
)
def test_quantize(m, k, rank, precision, shift, dtype, run):
    x, smooth, down = operands(m, k, rank, dtype)
    x[0] = 0
    for _ in range(2):  # the second finds the counters as the first left them
        check(run(Quantize(x, smooth, down, precision, shift)), x, smooth, down, precision, shift)


@pytest.mark.parametrize(("precision", "shift"), [("w4a8", 0.0), ("int4", 0.171875)])
@pytest.mark.parametrize(("m", "k", "rank"), [(8192, 320, 32), (8100, 640, 16), (2048, 1280, 64), (77, 2048, 0)])
def test_tiles_after_one_another(m, k, rank, precision, shift):
    """They share counters."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    x, smooth, down = operands(m, k, rank, torch.bfloat16)
    o = Quantize(x, smooth, down, precision, shift)
    for tile in [gq.Tile(4, 4), gq.Tile(2, 2), gq.Tile(8, 2)] * 2:
        check(gq.quantize(o, tile=tile), x, smooth, down, precision, shift)


@pytest.mark.parametrize("run", [fastest, tq.quantize])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("m", "k", "rank"), [(1, 64, 0), (77, 320, 48), (333, 3072, 96), (4608, 3072, 32)])
def test_rotation(m, k, rank, fp8, run):
    x, smooth, down = operands(m, k, rank, BF16)
    x[0] = 0
    x[:, 3] *= 50
    qx, ascales, xd = run(Quantize(x, smooth, down, "int4", 0.0, rotate=True), fp8=fp8)
    check((qx.to(torch.int8), ascales, xd), x, smooth, down, "int4", 0.0, rotate=True)


@pytest.mark.parametrize(("precision", "shift"), FORMATS[1:])
def test_ties_are_exact(precision, shift):
    x, _, down = operands(300, 1024, 0, torch.bfloat16)
    x, smooth = (x * 8).round() / 8 + 0.0, torch.ones(1024, device="cuda")
    qx, ascales, _ = fastest(Quantize(x, smooth, down, precision, shift))
    # On the CPU: torch divides by a number on CUDA as it multiplies by one over it, rounded.
    q, a, _ = reference.quantize(x.cpu(), smooth.cpu(), down.cpu(), precision, shift)
    assert torch.equal(ascales.float().cpu(), a.float())
    assert torch.equal(qx.cpu(), q)


def check_prologue(result, h, smooth, down, precision, shift):
    """h itself may round either way, so codes and scales may move a little."""
    qx, ascales, xd = result
    q, a, _ = reference.quantize(h, smooth, down, precision, shift)
    assert error(ascales, a) < (3e-2 if precision == "nvfp4" else 1e-3)
    assert (qx != q).double().mean() < 1e-2
    assert not down.shape[0] or error(xd, h.double() @ down.double().t()) < BOUND[h.dtype]


@pytest.mark.parametrize(
    ("m", "k", "rank", "precision", "shift", "dtype", "run"),
    [(128, 3072, 32, "w4a8", 0.0, BF16, fastest), (333, 3072, 32, "w4a8", 0.0, FP16, fastest),
     (77, 336, 128, "w4a8", 0.0, BF16, fastest), (128, 3072, 128, "w4a8", 0.0, BF16, fastest),
     (77, 336, 32, "int4", 0.171875, BF16, fastest), (50, 1000, 0, "nvfp4", 0.0, BF16, fastest),
     (50, 1000, 16, "w4a8", 0.0, BF16, tq.quantize), (50, 1000, 16, "int4", 0.171875, FP16, tq.quantize)],
)  # fmt: skip
def test_prologues(m, k, rank, precision, shift, dtype, run):
    """The result beyond the edges must be zero, whatever the prologue makes of nothing."""
    x, smooth, down = operands(m, k, rank, dtype)
    mean, rstd = torch.randn(m, device="cuda"), torch.rand(m, device="cuda") + 0.5
    scale, move = torch.randn(2, k, device="cuda").to(dtype)
    residual = torch.randn(m, k + 24, device="cuda").to(dtype)
    norm = (x.float() + residual[:, :k].float() - mean[:, None]) * rstd[:, None] * (1 + scale.float()) + move.float()
    prologue = Generated(modulated, (mean, rstd, scale, move, residual, k + 24, m))
    given = Quantize(x, smooth, down, precision, shift)
    check_prologue(run(given, prologue), norm.to(dtype), smooth, down, precision, shift)


@pytest.mark.parametrize(
    ("m", "left", "k", "rank", "gap", "precision", "run"),
    [(333, 3072, 15360, 32, 64, "w4a8", fastest), (77, 64, 336, 96, 8, "w4a8", fastest),
     (77, 64, 336, 0, 5, "w4a8", fastest), (130, 100, 320, 16, 8, "int4", fastest),
     (130, 64, 320, 16, 8, "int4", fastest), (1, 64, 128, 16, 8, "w4a8", fastest),
     (333, 3072, 15360, 32, 64, "w4a8", tq.quantize), (77, 64, 336, 16, 8, "nvfp4", tq.quantize)],
)  # fmt: skip
def test_two_parts(m, left, k, rank, gap, precision, run):
    """Side by side, each a slice of something wider, also where the one kernel cannot copy 16 bytes at a time."""
    _, smooth, down = operands(m, k, rank, BF16)
    wide = torch.randn(m, k + 3 * gap, device="cuda").to(BF16)
    x, right = wide[:, gap : gap + left], wide[:, left + 2 * gap : k + 2 * gap]
    joined, given = torch.cat((x, right), 1), Quantize(x, smooth, down, precision, 0.0)
    check(run(given, None, right), joined, smooth, down, precision, 0.0)
    if m == 333:
        h = torch.nn.functional.gelu(joined.float()).to(BF16)
        check_prologue(run(given, Generated(gelu), right), h, smooth, down, precision, 0.0)


@pytest.mark.parametrize("shift", [0.0, 0.171875])
@pytest.mark.parametrize(("m", "k", "rank"), [(1, 64, 0), (333, 3072, 32)])
def test_int4_in_fp8(m, k, rank, shift):
    """The same values in the form that the sm_90 GEMM reads without a conversion."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs float8_e4m3fn")
    x, smooth, down = operands(m, k, rank, torch.bfloat16)
    given = Quantize(x, smooth, down, "int4", shift)
    for run in (fastest, tq.quantize):
        qx, ascales, xd = run(given, fp8=True)
        plain, scales, xd2 = run(given)
        assert torch.equal(qx.view(torch.uint8), plain.half().to(torch.float8_e4m3fn).view(torch.uint8))
        assert torch.equal(ascales, scales)
        assert torch.equal(xd, xd2)
        assert ascales.stride() == (1, -(-m // 4) * 4)


@pytest.mark.parametrize(("precision", "shift"), FORMATS)
def test_every_element_is_written(precision, shift):
    """Freed memory full of NaN is what torch.empty hands out next."""
    x, smooth, down = operands(333, 264, 32, torch.bfloat16)
    for run in (fastest, tq.quantize):
        poison = [torch.full((n,), float("nan"), device="cuda") for n in (333 * 80, 333 * 40, 333 * 17, 333 * 16, 333)]
        del poison
        check(run(Quantize(x, smooth, down, precision, shift)), x, smooth, down, precision, shift)


def test_captured_in_a_graph():
    x, smooth, down = operands(100, 3072, 32, torch.bfloat16)
    given = Quantize(x, smooth, down, "w4a8", 0.0)
    fastest(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fastest(given)
    for _ in range(3):
        x.copy_(torch.randn(100, 3072, device="cuda"))
        graph.replay()
        check(result, x, smooth, down, "w4a8", 0.0)


def test_two_streams():
    """Each stream has counters of its own."""
    x, smooth, down = operands(4608, 3072, 32, torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(10):
        with torch.cuda.stream(streams[i % 2]):
            results.append(fastest(Quantize(x, smooth, down, "w4a8", 0.0)))
    torch.cuda.synchronize()
    for result in results:
        check(result, x, smooth, down, "w4a8", 0.0)


def test_more_than_two_to_the_31_elements():
    m, k = 2**20 + 128, 2048
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    x = torch.zeros(m, k, device="cuda", dtype=torch.bfloat16)
    smooth, down = torch.rand(k, device="cuda") + 0.5, torch.randn(16, k, device="cuda").bfloat16()
    x[-64:] = torch.randn(64, k, device="cuda")
    qx, ascales, xd = fastest(Quantize(x, smooth, down, "w4a8", 0.0))
    assert not qx[:-64].any()
    check((qx[-64:], ascales[-64:], xd[-64:]), x[-64:], smooth, down, "w4a8", 0.0)
