"""The w4a8 and int4 products as kernels: numbers in the interpreter, bad input, and what they compile to."""

import re

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
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

POINTERS = {"qx": "*i8", "qweight": "*i8", "subscales": "*i16", "ascales": "*fp32", "wscales": "*fp32",
            "offset": "*fp32", "xd": "*bf16", "up": "*bf16", "bias": "*bf16", "y": "*bf16", "auxiliary": "*bf16",
           "extra": ()}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"), [(1, 8, 64, 0), (17, 72, 192, 16), (70, 130, 100, 48), (140, 65, 128, 96)]
)
def test_interpreted_gemm(m, n, k, rank, precision):
    """Ragged everywhere; xd is a slice of a wider matrix."""
    from svdq_compile.kernels.portable import gemm as triton_gemm

    fmt = FORMATS[precision]
    weight = fmt.quantize_weight(torch.randn(n, k))
    qx, ascales = fmt.quantize_activation(torch.randn(m, k))
    xd, up, bias = torch.randn(m, rank + 16).to(HALF)[:, 16:], torch.randn(n, rank).to(HALF), torch.randn(n).to(HALF)
    offset = torch.randn(n) if precision == "int4" else None
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, offset, precision, torch.float32)
    packed = layout.to_kernel(precision, weight)
    y = triton_gemm.gemm(Gemm(qx, ascales, xd, packed, up, bias, offset, precision, HALF))
    assert error(y, expected) < ROUNDING
    y = triton_gemm.gemm(Gemm(qx, ascales, xd, packed, up, None, offset, precision, torch.float32))
    assert error(y, expected - bias.float()) < 1e-5


@interpreted
@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(("m", "count", "rank"), [(17, 2, 16), (3, 3, 40), (1, 2, 0)])
def test_interpreted_siblings(m, count, rank, precision):
    """Several linears of 128 features together, and the last of them where it lies: its scales by group are then rows
    cut out of longer ones.
    """
    from svdq_compile.kernels.portable import gemm as triton_gemm

    fmt, n, k = FORMATS[precision], 128 * count, 192
    weight = fmt.quantize_weight(torch.randn(n, k))
    qx, ascales = fmt.quantize_activation(torch.randn(m, k))
    xd, up = torch.randn(m, count * rank + 16).to(HALF)[:, 8 : 8 + count * rank], torch.randn(n, rank).to(HALF)
    offset = torch.randn(n) if precision == "int4" else None
    expected = reference.gemm(qx, ascales, xd, list(weight), up, None, offset, precision, torch.float32)
    packed = layout.to_kernel(precision, weight)
    y = triton_gemm.gemm(Gemm(qx, ascales, xd, packed, up, None, offset, precision, torch.float32))
    assert error(y, expected) < 1e-5
    dims = layout.feature_dims(precision, packed)
    last = tuple(t.narrow(dim, n - 128, 128) for t, dim in zip(packed, dims, strict=True))
    own = xd[:, xd.shape[1] - rank :], last, up[n - 128 :], None, None if offset is None else offset[n - 128 :]
    assert torch.equal(triton_gemm.gemm(Gemm(qx, ascales, *own, precision, torch.float32)), y[:, n - 128 :])


@triton.jit
def gated_residual(out, auxiliary, features, tokens, live, extra):
    gate, factor = extra
    return out * tl.load(gate + features, mask=live, other=0.0).to(tl.float32) * factor + auxiliary


@triton.jit
def gelu(out, features, tokens, live, extra):
    return out / (1.0 + tl.exp(-1.5957691216 * out * (1.0 + 0.044715 * out * out)))


