"""int4 (W4A4) as kernels: the plain one's numbers in the interpreter, the orders of bytes, and what they compile to."""

import re

import pytest
import torch
from kernel_testing import (
    HALF,
    ROUNDING,
    builds,
    compile_for,
    compiled,
    error,
    interpreted,
    run_interpreted,
    waits_first,
)

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemm
from svdq_compile.lowering import reference

POINTERS = {"qx": "*i8", "qweight": "*i8", "subscales": "*i16", "ascales": "*fp32", "wscales": "*bf16",
            "offset": "*fp32", "xd": "*bf16", "up": "*bf16", "bias": "*bf16", "y": "*bf16",
            "auxiliary": "*bf16"}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 8, 64, 0), (17, 72, 192, 16), (77, 65, 100, 48)])
def test_interpreted_plain(m, n, k, rank, unsigned):
    from svdq_compile.kernels.portable import gemm as triton_gemm

    fmt = FORMATS["int4"]
    weight = fmt.quantize_weight(torch.randn(n, k))
    qx, ascales = fmt.quantize_activation(torch.rand(m, k) if unsigned else torch.randn(m, k), unsigned=unsigned)
    xd, up, bias, offset = torch.randn(m, rank).to(HALF), torch.randn(n, rank).to(HALF), torch.randn(n), torch.randn(n)
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, offset, "int4", torch.float32)
    packed = layout.to_kernel("int4", weight)
    y = triton_gemm.gemm(Gemm(qx, ascales, xd, packed, up, bias, offset, "int4", torch.float32))
    assert error(y, expected) < 1e-5
    y = triton_gemm.gemm(Gemm(qx, ascales, xd, packed, up, bias, offset, "int4", HALF))
    assert error(y, expected) < ROUNDING


# ** the order of bytes for e4m3 **


