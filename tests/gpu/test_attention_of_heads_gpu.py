"""Attention in 8 bits with what makes its heads, on a GPU: codes, the operator by both ways, the choice. Needs CUDA
(sm_90), and fa3-fwd for all but the codes:

python -m pytest tests/gpu/test_attention_of_heads_gpu.py
"""

import pytest
import torch
import torch.nn.functional as F
from fresh_choices import no_choice_yet as no_choice_yet
from test_heads_gpu import ALL_HEADS, HALVES, ROTATED, WAN
from torch import Tensor

from svdq_compile.kernels.portable import attention_codes as ac
from svdq_compile.lowering import attention_of_heads as of_heads
from svdq_compile.lowering import flash3, generate_heads, ops
from svdq_compile.lowering.region import PLAIN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_flash3 = pytest.mark.skipif(flash3.missing() is not None, reason="needs fa3-fwd")

BSHD, BHSD = [0, 2, 1, 3], [0, 1, 2, 3]


def tensors_of(text: str, b: int, t: int, h: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Of one part: x is a slice of a merged result; angles are those of positions."""
    x = torch.randn(b, t, 3 * h * d, device="cuda").to(dtype)[..., h * d : 2 * h * d].unflatten(-1, (h, d))
    if "a0" not in text:
        return [x]
    x += 2 * torch.randn(h, d, device="cuda").to(dtype)  # what all tokens share
    angle = torch.arange(t, device="cuda")[:, None] * 1e4 ** -torch.linspace(0, 1, d // 2, device="cuda")
    wide = angle.repeat(1, 2) if "low" in text else angle.repeat_interleave(2, 1)
    tables = [wide.cos()[:, None], wide.sin()[:, None]]
    if "HD" not in text:
        return [x, torch.rand(d, device="cuda") + 0.5, *tables]
    normed = [x, x.float().square().mean((2, 3), keepdim=True), torch.rand(h, d, device="cuda") + 0.5]
    return [*normed, *tables] if "a2" in text else normed


def operands(texts: list[str], lengths: list[list[int]], b: int, h: int, d: int, dtype=torch.bfloat16) -> tuple:
    """The operator's, but for what is attention's."""
    each = [[tensors_of(text, b, t, h, d, dtype) for t in ts] for text, ts in zip(texts, lengths, strict=True)]
    tensors = [t for part in each for given in part for t in given]
    text = " | ".join(text for text, ts in zip(texts, lengths, strict=True) for _ in ts)
    return tensors, list(range(len(tensors))), text, [len(ts) for ts in lengths[:2]]


def heads_in_torch(given: tuple) -> list[Tensor]:
    """q, k and v [B, S, H, D] in fp32."""
    o = of_heads.record(*given, False, None, BSHD, "fp8")
    return [torch.cat([region.evaluate(values) for region, values in each], 1) for each in o.parts]


def codes_of(given: tuple) -> tuple[Tensor, ...]:
    o = of_heads.record(*given, False, None, BSHD, "fp8")
    regions, values = zip(*(part for each in o.parts for part in each), strict=True)
    xs = [[values["x"] for _, values in each] for each in o.parts]
    return ac.attention_codes(xs, generate_heads.bind_parts(regions, values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("texts", "lengths", "b", "h", "d"),
    [
        ([ROTATED, ROTATED, str(PLAIN)], [[512, 4096], [512, 4096], [512, 4096]], 1, 24, 128),
        ([HALVES, HALVES, str(PLAIN)], [[77, 333], [77, 333], [410]], 2, 5, 64),
        ([ROTATED, ROTATED, str(PLAIN)], [[1], [1000], [1000]], 2, 3, 128),
        ([WAN, WAN, str(PLAIN)], [[1000], [1000], [1000]], 2, 5, 128),
        ([ALL_HEADS, ALL_HEADS, str(PLAIN)], [[1000], [77], [77]], 1, 5, 64),
        ([str(PLAIN)] * 3, [[515], [64], [64]], 2, 3, 96),
        ([str(PLAIN)] * 3, [[1], [1], [1]], 1, 1, 16),
    ],
)
def test_codes(texts: list[str], lengths: list[list[int]], b: int, h: int, d: int, dtype: torch.dtype) -> None:
    """Each value within half a step of e4m3, k less the mean of its samples; nothing saturates here."""
    given = operands(texts, lengths, b, h, d, dtype)
    *codes, sq, sk, sv = codes_of(given)
    for i, (x, code, scale) in enumerate(zip(heads_in_torch(given), codes, (sq, sk, sv), strict=True)):
        at = [(2 * torch.arange(32) + 1) * t // 64 for t in lengths[i]]
        samples = torch.cat([part[:, j] for part, j in zip(x.split(lengths[i], 1), at, strict=True)], 1)
        centre = samples.mean(1, keepdim=True) * (i == 1)
        most = (samples - centre).abs().amax((1, 3))
        torch.testing.assert_close(scale, torch.where(most > 0, most * 256 / 448, 1.0), rtol=1e-3, atol=1e-5)
        steps = scale[:, None, :, None]
        off = (code.float() * steps - (x - centre)).abs()
        assert (off <= (x - centre).abs() * (1.01 / 16) + steps * 2**-9 + x.abs() * 1e-5).all()


def test_values_that_are_no_numbers_stay_so() -> None:
    given = operands([str(PLAIN)] * 3, [[40]] * 3, 1, 2, 64)
    given[0][0][0, 2, 0, 2] = torch.nan  # no sample is token 2 or 7
    given[0][0][0, 7, 1, 2] = torch.inf
    q, *_, sq, sk, sv = codes_of(given)
    assert torch.stack([sq, sk, sv]).isfinite().all()
    assert q.float().isnan().nonzero().tolist() == [[0, 2, 0, 2]]
    assert q[0, 7, 1, 2].float() == 448


def check(y: Tensor, given: tuple, is_causal: bool, scale: float | None, least: float, most: float) -> None:
    q, k, v = (x.double().transpose(1, 2) for x in heads_in_torch(given))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    assert least < float((y - expected).norm() / expected.norm()) < most


@needs_flash3
@pytest.mark.parametrize("order", [BSHD, BHSD], ids=["BSHD", "BHSD"])
@pytest.mark.parametrize(
    ("texts", "lengths", "is_causal", "d"),
    [
        ([ROTATED, ROTATED, str(PLAIN)], [[77, 900], [77, 900], [77, 900]], False, 128),
        ([HALVES, HALVES, str(PLAIN)], [[515], [515], [515]], True, 64),
        ([ROTATED, ROTATED, str(PLAIN)], [[300], [0, 77], [77, 0]], False, 128),
        ([WAN, WAN, str(PLAIN)], [[900], [900], [900]], False, 128),
        ([ALL_HEADS, ALL_HEADS, str(PLAIN)], [[900], [77], [77]], False, 128),
    ],
)
def test_both_ways(texts: list[str], lengths: list, is_causal: bool, d: int, order: list[int]) -> None:
    given = operands(texts, lengths, 2, 4, d)
    o = of_heads.record(*given, is_causal, None, order, "fp8")
    for kernel in of_heads.ATTENTION_OF_HEADS.rows:
        assert (kernel.refuses(o) is None) == (kernel.name != "attention_int8_heads")
        if kernel.refuses(o):
            continue
        y = kernel.run(o)
        assert y.permute(order).is_contiguous()
        check(y, given, is_causal, None, *((0.01, 0.12) if kernel.name == "flash3_fp8_heads" else (0, 0.01)))


@needs_flash3
def test_by_plans_and_graphs() -> None:
    """In compiled code's operator, at the same addresses and at others; no result is the memory of an earlier one."""
    site = ops.sites("svdq.attention_of_heads.default")()
    texts = [ROTATED, ROTATED, str(PLAIN)]
    given = operands(texts, [[512, 4096]] * 3, 1, 24, 128)
    results = [site(*given, False, None, BSHD, "fp8") for _ in range(6)]
    o = of_heads.record(*given, False, None, BSHD, "fp8")
    assert of_heads.ATTENTION_OF_HEADS.choose(o).name == "flash3_fp8_heads"
    assert all(torch.equal(results[0], y) for y in results)
    other = operands(texts, [[512, 4096]] * 3, 1, 24, 128)
    check(site(*other, False, None, BSHD, "fp8"), other, False, None, 0.01, 0.12)
    check(results[0], given, False, None, 0.01, 0.12)


@needs_flash3
def test_without_leave_it_is_exact() -> None:
    given = operands([ROTATED, ROTATED, str(PLAIN)], [[2048]] * 3, 1, 24, 128)
    check(ops.attention_of_heads(*given, False, None, BSHD, "exact"), given, False, None, 0, 0.01)


@pytest.mark.parametrize("name", ["exact_heads", "reference"])
def test_without_flash3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash3, "missing", lambda: "fa3-fwd is not installed")
    monkeypatch.setenv("SVDQ_KERNELS", name)
    given = operands([ROTATED, ROTATED, str(PLAIN)], [[77, 300]] * 3, 2, 4, 64)
    check(ops.attention_of_heads(*given, True, 0.1, BHSD, "fp8"), given, True, 0.1, 0, 0.01)
