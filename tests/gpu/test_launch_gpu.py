"""Launches past Triton's own path on a GPU: the same results, whatever lies at an address. Needs CUDA:

python -m pytest tests/gpu/test_launch_gpu.py
"""

import pytest
import torch
from kernel_testing import error

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemm, Gemv
from svdq_compile.kernels.runtime import launcher
from svdq_compile.lowering import launch, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BF16 = torch.bfloat16


def normal(*shape):
    return torch.randn(*shape, device="cuda").to(BF16)


class Linear:
    """A quantized linear and its input, at addresses that may have held others."""

    def __init__(self, m, n, k, rank=32):
        fmt = FORMATS["w4a8"]
        self.plain = fmt.quantize_weight(normal(n, k).float() * k**-0.5)
        self.weight = list(layout.to_kernel("w4a8", self.plain))
        self.qx, self.ascales = fmt.quantize_activation(normal(m, k).float())
        self.xd, self.up, self.bias = normal(m, rank + 16)[:, 8 : 8 + rank], normal(n, rank), normal(n)

    def __call__(self, plain=False):
        given = self.qx, self.ascales, self.xd, self.plain if plain else self.weight, self.up, self.bias, None, "w4a8"
        return reference.gemm(*given, torch.float32) if plain else launch.gemm(*given, BF16)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(launcher, "_started", {})


def test_descriptors_are_encoded_once(monkeypatch):
    """In the call that compiles, through Triton; again past it; then no more. Or nothing here tests anything."""
    original, made = launcher._described, []
    monkeypatch.setattr(launcher, "_described", lambda a: made.append(type(a)) or original(a))
    linear = Linear(256, 512, 1024)
    results, counts = [], []
    for _ in range(4):
        results.append(linear())
        counts.append(made.count(launcher.Descriptor))
    described = counts[0]
    assert described >= 6
    assert counts[1] > described
    assert counts[3] <= 2 * described + 4, "the result alone is elsewhere, which also stands for what is not beside it"
    assert all(torch.equal(y, results[0]) for y in results)
    assert error(results[0], linear(plain=True)) < 4e-3


@pytest.mark.parametrize("rank", [0, 32])
def test_other_tensors_at_the_same_addresses(rank):
    """Freed, and allocated again with other shapes and strides; every third is ragged."""
    shapes = [(256, 512, 1024), (512, 256, 1024), (250, 520, 960), (1024, 512, 256), (77, 72, 2048), (256, 512, 1024)]
    addresses = []
    for _ in range(3):
        for m, n, k in shapes:
            linear = Linear(m, n, k, rank)
            addresses.append(linear.qx.data_ptr())
            expected = linear(plain=True)
            for _ in range(2):
                assert error(linear(), expected) < 4e-3
            del linear
    assert len(set(addresses)) < len(addresses), "no address came back: this tested nothing"


def test_contents_are_read_anew():
    """A cached descriptor says where, not what."""
    linear = Linear(256, 512, 1024)
    for _ in range(3):
        linear.qx.copy_(torch.randint_like(linear.qx, -127, 128))
        linear.xd.normal_()
        assert error(linear(), linear(plain=True)) < 4e-3


def test_in_a_graph():
    """Captured with the descriptors of the tensors it replays on."""
    linear = Linear(512, 1024, 1024)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        linear()
        linear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear()
    for _ in range(3):
        linear.qx.copy_(torch.randint_like(linear.qx, -127, 128))
        graph.replay()
        assert error(y, linear(plain=True)) < 4e-3


def test_on_another_stream():
    """The kernel goes to the stream that is current: a long sleep there delays it, and nothing else does."""
    linear = Linear(256, 512, 1024)
    expected = linear(plain=True)
    linear()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        y = linear()
        assert not side.query()
    torch.cuda.current_stream().synchronize()
    assert not side.query(), "it went to the side stream, behind the sleep"
    side.synchronize()
    assert error(y, expected) < 4e-3


def test_a_cpu_tensor_is_an_error():
    from svdq_compile.kernels.portable import gemv as triton_gemv

    x, weight = normal(2, 128), layout.to_kernel("w4a16", FORMATS["w4a16"].quantize_weight(normal(64, 128).float()))
    triton_gemv.gemv(Gemv(x, None, weight, None, None, "w4a16", BF16))
    seen = []
    original = triton_gemv.launch
    triton_gemv.launch = lambda *a, **options: seen.append((a, options))
    try:
        triton_gemv.gemv(Gemv(x, None, weight, None, None, "w4a16", BF16))
    finally:
        triton_gemv.launch = original
    ((kernel, grid, arguments, constants), options) = seen[0]
    with pytest.raises(ValueError, match="cpu tensor"):
        launcher.launch(kernel, grid, (arguments[0].cpu(), *arguments[1:]), constants, **options)


def test_a_misaligned_view_is_an_error():
    """What TMA cannot copy is refused also where the kernel is compiled already."""
    from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm

    linear = Linear(256, 512, 1024)
    given = linear.ascales, linear.xd, tuple(linear.weight), linear.up, linear.bias, None, "w4a8", BF16
    tile = gluon_gemm.candidates(256)[0]
    for _ in range(2):
        gluon_gemm.gemm(Gemm(linear.qx, *given), tile=tile)
    shifted = torch.empty(256 * 1024 + 8, device="cuda", dtype=torch.int8)[8:].view(256, 1024)
    with pytest.raises((AssertionError, ValueError), match="align"):
        gluon_gemm.gemm(Gemm(shifted, *given), tile=tile)
