"""Attention with q and k in int8 on a GPU: each tile, both rows, replayed calls, what it allocates. Needs CUDA (sm_80
or newer), or an sm_90 that is taken for an older one:

python -m pytest tests/gpu/test_attention_int8_gpu.py
python bench/as_target.py 89 -m pytest -q tests/gpu/test_attention_int8_gpu.py
"""

import pytest
import torch
import torch.nn.functional as F
from fresh_choices import no_choice_yet as no_choice_yet
from test_attention_of_heads_gpu import ALL_HEADS, HALVES, ROTATED, WAN, heads_in_torch, operands
from torch import Tensor

from svdq_compile.kernels.operands import Attention
from svdq_compile.kernels.portable import attention_int8
from svdq_compile.kernels.runtime.target import shared_memory
from svdq_compile.lowering import attention_of_heads as of_heads
from svdq_compile.lowering import ops
from svdq_compile.lowering.generate_heads import bind_heads
from svdq_compile.lowering.launch import ATTENTION
from svdq_compile.lowering.region import PLAIN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BSHD, BHSD = [0, 2, 1, 3], [0, 1, 2, 3]
INT8, BF16 = 0.02, 4e-3  # what int8 loses of random q and k; roundings to 16 bits


def normal(b: int, h: int, s: int, d: int, dtype: torch.dtype) -> Tensor:
    """[B, H, S, D], one of three that a linear puts side by side, with what all tokens share."""
    x = torch.randn(b, s, 3, h, d, device="cuda") + 3 * torch.randn(h, d, device="cuda")
    return x.to(dtype)[:, :, 1].transpose(1, 2)


def row(table) -> object:
    return next(kernel for kernel in table.rows if kernel.name.startswith("attention_int8"))


