"""The svdq:: operators as Inductor may call them: operands in any layout give what contiguous ones give, contiguous."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svdq_compile.kernels.formats import FORMATS
from svdq_compile.lowering import ops

B, T, K, N, R = 2, 12, 64, 96, 16
BF16 = torch.bfloat16
PROLOGUE = "prologue(x, a0: BT, a1: BTC); t0 = mul(x, a0); t1 = add(t0, a1)"
EPILOGUE = "epilogue(y, auxiliary: BTC, a0: BC); t0 = mul(y, a0); t1 = add(auxiliary, t0)"

Layout = Callable[[Tensor], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).to(BF16)


def weight(precision: str) -> list[Tensor]:
    return list(FORMATS[precision].quantize_weight(torch.randn(N, K)))


def tokens_first(t: Tensor) -> Tensor:
    """The same with the dimensions in another order in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def channels_first(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def with_gaps(t: Tensor) -> Tensor:
    return torch.cat((t, t), 1)[:, : t.shape[1]]


def quantize(to: Layout) -> tuple[Tensor, ...]:
    return ops.quantize(to(normal(B, T, K)), torch.rand(K) + 0.5, normal(R, K), "w4a8", 0.0)


def fused_quantize(to: Layout) -> tuple[Tensor, ...]:
    operands = [to(normal(B, T, K)), torch.rand(B, T, 1), to(normal(B, T, K))]
    return ops.fused_quantize(operands, torch.rand(K) + 0.5, normal(R, K), "w4a8", 0.0, PROLOGUE)


def gemm_operands(to: Layout) -> tuple:
    qx, ascales = FORMATS["w4a8"].quantize_activation(torch.randn(B, T, K))
    return qx, ascales, to(normal(B, T, R)), weight("w4a8"), normal(N, R), normal(N), None, "w4a8", BF16


def gemm(to: Layout) -> Tensor:
    return ops.gemm(*gemm_operands(to))


def fused_gemm(to: Layout) -> Tensor:
    return ops.fused_gemm(*gemm_operands(to), [to(normal(B, T, N)), normal(B, 1, N)], EPILOGUE)


def gemv(to: Layout) -> Tensor:
    return ops.gemv(to(normal(B, T, K)), to(normal(B, T, R)), weight("w4a16"), normal(N, R), normal(N), "w4a16", BF16)


def row_moments(to: Layout) -> tuple[Tensor, ...]:
    return ops.row_moments(to(normal(B, T, K)))


@pytest.mark.parametrize("to", [tokens_first, channels_first, with_gaps])
@pytest.mark.parametrize("call", [quantize, fused_quantize, gemm, fused_gemm, gemv, row_moments])
def test_operands_in_any_layout(call: Callable[[Layout], Tensor | tuple[Tensor, ...]], to: Layout) -> None:
    results = []
    for layout in (torch.Tensor.contiguous, to):
        torch.manual_seed(0)
        result = call(layout)
        results.append([result] if isinstance(result, Tensor) else list(result))
    for plain, other in zip(*results, strict=True):
        assert other.is_contiguous()
        torch.testing.assert_close(other.float(), plain.float(), rtol=1e-2, atol=1e-5)
