"""Operators replayed on a GPU: bit for bit what they give when they run as they are. Needs CUDA:

python -m pytest tests/gpu/test_replay_gpu.py
"""

import pytest
import torch
from torch import Tensor

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.lowering import fused, launch, replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

M, N, K, R = 96, 256, 512, 32
BF16 = torch.bfloat16
EPILOGUE = "epilogue(y, auxiliary: BTC, a0: BC); t0 = mul(y, a0); t1 = add(auxiliary, t0)"
PROLOGUE = "prologue(x, a0: BT, a1: BT, a2: C); t0 = sub(x, a0); t1 = mul(t0, a1); t2 = mul(t1, a2)"


def normal(*shape):
    return torch.randn(*shape, device="cuda").to(BF16)


def weight(precision, n=N, k=K):
    return list(layout.to_kernel(precision, FORMATS[precision].quantize_weight(normal(n, k).float() * k**-0.5)))


def gemm_operands(rank=R):
    qx, ascales = FORMATS["w4a8"].quantize_activation(normal(1, M, K).float())
    xd = normal(1, M, rank + 16)[..., 8 : 8 + rank]
    return qx, ascales, xd, weight("w4a8"), normal(N, rank), normal(N), None, "w4a8", BF16


def quantize_operands(rank=R):
    return normal(1, M, K), torch.rand(K, device="cuda") + 0.5, normal(rank, K), "w4a8", 0.0


def gemv_operands():
    return normal(3, K), normal(3, R), weight("w4a16"), normal(N, R), normal(N), "w4a16", BF16


def fused_gemm_operands():
    return *gemm_operands(), [normal(1, M, N), normal(1, 6 * N)[:, None, N : 2 * N]], EPILOGUE


def fused_quantize_operands():
    x, *rest = quantize_operands()
    rows = torch.rand(1, M, 1, device="cuda"), torch.rand(1, M, 1, device="cuda")
    return [x, *rows, normal(K)], *rest, PROLOGUE


CASES = {
    "gemm": (launch.gemm, gemm_operands),
    "gemm without low rank": (launch.gemm, lambda: gemm_operands(0)),
    "quantize": (launch.quantize, quantize_operands),
    "gemv": (launch.gemv, gemv_operands),
    "fused gemm": (fused.gemm, fused_gemm_operands),
    "fused quantize": (fused.quantize, fused_quantize_operands),
}


class Counted:
    """An implementation, and how often it ran."""

    def __init__(self, function):
        self.function, self.calls = function, 0
        self.__name__ = self.__qualname__ = self.__module__ = "counted"

    def __call__(self, *operands):
        self.calls += 1
        return self.function(*operands)


def results(value):
    return [value] if isinstance(value, Tensor) else list(value)


def agree(got, wanted):
    for a, b in zip(results(got), results(wanted), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(a, b)


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("SVDQ_TUNE", "0")  # two tiles may round the low rank differently


@pytest.mark.parametrize("name", CASES)
def test_bit_for_bit(name):
    """On operands that lie elsewhere each time, and hold something else."""
    function, operands = CASES[name]
    counted = Counted(function)
    fast = replay.Replayed(counted)
    kept = []
    for _ in range(5):
        given = operands()
        for _ in range(2):
            agree(fast(*given), function(*given))
        kept.append(given)
    assert counted.calls == 2, "one to compile, one to record"


@pytest.mark.parametrize("name", ["gemm", "quantize", "fused gemm"])
def test_in_a_graph(name):
    function, operands = CASES[name]
    fast = replay.Replayed(function)
    for _ in range(3):
        fast(*operands())
    given = operands()
    wanted = function(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fast(*given)
    for _ in range(2):
        for t in results(got):
            t.zero_()
        graph.replay()
        agree(got, wanted)


def test_on_another_stream():
    """Behind what that stream has to do, and nowhere else."""
    function, operands = CASES["gemm"]
    fast = replay.Replayed(function)
    for _ in range(3):
        fast(*operands())
    given = operands()
    wanted = function(*given)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        got = fast(*given)
    torch.cuda.current_stream().synchronize()
    assert not side.query()
    side.synchronize()
    agree(got, wanted)


def test_other_shapes_have_their_own_plan():
    counted = Counted(launch.quantize)
    fast = replay.Replayed(counted)
    for _ in range(3):
        for rows in (1, 64, 0, 96):
            x, *rest = quantize_operands()
            agree(fast(x[:, :rows].contiguous(), *rest), launch.quantize(x[:, :rows].contiguous(), *rest))
    assert counted.calls == 8


def test_what_also_calls_a_library_calls_it_again():
    """A rank that the kernel does not take: the low-rank product is cuBLAS's."""
    counted = Counted(launch.quantize)
    fast = replay.Replayed(counted)
    for _ in range(6):
        given = quantize_operands(24)
        agree(fast(*given), launch.quantize(*given))
    assert counted.calls == 2


def test_the_operators_are_replayed():
    """Through torch.ops, with a wrong operand in between."""
    from svdq_compile.lowering import ops

    given = gemm_operands()
    wanted = launch.gemm(*given)
    for _ in range(4):
        agree(ops.gemm(*given), wanted)
    with pytest.raises((TypeError, ValueError)):
        ops.gemm(given[0], given[1].half(), *given[2:])
    agree(ops.gemm(*given), wanted)
