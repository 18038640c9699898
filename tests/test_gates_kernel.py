"""Products whose two halves are multiplied as they are stored: numbers in the interpreter (of sm_80's code they are in
test_older_gpus_code.py), bad input, and what they compile to.
"""

import re

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kernel_testing import HALF, builds, compile_for, compiled, error, interpreted, run_interpreted

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemm
from svdq_compile.kernels.portable.erf import erf
from svdq_compile.kernels.runtime.generated import Generated
from svdq_compile.kernels.runtime.target import SHARED_MEMORY
from svdq_compile.lowering import reference

POINTERS = {"qx": "*i8", "qweight": "*i8", "subscales": "*i16", "ascales": "*fp32", "wscales": "*fp32",
            "offset": "*fp32", "xd": "*bf16", "up": "*bf16", "bias": "*bf16", "y": "*bf16", "auxiliary": "*bf16",
            "partial": "*i32", "counters": "*i32", "extra": ()}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@triton.jit
def swiglu(left, right, features, tokens, live, extra):
    """Of which each side is another function, and which reads a factor for each feature of a half."""
    scale = tl.load(extra[0] + features, mask=live, other=0.0)
    return left * scale * right / (1.0 + tl.exp(-right))


GATE = Generated(swiglu, (), None, True)


def operands(precision, m, n, k, rank, dtype=HALF):
    fmt = FORMATS[precision]
    weight = fmt.quantize_weight(torch.randn(n, k) * k**-0.5)
    qx, ascales = fmt.quantize_activation(torch.randn(m, k))
    xd, up, bias = torch.randn(m, rank + 16).to(dtype)[:, 16:], torch.randn(n, rank).to(dtype), torch.randn(n).to(dtype)
    offset = torch.randn(n) if precision == "int4" else None
    return Gemm(qx, ascales, xd, layout.to_kernel(precision, weight), up, bias, offset, precision, torch.float32)


