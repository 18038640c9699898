"""q, k and v of an attention in 8 bits: numbers in the interpreter, and what the kernels compile to."""

import re
from collections.abc import Sequence

import pytest
import torch
from kernel_testing import builds, compile_for, compiled, interpreted, run_interpreted, waits_first
from test_heads import COMPLEX, FLUX, HALVES, LTX, NORM, WAN, operands
from torch import Tensor

from svdq_compile.lowering.heads import parts

HEADROOM = 256
PLAIN = "heads(x)"
WIDE = re.compile(r"ld\.global\S*\.v4\.b32")  # 16 bytes a thread


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


def codes_of(texts: Sequence[str], values: Sequence[Sequence[dict[str, Tensor]]]) -> tuple[Tensor, ...]:
    """texts and values: of q, k and v, values of each part."""
    from svdq_compile.kernels.portable import attention_codes as ac
    from svdq_compile.lowering import generate_heads

    regions = [region for text in texts for region in parts(text)]
    generated = generate_heads.bind_parts(regions, [named for each in values for named in each])
    xs = tuple([named["x"] for named in each] for each in values)
    return ac.attention_codes(xs, generated)


def sampled(x: Tensor) -> Tensor:
    return x[:, (2 * torch.arange(32) + 1) * x.shape[1] // 64]


def check(each: Sequence[Tensor], code: Tensor, scale: Tensor, centred: bool) -> None:
    """each: of every part what the region makes, [B, T, H, D] fp32."""
    x = torch.cat(list(each), 1)
    samples = torch.cat([sampled(part) for part in each], 1)
    centre = samples.mean(1, keepdim=True) * centred
    most = (samples - centre).abs().amax((1, 3))
    torch.testing.assert_close(scale, torch.where(most > 0, most * HEADROOM / 448, 1.0), rtol=1e-3, atol=1e-6)
    assert code.shape == x.shape
    assert code.dtype == torch.float8_e4m3fn
    step = scale[:, None, :, None]
    expected = (x - centre).clamp(-448 * step, 448 * step)
    got = code.float() * step
    # e4m3 has 3 bits of mantissa: a sixteenth; below 2^-6 of a scale it has steps of 2^-9. Values themselves to 2^-9.
    bound = expected.abs() * 0.064 + step * 2**-9 + x.abs() * 2**-9
    # Where rounding goes up to a power of two, the interpreter leaves the exponent as it was.
    assert (((got - expected).abs() <= bound) | ((2 * got - expected).abs() <= bound)).all()


def named(text: str, given: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip([name for name, _ in parts(text)[0].operands], given, strict=True))


@interpreted
@pytest.mark.parametrize(("b", "s", "t", "h", "d"), [(1, 1, 1, 1, 16), (2, 70, 9, 3, 48), (1, 100, 115, 2, 64)])
def test_interpreted_without_regions(b: int, s: int, t: int, h: int, d: int, tmp_path, monkeypatch) -> None:
    """What all keys share is left out; a head of zeros; a value that no sample foretold saturates, and others stay."""
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, n, 2 * h, d).half()[:, :, :h] for n in (s, t, t))
    k += 3 * torch.randn(1, 1, 1, d).half()
    v[:, :, 0] = 0
    q[:, 0, 0, 3] = 5000 if s == 100 else 1
    *codes, sq, sk, sv = codes_of([PLAIN] * 3, [[{"x": x}] for x in (q, k, v)])
    for x, code, scale in zip((q, k, v), codes, (sq, sk, sv), strict=True):
        check([x.float()], code, scale, x is k)
    assert not codes[2][:, :, 0].float().any()


@interpreted
@pytest.mark.parametrize("text", [FLUX, HALVES, NORM, COMPLEX, WAN, LTX])
def test_interpreted_regions_of_parts(text: str, tmp_path, monkeypatch) -> None:
    """Text and image tokens, q and k normed and rotated, another number of keys, one part without room for samples."""
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    torch.manual_seed(0)
    text = text.replace("bf16(", "fp16(")
    b, h, d = 2, 3, 32
    values = [
        [named(text, operands(text, b, n, h, d, torch.half, True)) for n in lengths] for lengths in ((5, 40), (7, 33))
    ]
    values.append([{"x": torch.randn(b, n, h, d).half()} for n in (7, 33)])
    texts = [f"{text} | {text}", f"{text} | {text}", f"{PLAIN} | {PLAIN}"]
    *codes, sq, sk, sv = codes_of(texts, values)
    for i, (code, scale) in enumerate(zip(codes, (sq, sk, sv), strict=True)):
        (region, *_) = parts(texts[i])
        check([region.evaluate(each) for each in values[i]], code, scale, i == 1)


