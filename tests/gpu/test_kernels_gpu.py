"""The kernels on a GPU, through the same functions the operators call, against the reference. Needs CUDA:

python -m pytest tests/gpu
"""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kernel_testing import error

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemm
from svdq_compile.kernels.runtime.generated import Generated
from svdq_compile.lowering import launch, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BF16, FP16 = torch.bfloat16, torch.float16
# Half a unit in the last place of bf16 is 2^-9; two roundings (xd, y) add up to about this.
BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 3e-3}


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    """The same numbers and the first candidate of each kernel in every run."""
    torch.manual_seed(0)
    monkeypatch.setenv("SVDQ_TUNE", "0")


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "dtype"),
    [(1, 64, 64, 0, BF16), (17, 72, 192, 16, FP16), (77, 3072, 3072, 32, BF16), (333, 1000, 320, 48, FP16),
     (512, 200, 15360, 32, BF16), (1000, 3072, 448, 128, BF16), (4608, 1032, 1024, 256, FP16),
     (5, 100, 100, 32, FP16), (130, 8, 128, 0, FP16)],
)  # fmt: skip
def test_gemm(m, n, k, rank, dtype, precision):
    """Gluon where the features are a multiple of 8, plain Triton elsewhere; xd is a slice of a wider matrix."""
    fmt = FORMATS[precision]
    weight = fmt.quantize_weight(normal(n, k) * k**-0.5)
    qx, ascales = fmt.quantize_activation(normal(m, k))
    wide = normal(m, rank + 32, dtype=dtype)
    xd, up, bias = wide[:, 16 : 16 + rank], normal(n, rank, dtype=dtype), normal(n, dtype=dtype)
    offset = normal(n) if precision == "int4" else None
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, offset, precision, torch.float32)
    packed = layout.to_kernel(precision, weight)
    for out in (dtype, torch.float32):
        y = launch.gemm(qx, ascales, xd, list(packed), up, bias, offset, precision, out)
        assert y.dtype == out
        assert error(y, expected) < BOUND[out]
        assert torch.equal(y, launch.gemm(qx, ascales, xd, list(weight), up, bias, offset, precision, out))


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(
    ("m", "n", "count", "k", "rank", "dtype"),
    [(1, 128, 2, 64, 8, FP16), (17, 128, 3, 192, 16, BF16), (77, 1152, 2, 320, 40, FP16),
     (512, 3072, 3, 3072, 32, BF16), (512, 640, 2, 15360, 48, BF16),
     (4608, 3072, 3, 3072, 32, BF16), (4608, 1024, 3, 448, 256, FP16),
     (333, 256, 3, 128, 0, BF16)],
)  # fmt: skip
def test_siblings(m, n, count, k, rank, dtype, precision):
    """Several linears as one, against the reference and, bit for bit, against each where it lies: its scales by group
    are then rows cut out of longer ones. Gluon for 16-bit results, plain Triton for fp32.
    """
    fmt, wide = FORMATS[precision], count * n
    weight = fmt.quantize_weight(normal(wide, k) * k**-0.5)
    qx, ascales = fmt.quantize_activation(normal(m, k))
    xd = normal(m, count * rank + 32, dtype=dtype)[:, 16 : 16 + count * rank]
    up, bias = normal(wide, rank, dtype=dtype), normal(wide, dtype=dtype)
    offset = normal(wide) if precision == "int4" else None
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, offset, precision, torch.float32)
    packed = launch.in_device_order(precision, weight)
    dims = layout.feature_dims(precision, packed)
    for out in (dtype, torch.float32):
        poison = torch.full((m, wide), float("nan"), device="cuda", dtype=out)
        del poison
        y = launch.gemm(qx, ascales, xd, list(packed), up, bias, offset, precision, out)
        assert error(y, expected) < BOUND[out]
        for i in range(count):
            own = slice(i * n, (i + 1) * n)
            part = [t.narrow(dim, i * n, n) for t, dim in zip(packed, dims, strict=True)]
            columns, shift = xd[:, i * rank : (i + 1) * rank], None if offset is None else offset[own]
            alone = launch.gemm(qx, ascales, columns, part, up[own], bias[own], shift, precision, out)
            assert torch.equal(y[:, own], alone)