@interpreted
@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 8, 64, 0), (19, 72, 192, 16), (70, 130, 128, 32)])
def test_interpreted_epilogues(m, n, k, rank, precision):
    """gate * y + residual, the residual a slice of a wider matrix in the other 16-bit type; and gelu."""
    from svdq_compile.kernels.portable import gemm as triton_gemm
    from svdq_compile.kernels.runtime.generated import Generated

    fmt = FORMATS[precision]
    weight = fmt.quantize_weight(torch.randn(n, k) * k**-0.5)
    qx, ascales = fmt.quantize_activation(torch.randn(m, k))
    xd, up, bias = torch.randn(m, rank).to(HALF), torch.randn(n, rank).to(HALF), torch.randn(n).to(HALF)
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, None, precision, torch.float32)
    packed = layout.to_kernel(precision, weight)

    def gemm(epilogue):
        return triton_gemm.gemm(Gemm(qx, ascales, xd, packed, up, bias, None, precision, torch.float32), epilogue)

    gate, residual = torch.randn(n).to(HALF), torch.randn(m, n + 40).to(torch.bfloat16)[:, 24 : 24 + n]
    y = gemm(Generated(gated_residual, (gate, 0.5), residual))
    assert error(y, expected * gate * 0.5 + residual) < 1e-5
    assert error(gemm(Generated(gelu)), F.gelu(expected, approximate="tanh")) < 1e-5


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
    from svdq_compile.kernels.portable import gemm as triton_gemm

    arguments = gemm_arguments()
    arguments[name] = spoil(arguments[name])
    with pytest.raises((TypeError, ValueError), match=complaint):
        triton_gemm.gemm(Gemm(**arguments, precision="w4a8", out_dtype=HALF))


@compiled
@pytest.mark.parametrize(
    ("auxiliary", "complaint"),
    [
        (torch.zeros(4, 8), "auxiliary is torch.float32"),
        (torch.zeros(4, 16, dtype=HALF), "auxiliary has shape"),
        (torch.zeros(8, 4, dtype=HALF).t(), "auxiliary has strides"),
        (torch.zeros(4, 8, dtype=HALF, device="meta"), "auxiliary is on meta"),
        (torch.zeros(4, 12, dtype=HALF)[:, :8], "multiples of 16 bytes"),
        (torch.zeros(4, 16, dtype=HALF)[:, 4:12], "multiples of 16 bytes"),
        (torch.zeros(1, 8, dtype=HALF).expand(4, 8), "multiples of 16 bytes"),
    ],
)
def test_launchers_say_what_is_wrong_with_an_auxiliary_input(auxiliary, complaint):
    """Plain Triton takes rows at any address."""
    from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm
    from svdq_compile.kernels.portable import gemm as triton_gemm
    from svdq_compile.kernels.runtime.generated import Generated

    operands = Gemm(**gemm_arguments(), precision="w4a8", out_dtype=HALF)
    epilogue = Generated(gated_residual, (), auxiliary)
    if "bytes" not in complaint:
        with pytest.raises(ValueError, match=complaint):
            triton_gemm.gemm(operands, epilogue)
    with pytest.raises(ValueError, match=complaint):
        gluon_gemm.gemm(operands, epilogue)


# ** instructions **

INT8_MMA = {
    90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    80: r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32",
}


@builds
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_gemm_uses_int8_tensor_cores(capability, grouped):
    from svdq_compile.kernels.portable.gemm import _gemm_kernel

    constants = {"TM": 64, "TN": 64, "GROUP": 8, "RANK": 32, "GROUPED": grouped, "BIAS": True, "OFFSET": grouped,
                 "EPILOGUE": None, "AUXILIARY": False, "GATES": False}  # fmt: skip
    types = POINTERS | ({"wscales": "*bf16"} if grouped else {})
    built = compile_for(_gemm_kernel, capability, constants, 4, types)
    assert re.search(INT8_MMA[capability], built.ptx)
    assert built.spilled == 0


