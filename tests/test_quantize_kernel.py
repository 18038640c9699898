"""The quantize kernels: numbers in the interpreter, prologues, bad input, and what they compile to."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kernel_testing import HALF, ROUNDING, SHARED, compile_for, compiled, error, interpreted, run_interpreted

from svdq_compile.kernels import triton_quantize as tq
from svdq_compile.kernels.hooks import Hook
from svdq_compile.lowering import reference

CASES = [("w4a8", 0.0), ("int4", 0.0), ("int4", 0.171875), ("nvfp4", 0.0)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def operands(m, k, rank, width=None):
    x = torch.randn(m, width or k).to(HALF)
    return x, torch.rand(k) + 0.5, torch.randn(rank, k).to(HALF)


def check(result, h, smooth, down, precision, shift):
    """Against the reference on h, what the linear reads."""
    qx, ascales, xd = result
    q, a, d = reference.quantize(h, smooth, down, precision, shift)
    assert (qx.dtype, qx.shape, ascales.dtype, ascales.shape) == (q.dtype, q.shape, a.dtype, a.shape)
    torch.testing.assert_close(ascales.float(), a.float(), rtol=1e-6, atol=0)
    if precision == "w4a8":
        assert (qx.int() - q.int()).abs().max() <= 1
    assert (qx != q).double().mean() < 2e-4
    assert xd.shape == d.shape
    assert not down.shape[0] or error(xd, d) < ROUNDING


@triton.jit
def gelu(v, rows, columns, live, extra):
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def gated(v, rows, columns, live, extra):
    gate, width = extra
    g = tl.load(gate + rows * width + columns, mask=live, other=0.0).to(tl.float32)
    return v * tl.sigmoid(v) * g


@triton.jit
def joined(v, rows, columns, live, extra):
    second, first_width, width = extra
    there = columns >= first_width
    w = tl.load(second + rows * width + columns - first_width, mask=live & there, other=0.0).to(tl.float32)
    return tl.where(there, w, v)


@triton.jit
def layernorm(v, mean, variance, rows, columns, live, extra):
    scale, shift, tokens, width = extra
    at = rows // tokens * width + columns
    s = tl.load(scale + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(shift + at, mask=live, other=0.0).to(tl.float32)
    return (v - mean) * tl.rsqrt(variance + 1e-6) * (1.0 + s) + b


@triton.jit
def rmsnorm(v, mean, variance, rows, columns, live, extra):
    return v * tl.rsqrt(variance + mean * mean + 1e-6)


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(("precision", "shift"), CASES)
@pytest.mark.parametrize(
    ("m", "k", "rank"), [(1, 64, 0), (3, 72, 16), (17, 100, 32), (70, 320, 48), (5, 1090, 256), (2, 50, 0)]
)
def test_interpreted_quantize(m, k, rank, precision, shift):
    x, smooth, down = operands(m, k, rank)
    x[0] = 0
    check(tq.quantize(x, smooth, down, precision, shift), x, smooth, down, precision, shift)


@interpreted
@pytest.mark.parametrize(("precision", "shift"), CASES[1:])
def test_interpreted_ties_are_exact(precision, shift):
    """Without smoothing, 16-bit values often lie just between two codes, and zeros keep their sign."""
    x, _, down = operands(40, 256, 0)
    x = (x * 8).round() / 8
    smooth = torch.ones(256)
    qx, ascales, _ = tq.quantize(x, smooth, down, precision, shift)
    q, a, _ = reference.quantize(x, smooth, down, precision, shift)
    assert torch.equal(ascales.float(), a.float())
    assert (qx != q).double().mean() < 1e-3  # the interpreter rounds a fused multiply-add twice


@interpreted
@pytest.mark.parametrize(("precision", "shift"), CASES)
def test_interpreted_elementwise_prologues(precision, shift):
    x, smooth, down = operands(19, 136, 16)
    other = torch.randn(19, 136).to(HALF)
    result = tq.quantize(x, smooth, down, precision, shift, Hook(gelu))
    check(result, F.gelu(x.float()).to(HALF), smooth, down, precision, shift)
    result = tq.quantize(x, smooth, down, precision, shift, Hook(gated, (other, 136)))
    check(result, (F.silu(x.float()) * other.float()).to(HALF), smooth, down, precision, shift)
    narrow = x[:, :72].contiguous()
    result = tq.quantize(narrow, smooth, down, precision, shift, Hook(joined, (other, 72, 136)))
    check(result, torch.cat((narrow, other[:, :64]), 1), smooth, down, precision, shift)


@interpreted
@pytest.mark.parametrize(("precision", "shift"), CASES)
def test_interpreted_row_prologues(precision, shift):
    """Means far from zero: the variance must not be a difference of large numbers."""
    x, smooth, down = operands(18, 1090, 16)
    x = (x + 30 * torch.randn(18, 1)).to(HALF)
    scale, move = torch.randn(2, 1090).to(HALF), torch.randn(2, 1090).to(HALF)
    prologue = tq.RowPrologue(layernorm, (scale, move, 9, 1090))
    normal = F.layer_norm(x.float(), (1090,), eps=1e-6).view(2, 9, 1090)
    h = (normal * (1 + scale.float()[:, None]) + move.float()[:, None]).view(18, 1090)
    for function, expected in ((prologue, h), (tq.RowPrologue(rmsnorm), F.rms_norm(x.float(), (1090,), eps=1e-6))):
        qx, ascales, xd = tq.quantize(x, smooth, down, precision, shift, function)
        q, a, d = reference.quantize(expected.to(HALF), smooth, down, precision, shift)
        assert error(xd, d) < 2 * ROUNDING  # h itself may round either way
        if precision != "nvfp4":
            assert error(ascales, a) < 1e-3
        assert (qx != q).double().mean() < 1e-2


@compiled
@pytest.mark.parametrize("precision", ["w4a8", "int4", "nvfp4"])
def test_no_rows(precision):
    x, smooth, down = operands(0, 128, 16)
    for t, e in zip(
        tq.quantize(x, smooth, down, precision), reference.quantize(x, smooth, down, precision, 0.0), strict=True
    ):
        assert (t.shape, t.dtype) == (e.shape, e.dtype)


@compiled
def test_bad_input():
    x, smooth, down = operands(2, 64, 16)
    wrong = [
        ((x, smooth, down, "w4a16"), ValueError, "no quantized activations"),
        ((x, smooth, down, "w4a8", 0.1), ValueError, "unsigned codes"),
        ((x.float(), smooth, down.float(), "w4a8"), TypeError, "bfloat16 or float16"),
        ((x, smooth.half(), down, "w4a8"), TypeError, "smooth is"),
        ((x, smooth[:32], down, "w4a8"), ValueError, "64 columns"),
        ((x[None], smooth, down, "w4a8"), ValueError, "dimensions"),
        ((torch.randn(64, 2).to(HALF).t(), smooth, down, "w4a8"), ValueError, "must be contiguous"),
        ((x, smooth, torch.randn(8, 64).to(HALF), "w4a8"), ValueError, "multiple of 16 up to 256"),
        ((x, smooth, torch.randn(272, 64).to(HALF), "w4a8"), ValueError, "multiple of 16 up to 256"),
        ((x[:, :32].contiguous(), smooth, down, "w4a8", 0.0, tq.RowPrologue(rmsnorm)), ValueError, "32 columns"),
    ]
    for arguments, kind, message in wrong:
        with pytest.raises(kind, match=message):
            tq.quantize(*arguments)


TYPES = {"x": "*i16", "smooth": "*fp32", "down": "*bf16", "qx": "*i8", "ascales": "*fp32", "moments": "*fp32",
         "peaks": "*fp32", "partial": "*fp32", "xd": "*bf16", "shift": "fp32", "extra": ()}  # fmt: skip


@compiled
@pytest.mark.parametrize("capability", list(SHARED))
@pytest.mark.parametrize("precision", ["w4a8", "int4", "nvfp4"])
@pytest.mark.parametrize(("rank", "warps", "stages"), [(32, 4, 4), (256, 8, 2)])
def test_compiles_without_spills(capability, precision, rank, warps, stages):
    scales = {"nvfp4": {"qx": "*u8", "ascales": "*u8"}}.get(precision, {})
    constants = {"DTYPE": tl.bfloat16, "TM": 64, "TK": 64, "RANK": rank, "PARTS": 8, "FORMAT": precision,
                 "UNSIGNED": False, "HOOK": None, "MOMENTS": False}  # fmt: skip
    assert not compile_for(tq._measure_kernel, capability, constants, warps, TYPES | scales, stages).spilled
    constants = {**constants, "TM": 8, "TK": 1024}
    del constants["UNSIGNED"]
    assert not compile_for(tq._finish_kernel, capability, constants, 4, TYPES | scales).spilled


@compiled
def test_compiles_with_row_statistics():
    constants = {"DTYPE": tl.bfloat16, "TM": 64, "TK": 64, "RANK": 32, "PARTS": 8, "FORMAT": "w4a8",
                 "UNSIGNED": False, "HOOK": layernorm, "MOMENTS": True}  # fmt: skip
    types = TYPES | {"extra": ("*bf16", "*bf16", "i32", "i32")}
    assert not compile_for(tq._measure_kernel, 90, constants, 4, types).spilled
    types = {k: v for k, v in TYPES.items() if k in ("x", "moments")}
    constants = {"DTYPE": tl.bfloat16, "TM": 64, "TK": 64}
    assert not compile_for(tq._moments_kernel, 90, constants, 4, types).spilled


@compiled
@pytest.mark.parametrize(("rank", "programs"), [(0, 12), (32, 12), (32, 60), (64, 1), (96, 6), (128, 30)])
def test_the_single_kernel_on_sm_90(rank, programs):
    """Several programs share a multiprocessor, or nothing would be copied while one waits."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels import gluon_quantize as gq

    boxes, slots = gq._boxes(rank)
    constants = {"BOXES": boxes, "SLOTS": slots, "RANK": triton.next_power_of_2(rank) if rank else 0,
                 "PARTS": triton.next_power_of_2(programs),
                 "SLICE": max(16, triton.next_power_of_2(-(-64 * rank // programs)))}  # fmt: skip
    types = {k: TYPES[k] for k in ("smooth", "down", "qx", "ascales", "xd")}
    types |= {"x": "*bf16", "work": "*fp32", "counters": "*i32"}
    built = compile_for(gq._quantize_kernel, 90, constants, 4, types, source=GluonASTSource)
    assert not built.spilled
    assert 2 * (built.shared + 1024) <= 227 * 1024
    assert built.registers * 128 * 2 <= 65536
    assert ("wgmma.mma_async" in built.ptx) == (rank > 0)
    assert "cp.async.cg.shared.global" in built.ptx