@pytest.mark.parametrize(
    ("m", "n", "count", "k", "rank", "dtype"),
    [(17, 64, 1, 64, 0, BF16), (77, 3072, 1, 3072, 32, BF16), (333, 1000, 1, 320, 48, FP16),
     (4608, 1032, 1, 1024, 256, FP16), (130, 8, 1, 100, 16, BF16), (512, 3072, 3, 3072, 32, BF16)],
)  # fmt: skip
def test_int8_by_a_library(m, n, count, k, rank, dtype):
    """w8a8, alone and as siblings; what it does not take goes to the reference."""
    fmt, wide = FORMATS["w8a8"], count * n
    weight = launch.in_device_order("w8a8", fmt.quantize_weight(normal(wide, k) * k**-0.5))
    qx, ascales = fmt.quantize_activation(normal(m, k))
    xd = normal(m, count * rank + 32, dtype=dtype)[:, 16 : 16 + count * rank]
    up, bias = normal(wide, rank, dtype=dtype), normal(wide, dtype=dtype)
    operands = Gemm(qx, ascales, xd, list(weight), up, bias, None, "w8a8", torch.float32)
    assert launch.GEMM.choose(operands.rows()).name == "cublas_int8"
    expected = reference.gemm(*operands)
    for out in (dtype, torch.float32):
        y = launch.gemm(*operands._replace(out_dtype=out))
        assert y.dtype == out
        assert error(y, expected) < BOUND[out]
    few = operands._replace(qx=qx[:16], ascales=ascales[:16], xd=xd[:16])
    assert launch.GEMM.choose(few.rows()).name == "reference"
    assert error(launch.gemm(*few), expected[:16]) < BOUND[torch.float32]


def test_int8_activations_are_w4a8s():
    x, smooth, down = normal(333, 1000, dtype=BF16), normal(1000).abs() + 0.5, normal(32, 1000, dtype=BF16)
    for ours, theirs in zip(*(launch.quantize(x, smooth, down, p, 0.0) for p in ("w8a8", "w4a8")), strict=True):
        assert torch.equal(ours, theirs)


@triton.jit
def gated_residual(out, auxiliary, features, tokens, live, extra):
    gate, N = extra
    return out * tl.load(gate + features, mask=features < N, other=0.0).to(tl.float32) + auxiliary


@triton.jit
def gelu(out, features, tokens, live, extra):
    return out / (1.0 + tl.exp(-1.5957691216 * out * (1.0 + 0.044715 * out * out)))


def w4a8_operands(m, n, k, rank, dtype):
    """What a w4a8 gemm reads, and its result in fp32."""
    fmt = FORMATS["w4a8"]
    weight = fmt.quantize_weight(normal(n, k) * k**-0.5)
    qx, ascales = fmt.quantize_activation(normal(m, k))
    xd, up, bias = normal(m, rank, dtype=dtype), normal(n, rank, dtype=dtype), normal(n, dtype=dtype)
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, None, "w4a8", torch.float32)
    return Gemm(qx, ascales, xd, layout.to_kernel("w4a8", weight), up, bias, None, "w4a8", dtype), expected