def gated(o, scale):
    plain = layout.to_plain(o.precision, o.weight, o.qx.shape[1])
    left, right = reference.gemm(*o._replace(weight=list(plain))).chunk(2, -1)
    return left * scale * F.silu(right)


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"), [(1, 16, 64, 0), (17, 48, 192, 16), (70, 144, 128, 48), (140, 1040, 64, 32)]
)
def test_interpreted_gemm(m, n, k, rank, precision):
    """Halves that end within a tile, in the middle of it or at its end."""
    from svdq_compile.kernels.portable import gemm as triton_gemm

    o, scale = operands(precision, m, n, k, rank), torch.randn(n // 2)
    y = triton_gemm.gemm(o, GATE._replace(operands=(scale,)))
    assert y.shape == (m, n // 2)
    assert error(y, gated(o, scale)) < 1e-5


@interpreted
def test_interpreted_generated_gate():
    """As the pass writes it: GEGLU with a factor for each channel, and something to add for each element."""
    from svdq_compile.kernels.portable import gemm as triton_gemm
    from svdq_compile.lowering import generate
    from svdq_compile.lowering.region import parse

    text = ("gate(y, right, a0: C, a1: BTC); t0 = mul(right, 0.7071067811865476); t1 = erf(t0); t2 = add(t1, 1.0); "
            "t3 = mul(right, t2); t4 = mul(t3, a0); t5 = mul(y, t4); t6 = add(t5, a1)")  # fmt: skip
    o, values = operands("w4a8", 21, 80, 128, 16), {"a0": torch.randn(40).to(HALF), "a1": torch.randn(21, 40).to(HALF)}
    y = triton_gemm.gemm(o, generate.bind(text, values, torch.Size((21,)), 40))
    plain = layout.to_plain(o.precision, o.weight, o.qx.shape[1])
    left, right = reference.gemm(*o._replace(weight=list(plain))).chunk(2, -1)
    assert error(y, parse(text).evaluate(values | {"y": left, "right": right})) < 1e-5


@interpreted
@pytest.mark.parametrize("tile", [(32, 64, 64, False), (128, 128, 128, True)])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 16, 16, 0), (17, 48, 192, 16), (40, 272, 100, 48)])
def test_interpreted_nvfp4(m, n, k, rank, tile):
    from svdq_compile.kernels.portable import gemm_nvfp4

    tokens, features, step, chunked = tile
    o, scale = operands("nvfp4", m, n, k, rank), torch.randn(n // 2)
    config = gemm_nvfp4.Tile(tokens, features, step, 4, 1, chunked)
    y = gemm_nvfp4.gemm(o, GATE._replace(operands=(scale,)), config)
    assert y.shape == (m, n // 2)
    assert error(y, gated(o, scale)) < 1e-5


# ** bad input **


@compiled
@pytest.mark.parametrize(
    ("n", "siblings", "complaint"), [(24, 1, "24 features, an epilogue gates multiples of 16"), (256, 2, "siblings")]
)
def test_launchers_say_what_is_wrong(n, siblings, complaint):
    from svdq_compile.kernels.ampere import gemm_w4a8 as ampere
    from svdq_compile.kernels.hopper import gemm_w4a8 as hopper
    from svdq_compile.kernels.portable import gemm as portable

    o = operands("w4a8", 4, n, 128, 16)
    o = o._replace(out_dtype=HALF, xd=torch.randn(4, 16 * siblings).to(HALF))
    for kernel in (portable, ampere, hopper):
        with pytest.raises(ValueError, match=complaint):
            kernel.gemm(o, GATE)


@compiled
def test_launchers_say_what_is_wrong_int4():
    from svdq_compile.kernels.hopper import gemm_int4

    o = operands("int4", 4, 24, 128, 16)._replace(out_dtype=HALF)
    with pytest.raises(ValueError, match="24 features"):
        gemm_int4.gemm(o, GATE)


# ** instructions **


@triton.jit
def geglu(left, right, features, tokens, live, extra):
    return left * right * 0.5 * (1.0 + erf(right * 0.7071067811865476))


def described(blocks, features):
    """The types of descriptors of [rows, columns] each; features: which dimension of some of them counts features."""
    from triton.experimental.gluon import language as gl

    from svdq_compile.kernels.hopper.descriptors import describe, of_both_halves

    types = {}
    for name, (dtype, rows, columns, shared) in blocks.items():
        tensor = torch.empty(1024, 1024, dtype=dtype)
        whole = describe(tensor, rows, columns, shared)
        if name in features:
            whole = of_both_halves(whole, features[name])
        kind = {torch.int8: "i8", torch.int16: "i16", torch.bfloat16: "bf16", torch.float32: "fp32",
                torch.float8_e4m3fn: "fp8e4nv"}[dtype]  # fmt: skip
        assert isinstance(whole.layout, gl.NVMMASharedLayout)
        types[name] = f"tensordesc<{kind}{list(whole.block_shape)},{whole.layout!r}>"
    return types


@builds
@pytest.mark.parametrize("rows", [32, 64, 512, 4608])
def test_hopper_w4a8(rows):
    """Both halves come by the copy engine, four dimensions at a time; what a thread multiplies it has in registers."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels.hopper import gemm_w4a8 as hopper
    from svdq_compile.kernels.hopper.descriptors import plain

    for tile in hopper.candidates(rows):
        tm, tn = tile.tm, tile.tn
        bf16, i8, i16 = torch.bfloat16, torch.int8, torch.int16
        blocks = {"x": (i8, tm, 128, None), "w": (i8, tn, 64, None), "s": (i16, 1, tn, plain(16)),
                  "xd": (bf16, tm, 32, None), "up": (bf16, tn, 32, None), "y": (bf16, tm // 2, tn // 2, None),
                  "auxiliary": (bf16, tm // 2, tn // 2, None)}  # fmt: skip
        constants = {"TM": tm, "TN": tn, "STAGES": tile.stages, "GROUP": 8, "LOW_RANK": True, "BIAS": True,
                     "EPILOGUE": geglu, "AUXILIARY": False, "GATES": True, "WARPS": tile.warps}  # fmt: skip
        types = POINTERS | described(blocks, {"w": 0, "s": 1, "up": 0})
        kernel = compile_for(hopper._gemm_kernel, 90, constants, tile.warps, types, source=GluonASTSource)
        assert len(re.findall(r"cp\.async\.bulk\.tensor\.4d\.shared\S*\.global", kernel.ptx)) == 3
        assert kernel.spilled == 0, tile


@builds
@pytest.mark.parametrize("rows", [32, 64, 4608])
def test_hopper_int4(rows):
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels.hopper import gemm_int4 as hopper
    from svdq_compile.kernels.hopper.descriptors import plain

    for tile in hopper.candidates(rows):
        tm, tn = tile.tm, tile.tn
        bf16 = torch.bfloat16
        blocks = {"x": (torch.float8_e4m3fn, tm, 128, None), "w": (torch.int8, tn, 64, None),
                  "s": (bf16, 2, tn, plain(16)), "a": (torch.float32, 2, tm, plain(32)), "xd": (bf16, tm, 32, None),
                  "up": (bf16, tn, 32, None), "y": (bf16, tm, tn // 2, None)}  # fmt: skip
        constants = {"TM": tm, "TN": tn, "STAGES": tile.stages, "GROUP": 8, "BIAS": True, "OFFSET": True,
                     "EPILOGUE": geglu, "GATES": True, "WARPS": tile.warps}  # fmt: skip
        types = POINTERS | described(blocks, {"w": 0, "s": 1, "up": 0})
        kernel = compile_for(hopper._int4_kernel, 90, constants, tile.warps, types, source=GluonASTSource)
        assert len(re.findall(r"cp\.async\.bulk\.tensor\.4d\.shared\S*\.global", kernel.ptx)) == 3
        assert kernel.spilled == 0, tile


@builds
@pytest.mark.parametrize("capability", [80, 89, 120])
def test_ampere_w4a8(capability):
    """Weights still come 16 bytes at a time, and go to the tensor cores by ldmatrix."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels.ampere.gemm_w4a8 import _gemm_kernel, candidates

    tile = candidates(4608, SHARED_MEMORY[capability])[0]
    constants = {"TM": tile.tm, "TN": tile.tn, "STAGES": tile.stages, "WARPS_M": tile.warps_m, "WARPS_N": tile.warps_n,
                 "GROUP": 8, "LOW_RANK": True, "BIAS": True, "EPILOGUE": geglu, "AUXILIARY": False,
                 "GATES": True}  # fmt: skip
    kernel = compile_for(_gemm_kernel, capability, constants, tile.warps, POINTERS, source=GluonASTSource)
    walk = kernel.ptx[: re.search(r"\b(st|ld|atom)\.global", kernel.ptx).start()]
    assert set(re.findall(r"cp\.async\.c\w\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", walk)) == {"0x10"}
    assert not re.search(r"[ls][dt]\.shared", walk)
    assert kernel.shared <= tile.shared() + 1024
    assert kernel.spilled <= 168  # as without a gate


@builds
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("grouped", [False, True])
def test_portable(capability, grouped):
    from svdq_compile.kernels.portable.gemm import _gemm_kernel, tile_for

    tm, tn, warps, stages = tile_for(4608, 5120, grouped, False)
    constants = {"TM": tm, "TN": tn, "GROUP": 8, "RANK": 32, "GROUPED": grouped, "BIAS": True, "OFFSET": grouped,
                 "EPILOGUE": geglu, "AUXILIARY": False, "GATES": True}  # fmt: skip
    types = POINTERS | ({"wscales": "*bf16"} if grouped else {})
    assert compile_for(_gemm_kernel, capability, constants, warps, types, stages).spilled <= 40  # 8 without a gate
