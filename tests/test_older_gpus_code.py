"""What kernels compile to for sm_80 and sm_89, run on the CPU (ptx.py), against the reference: ragged shapes, both
16-bit types, ranks, fused functions, sums that several programs share.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_testing import builds, compiled, error, resources

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemm, Gemv, Quantize
from svdq_compile.kernels.runtime.generated import Generated
from svdq_compile.kernels.runtime.target import SHARED_MEMORY
from svdq_compile.lowering import reference

BF16, FP16 = torch.bfloat16, torch.float16
BOUND = {BF16: 4e-3, FP16: 6e-4, torch.float32: 1e-5}
pytestmark = compiled


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def on(monkeypatch):
    """A kernel's module whose launches run here, as on a GPU with some multiprocessors."""
    from ptx import on_cpu

    def use(module, capability, processors=1):
        monkeypatch.setattr(module, "launch", on_cpu(capability))
        if hasattr(module, "processors"):
            monkeypatch.setattr(module, "processors", lambda device: processors)
        return module

    return use


def linear(m, n, k, rank, dtype, precision="w4a8"):
    """Operands of a GEMM, and its result in fp32; xd is a slice of something wider."""
    fmt = FORMATS[precision]
    weight = fmt.quantize_weight(torch.randn(n, k) * k**-0.5)
    qx, ascales = fmt.quantize_activation(torch.randn(m, k))
    xd, up = torch.randn(m, rank + 16).to(dtype)[:, 8 : 8 + rank], torch.randn(n, rank).to(dtype)
    bias, offset = torch.randn(n).to(dtype), torch.randn(n) if precision == "int4" else None
    expected = reference.gemm(qx, ascales, xd, list(weight), up, bias, offset, precision, torch.float32)
    weight = layout.to_kernel(precision, weight)
    return Gemm(qx, ascales, xd, weight, up, bias, offset, precision, torch.float32), expected


@triton.jit
def gated_residual(out, auxiliary, features, tokens, live, extra):
    gate, factor = extra
    return out * tl.load(gate + features, mask=live, other=0.0).to(tl.float32) * factor + auxiliary


@pytest.mark.parametrize(
    ("capability", "m", "n", "k", "rank", "dtype", "tile", "processors"),
    [
        (80, 5, 72, 64, 0, FP16, (16, 64, 6, 1, 4), 1),
        (89, 17, 72, 192, 16, BF16, (32, 64, 6, 1, 4), 1),
        (80, 70, 136, 320, 48, BF16, (64, 128, 3, 1, 4), 1),
        (89, 9, 72, 1088, 32, FP16, (64, 64, 4, 2, 2), 16),  # cut along K
        (80, 33, 264, 192, 80, BF16, (128, 256, 3, 2, 4), 1),
    ],
)
def test_w4a8(capability, m, n, k, rank, dtype, tile, processors, on):
    from svdq_compile.kernels.ampere import gemm_w4a8 as ampere

    module, tile = on(ampere, capability, processors), ampere.Tile(*tile)
    operands, expected = linear(m, n, k, rank, dtype)
    assert error(module.gemm(operands, tile=tile), expected) < BOUND[torch.float32]
    assert error(module.gemm(operands._replace(out_dtype=dtype), tile=tile), expected) < BOUND[dtype]
    gate, residual = torch.randn(n).to(dtype), torch.randn(m, n + 16).to(dtype)[:, 8 : 8 + n]
    y = module.gemm(operands, Generated(gated_residual, (gate, 0.5), residual), tile)
    assert error(y, expected * gate * 0.5 + residual) < BOUND[torch.float32]


def test_w4a8_is_cut_along_k(on, monkeypatch):
    """The case above has parts, and they give the same bits as whole tiles."""
    from svdq_compile.kernels.ampere import gemm_w4a8 as ampere

    tile, counters = ampere.Tile(64, 64, 4, 2, 2), torch.zeros(16, dtype=torch.int32)
    operands, _ = linear(9, 72, 1088, 0, FP16)
    whole = on(ampere, 80, 1).gemm(operands, tile=tile)
    monkeypatch.setattr(ampere, "zeroed_counters", lambda device, count: counters)
    assert torch.equal(on(ampere, 80, 16).gemm(operands, tile=tile), whole)
    assert ampere.share(2, 9, 16, 4).parts == 2
    assert not counters.any()  # as they were