def gluon_gemm_for(tile, epilogue=None, extra=(), auxiliary=False, low_rank=True):
    """The sm_90 kernel of one tile, compiled."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm
    from svdq_compile.kernels.hopper.descriptors import plain, swizzled

    tm, tn = tile.tm, tile.tn
    blocks = {"x": ("i8", torch.int8, tm, 128), "w": ("i8", torch.int8, tn, 64), "s": ("i16", torch.int16, 1, tn),
              "xd": ("bf16", torch.bfloat16, tm, 32), "up": ("bf16", torch.bfloat16, tn, 32),
              "y": ("bf16", torch.bfloat16, tm // 2, tn),
              "auxiliary": ("bf16", torch.bfloat16, tm // 2, tn)}  # fmt: skip
    layouts = {name: swizzled(*block[1:]) for name, block in blocks.items() if name != "s"} | {"s": plain(16)}
    descriptors = {
        name: f"tensordesc<{kind}{[rows, columns]},{layouts[name]!r}>"
        for name, (kind, _, rows, columns) in blocks.items()
    }
    constants = {"TM": tm, "TN": tn, "STAGES": tile.stages, "GROUP": 8, "LOW_RANK": low_rank, "BIAS": True,
                 "EPILOGUE": epilogue, "AUXILIARY": auxiliary, "GATES": False, "WARPS": tile.warps}  # fmt: skip
    types = POINTERS | descriptors | {"partial": "*i32", "counters": "*i32", "extra": extra}
    return compile_for(gluon_gemm._gemm_kernel, 90, constants, tile.warps, types, source=GluonASTSource)


@builds
@pytest.mark.parametrize("rows", [32, 4608])
def test_gluon_gemm_keeps_int8_products_in_flight(rows):
    """int8 wgmma with the left operand from registers, one product outstanding, operands copied by TMA, and no barrier
    of all warps where a buffer is handed back.
    """
    from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm

    built = gluon_gemm_for(gluon_gemm.candidates(rows)[0])
    assert re.search(rf"{INT8_MMA[90]} {{[^}}]*}}, {{[^}}]*}}", built.ptx), "the left operand is not in registers"
    assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1", built.ptx)
    assert "cp.async.bulk.tensor.2d" in built.ptx
    assert "setmaxnreg" in built.ptx
    assert "bar.arrive" in built.ptx
    assert waits_first(built.ptx)
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" not in built.ptx  # what `auxiliary` would be read by
    assert built.spilled == 0


@builds
@pytest.mark.parametrize("rows", [32, 4608])
def test_gluon_gemm_with_epilogues(rows):
    """An epilogue in plain Triton; the auxiliary input comes by TMA and is transposed by ldmatrix; no spills."""
    from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm

    tile = gluon_gemm.candidates(rows)[0]
    plain = gluon_gemm_for(tile, low_rank=False)
    auxiliary = gluon_gemm_for(tile, gated_residual, ("*bf16", "fp32"), auxiliary=True)
    copies = r"cp\.async\.bulk\.tensor\.2d\.shared\S*\.global"
    assert len(re.findall(copies, auxiliary.ptx)) == len(re.findall(copies, plain.ptx)) + 2
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in auxiliary.ptx
    assert plain.spilled == gluon_gemm_for(tile, gelu).spilled == 0
    assert auxiliary.spilled <= 8  # a register pair with Triton 3.9, none with 3.6


@compiled
@pytest.mark.parametrize(
    ("tiles", "k_steps", "programs", "whole", "parts", "part_steps"),
    [(432, 24, 132, 396, 3, 8), (432, 120, 132, 396, 3, 40), (264, 24, 132, 264, 1, 24), (96, 24, 132, 96, 1, 24),
     (48, 24, 132, 0, 2, 12), (1, 1, 132, 1, 1, 1), (12, 5, 132, 12, 1, 5), (12, 9, 132, 0, 2, 5)],
)  # fmt: skip
def test_the_last_round_is_cut_where_programs_would_idle(tiles, k_steps, programs, whole, parts, part_steps):
    from svdq_compile.kernels.hopper.gemm_w4a8 import share

    rounds = share(tiles, k_steps, programs, 4)
    assert (rounds.whole, rounds.parts, rounds.part_steps) == (whole, parts, part_steps)
    items = whole + (tiles - whole) * parts
    assert rounds.programs == min(items, programs)
    assert parts * part_steps >= k_steps > (parts - 1) * part_steps