@pytest.mark.parametrize(
    ("kernel", "m", "n", "k", "rank", "dtype"),
    [("gluon", 200, 1032, 3072, 32, BF16), ("gluon", 4608, 3072, 256, 0, FP16), ("triton", 17, 72, 192, 16, BF16)],
)
def test_epilogues(kernel, m, n, k, rank, dtype):
    """gate * y + residual, the residual a slice of a wider matrix in the other 16-bit type; and gelu. The first has its
    tiles cut along K, the second many tiles a program.
    """
    from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm
    from svdq_compile.kernels.portable import gemm as triton_gemm

    if kernel == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    operands, expected = w4a8_operands(m, n, k, rank, dtype)

    def gemm(epilogue):
        if kernel == "gluon":
            return gluon_gemm.gemm(operands, epilogue)
        return triton_gemm.gemm(operands, epilogue)

    gate, residual = normal(n, dtype=dtype), normal(m, n + 16, dtype=FP16 if dtype == BF16 else BF16)[:, 8 : 8 + n]
    for _ in range(3):
        y = gemm(Generated(gated_residual, (gate, n), residual))
        assert error(y, expected * gate + residual) < BOUND[dtype]
    assert error(gemm(Generated(gelu)), F.gelu(expected, approximate="tanh")) < BOUND[dtype]


def test_gemm_integers_are_exact():
    """With every scale one, no low rank and values that bf16 holds, the result is the integer product itself."""
    fmt = FORMATS["w4a8"]
    qweight = torch.randint(0, 256, (256, 2048), device="cuda", dtype=torch.uint8)
    qweight = torch.where(qweight & 15 == 0, qweight + 1, qweight)
    subscales = torch.randint(1, 17, (256, 64), device="cuda", dtype=torch.int8)
    weight = (qweight, subscales, torch.full((256,), 2.0**-14, device="cuda"))
    qx = torch.randint(-127, 128, (300, 4096), device="cuda", dtype=torch.int8)
    empty = torch.empty(300, 0, device="cuda", dtype=torch.float16), torch.empty(256, 0, device="cuda")
    ones = torch.ones(300, 1, device="cuda")
    y = launch.gemm(qx, ones, empty[0], list(weight), empty[1], None, None, "w4a8", torch.float16)
    assert torch.equal(y, fmt.matmul(qx, ones, *weight).half())


@pytest.mark.parametrize("lead", [(0,), (2, 0), (2, 3, 5), ()])
def test_leading_dimensions(lead):
    """Zero rows, several leading dimensions, none at all."""
    weight = FORMATS["w4a8"].quantize_weight(normal(64, 128))
    x, smooth, down = (
        normal(*lead, 128, dtype=torch.bfloat16),
        torch.ones(128, device="cuda"),
        normal(48, 128).bfloat16(),
    )
    qx, ascales, xd = launch.quantize(x, smooth, down, "w4a8", 0.0)
    y = launch.gemm(qx, ascales, xd[..., 16:32], list(weight), normal(64, 16).bfloat16(), None, None, "w4a8", x.dtype)
    assert y.shape == (*lead, 64)
    weight = FORMATS["w4a16"].quantize_weight(normal(64, 128))
    assert launch.gemv(x, None, list(weight), None, None, "w4a16", x.dtype).shape == (*lead, 64)


def test_every_element_is_written():
    """Freed memory full of NaN is what torch.empty hands out next."""
    weight = layout.to_kernel("w4a8", FORMATS["w4a8"].quantize_weight(normal(1000, 256)))
    x, smooth = normal(333, 256, dtype=torch.bfloat16), torch.ones(256, device="cuda")
    down, up = normal(32, 256).bfloat16(), normal(1000, 32).bfloat16()
    for _ in range(3):
        poison = [
            torch.full((size,), float("nan"), device="cuda") for size in (333 * 500, 333 * 64, 333 * 16, 333 * 32)
        ]
        del poison
        qx, ascales, xd = launch.quantize(x, smooth, down, "w4a8", 0.0)
        y = launch.gemm(qx, ascales, xd, list(weight), up, None, None, "w4a8", torch.bfloat16)
        assert torch.isfinite(ascales).all()
        assert torch.isfinite(xd).all()
        assert torch.isfinite(y).all()


