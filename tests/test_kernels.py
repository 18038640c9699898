"""The Triton kernels without a GPU: their numbers in Triton's interpreter, and the instructions they compile to.

The interpreter must be chosen before Triton is imported, so those tests run in a process of their own (`interpreted`).
It multiplies fp16 but not bf16 matrices; bf16 is tested on a GPU (tests/gpu).
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from svdq_compile.kernels import FORMATS, layout
from svdq_compile.lowering import launch, reference

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs under test_numbers_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

HALF = torch.float16
ROUNDING = 3e-4  # one rounding to fp16 is 2^-11 at most, about 2e-4 on average


def error(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ** layouts **


@pytest.mark.parametrize("precision", layout.PLANAR_FORMATS)
@pytest.mark.parametrize(("n", "k"), [(8, 64), (3, 128), (24, 192), (16, 100), (5, 448)])
def test_layout_round_trip(precision, n, k):
    plain = FORMATS[precision].quantize_weight(torch.randn(n, k))
    packed = layout.to_kernel(precision, plain)
    assert layout.is_planar(packed[0])
    assert layout.to_kernel(precision, packed) is packed
    back = layout.to_plain(precision, packed, k)
    assert [t.dtype for t in back] == [t.dtype for t in plain]
    assert all(torch.equal(a, b) for a, b in zip(back, plain, strict=True))
    assert layout.to_plain(precision, plain, k) is plain


def test_planar_order():
    """Byte j holds channel j and channel 64 + j."""
    codes = torch.arange(128, dtype=torch.uint8).unsqueeze(0) % 16
    qweight = codes[:, 0::2] | (codes[:, 1::2] << 4)
    subscales = torch.tensor([[3, 7]], dtype=torch.int8)
    planar, pairs, _ = layout.to_kernel("w4a8", (qweight, subscales, torch.ones(1)))
    assert torch.equal(planar.view(torch.uint8), codes[:, :64] | (codes[:, 64:] << 4))
    assert pairs.tolist() == [[3 + (7 << 8)]]


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
def test_launch_on_cpu_takes_either_order(precision):
    fmt = FORMATS[precision]
    weight = fmt.quantize_weight(torch.randn(24, 192))
    qx, ascales = fmt.quantize_activation(torch.randn(2, 5, 192))
    xd, up = torch.randn(2, 5, 16), torch.randn(24, 16)
    expected = reference.gemm(qx, ascales, xd, list(weight), up, None, None, precision, torch.float32)
    assert launch.in_device_order(precision, weight) is weight
    for order in (weight, layout.to_kernel(precision, weight)):
        y = launch.gemm(qx, ascales, xd, list(order), up, None, None, precision, torch.float32)
        assert torch.equal(y, expected)


# ** numbers **


@compiled
def test_numbers_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout.splitlines()[-1]


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


@interpreted
@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"), [(1, 8, 64, 0), (17, 72, 192, 16), (70, 130, 100, 48), (140, 65, 128, 96)]
)
def test_interpreted_gemm(m, n, k, rank, precision):
    """Ragged everywhere; xd is a slice of a wider matrix."""
    from svdq_compile.kernels import triton_gemm

    fmt = FORMATS[precision]
    weight = fmt.quantize_weight(torch.randn(n, k))
    qx, ascales = fmt.quantize_activation(torch.randn(m, k))
    xd, up, bias = torch.randn(m, rank + 16).to(HALF)[:, 16:], torch.randn(n, rank).to(HALF), torch.randn(n).to(HALF)
    offset = torch.randn(n) if precision == "int4" else None
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, offset, precision, torch.float32)
    packed = layout.to_kernel(precision, weight)
    assert error(triton_gemm.gemm(precision, qx, ascales, xd, packed, up, bias, offset, HALF), expected) < ROUNDING
    y = triton_gemm.gemm(precision, qx, ascales, xd, packed, up, None, offset, torch.float32)
    assert error(y, expected - bias.float()) < 1e-5


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


@interpreted
def test_interpreted_zero_rows():
    from svdq_compile.kernels import triton_gemm, triton_gemv, triton_quantize

    x = torch.empty(0, 128, dtype=HALF)
    qx, ascales, xd = triton_quantize.quantize_w4a8(x, torch.ones(128), torch.randn(16, 128).to(HALF))
    weight = layout.to_kernel("w4a8", FORMATS["w4a8"].quantize_weight(torch.randn(8, 128)))
    y = triton_gemm.gemm("w4a8", qx, ascales, xd, weight, torch.randn(8, 16).to(HALF), None, None, HALF)
    assert y.shape == (0, 8)
    weight = layout.to_kernel("w4a16", FORMATS["w4a16"].quantize_weight(torch.randn(8, 128)))
    assert triton_gemv.gemv(x, None, weight, None, None, HALF).shape == (0, 8)


# ** bad input **


def gemm_arguments():
    fmt = FORMATS["w4a8"]
    qx, ascales = fmt.quantize_activation(torch.randn(4, 128))
    weight = layout.to_kernel("w4a8", fmt.quantize_weight(torch.randn(8, 128)))
    return {"qx": qx, "ascales": ascales, "xd": torch.randn(4, 16).to(HALF), "weight": weight,
            "up": torch.randn(8, 16).to(HALF), "bias": None, "offset": None}  # fmt: skip


@compiled
@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        ("qx", lambda t: t.to(torch.int32), "qx is torch.int32"),
        ("qx", lambda t: t.t().contiguous().t(), "qx must be contiguous"),
        ("ascales", lambda t: t[:3], "ascales has shape"),
        ("weight", lambda w: (w[0][:, :32].contiguous(), *w[1:]), "qweight has shape"),
        ("xd", lambda t: t[:, :8], "up has shape"),
        ("xd", lambda t: t.t().contiguous().t(), "xd has shape"),
        ("up", lambda t: t.to("meta"), "up is on meta"),
        ("bias", lambda _: torch.ones(7), "bias has shape"),
    ],
)
def test_launchers_say_what_is_wrong(name, spoil, complaint):
    from svdq_compile.kernels import triton_gemm

    arguments = gemm_arguments()
    arguments[name] = spoil(arguments[name])
    with pytest.raises((TypeError, ValueError), match=complaint):
        triton_gemm.gemm("w4a8", **arguments, out_dtype=HALF)


@compiled
def test_quantize_refuses_a_rank_it_cannot_do():
    from svdq_compile.kernels.triton_quantize import quantize_w4a8

    for rank in (8, 272):
        with pytest.raises(ValueError, match="multiple of 16 up to 256"):
            quantize_w4a8(torch.randn(2, 64).to(HALF), torch.ones(64), torch.randn(rank, 64).to(HALF))


# ** instructions **

POINTERS = {"qx": "*i8", "qweight": "*i8", "subscales": "*i16", "pairs": "*i32", "ascales": "*fp32", "wscales": "*fp32",
            "offset": "*fp32", "smooth": "*fp32", "peaks": "*fp32", "partial": "*fp32", "xd": "*bf16", "up": "*bf16",
            "bias": "*bf16", "down": "*bf16", "x": "*bf16", "y": "*bf16"}  # fmt: skip


def compile_for(kernel, capability, constants, warps, stages=4, pointers=None, source=None):
    """PTX of a kernel for one target; every pointer and int divisible by 16, as they are for real models."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = POINTERS | (pointers or {})
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    even = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if not signature[n].startswith(("const", "tens"))
    }
    program = (source or ASTSource)(kernel, signature, constants, even)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(program, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.metadata.shared <= (232448 if capability == 90 else 166912)
    return built.asm["ptx"]


INT8_MMA = {
    90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    80: r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32",
}


@compiled
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_gemm_uses_int8_tensor_cores(capability, grouped):
    from svdq_compile.kernels.triton_gemm import _gemm_kernel

    constants = {"TM": 64, "TN": 64, "GROUP": 8, "RANK": 32, "GROUPED": grouped, "BIAS": True, "OFFSET": grouped}
    pointers = {"wscales": "*bf16"} if grouped else None
    ptx = compile_for(_gemm_kernel, capability, constants, warps=4, pointers=pointers)
    assert re.search(INT8_MMA[capability], ptx)
    assert "ld.local" not in ptx


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_gemv_and_quantize_compile(capability):
    from svdq_compile.kernels.triton_gemv import _gemv_kernel
    from svdq_compile.kernels.triton_quantize import _measure_kernel

    ptx = compile_for(_gemv_kernel, capability, {"TM": 16, "TN": 64, "RANK": 32, "BIAS": True, "STAGES": 4}, warps=4)
    assert re.search(r"mma\S+f32\.bf16\.bf16", ptx)
    assert "cp.async" in ptx
    ptx = compile_for(_measure_kernel, capability, {"TM": 64, "TK": 64, "RANK": 32}, warps=4, pointers={"x": "*i16"})
    assert re.search(r"mma\S+f32\.bf16\.bf16", ptx)


@compiled
def test_gluon_gemm_keeps_int8_products_in_flight():
    """int8 wgmma with the left operand from registers, one product outstanding, operands copied by TMA."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels import gluon_gemm

    tm, tn, stages, warps = 64, 64, 4, 4
    blocks = {"x": ("i8", torch.int8, tm, 128), "w": ("i8", torch.int8, tn, 64), "s": ("i16", torch.int16, 1, tn),
              "xd": ("bf16", torch.bfloat16, tm, 32), "up": ("bf16", torch.bfloat16, tn, 32),
              "y": ("bf16", torch.bfloat16, tm, tn)}  # fmt: skip
    descriptors = {
        name: f"tensordesc<{kind}{[rows, columns]},{gluon_gemm._layout(dtype, rows, columns)!r}>"
        for name, (kind, dtype, rows, columns) in blocks.items()
    }
    constants = {"TM": tm, "TN": tn, "STAGES": stages, "GROUP": 8, "BIAS": True, "WARPS": warps}
    kernel = gluon_gemm._gemm_kernel
    ptx = compile_for(kernel, 90, constants, warps, pointers=descriptors, source=GluonASTSource)
    products = re.findall(rf"{INT8_MMA[90]} {{[^}}]*}}, {{[^}}]*}}", ptx)
    assert products, "the left operand is not in registers"
    assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1", ptx)
    assert "cp.async.bulk.tensor.2d" in ptx