@triton.jit
def bilinear(left, right, features, tokens, live, extra):
    scale = tl.load(extra[0] + features, mask=live, other=0.0)
    return left * scale * (right + 1.0)


@pytest.mark.parametrize(
    ("capability", "m", "n", "k", "rank", "dtype", "tile"),
    [
        (80, 5, 48, 64, 0, FP16, (16, 64, 6, 1, 4)),
        (89, 17, 144, 192, 16, BF16, (32, 64, 6, 1, 4)),
        (80, 40, 272, 128, 48, BF16, (64, 128, 3, 1, 4)),
    ],
)
def test_w4a8_gates(capability, m, n, k, rank, dtype, tile, on):
    """Both halves of the features in one tile, the last one ragged."""
    from svdq_compile.kernels.ampere import gemm_w4a8 as ampere

    module, tile = on(ampere, capability), ampere.Tile(*tile)
    (operands, expected), scale = linear(m, n, k, rank, dtype), torch.randn(n // 2)
    y = module.gemm(operands, Generated(bilinear, (scale,), None, True), tile)
    left, right = expected.chunk(2, -1)
    assert error(y, left * scale * (right + 1.0)) < BOUND[torch.float32]


def test_w4a8_siblings(on):
    """Three linears side by side, each with columns of xd of its own."""
    from svdq_compile.kernels.ampere import gemm_w4a8 as ampere

    operands, _ = linear(20, 384, 128, 32, BF16)
    xd = torch.randn(20, 96).to(BF16)
    qx, ascales, _, weight, up, *rest = operands
    plain = layout.to_plain("w4a8", weight, 128)
    expected = reference.gemm(qx, ascales, xd, list(plain), up, *rest)
    y = on(ampere, 80).gemm(operands._replace(xd=xd), tile=ampere.Tile(64, 128, 3, 1, 4))
    assert error(y, expected) < BOUND[torch.float32]


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(("m", "n", "k", "rank", "dtype"), [(17, 72, 192, 16, BF16), (70, 65, 128, 48, FP16)])
def test_plain_gemm(m, n, k, rank, dtype, precision, on):
    from svdq_compile.kernels.portable import gemm

    operands, expected = linear(m, n, k, rank, dtype, precision)
    assert error(on(gemm, 80).gemm(operands), expected) < BOUND[torch.float32]


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize(
    ("m", "k", "rank", "dtype", "processors"), [(70, 192, 32, BF16, 4), (3, 100, 0, FP16, 1), (64, 320, 16, FP16, 2)]
)
def test_quantize(m, k, rank, dtype, processors, precision, on):
    from svdq_compile.kernels.portable import quantize

    x, smooth = torch.randn(m, k + 8).to(dtype)[:, 8:], torch.rand(k) + 0.5
    down = (torch.randn(rank, k) * k**-0.5).to(dtype)
    qx, ascales, xd = on(quantize, 80, processors).quantize(Quantize(x, smooth, down, precision, 0.0))
    codes, scales, product = reference.quantize(x, smooth, down, precision, 0.0)
    assert (qx != codes).float().mean() < 1e-3
    assert error(ascales, scales) < 1e-6
    assert rank == 0 or error(xd, product) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("m", "k"), [(1, 3072), (9, 100)])
def test_row_moments(m, k, dtype, on):
    from svdq_compile.kernels.portable import row_moments

    x = (torch.randn(m, k) + 3).to(dtype)
    for value, expected in zip(on(row_moments, 80).row_moments(x), reference.row_moments(x), strict=True):
        assert error(value, expected.flatten()) < 1e-5