def test_captured_in_a_graph():
    weight = layout.to_kernel("w4a8", FORMATS["w4a8"].quantize_weight(normal(256, 256)))
    x, smooth = normal(64, 256, dtype=torch.bfloat16), torch.ones(256, device="cuda")
    down, up = normal(32, 256).bfloat16(), normal(256, 32).bfloat16()

    def run():
        qx, ascales, xd = launch.quantize(x, smooth, down, "w4a8", 0.0)
        return launch.gemm(qx, ascales, xd, list(weight), up, None, None, "w4a8", torch.bfloat16)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(normal(64, 256))
    graph.replay()
    assert torch.equal(y, run())


@pytest.mark.parametrize("tile", [(64, 128, 6, 8), (128, 128, 3, 4, 2), (256, 128, 4, 8), (128, 256, 4, 8)])
def test_w4a8_tiles(tile):
    """Shapes of the sm_90 kernel that `test_gemm` may not reach, ragged and with tiles cut along K."""
    from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    for shape in ((333, 1000, 320, 48), (512, 200, 15360, 32)):
        operands, expected = w4a8_operands(*shape, BF16)
        assert error(gluon_gemm.gemm(operands, tile=gluon_gemm.Tile(*tile)), expected) < BOUND[BF16]


AMPERE_TILES = [(16, 128, 6, 1, 4), (32, 64, 6, 1, 4), (64, 64, 4, 2, 2), (64, 128, 3, 1, 4), (128, 128, 2, 2, 2),
                (128, 256, 3, 2, 4), (256, 128, 2, 4, 2)]  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", [(333, 1000, 320, 48), (512, 200, 15360, 32), (5, 72, 64, 0), (130, 264, 192, 256)])
def test_ampere_w4a8_tiles(shape, dtype):
    """On every NVIDIA GPU, ragged and with tiles cut along K: every tile gives the same sums, so the same bits where no
    low-rank product rounds in between; and the epilogues.
    """
    from svdq_compile.kernels.ampere.gemm_w4a8 import Tile, gemm
    from svdq_compile.kernels.runtime.target import shared_memory

    m, n, _, _ = shape
    operands, expected = w4a8_operands(*shape, dtype)
    without_branch = operands._replace(xd=operands.xd[:, :0], up=operands.up[:, :0].contiguous())
    gate, residual = normal(n, dtype=dtype), normal(m, n + 16, dtype=dtype)[:, 8 : 8 + n]
    sums = []
    for tile in [Tile(*t) for t in AMPERE_TILES]:
        if tile.shared() > shared_memory(operands.qx.device):
            continue
        for _ in range(2):  # the counters are zero again
            assert error(gemm(operands, tile=tile), expected) < BOUND[dtype], tile
        y = gemm(operands, Generated(gated_residual, (gate, n), residual), tile)
        assert error(y, expected * gate + residual) < BOUND[dtype], tile
        assert error(gemm(operands, Generated(gelu), tile), F.gelu(expected, approximate="tanh")) < BOUND[dtype], tile
        sums.append(gemm(without_branch, tile=tile))
    assert len(sums) >= 5
    assert all(torch.equal(y, sums[0]) for y in sums)


def test_ampere_w4a8_siblings():
    """Three linears side by side, each with columns of xd of its own."""
    from svdq_compile.kernels.ampere.gemm_w4a8 import gemm

    m, n, k, rank = 200, 3 * 384, 448, 32
    fmt = FORMATS["w4a8"]
    weight = fmt.quantize_weight(normal(n, k) * k**-0.5)
    qx, ascales = fmt.quantize_activation(normal(m, k))
    xd, up = normal(m, 3 * rank, dtype=BF16), normal(n, rank, dtype=BF16)
    expected = reference.gemm(qx, ascales, xd, list(weight), up, None, None, "w4a8", torch.float32)
    y = gemm(Gemm(qx, ascales, xd, layout.to_kernel("w4a8", weight), up, None, None, "w4a8", BF16))
    assert error(y, expected) < BOUND[BF16]
