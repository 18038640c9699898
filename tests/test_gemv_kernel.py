"""The w4a16 kernel: numbers in the interpreter, bad input, and what it compiles to."""

import re

import pytest
import torch
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
from svdq_compile.kernels.operands import Gemv
from svdq_compile.lowering import reference

POINTERS = {"x": "*bf16", "qweight": "*i8", "pairs": "*i32", "xd": "*bf16", "up": "*bf16", "bias": "*bf16",
            "y": "*bf16", "extra": ()}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def operands(m, n, k, rank, dtype=HALF):
    """x, xd, plain weight, up, bias; xd is a slice of a wider matrix."""
    weight = FORMATS["w4a16"].quantize_weight(torch.randn(n, k))
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    if not rank:
        return x, None, weight, None, bias
    wide = torch.randn(m, rank + 24).to(dtype)
    return x, wide[:, 8 : 8 + rank], weight, torch.randn(n, rank).to(dtype), bias


@compiled
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize(("warps", "words"), [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank"),
    [(1, 64, 64, 0), (3, 70, 200, 16), (8, 16, 768, 32), (9, 33, 1000, 7), (17, 65, 320, 96), (2, 1, 2000, 300)],
)
def test_interpreted_gemv(m, n, k, rank, warps, words):
    from svdq_compile.kernels.portable import gemv as triton_gemv

    x, xd, weight, up, bias = operands(m, n, k, rank)
    expected = reference.gemv(x, xd, list(weight), up, bias, "w4a16", torch.float32)
    split = triton_gemv.Split(warps, words)
    packed = layout.to_kernel("w4a16", weight)
    assert error(triton_gemv.gemv(Gemv(x, xd, packed, up, bias, "w4a16", HALF), split=split), expected) < ROUNDING
    exact = triton_gemv.gemv(Gemv(x, xd, packed, up, bias, "w4a16", torch.float32), split=split)
    assert error(exact, expected) < 1e-4  # 1024 + q in fp16 is exact, its fp32 sums are 1000 times the result


@interpreted
def test_interpreted_without_bias_in_the_chosen_split():
    from svdq_compile.kernels.portable import gemv as triton_gemv

    x, xd, weight, up, _ = operands(2, 40, 640, 32)
    expected = reference.gemv(x, xd, list(weight), up, None, "w4a16", torch.float32)
    y = triton_gemv.gemv(Gemv(x, xd, layout.to_kernel("w4a16", weight), up, None, "w4a16", HALF))
    assert error(y, expected) < ROUNDING


@triton.jit
def gate_residual(out, features, tokens, live, extra):
    gate, residual, stride, factor = extra
    g = tl.load(gate + features, mask=live, other=0.0).to(tl.float32)
    return out * g * factor + tl.load(residual + tokens * stride + features, mask=live, other=0.0).to(tl.float32)


@interpreted
def test_interpreted_epilogue():
    from svdq_compile.kernels.portable import gemv as triton_gemv
    from svdq_compile.kernels.runtime.generated import Generated

    x, xd, weight, up, bias = operands(9, 37, 320, 32)
    gate, residual = torch.randn(37).to(HALF), torch.randn(9, 37).to(HALF)
    expected = reference.gemv(x, xd, list(weight), up, bias, "w4a16", torch.float32) * gate * 0.5 + residual
    epilogue = Generated(gate_residual, (gate, residual, 37, 0.5))
    y = triton_gemv.gemv(Gemv(x, xd, layout.to_kernel("w4a16", weight), up, bias, "w4a16", torch.float32), epilogue)
    assert error(y, expected) < 1e-4


# ** bad input **


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 100, dtype=torch.float16)}, "qweight has shape"),
        ({"x": torch.zeros(2, 256)}, "expected bfloat16 or float16"),
        ({"x": torch.zeros(65, 256, dtype=torch.float16)}, "at most 64 rows"),
        ({"x": torch.zeros(256, 2, dtype=torch.float16).t()}, "contiguous"),
        ({"xd": torch.zeros(2, 16, dtype=torch.float16)}, "up has shape"),
        ({"xd": torch.zeros(2, 32, dtype=torch.bfloat16), "up": torch.zeros(40, 32, dtype=torch.bfloat16)}, "xd is"),
        ({"bias": torch.zeros(41)}, "bias has shape"),
    ],
)
def test_bad_input_is_an_error(change, message):
    from svdq_compile.kernels.portable import gemv as triton_gemv

    x, xd, weight, up, bias = operands(2, 40, 256, 32)
    given = {"x": x, "xd": xd, "up": up, "bias": bias} | change
    with pytest.raises((ValueError, TypeError), match=message):
        triton_gemv.gemv(Gemv(**given, weight=layout.to_kernel("w4a16", weight), precision="w4a16", out_dtype=HALF))


@compiled
def test_no_rows():
    from svdq_compile.kernels.portable import gemv as triton_gemv

    x, xd, weight, up, bias = operands(0, 40, 256, 32)
    assert triton_gemv.gemv(Gemv(x, xd, layout.to_kernel("w4a16", weight), up, bias, "w4a16", HALF)).shape == (0, 40)


# ** what it compiles to **


def build(capability, m, k, dtype="bf16"):
    from svdq_compile.kernels.portable import gemv as triton_gemv

    split = triton_gemv.choose_split(m, k, capability // 10)
    step = 128 * split.warps * split.words
    constants = {"TM": 8 if m <= 8 else 16, "WARPS": split.warps, "WORDS": split.words, "WHOLE": k % step == 0,
                 "ONCE": k <= step, "RANK_STEPS": 1, "BIAS": True, "EPILOGUE": None,
                 "EARLY": capability >= 90}  # fmt: skip
    types = {name: t.replace("bf16", dtype) if t else t for name, t in POINTERS.items()}
    return compile_for(triton_gemv._gemv_kernel, capability, constants, split.warps, types, stages=1)


@builds
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize(("m", "k"), [(1, 3072), (16, 3072), (1, 12288)])
def test_tensor_cores_and_no_spills(capability, m, k):
    built = build(capability, m, k)
    assert built.spilled <= 8  # at 256 threads ptxas stops at 128 registers, one or two short
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in built.ptx
    assert waits_first(built.ptx) == (capability >= 90)


@builds
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_codes_go_to_the_tensor_cores_without_moving(dtype):
    """All 12 loads of codes are 16 bytes wide and before the first barrier; then no shuffle before the last mma."""
    ptx = build(90, 1, 3072, dtype).ptx
    loads, products = ptx[: ptx.index("bar.sync")], ptx[ptx.index("bar.sync") + 8 : ptx.rindex("mma.sync")]
    assert len(re.findall(r"ld\.global\S*evict_first\S*\.v4\.b32", loads)) == 12
    assert not re.search(r"bar\.sync|shfl|st\.shared|ld\.shared|ldmatrix", products)