def exact(o: Attention) -> Tensor:
    q, k, v = (x.double() for x in (o.q, o.k, o.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=o.is_causal, scale=o.scale, enable_gqa=True)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


def rounded(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, S, D] -> in fp64 what their codes stand for."""
    at = (2 * torch.arange(32) + 1) * k.shape[2] // 64
    k = k.float() - k[:, :, at].float().mean(2, keepdim=True)
    # One key alone is its own mean.
    scales = ((x, x.abs().amax(3, keepdim=True).clamp_min(1e-30) / 127) for x in (q.float(), k))
    q, k = ((x / scale).round().double() * scale.double() for x, scale in scales)
    return q, k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("b", "h", "g", "s", "t", "d", "e", "is_causal"),
    [
        (1, 24, 24, 1111, 1111, 128, 128, False),
        (2, 6, 2, 300, 77, 64, 64, False),
        (1, 4, 4, 1000, 1000, 128, 128, True),
        (1, 3, 3, 515, 515, 72, 72, True),
        (2, 2, 1, 130, 400, 96, 64, False),
        (1, 2, 2, 200, 333, 256, 256, False),
        (1, 2, 2, 400, 400, 160, 160, True),
        (1, 2, 2, 1, 1, 40, 40, False),
    ],
)
def test_every_tile(b: int, h: int, g: int, s: int, t: int, d: int, e: int, is_causal: bool, dtype) -> None:
    """Near attention of the rounded q and k, in any order of the result's dimensions."""
    q, k, v = normal(b, h, s, d, dtype), normal(b, g, t, d, dtype), normal(b, g, t, e, dtype)
    expected = exact(Attention(*rounded(q, k), v, is_causal, 0.7 * d**-0.5, BSHD))
    xs, generated = bind_heads([[(PLAIN, {"x": x.transpose(1, 2)})] for x in (q, k)])
    width = 1 << (max(d, e, 32) - 1).bit_length()
    for tile in attention_int8.tiles(width, shared_memory(q.device), ""):
        for order in (BSHD, BHSD, [2, 3, 0, 1]):
            y = Attention(q, k, v, is_causal, None, order).empty_result()
            attention_int8.attention_int8(xs, generated, v, y, is_causal, 0.7 * d**-0.5, tile)
            assert error(y, expected) < BF16
    o = Attention(q, k, v, is_causal, None, BHSD, "int8")
    assert row(ATTENTION).refuses(o) is None
    assert error(row(ATTENTION).run(o), exact(o)) < INT8


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
def test_with_what_makes_heads(texts: list[str], lengths: list, is_causal: bool, d: int) -> None:
    given = operands(texts, lengths, 2, 4, d)
    o = of_heads.record(*given, is_causal, None, BHSD, "int8")
    assert row(of_heads.ATTENTION_OF_HEADS).refuses(o) is None
    y = row(of_heads.ATTENTION_OF_HEADS).run(o)
    q, k, v = (x.transpose(1, 2) for x in heads_in_torch(given))
    assert y.is_contiguous()
    assert 1e-3 < error(y, exact(Attention(q, k, v, is_causal, None, BHSD))) < INT8


def test_values_that_are_no_numbers_stay_so() -> None:
    q, k, v = (normal(1, 2, 100, 64, torch.bfloat16) for _ in range(3))
    q[0, 0, 2, 5], k[0, 1, 8, 3] = torch.nan, torch.inf  # no sample is token 2 or 8
    y = row(ATTENTION).run(Attention(q, k, v, False, None, BHSD, "int8"))
    assert y[0, 0].isnan().all(1).nonzero().tolist() == [[2]]
    assert y[0, 1].isnan().all()


@pytest.mark.parametrize("name", ["attention", "attention_of_heads"])
def test_by_plans_and_graphs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled code's operator, at the same addresses and at others; no result is the memory of an earlier one."""
    monkeypatch.setenv("SVDQ_KERNELS", "attention_int8,attention_int8_heads")
    site = ops.sites(f"svdq.{name}.default")()

    def given() -> tuple:
        if name == "attention":
            return tuple(normal(1, 24, 2048, 128, torch.bfloat16) for _ in range(3))
        return operands([ROTATED, ROTATED, str(PLAIN)], [[512, 1536]] * 3, 1, 24, 128)

    def expected(arguments: tuple) -> Tensor:
        heads = arguments if name == "attention" else [x.transpose(1, 2) for x in heads_in_torch(arguments)]
        return exact(Attention(*heads, False, None, BSHD))

    one, other = given(), given()
    results = [site(*one, False, None, BSHD, "int8") for _ in range(6)]
    assert all(torch.equal(results[0], y) for y in results)
    assert 1e-3 < error(site(*other, False, None, BSHD, "int8"), expected(other)) < INT8
    assert 1e-3 < error(results[0], expected(one)) < INT8


def test_the_fastest_is_chosen() -> None:
    """Among them the exact ones; without leave int8 is not."""
    q, k, v = (normal(1, 24, 4096, 128, torch.bfloat16) for _ in range(3))
    rows = [kernel.name for kernel in ATTENTION._able(Attention(q, k, v, False, None, BSHD, "int8"), None)]
    assert rows.index("attention_int8") == len(rows) - 2
    assert error(ops.attention(q, k, v, False, None, BSHD, "int8"), exact(Attention(q, k, v, False, None, BSHD))) < INT8
    y = ops.attention(q, k, v, False, None, BSHD)
    assert error(y, exact(Attention(q, k, v, False, None, BSHD))) < BF16


def test_memory_grows_with_the_tokens_alone() -> None:
    """Of q and k a byte a value, a scale a token, and the result."""
    q, k, v = (normal(1, 4, 20_000, 128, torch.bfloat16) for _ in range(3))
    o = Attention(q, k, v, False, None, BSHD, "int8")
    row(ATTENTION).run(o)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row(ATTENTION).run(o)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * (2 * q.numel() + 2 * 4 * 4 * 20_000 + 2 * q.numel())