def planar(n, p):
    codes = torch.randint(1, 16, (2, n, p // 2), dtype=torch.uint8)
    return (codes[0] | codes[1] << 4).view(torch.int8)


@compiled
def test_words_and_back():

    q = planar(24, 256)
    assert torch.equal(layout.from_words(layout.to_words(q)), q)
    with pytest.raises(ValueError, match="-8"):
        layout.to_words(torch.zeros(8, 64, dtype=torch.int8))


@compiled
def test_words_are_e4m3_numbers():
    """What the kernel does with a word in one AND, or a rotation and an AND."""
    from svdq_compile.kernels.hopper import gemm_int4 as gluon_int4

    q = planar(8, 128)
    words = layout.to_words(q).long() & 0xFFFFFFFF
    rotated = (words >> 4 | words << 28) & 0xFFFFFFFF
    b = q.view(torch.uint8)
    for word, codes in ((words, b & 15), (rotated, b >> 4)):
        byte = torch.stack([word >> shift & 0x87 for shift in (0, 8, 16, 24)], -1).flatten(-2)
        values = byte.to(torch.uint8).view(torch.float8_e4m3fn).float() * gluon_int4.UNIT.value
        assert torch.equal(values, codes.float() - 8)


# ** bad input **


@compiled
@pytest.mark.parametrize(
    ("name", "spoil", "complaint"),
    [
        ("qx", lambda t: t.to(torch.int32), "qx is torch.int32"),
        ("ascales", lambda t: t[:3], "ascales is"),
        ("ascales", lambda t: t.half(), "ascales is"),
        ("weight", lambda w: (w[0][:, :32].contiguous(), w[1]), "qweight has shape"),
        ("weight", lambda w: (w[0], w[1].float()), "wscales is"),
        ("xd", lambda t: t[:, :8], "up has shape"),
        ("bias", lambda _: torch.ones(7), "bias has shape"),
        ("offset", lambda _: torch.ones(8).half(), "offset is"),
    ],
)
def test_gluon_launcher_says_what_is_wrong(name, spoil, complaint):
    from svdq_compile.kernels.hopper import gemm_int4 as gluon_int4

    fmt = FORMATS["int4"]
    qx, ascales = fmt.quantize_activation(torch.randn(4, 128))
    weight = layout.to_kernel("int4", fmt.quantize_weight(torch.randn(8, 128)))
    arguments = {"qx": qx, "ascales": ascales, "xd": torch.randn(4, 16).to(HALF), "weight": weight,
                 "up": torch.randn(8, 16).to(HALF), "bias": None, "offset": None}  # fmt: skip
    arguments[name] = spoil(arguments[name])
    with pytest.raises((TypeError, ValueError), match=complaint):
        gluon_int4.gemm(Gemm(**arguments, precision="int4", out_dtype=HALF))


@compiled
def test_gluon_takes_no_auxiliary_input():
    from svdq_compile.kernels.hopper import gemm_int4 as gluon_int4
    from svdq_compile.kernels.runtime.generated import Generated

    empty = torch.empty(0)
    epilogue = Generated(None, (), torch.zeros(4, 8))
    with pytest.raises(ValueError, match="auxiliary"):
        gluon_int4.gemm(Gemm(empty, empty, empty, (empty, empty), empty, None, None, "int4", HALF), epilogue)


# ** instructions **


@builds
@pytest.mark.parametrize("capability", [80, 89])
def test_plain_uses_int8_tensor_cores(capability):
    from svdq_compile.kernels.portable.gemm import _gemm_kernel

    constants = {"TM": 64, "TN": 64, "GROUP": 8, "RANK": 32, "GROUPED": True, "BIAS": True, "OFFSET": True,
                 "EPILOGUE": None, "AUXILIARY": False, "GATES": False}  # fmt: skip
    built = compile_for(_gemm_kernel, capability, constants, 4, POINTERS)
    assert re.search(r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32", built.ptx)
    assert built.spilled == 0


@builds
@pytest.mark.parametrize(
    ("tm", "tn", "stages", "warps"), [(32, 128, 8, 8), (64, 128, 8, 8), (128, 128, 6, 8), (128, 64, 4, 4)]
)
def test_gluon_int4_overlaps(tm, tn, stages, warps):
    """e4m3 wgmma, left operand from registers, one group multiplied while another is rescaled; nothing spilled."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels.hopper import gemm_int4 as gluon_int4
    from svdq_compile.kernels.hopper.descriptors import plain, swizzled

    blocks = {"x": ("fp8e4nv", torch.float8_e4m3fn, tm, 128), "w": ("i8", torch.int8, tn, 64),
              "xd": ("bf16", torch.bfloat16, tm, 32), "up": ("bf16", torch.bfloat16, tn, 32),
              "y": ("bf16", torch.bfloat16, tm, tn)}  # fmt: skip
    types = {
        name: f"tensordesc<{kind}{[rows, columns]},{swizzled(dtype, rows, columns)!r}>"
        for name, (kind, dtype, rows, columns) in blocks.items()
    }
    for name, kind, bits, columns in (("s", "bf16", 16, tn), ("a", "fp32", 32, tm)):
        types[name] = f"tensordesc<{kind}{[2, columns]},{plain(bits)!r}>"
    types |= {"bias": "*bf16", "offset": "*fp32", "extra": ()}
    constants = {"TM": tm, "TN": tn, "STAGES": stages, "GROUP": 8, "BIAS": True, "OFFSET": True, "EPILOGUE": None,
                 "GATES": False, "WARPS": warps}  # fmt: skip
    built = compile_for(gluon_int4._int4_kernel, 90, constants, warps, types, source=GluonASTSource)
    product = rf"wgmma\.mma_async\.sync\.aligned\.m64n{tm}k32\.f32\.e4m3\.e4m3 {{[^}}]*}}, {{[^}}]*}}"
    assert re.search(product, built.ptx), "the left operand is not in registers"
    assert waits_first(built.ptx)
    assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1", built.ptx)
    assert built.spilled == 0