@pytest.mark.parametrize(("m", "n", "k", "rank", "dtype"), [(1, 24, 3072, 32, BF16), (5, 40, 192, 16, FP16)])
def test_gemv(m, n, k, rank, dtype, on):
    from svdq_compile.kernels.portable import gemv

    fmt = FORMATS["w4a16"]
    weight = fmt.quantize_weight(torch.randn(n, k) * k**-0.5)
    x, xd, up, bias = (t.to(dtype) for t in (torch.randn(m, k), torch.randn(m, rank), torch.randn(n, rank),
                                             torch.randn(n)))  # fmt: skip
    expected = reference.gemv(x, xd, list(weight), up, bias, "w4a16", torch.float32)
    y = on(gemv, 80).gemv(Gemv(x, xd, layout.to_kernel("w4a16", weight), up, bias, "w4a16", torch.float32))
    assert error(y, expected) < BOUND[torch.float32]


@triton.jit
def nothing(sample, token, extra, D):
    return ()


@triton.jit
def turned(x_0, x_1, held, sample, token, head, extra, D):
    return x_0 * 0.5 - x_1, x_1 * 0.5 + x_0


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_heads(dtype, on):
    """Pairs of neighbours, out of a slice, ragged."""
    from svdq_compile.kernels.portable import heads

    x = torch.randn(2, 13, 6, 64).to(dtype)[:, :, 1:4]
    y = torch.empty(2, 13, 3, 64, dtype=dtype)
    on(heads, 80).run(x, y, heads.GeneratedHeads(nothing, turned, ()))
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    assert error(y, torch.stack((even * 0.5 - odd, odd * 0.5 + even), -1).flatten(-2)) < BOUND[dtype]


@pytest.mark.parametrize(
    ("capability", "g", "s", "t", "d", "e", "dtype", "is_causal", "tile"),
    [
        (80, 2, 70, 70, 64, 64, BF16, True, (64, 64, 4, 3)),
        (89, 1, 5, 150, 72, 40, FP16, False, (64, 64, 4, 2)),
        (80, 2, 9, 70, 160, 160, FP16, False, (64, 32, 8, 2)),
    ],
)
def test_attention_int8(capability, g, s, t, d, e, dtype, is_causal, tile, on, tmp_path, monkeypatch):
    """Codes and products, grouped heads, what all keys share; near attention of the rounded q and k."""
    from test_attention_int8 import centred, exact, rounded

    from svdq_compile.kernels.portable import attention_codes, attention_int8
    from svdq_compile.lowering.generate_heads import bind_heads
    from svdq_compile.lowering.region import PLAIN

    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    on(attention_codes, capability)
    q, k = torch.randn(1, s, 2, d).to(dtype), (torch.randn(1, t, g, d) + torch.randn(1, 1, g, d)).to(dtype)
    v, y = torch.randn(1, g, t, e).to(dtype), torch.empty(1, 2, s, e, dtype=dtype)
    xs, generated = bind_heads([[(PLAIN, {"x": x})] for x in (q, k)])
    on(attention_int8, capability).attention_int8(xs, generated, v, y, is_causal, None, attention_int8.Tile(*tile))
    coded = (x.transpose(1, 2) for x in (rounded(q.float()), rounded(centred([k.float()]))))
    assert error(y, exact(*coded, v, is_causal, None)) < BOUND[dtype]


# ** every target **


