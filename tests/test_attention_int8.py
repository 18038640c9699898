"""Attention with q and k in int8: codes and results in the interpreter, and what the kernels compile to. What is
compiled for sm_80 and sm_89 runs in test_older_gpus_code.py, AMD's is in test_amd.py.
"""

import re
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import builds, compile_for, compiled, error, interpreted, run_interpreted, waits_first
from test_attention_codes import PLAIN, WIDE, compiled_kernel, named, sampled
from test_heads import FLUX, HALVES, LTX, WAN, operands
from torch import Tensor

from svdq_compile.kernels.operands import Attention
from svdq_compile.lowering import attention_int8 as lowered
from svdq_compile.lowering import attention_of_heads as of_heads
from svdq_compile.lowering import launch
from svdq_compile.lowering.heads import parts

BSHD, BHSD = [0, 2, 1, 3], [0, 1, 2, 3]
ROUNDING = 6e-4  # probabilities and results in fp16, sums and exponentials in fp32
INT8 = 0.015  # what int8 loses of random q and k
WGMMA, MMA, TCGEN05 = (
    r"wgmma.mma_async.sync.aligned.m64n\d+k32.s32.s8.s8",
    r"mma.sync.aligned.m16n8k32.row.col(.satfinite)?.s32.s8.s8.s32",
    r"tcgen05.mma.cta_group::1.kind::i8",
)
PRODUCT = {80: MMA, 86: MMA, 89: MMA, 90: WGMMA, 100: f"{TCGEN05}|{MMA}", 120: MMA}  # Triton 3.6 has MMA on sm_100


@pytest.fixture(autouse=True)
def seed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    torch.manual_seed(0)


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


# ** codes **


def centred(each: Sequence[Tensor]) -> Tensor:
    """k [B, T, H, D], less the mean of its samples."""
    return torch.cat(list(each), 1) - torch.cat([sampled(part) for part in each], 1).mean(1, keepdim=True)


def codes_of(texts: Sequence[str], values: Sequence[Sequence[dict[str, Tensor]]]) -> tuple[Tensor, ...]:
    """texts and values: of q and k, values of each part."""
    from svdq_compile.kernels.portable import attention_codes as ac
    from svdq_compile.lowering import generate_heads

    xs, generated = generate_heads.bind_heads(
        [list(zip(parts(text), each, strict=True)) for text, each in zip(texts, values, strict=True)]
    )
    return ac.attention_codes_int8(xs, generated)


