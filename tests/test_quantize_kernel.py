"""The quantize kernels: numbers in the interpreter, prologues, bad input, and what they compile to."""

from unittest import mock

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

from svdq_compile.kernels.formats import codes_of
from svdq_compile.kernels.operands import Quantize
from svdq_compile.kernels.portable import quantize as tq
from svdq_compile.kernels.runtime.generated import Generated
from svdq_compile.kernels.runtime.target import SHARED_MEMORY
from svdq_compile.kernels.runtime.tuning import failed_to_compile
from svdq_compile.lowering import reference

CASES = [("w4a8", 0.0), ("int4", 0.0), ("int4", 0.171875), ("nvfp4", 0.0)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def operands(m, k, rank, width=None):
    x = torch.randn(m, width or k).to(HALF)
    return x, torch.rand(k) + 0.5, torch.randn(rank, k).to(HALF)


def check(result, h, smooth, down, precision, shift, fp8=False, rotate=False):
    """Against the reference on h, what the linear reads."""
    qx, ascales, xd = result
    q, a, d = reference.quantize(h, smooth, down, precision, shift, rotate)
    kind = torch.float8_e4m3fn if fp8 else q.dtype
    assert (qx.dtype, qx.shape, ascales.dtype, ascales.shape) == (kind, q.shape, a.dtype, a.shape)
    # What the interpreter rounds twice in a fused multiply-add is magnified where a rotation cancels.
    torch.testing.assert_close(ascales.float(), a.float(), rtol=1e-5 if rotate else 1e-6, atol=0)
    if precision == "w4a8":
        assert (qx.int() - q.int()).abs().max() <= 1
    assert (qx.float() != q.float()).double().mean() < 2e-4
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
def modulated(v, rows, columns, live, extra):
    mean, rstd, scale, shift, tokens, width = extra
    at = rows // tokens * width + columns
    s = tl.load(scale + at, mask=live, other=0.0).to(tl.float32)
    b = tl.load(shift + at, mask=live, other=0.0).to(tl.float32)
    alive = rows < 2 * tokens
    return (v - tl.load(mean + rows, mask=alive)) * tl.load(rstd + rows, mask=alive) * (1.0 + s) + b


@triton.jit
def one(v, rows, columns, live, extra):
    return v * 0.0 + 1.0


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
    check(tq.quantize(Quantize(x, smooth, down, precision, shift)), x, smooth, down, precision, shift)


@interpreted
@pytest.mark.parametrize(("precision", "shift"), CASES[1:])
def test_interpreted_ties_are_exact(precision, shift):
    """Without smoothing, 16-bit values often lie just between two codes, and zeros keep their sign."""
    x, _, down = operands(40, 256, 0)
    x = (x * 8).round() / 8
    smooth = torch.ones(256)
    qx, ascales, _ = tq.quantize(Quantize(x, smooth, down, precision, shift))
    q, a, _ = reference.quantize(x, smooth, down, precision, shift)
    assert torch.equal(ascales.float(), a.float())
    assert (qx != q).double().mean() < 1e-3  # the interpreter rounds a fused multiply-add twice


@interpreted
@pytest.mark.parametrize(("m", "k", "rank"), [(1, 64, 0), (17, 128, 32), (70, 320, 48)])
def test_interpreted_rotation(m, k, rank):
    x, smooth, down = operands(m, k, rank)
    x[0] = 0
    x[:, 3] *= 50
    given = Quantize(x, smooth, down, "int4", 0.0, rotate=True)
    check(tq.quantize(given), x, smooth, down, "int4", 0.0, rotate=True)
    check(tq.quantize(given, fp8=True), x, smooth, down, "int4", 0.0, fp8=True, rotate=True)
    left, right = x[:, : k // 2], x[:, k // 2 :]
    result = tq.quantize(given._replace(x=left), Generated(gelu), right)
    check(result, F.gelu(x.float()).to(HALF), smooth, down, "int4", 0.0, rotate=True)


@interpreted
def test_interpreted_rotated_ties_are_exact():
    """The same additions in the same order give the same bits."""
    x, _, down = operands(40, 256, 0)
    x = (x * 8).round() / 8
    qx, ascales, _ = tq.quantize(Quantize(x, torch.ones(256), down, "int4", 0.0, rotate=True))
    q, a, _ = reference.quantize(x, torch.ones(256), down, "int4", 0.0, rotate=True)
    assert torch.equal(ascales, a)
    assert (qx != q).double().mean() < 1e-3  # the interpreter rounds a fused multiply-add twice


@interpreted
@pytest.mark.parametrize(("precision", "shift"), CASES)
def test_interpreted_prologues(precision, shift):
    x, smooth, down = operands(18, 136, 16)
    other = torch.randn(18, 136).to(HALF)
    result = tq.quantize(Quantize(x, smooth, down, precision, shift), Generated(gelu))
    check(result, F.gelu(x.float()).to(HALF), smooth, down, precision, shift)
    result = tq.quantize(Quantize(x, smooth, down, precision, shift), Generated(gated, (other, 136)))
    check(result, (F.silu(x.float()) * other.float()).to(HALF), smooth, down, precision, shift)
    mean, rstd = torch.randn(18), torch.rand(18) + 0.5
    scale, move = torch.randn(2, 136).to(HALF), torch.randn(2, 136).to(HALF)
    result = tq.quantize(
        Quantize(x, smooth, down, precision, shift), Generated(modulated, (mean, rstd, scale, move, 9, 136))
    )
    normal = ((x.float() - mean[:, None]) * rstd[:, None]).view(2, 9, 136)
    h = (normal * (1 + scale.float()[:, None]) + move.float()[:, None]).view(18, 136).to(HALF)
    check(result, h, smooth, down, precision, shift)


@interpreted
@pytest.mark.parametrize(("precision", "shift"), CASES)
def test_interpreted_nothing_beyond_the_edges(precision, shift):
    """A prologue that makes ones of zeros must not make any where the input has no element."""
    x, smooth, down = operands(5, 72, 16)
    check(
        tq.quantize(Quantize(x, smooth, down, precision, shift), Generated(one)),
        torch.ones_like(x),
        smooth,
        down,
        precision,
        shift,
    )


@interpreted
@pytest.mark.parametrize(("precision", "shift"), CASES)
@pytest.mark.parametrize(("m", "left", "k"), [(19, 64, 192), (3, 50, 136), (70, 8, 1090)])
def test_interpreted_two_parts(m, left, k, precision, shift):
    """Side by side, each with rows farther apart than it is wide; a prologue sees both."""
    x, smooth, down = operands(m, k, 16)
    wide = torch.randn(m, 2 * k + 5).to(HALF)
    parts = wide[:, 3 : 3 + left], wide[:, k + 4 : 2 * k + 4 - left]
    h = torch.cat(parts, 1)
    result = tq.quantize(Quantize(parts[0], smooth, down, precision, shift), right=parts[1])
    check(result, h, smooth, down, precision, shift)
    result = tq.quantize(Quantize(parts[0], smooth, down, precision, shift), Generated(gated, (x, k)), parts[1])
    check(result, (F.silu(h.float()) * x.float()).to(HALF), smooth, down, precision, shift)


@interpreted
@pytest.mark.parametrize("shift", [0.0, 0.171875])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (18, 100), (70, 320)])
def test_interpreted_fp8(m, k, shift):
    """The same values in the form that the sm_90 GEMM reads without a conversion."""
    x, smooth, down = operands(m, k, 16)
    x[0] = 0
    result = tq.quantize(Quantize(x, smooth, down, "int4", shift), fp8=True)
    check(result, x, smooth, down, "int4", shift, fp8=True)
    qx, ascales, _ = result
    plain, scales, _ = tq.quantize(Quantize(x, smooth, down, "int4", shift))
    assert torch.equal(qx.view(torch.uint8), plain.half().to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(ascales, scales)
    assert ascales.stride() == (1, -(-m // 4) * 4)


@compiled
@pytest.mark.parametrize("precision", ["w4a8", "int4", "nvfp4"])
def test_no_rows(precision):
    x, smooth, down = operands(0, 128, 16)
    for t, e in zip(
        tq.quantize(Quantize(x, smooth, down, precision, 0.0)),
        reference.quantize(x, smooth, down, precision, 0.0),
        strict=True,
    ):
        assert (t.shape, t.dtype) == (e.shape, e.dtype)


@compiled
def test_bad_input():
    x, smooth, down = operands(2, 64, 16)
    wrong = [
        ((x, smooth, down, "w4a16", 0.0), ValueError, "no quantized activations"),
        ((x, smooth, down, "w4a8", 0.1), ValueError, "w4a8 has no unsigned codes"),
        ((x, smooth, down, "w4a8", 0.0, True), ValueError, "w4a8 does not rotate an input of 64 channels"),
        ((x, smooth, down, "int4", 0.1, True), ValueError, "64 channels and shift 0.1"),
        ((x[:, :32], smooth[:32], down[:, :32].contiguous(), "int4", 0.0, True), ValueError, "of 32 channels"),
        ((x.float(), smooth, down.float(), "w4a8", 0.0), TypeError, "bfloat16 or float16"),
        ((x, smooth.half(), down, "w4a8", 0.0), TypeError, "smooth is"),
        ((x, smooth[:32], down, "w4a8", 0.0), ValueError, "64 columns"),
        ((x[:, :32], smooth, down, "w4a8", 0.0), ValueError, "32 columns"),
        ((x, smooth, down, "w4a8", 0.0, False, None, x), ValueError, "128 columns"),
        ((x[:, :32], smooth, down, "w4a8", 0.0, False, None, x[:1, 32:]), ValueError, "right is"),
        ((x[:, :32], smooth, down, "w4a8", 0.0, False, None, x[:, 32:].float()), ValueError, "right is"),
        ((x[:, ::2], smooth, down, "w4a8", 0.0, False, None, x[:, 32:]), ValueError, "columns of x must be neighbours"),
        (
            (x[:, :32], smooth, down, "w4a8", 0.0, False, None, x[:, ::2]),
            ValueError,
            "columns of right must be neighbours",
        ),
        ((x, smooth, down, "w4a8", 0.0, False, None, None, True), ValueError, "w4a8 has no fp8 codes"),
        ((x[None], smooth, down, "w4a8", 0.0), ValueError, "dimensions"),
        ((torch.randn(64, 2).to(HALF).t(), smooth, down, "w4a8", 0.0), ValueError, "must be neighbours"),
        ((x, smooth, torch.randn(8, 64).to(HALF), "w4a8", 0.0), ValueError, "multiple of 16 up to 256"),
        ((x, smooth, torch.randn(272, 64).to(HALF), "w4a8", 0.0), ValueError, "multiple of 16 up to 256"),
    ]
    for arguments, kind, message in wrong:
        with pytest.raises(kind, match=message):
            tq.quantize(Quantize(*arguments[:6]), *arguments[6:])


TYPES = {"x": "*i16", "right": "*i16", "smooth": "*fp32", "down": "*bf16", "qx": "*i8", "ascales": "*fp32",
         "peaks": "*fp32", "partial": "*fp32", "counters": "*i32", "xd": "*bf16", "shift": "fp32",
         "extra": ()}  # fmt: skip


@builds
@pytest.mark.parametrize("capability", list(SHARED_MEMORY))
@pytest.mark.parametrize("precision", ["w4a8", "int4", "nvfp4"])
@pytest.mark.parametrize(("rank", "warps", "stages"), [(32, 4, 4), (256, 8, 2)])
def test_compiles_without_spills(capability, precision, rank, warps, stages):
    types = TYPES | {"nvfp4": {"qx": "*u8", "ascales": "*u8"}}.get(precision, {})
    codes = codes_of(precision).name
    constants = {"DTYPE": tl.bfloat16, "TM": 64, "TK": 64, "RANK": rank, "CODES": codes, "UNSIGNED": False,
                 "ROTATE": False, "JOINED": False, "PROLOGUE": None}  # fmt: skip
    if capability == 110 and triton.__version__ < "3.7":  # its assembler does not know sm_110: the kernel is left out
        with pytest.raises(Exception, match="sm_110a") as refused:
            compile_for(tq._measure_kernel, capability, constants, warps, types, stages)
        assert failed_to_compile(refused.value)
        return
    spilled = compile_for(tq._measure_kernel, capability, constants, warps, types, stages).spilled
    # On Blackwell for one more program on a multiprocessor, or, at rank 256, not to read `down` twice as often.
    assert spilled <= (16 if capability >= 100 else 0)
    if precision == "w4a8":
        for kp in (3072, 640, 320):
            tm, tk = tq.codes_tile(kp)
            constants = {"DTYPE": tl.bfloat16, "TM": tm, "TK": tk, "PARTS": 8, "JOINED": False, "PROLOGUE": None}
            assert not compile_for(tq._codes_kernel, capability, constants, 4, types).spilled


@builds
@pytest.mark.parametrize(
    "changes",
    [{"JOINED": True}, {"PROLOGUE": modulated}, {"CODES": "int4", "UNSIGNED": True}, {"CODES": "int4", "ROTATE": True}],
)
def test_variants_compile_without_spills(changes):
    constants = {"DTYPE": tl.bfloat16, "TM": 64, "TK": 64, "RANK": 32, "CODES": "int8", "UNSIGNED": False,
                 "ROTATE": False, "JOINED": False, "PROLOGUE": None}  # fmt: skip
    types = TYPES | {"extra": PROLOGUE_TYPES} if "PROLOGUE" in changes else TYPES
    types = types | {"qx": "*fp8e4nv"} if "CODES" in changes else types
    assert not compile_for(tq._measure_kernel, 90, constants | changes, 4, types).spilled


@compiled
def test_codes_are_written_in_tiles_that_fill_rows():
    tiles = {kp: tq.codes_tile(kp)[1] for kp in (64, 128, 320, 640, 960, 1152, 1280, 2048, 3072, 15360)}
    assert tiles == {64: 64, 128: 128, 320: 64, 640: 128, 960: 1024, 1152: 256, 1280: 256, 2048: 1024, 3072: 1024,
                     15360: 1024}  # fmt: skip
    assert all(tm * tk == 8192 for tm, tk in map(tq.codes_tile, tiles))


PROLOGUE_TYPES = ("*fp32", "*fp32", "*bf16", "*bf16", "i32", "i32")


def on_h200(m, k, rank, precision="w4a8", width=None, rotate=False):
    """What quantize reads, and its second part if the first has only `width` columns: shapes without memory."""
    x = torch.empty(m, width or k, dtype=torch.bfloat16, device="meta")
    down = torch.empty(rank, k, dtype=torch.bfloat16, device="meta")
    o = Quantize(x, None, down, precision, float(precision == "int4" and not rotate), rotate)
    return o, torch.empty(m, k - width, device="meta") if width else None


def compile_gluon(rank, k, joined=False, prologue=None, precision="w4a8", m=4608, rotate=False):
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels.hopper import quantize as gq

    o, right = on_h200(m, k, rank, precision, 3072 if joined else None, rotate)
    prologue = prologue and Generated(prologue)
    with mock.patch.object(gq, "processors", return_value=132):
        tile = gq.tile_for(o, prologue, right)
    values = gq.constants(tile, o, prologue, right)
    constants = dict(zip(gq._quantize_kernel.arg_names[-len(values) :], values, strict=True))
    types = TYPES | {"work": "*fp32", "extra": PROLOGUE_TYPES if prologue and prologue.function is modulated else ()}
    types |= {"qx": "*fp8e4nv"} if precision == "int4" else {}
    x = gq.describe(o.x, 64, tile.group())
    first, rest = gq.describe_down(o.down, tile) if rank else (x, x)
    for name, block in (("x", x), ("right", x), ("down", first), ("rest", rest)):
        types[name] = f"tensordesc<bf16{list(block.block_shape)},{block.layout!r}>"
    return compile_for(gq._quantize_kernel, 90, constants, 4, types, source=GluonASTSource)


@builds
@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize("m", [4608, 77])
@pytest.mark.parametrize(
    ("rank", "k"), [(0, 3072), (32, 15360), (64, 96), (96, 3072), (128, 15360), (144, 3072), (192, 3072), (240, 15360)]
)  # fmt: skip
def test_the_single_kernel_on_sm_90(rank, k, m, precision):
    """Several programs share a multiprocessor, or nothing would be copied while one waits."""
    built = compile_gluon(rank, k, precision=precision, m=m)
    assert not built.spilled
    assert 2 * (built.shared + 1024) <= 227 * 1024
    assert built.registers * 128 * 2 <= 65536
    assert ("wgmma.mma_async" in built.ptx) == (rank > 0)
    assert waits_first(built.ptx)
    assert "cp.async.bulk.tensor" in built.ptx


@builds
@pytest.mark.parametrize(
    ("rank", "k", "joined", "prologue"),
    [(0, 3072, False, None), (32, 4096, True, None), (32, 192, False, None), (128, 3072, False, modulated),
     (240, 3072, False, None)],
)  # fmt: skip
def test_the_single_kernel_rotates(rank, k, joined, prologue):
    """In registers: no value changes threads, which to add up xd none does either with so few channels."""
    built = compile_gluon(rank, k, joined, prologue, "int4", rotate=True)
    assert not built.spilled
    assert 2 * (built.shared + 1024) <= 227 * 1024
    assert built.registers * 128 * 2 <= 65536
    assert "shfl.sync.bfly" not in built.ptx


@builds
@pytest.mark.parametrize(
    ("rank", "k", "joined", "prologue"),
    [(32, 15360, True, None), (128, 3072, True, None), (32, 12288, False, gelu), (32, 15360, True, modulated),
     (128, 3072, False, gelu), (128, 3072, False, modulated), (192, 3072, False, modulated), (256, 15360, True, None)],
)  # fmt: skip
def test_the_single_kernel_with_two_parts_and_prologues(rank, k, joined, prologue):
    built = compile_gluon(rank, k, joined, prologue)
    assert built.spilled <= (8 if rank == 256 else 0)  # a register pair with Triton 3.6, none with 3.7
    assert built.registers * 128 * 2 <= 65536
    assert "cp.async.bulk.tensor" in built.ptx


@builds
@pytest.mark.parametrize(("prologue", "together"), [(None, 4), (modulated, 7)])
@pytest.mark.parametrize("k", [320, 640, 1280])
def test_the_single_kernel_on_short_rows(k, prologue, together):
    """More programs share a multiprocessor."""
    built = compile_gluon(32, k, prologue=prologue)
    assert built.spilled == 0
    assert together * (built.shared + 1024) <= 227 * 1024
    assert together * 128 * built.registers <= 65536
    assert waits_first(built.ptx)


@builds
@pytest.mark.parametrize("prologue", [None, modulated])
def test_three_programs_share_a_multiprocessor(prologue):
    """Where that many hold all rows at once."""
    built = compile_gluon(32, 3072, prologue=prologue, m=4096)
    assert built.spilled == 0
    assert 3 * (built.shared + 1024) <= 228 * 1024
    assert 3 * 128 * built.registers <= 65536


@compiled
def test_tiles_of_the_single_kernel(monkeypatch):
    """No tile of two parts straddles them."""
    from svdq_compile.kernels.hopper import quantize as gq

    monkeypatch.setattr(gq, "processors", lambda device: 132)

    def tile(*given, prologue=None, **more):
        o, right = on_h200(*given, **more)
        chosen = gq.tile_for(o, prologue and Generated(prologue), right)
        return chosen.boxes, chosen.slots

    assert tile(8192, 320, 32) == tile(2048, 1280, 64) == tile(8192, 640, 32, "int4") == (4, 4)
    assert tile(8192, 640, 32, prologue=modulated) == (2, 2)
    assert tile(4608, 3072, 32) == tile(512, 12288, 32) == tile(4608, 15360, 32) == (8, 8)
    assert tile(512, 3072, 32) == (4, 4)  # 48 wide programs would leave most of the GPU idle
    assert tile(4096, 3072, 32) == tile(4096, 3072, 32, prologue=modulated) == (8, 2)  # 384 programs, three at once
    assert tile(4608, 3072, 32, prologue=modulated) == tile(4608, 3072, 64) == tile(4096, 3072, 32, "int4") == (4, 4)
    assert tile(8192, 640, 96) == tile(512, 3072, 96) == tile(4096, 3072, 128) == (4, 2)
    assert tile(4608, 3072, 128) == tile(64, 20480, 128) == (8, 2)
    assert tile(8192, 640, 32, width=384) == (2, 2)
    assert tile(8192, 640, 32, width=320) == (1, 1)


@compiled
def test_what_the_single_kernel_takes(monkeypatch):
    from svdq_compile.kernels.hopper import quantize as gq

    monkeypatch.setattr(gq, "processors", lambda device: 132)
    x, wide = torch.zeros(8, 256, dtype=torch.bfloat16), torch.zeros(8, 1024, dtype=torch.bfloat16)

    def takes(x, right=None, rank=32, k=256, precision="w4a8"):
        return gq.can_quantize(
            Quantize(x, None, torch.zeros(rank, k, dtype=torch.bfloat16), precision, 0.0), None, right
        )

    assert takes(x)
    assert takes(wide[:, 512:768])
    assert takes(x, wide[:, 64:320], k=512)
    assert takes(x, rank=256)
    assert not takes(x[:1].expand(8, 256))  # TMA wants rows apart
    assert not takes(wide[:, 3:259])  # and 16 bytes
    assert not takes(x[:, :100], wide[:, :156])  # a box of both
    assert not takes(x, rank=256, precision="int4")
    assert takes(torch.zeros(2, 20000, dtype=torch.bfloat16), k=20000)
    assert not takes(torch.zeros(2, 40000, dtype=torch.bfloat16), k=40000)  # a row block is half the GPU


@compiled
def test_a_rank_is_two_powers_of_two():
    from svdq_compile.kernels.hopper import quantize as gq

    pieces = {r: gq._pieces(r) for r in range(0, 257, 16)}
    assert pieces[0] == (16, 0)
    assert (pieces[48], pieces[96], pieces[112], pieces[144], pieces[256]) == (
        (32, 16), (64, 32), (128, 0), (128, 16), (256, 0),
    )  # fmt: skip
    assert all(r <= sum(p) and p[0] & (p[0] - 1) == 0 == p[1] & (p[1] - 1) for r, p in pieces.items())