@interpreted
def test_interpreted_parts_of_one_kind_of_halves(tmp_path, monkeypatch) -> None:
    """Text is only normed, images are rotated by halves too: the norm's weight is taken apart as the channels are."""
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    torch.manual_seed(0)
    normed = HALVES.replace("bf16(", "fp16(").replace(", a1: BTD, a2: BTD", "").split("; t7 = ")[0]
    texts = [f"{normed} | {HALVES.replace('bf16(', 'fp16(')}"] * 2 + [PLAIN]
    values = [
        [named(text, operands(text, 1, 9, 2, 16, torch.half, True)) for text in each.split(" | ")] for each in texts
    ]
    *codes, sq, sk, sv = codes_of(texts, values)
    for i, (code, scale) in enumerate(zip(codes, (sq, sk, sv), strict=True)):
        check(
            [region.evaluate(each) for region, each in zip(parts(texts[i]), values[i], strict=True)],
            code,
            scale,
            i == 1,
        )


def compiled_kernel(kernel, capability: int, text: str, d: int, constants: dict, warps: int, in_int8: bool = False):
    from triton.compiler import ASTSource

    from svdq_compile.lowering import generate_heads

    regions = [region for part in ((text, text) if in_int8 else (text, text, PLAIN)) for region in parts(part) * 2]
    module = generate_heads._module_of_parts(tuple(regions))
    extra: list[str] = []
    for region in regions:
        extra += ["*bf16", "i32", "i32", "i32"]
        for _, axes in region.operands[1:]:
            strides = {"BTD": 2, "BT": 2, "BTHD": 3}.get(axes, 0)
            extra += ["*fp32" if strides else "*bf16", *["i32"] * strides]
    width = 1 << (d - 1).bit_length()
    constants |= {"D": d, "WIDTH": width, "Q": 2, "QK": 4, "PARTS": len(regions), "INTERLEAVED": text != PLAIN,
                  "START": module.start, "LOAD": module.load, "FUNCTION": module.fused, "PER_TOKEN": in_int8,
                  "EARLY": capability >= 90}  # fmt: skip

    def source(kernel, signature, constants, even):
        within = {
            (at, i): [["tt.divisibility", 16]]
            for at, name in enumerate(kernel.arg_names)
            if name in ("codes", "scales", "extra") and isinstance(signature[name], tuple)
            for i in range(len(signature[name]))
        }
        return ASTSource(kernel, signature, constants, even | within)

    types = {"centres": "*fp32", "scales": "*fp32", "extra": tuple(extra)}
    if "codes" in kernel.arg_names:
        constants["group"] = 1
        types |= {"codes": ("*i8",) * 2 if in_int8 else ("*fp8e4nv",) * 3, "scales": ("*fp32",) * 3}
    types |= {"tokens": ("i32",) * len(regions), "begins": ("i32",) * len(regions), "lengths": ("i32",) * 3}
    return compile_for(kernel, capability, constants, warps, types, source=source)


@builds
@pytest.mark.parametrize(
    ("capability", "text", "d"),
    [
        *((capability, text, 128) for capability in (89, 90, 100, 120) for text in (FLUX, WAN)),
        (90, FLUX, 64),
        (90, LTX, 64),
        (90, PLAIN, 128),
        (90, PLAIN, 96),
    ],
)
def test_compiles_without_spills(capability: int, text: str, d: int, tmp_path, monkeypatch) -> None:
    from svdq_compile.kernels.portable import attention_codes as ac
    from svdq_compile.kernels.portable.heads import choose

    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    tile = choose(3 * 4608, 24, 1 << (d - 1).bit_length(), 132)
    tiled = {"TOKENS": tile.tokens, "HEADS": tile.heads}
    built = compiled_kernel(ac._attention_codes_kernel, capability, text, d, tiled, tile.warps)
    assert not built.spilled
    assert built.registers <= 80
    assert WIDE.search(built.ptx)
    assert "cvt.rn.satfinite.e4m3x2" in built.ptx
    assert "min.NaN" in built.ptx, "what is no number stays so"
    assert not built.shared
    assert capability < 90 or waits_first(built.ptx)
    built = compiled_kernel(ac._attention_samples_kernel, capability, text, d, {"COUNT": ac.SAMPLES}, 8)
    assert not built.spilled
    assert capability < 90 or waits_first(built.ptx)
