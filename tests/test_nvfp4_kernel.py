"""The nvfp4 product: numbers in the interpreter, refusals, bad input, and the instructions it compiles to."""

import re

import pytest
import torch
import triton
import triton.language as tl
from kernel_testing import HALF, ROUNDING, builds, compile_for, compiled, error, interpreted, run_interpreted

from svdq_compile.kernels.formats import nvfp4
from svdq_compile.kernels.operands import Gemm
from svdq_compile.kernels.portable import gemm_nvfp4 as triton_nvfp4
from svdq_compile.kernels.portable.gemm_nvfp4 import Tile
from svdq_compile.kernels.runtime.generated import Generated
from svdq_compile.lowering import reference

TYPES = {"qx": "*u8", "ascales": "*fp8e4nv", "qweight": "*u8", "wscales": "*fp8e4nv", "wtscale": "*fp32",
         "xd": "*bf16", "up": "*bf16", "bias": "*bf16", "y": "*bf16", "extra": ()}  # fmt: skip

# Small steps along K, so that a few hundred channels are several and the last one is ragged.
TILES = [Tile(32, 64, 64, 4, 1, chunked=False), Tile(128, 128, 128, 4, 1, chunked=True)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def arguments(m, n, k, rank):
    """Scales that differ from group to group by up to 64 times, so that a scale in the wrong place shows."""
    weight, x = torch.randn(n, k), torch.randn(m, k)
    for t in (weight, x):
        t *= torch.exp2(6 * torch.rand(t.shape[0], -(-k // 16)) - 3).repeat_interleave(16, 1)[:, :k]
    qx, ascales = nvfp4.quantize_activation(x)
    xd, up, bias = torch.randn(m, rank + 16).to(HALF)[:, 16:], torch.randn(n, rank).to(HALF), torch.randn(n).to(HALF)
    return {"qx": qx, "ascales": ascales, "xd": xd, "weight": nvfp4.quantize_weight(weight), "up": up, "bias": bias}


def expected(qx, ascales, xd, weight, up, bias=None):
    return reference.gemm(qx, ascales, xd, list(weight), up, bias, None, "nvfp4", torch.float32)


def operands(out_dtype, bias=None, **given):
    return Gemm(**given, bias=bias, offset=None, precision="nvfp4", out_dtype=out_dtype)


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("tile", [None, *TILES])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"), [(1, 8, 16, 0), (17, 72, 192, 16), (70, 130, 100, 48), (140, 65, 336, 96)]
)
def test_interpreted_gemm(m, n, k, rank, tile):
    """Ragged everywhere; xd is a slice of a wider matrix."""
    given = arguments(m, n, k, rank)
    wanted = expected(**given)
    assert error(triton_nvfp4.gemm(operands(HALF, **given), config=tile), wanted) < ROUNDING
    assert error(triton_nvfp4.gemm(operands(torch.float32, **given), config=tile), wanted) < 1e-6


@interpreted
@pytest.mark.parametrize("tile", TILES)
def test_interpreted_gemm_of_every_code_and_scale(tile):
    """All 256 pairs of codes meet, and every finite positive e4m3 scale, the subnormal ones too, on both sides."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(2)
    qweight = (codes | codes.roll(1) << 4).reshape(1, 32).expand(63, 32).contiguous()
    qx = torch.stack([qweight[0].roll(i) for i in range(32)])
    weight = (qweight, scales.view(torch.uint8).repeat(2).reshape(63, 4).view(scales.dtype), torch.tensor(0.37))
    ascales = scales.view(torch.uint8).flip(0).repeat(2)[:128].reshape(32, 4).view(scales.dtype)
    given = {"qx": qx, "ascales": ascales, "xd": torch.zeros(32, 0), "weight": weight, "up": torch.zeros(63, 0)}
    y = triton_nvfp4.gemm(operands(torch.float32, **given), config=tile)
    assert error(y, expected(**given)) < 1e-6


@triton.jit
def gated(out, features, tokens, live, extra):
    gate = tl.load(extra[0] + features, mask=features < extra[2], other=0.0)
    residual = tl.load(extra[1] + tokens * extra[2] + features, mask=live, other=0.0)
    return residual + gate * out


@interpreted
@pytest.mark.parametrize("tile", TILES)
def test_interpreted_epilogue(tile):
    """The epilogue gets its block as [features, tokens], with bias and low rank in it."""
    m, n = 33, 72
    given, gate, residual = arguments(m, n, 80, 16), torch.randn(n), torch.randn(m, n)
    y = triton_nvfp4.gemm(operands(torch.float32, **given), Generated(gated, (gate, residual, n)), tile)
    assert error(y, residual + gate * expected(**given)) < 1e-6


@interpreted
def test_interpreted_gemm_of_nothing():
    for m, n in ((0, 8), (3, 0)):
        given = {name: t[:m] if name in ("qx", "ascales", "xd") else t for name, t in arguments(3, 8, 32, 16).items()}
        given |= {"weight": (*(t[:n] for t in given["weight"][:2]), given["weight"][2])}
        given |= {"up": given["up"][:n], "bias": given["bias"][:n]}
        assert triton_nvfp4.gemm(operands(torch.bfloat16, **given)).shape == (m, n)


# ** refusals and bad input **


@pytest.fixture
def compute_target(monkeypatch):
    """The answer for a GPU of any capability, and of a Triton of any version."""

    def answer(capability, version=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(triton_nvfp4, "_TRITON", version or triton_nvfp4._TRITON)
        return triton_nvfp4.compute_target.__wrapped__(0)

    return answer


@compiled
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (11, 0), (13, 0)])
def test_other_gpus_are_refused(capability, compute_target):
    with pytest.raises(RuntimeError, match=f"sm_100 from Triton 3.6.*Here: sm_{capability[0]}{capability[1]} with"):
        compute_target(capability)


@compiled
def test_targets(compute_target):
    assert [compute_target(c) for c in ((10, 0), (10, 3), (12, 0))] == [10, 10, 12]
    assert compute_target((12, 1), (3, 8, 0)) == 12
    with pytest.raises(RuntimeError, match="sm_121 with Triton"):
        compute_target((12, 1), (3, 7, 1))


@compiled
def test_nothing_is_compiled_for_a_gpu_that_is_refused(monkeypatch):
    """Triton compiles for the current GPU whatever device the tensors are on, so CPU tensors are no exception."""

    def launched(*_, **__):
        raise AssertionError("launched")

    monkeypatch.setattr(triton_nvfp4, "launch", launched)
    with pytest.raises(RuntimeError, match="Here: no NVIDIA GPU"):
        triton_nvfp4.gemm(operands(HALF, **arguments(4, 8, 32, 16)))


@compiled
def test_no_asynchronous_copies_without_fences(monkeypatch):
    for version, stages in (((3, 6, 0), {1}), ((3, 7, 0), {1}), ((3, 7, 1), {3, 5})):
        monkeypatch.setattr(triton_nvfp4, "_TRITON", version)
        assert {tile.stages for rows in (1, 4608) for tile in triton_nvfp4.candidates(rows, 10)} == stages


@compiled
@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        ("qx", lambda t: t.view(torch.int8), "qx is torch.int8"),
        ("qx", lambda t: t.t().contiguous().t(), "qx must be contiguous"),
        ("qx", lambda t: t[:, :12].contiguous(), "qx has 24 columns, not whole groups of 16"),
        ("ascales", lambda t: t[:3], "ascales has shape"),
        ("ascales", lambda t: t.view(torch.uint8), "ascales is torch.uint8"),
        ("weight", lambda w: (w[0][:, :8].contiguous(), *w[1:]), "qweight has shape"),
        ("weight", lambda w: (w[0], w[1][:, :1].contiguous(), w[2]), "wscales has shape"),
        ("weight", lambda w: (*w[:2], w[2].reshape(1)), "wtscale has shape"),
        ("xd", lambda t: t[:, :8], "up has shape"),
        ("xd", lambda t: t.t().contiguous().t(), "xd has shape"),
        ("up", lambda t: t.to("meta"), "up is on meta"),
        ("bias", lambda _: torch.ones(7), "bias has shape"),
    ],
)
def test_launcher_says_what_is_wrong(name, spoil, complaint, monkeypatch):
    monkeypatch.setattr(triton_nvfp4, "compute_target", lambda _: 12)
    given = arguments(4, 8, 32, 16)
    given[name] = spoil(given[name])
    with pytest.raises((TypeError, ValueError), match=complaint):
        triton_nvfp4.gemm(operands(HALF, **given))


@compiled
def test_low_rank_is_16_bit(monkeypatch):
    monkeypatch.setattr(triton_nvfp4, "compute_target", lambda _: 12)
    given = arguments(4, 8, 32, 16)
    given |= {"xd": given["xd"].float(), "up": given["up"].float()}
    with pytest.raises(TypeError, match=r"xd is torch.float32, expected 16 bits"):
        triton_nvfp4.gemm(operands(torch.float32, **given))


# ** instructions **

PRODUCT = {
    100: r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)",
    120: r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"
    r"\.f32\.e2m1\.e2m1\.f32\.ue4m3",
}


def build(capability, tile, align):
    constants = {"TM": tile.tokens, "TN": tile.features, "TK": tile.k, "CHUNKED": tile.chunked,
                 "ALIGN": min(align, tile.k), "GROUP": 8, "RANK": 32, "BIAS": True, "EPILOGUE": None,
                 "GATES": False}  # fmt: skip
    return compile_for(triton_nvfp4._gemm_kernel, capability, constants, tile.warps, TYPES, tile.stages)


def tiles():
    """Every tile that a launch may choose."""
    return [
        (capability, tile)
        for capability in (100, 120)
        for tile in dict.fromkeys(t for rows in (16, 64, 4608) for t in triton_nvfp4.candidates(rows, capability // 10))
    ]


@builds
@pytest.mark.parametrize(("capability", "tile"), tiles())
def test_gemm_uses_4_bit_tensor_cores(capability, tile):
    built = build(capability, tile, align=1024)
    assert re.search(PRODUCT[capability], built.ptx)
    assert built.spilled == 0
    # Codes in the widest asynchronous copies.
    assert tile.stages == 1 or re.search(r"cp\.async\.cg\.shared\.global .*0x10;?", built.ptx)


@builds
@pytest.mark.parametrize("align", [16, 64])
@pytest.mark.parametrize("capability", [100, 120])
def test_gemm_of_ragged_channels(capability, align):
    """K of whole groups only, and of half tiles: where models have it, all copies are still asynchronous."""
    built = build(capability, triton_nvfp4.candidates(4608, capability // 10)[0], align)
    assert re.search(PRODUCT[capability], built.ptx)
    assert built.spilled == 0
    if align == 64:
        assert not re.search(r"ld\.global\.b8", built.ptx)


@builds
@pytest.mark.skipif(triton_nvfp4._TRITON < triton_nvfp4._FENCED, reason="this Triton has no fences")
@pytest.mark.parametrize("tile", [t for capability, t in tiles() if capability == 100])
def test_gemm_keeps_a_product_in_flight_on_sm100(tile):
    """Scales go from shared to tensor memory, behind a fence, and no step sets up a barrier to wait on by itself."""
    ptx = build(100, tile, align=1024).ptx
    step = ptx[ptx.index("cp.async.wait_group") : ptx.index("tcgen05.mma")]
    assert re.search(r"fence\.proxy\.async.*tcgen05\.cp", step, re.DOTALL)
    assert "mbarrier.init" not in step
    assert not re.search(r"tcgen05\.st", step)