@builds
@pytest.mark.parametrize("capability", [86, 90, 100, 120])
def test_every_portable_kernel_compiles(capability, monkeypatch):
    """As its launcher would have it, within the target's shared memory. sm_80 and sm_89 are above."""
    from ptx import compiled as compile_one
    from ptx import signature_of

    from svdq_compile.kernels.portable import gemm, gemv, heads, quantize, round_columns, round_weight, row_moments

    names = set()

    def compile_only(kernel, grid, arguments, constants, num_warps=4, num_stages=3):
        built = compile_one(kernel, signature_of(arguments), constants, capability, num_warps, num_stages)
        machine, _, _ = resources(built.asm["cubin"])
        assert machine.rstrip("a") == f"sm_{capability}"
        assert built.metadata.shared <= SHARED_MEMORY[capability]
        names.add(kernel.fn.__name__)

    for module in (gemm, gemv, heads, quantize, round_columns, round_weight, row_moments):
        monkeypatch.setattr(module, "launch", compile_only)
    for precision in ("w4a8", "int4"):
        gemm.gemm(linear(200, 128, 128, 32, BF16, precision)[0])
    x, smooth = torch.zeros(200, 128, dtype=BF16), torch.ones(128)
    for precision in ("w4a8", "int4", "nvfp4"):
        quantize.quantize(Quantize(x, smooth, torch.zeros(32, 128, dtype=BF16), precision, 0.0))
    row_moments.row_moments(x)
    weight = layout.to_kernel("w4a16", FORMATS["w4a16"].quantize_weight(torch.randn(64, 128)))
    gemv.gemv(Gemv(x[:1], None, weight, None, None, "w4a16", BF16))
    tokens = x.view(1, 200, 2, 64)
    heads.run(tokens, tokens.clone(), heads.GeneratedHeads(nothing, turned, ()))
    for precision in ("w4a8", "int4", "w4a16"):
        round_weight.round_weight(precision, torch.randn(64, 128), None)
    columns = torch.randn(2, 64, 40)
    for precision, zero in (("w4a8", None), ("w4a16", columns)):
        round_columns.round_columns(precision, columns, columns, torch.randn(2, 64, 64), columns.abs() + 0.1, zero)
    assert len(names) == 8


# ** the machine itself **


def program(memory=None, threads=32, **registers):
    from ptx import Memory, Program

    one = Program(([], {}), threads, 256, memory or Memory(), [], (1, 1, 1), (0, 0, 0))
    one.registers = {f"%{name}": np.full(threads, value, np.uint64) for name, value in registers.items()}
    return one


@pytest.mark.parametrize(
    ("name", "rest", "given", "expected"),
    [
        ("prmt", ["b32"], ("0x33221100", "0x77665544", "0x7410"), 0x77441100),
        ("prmt", ["b32"], ("0x80", "0", "0x8888"), 0xFFFFFFFF),
        ("lop3", ["b32"], ("0xF0F0", "0xFF00", "0xAAAA", "0x6A"), 0x5AAA),
        ("bfe", ["s32"], ("0x8", "3", "1"), 0xFFFFFFFF),
        ("bfe", ["u32"], ("0xAB", "4", "4"), 0xA),
        ("shr", ["s32"], ("-8", "1"), 0xFFFFFFFC),
        ("mul", ["wide", "s32"], ("-3", "5"), 2**64 - 15),
        ("div", ["s32"], ("-7", "2"), 2**32 - 3),
    ],
)
def test_instructions(name, rest, given, expected):
    one = program()
    getattr(one, f"do_{name}")(rest, ["%out", *given], one.all)
    assert int(one.registers["%out"][5]) == expected


def test_memory_that_is_no_tensors_is_not_touched():
    from ptx import Memory

    memory = Memory()
    end = memory.place(torch.zeros(8, dtype=torch.int32)) + 32
    one = program(memory, at=end)
    with pytest.raises(IndexError, match="memory that is no tensor's"):
        one.do_ld(["global", "b32"], ["%r", "[%at]"], one.all)
    with pytest.raises(IndexError, match="memory that is no tensor's"):
        one.do_st(["global", "b32"], ["[%at+-2]", "%at"], one.all)
    with pytest.raises(IndexError, match="outside of shared memory"):
        one.do_ld(["shared", "b32"], ["%r", "[253]"], one.all)


def test_what_it_does_not_know_is_said(on):
    """And threads that part."""
    one = program()
    one.instructions = [(None, "wgmma.wait_group", [])]
    with pytest.raises(NotImplementedError, match="wgmma"):
        one.run()
    one.registers["%p1"] = np.arange(32) < 3
    one.instructions = [("%p1", "bra", ["away"])]
    with pytest.raises(NotImplementedError, match="threads part"):
        one.run()