def check_codes(x: Tensor, code: Tensor, scale: Tensor) -> None:
    """x [B, S, H, D] fp32 -> each value within half a step of its token's scale, and zeros behind each half."""
    b, s, h, d = x.shape
    assert code.dtype == torch.int8
    assert scale.shape == (b, h, s)
    steps = scale.transpose(1, 2)[..., None]
    torch.testing.assert_close(steps[..., 0] * 127, x.abs().amax(3), rtol=1e-3, atol=1e-6)
    halves = code.unflatten(3, (2, -1))[..., : d // 2]
    assert ((halves.flatten(3).float() * steps - x).abs() <= 0.502 * steps + x.abs() * 2**-9).all()
    assert halves.count_nonzero() == code.count_nonzero()


@interpreted
@pytest.mark.parametrize(
    ("b", "s", "t", "h", "g", "d"), [(1, 1, 1, 1, 1, 32), (2, 70, 9, 6, 2, 72), (1, 100, 115, 2, 2, 64)]
)
def test_interpreted_codes(b: int, s: int, t: int, h: int, g: int, d: int) -> None:
    """What all keys share is left out; a head of zeros; a value 1000 times as large costs its own token alone."""
    q, k = torch.randn(b, s, 2 * h, d).half()[:, :, :h], torch.randn(b, t, g, d).half()
    k += 3 * torch.randn(1, 1, 1, d).half()
    q[:, s // 2, 0] = 0
    q[:, 0, 0, 3] = 5000
    qq, kq, q_scales, k_scales = codes_of([PLAIN] * 2, [[{"x": q}], [{"x": k}]])
    check_codes(q.float(), qq, q_scales)
    check_codes(centred([k.float()]), kq, k_scales)


@interpreted
@pytest.mark.parametrize("text", [FLUX, HALVES, WAN, LTX])
def test_interpreted_codes_of_parts(text: str) -> None:
    """Text and image tokens, q and k normed and rotated, another number of keys."""
    text = text.replace("bf16(", "fp16(")
    b, h, d = 2, 3, 32
    values = [
        [named(text, operands(text, b, n, h, d, torch.half, True)) for n in lengths] for lengths in ((5, 40), (7, 33))
    ]
    qq, kq, q_scales, k_scales = codes_of([f"{text} | {text}"] * 2, values)
    (region, _) = parts(f"{text} | {text}")
    q, k = ([region.evaluate(each) for each in of_one] for of_one in values)
    check_codes(torch.cat(q, 1), qq, q_scales)
    check_codes(centred(k), kq, k_scales)


# ** results **


def rounded(x: Tensor) -> Tensor:
    """[B, S, H, D] fp32 -> what int8 codes of its tokens stand for."""
    scale = (x.abs().amax(3, keepdim=True) / 127).clamp_min(1e-30)
    return (x / scale).round() * scale


def exact(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=is_causal, scale=scale, enable_gqa=True
    )


def attend(o: Attention) -> Tensor:
    (row,) = [kernel for kernel in launch.ATTENTION.rows if kernel.name == "attention_int8"]
    assert row.why_not(o) is None
    return row.run(o)


def check(y: Tensor, o: Attention) -> None:
    """Near attention of the rounded q and k, which no wrong scale, mean, mask or sum is; and of q and k themselves."""
    assert y.dtype == o.v.dtype
    assert y.permute(o.order).is_contiguous()
    q, k = (x.transpose(1, 2).float() for x in (o.q, o.k))
    coded = rounded(q).transpose(1, 2), rounded(centred([k])).transpose(1, 2)
    assert error(y, exact(*coded, o.v, o.is_causal, o.scale)) < ROUNDING
    assert error(y, exact(o.q, o.k, o.v, o.is_causal, o.scale)) < INT8


@interpreted
@pytest.mark.parametrize("order", [BSHD, BHSD], ids=str)
@pytest.mark.parametrize(
    ("b", "h", "g", "s", "t", "d", "e", "is_causal", "scale"),
    [
        (1, 1, 1, 1, 1, 64, 64, False, None),
        (2, 3, 3, 70, 33, 64, 64, False, None),  # only a ragged step
        (1, 4, 2, 33, 128, 72, 72, False, 0.2),  # only whole ones; grouped heads
        (1, 2, 1, 150, 150, 80, 80, True, None),
        (2, 2, 2, 128, 128, 64, 64, True, 0.05),
        (1, 1, 1, 140, 200, 96, 128, False, 0.12),
        (1, 2, 2, 20, 50, 256, 256, False, None),
    ],
)
def test_interpreted(
    b: int, h: int, g: int, s: int, t: int, d: int, e: int, is_causal: bool, scale: float | None, order: list[int]
) -> None:
    q, k, v = torch.randn(b, h, s, d).half(), torch.randn(b, g, t, d).half(), torch.randn(b, t, 2 * g, e).half()
    k += 5 * torch.randn(b, g, 1, d).half()
    o = Attention(q, k, v.transpose(1, 2)[:, ::2], is_causal, scale, order, "int8")
    check(attend(o), o)


@interpreted
def test_interpreted_of_what_makes_heads() -> None:
    """Text and image, an empty part; v put together of its parts."""
    text = FLUX.replace("bf16(", "fp16(")
    values = [[operands(text, 2, n, 2, 64, torch.half, True) for n in lengths] for lengths in ((5, 40, 0), (7, 33))]
    v = [torch.randn(2, n, 2, 64).half() for n in (7, 33)]
    read = [t for of_one in values for given in of_one for t in given] + v
    texts = " | ".join([text] * 5 + [PLAIN] * 2)
    y = of_heads._int8(of_heads.record(read, list(range(len(read))), texts, [3, 2], False, None, BHSD, "int8"))
    q, k = ([parts(text)[0].evaluate(named(text, given)) for given in of_one] for of_one in values)
    given = [torch.cat(each, 1).transpose(1, 2) for each in (q, k, v)]
    assert y.is_contiguous()
    assert error(y, exact(*given, False, None)) < INT8


@interpreted
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_interpreted_values_that_are_no_numbers(value: float) -> None:
    """Of q a row, of k all; never a number that looks like a result. No sample is token 2."""
    q, k, v = torch.randn(3, 1, 1, 40, 64).half().unbind()
    q[0, 0, 2, 5] = value
    y = attend(Attention(q, k, v, False, None, BHSD, "int8"))
    assert y.isnan().all(3).nonzero()[:, 2].tolist() == [2]
    q, k = k, q
    assert attend(Attention(q, k, v, False, None, BHSD, "int8")).isnan().all()


# ** who can **


def why_not(q: Sequence[int], k=None, v=None, arithmetic: str = "int8", scale: float | None = None) -> str | None:
    return lowered.why_not(arithmetic, q, k or q, v or k or q, scale=scale)


@compiled
def test_what_is_left_to_others() -> None:
    for channels in (32, 40, 64, 72, 80, 96, 128, 160, 256):
        assert why_not((2, 4, 70, channels)) is None
    assert why_not((1, 4, 7, 64), (1, 2, 9, 64), (1, 2, 9, 128)) is None
    for channels in (16, 60, 264):
        assert "channels" in str(why_not((2, 4, 70, channels)))
        assert "channels" in str(why_not((2, 4, 70, 64), None, (2, 4, 70, channels)))
    for q, k in (((0, 4, 7, 64), None), ((1, 4, 0, 64), (1, 4, 7, 64)), ((1, 4, 7, 64), (1, 4, 0, 64)),
                 ((1, 4, 7, 64), (1, 3, 7, 64)), ((2**16, 1, 7, 64), None)):  # fmt: skip
        assert "a launch takes" in str(why_not(q, k))
    for arithmetic in ("exact", "fp8"):
        assert why_not((2, 4, 70, 64), arithmetic=arithmetic) == "int8 is not allowed"
    for scale in (0.0, -0.1, 1e-7, torch.inf, torch.nan):
        assert "not above 1e-06" in str(why_not((2, 4, 70, 64), scale=scale))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "flash" in str(why_not((2, 4, 70, 64)))


# ** what they compile to **


def build(capability: int, tile: Sequence[int], d: int, dtype: str, is_causal: bool):
    import triton

    from svdq_compile.kernels.portable import attention_int8 as ai

    rows, keys, warps, stages = tile
    width = triton.next_power_of_2(d)
    constants = {"ROWS": rows, "KEYS": keys, "W": width, "E": d, "EW": width, "CAUSAL": is_causal, "y_channel": 1}
    types = {"q": "*i8", "k": "*i8", "v": dtype, "y": dtype, "q_scales": "*fp32", "k_scales": "*fp32", "factor": "fp32"}
    return compile_for(ai._attention_int8_kernel, capability, constants, warps, types, stages)


FIRST, ALL = slice(1), slice(None)  # of the tiles that are measured


@builds
@pytest.mark.parametrize(
    ("capability", "d", "dtype", "is_causal", "which"),
    [
        (80, 128, "*bf16", False, ALL),
        (86, 64, "*fp16", False, ALL),
        (89, 128, "*bf16", True, FIRST),
        (90, 128, "*bf16", False, ALL),
        (100, 128, "*bf16", False, FIRST),
        (120, 128, "*bf16", False, ALL),
        (80, 256, "*fp16", True, ALL),
        (90, 256, "*bf16", False, ALL),
        (120, 160, "*bf16", False, ALL),
        (90, 72, "*fp16", True, FIRST),
        (89, 32, "*bf16", False, FIRST),
    ],
)
def test_compiles_without_spills(capability: int, d: int, dtype: str, is_causal: bool, which: slice) -> None:
    """Within the shared memory of its GPU, and with its int8 product."""
    import triton

    from svdq_compile.kernels.portable import attention_int8 as ai
    from svdq_compile.kernels.runtime.target import SHARED_MEMORY

    for tile in ai.tiles(triton.next_power_of_2(d), SHARED_MEMORY[capability], "")[which]:
        built = build(capability, tile, d, dtype, is_causal)
        assert not built.spilled
        assert re.search(PRODUCT[capability], built.ptx)
        assert "cp.async" in built.ptx, "what comes next is fetched meanwhile"


@builds
@pytest.mark.parametrize(
    ("capability", "text", "d"), [(80, FLUX, 128), (90, FLUX, 128), (90, WAN, 128), (120, PLAIN, 72)]
)
def test_codes_compile_without_spills(capability: int, text: str, d: int) -> None:
    from svdq_compile.kernels.portable import attention_codes as ac
    from svdq_compile.kernels.portable.heads import choose

    tile = choose(2 * 4608, 24, 1 << (d - 1).bit_length(), 132)
    tiled = {"TOKENS": tile.tokens, "HEADS": tile.heads}
    built = compiled_kernel(ac._attention_codes_kernel, capability, text, d, tiled, tile.warps, in_int8=True)
    assert not built.spilled
    assert built.registers <= 80
    assert WIDE.search(built.ptx)
    assert capability < 90 or waits_first(built.ptx)
    built = compiled_kernel(ac._attention_samples_kernel, capability, text, d, {"COUNT": ac.SAMPLES}, 8, in_int8=True)
    assert not built.spilled
    assert capability < 90 or waits_first(built.ptx)
