"""The backend on a CUDA device: python -m pytest tests/gpu/test_backend_gpu.py. Not part of `make test`."""

import copy

import pytest
import torch

import svdq_compile as svdq
from conftest import compiled, net, quiet, relative_error
from conftest import inputs as cpu_inputs
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.quantizer import quantize_group

if not torch.cuda.is_available():
    raise RuntimeError("these tests need a CUDA device")

BF16 = torch.bfloat16


def model(blocks: int = 2, seed: int = 0):
    return net(seed, blocks, BF16).cuda()


def inputs(**sizes) -> list[torch.Tensor]:
    return [t.cuda() for t in cpu_inputs(dtype=BF16, **sizes)]


@pytest.mark.parametrize("precision", FORMATS)
def test_references_agree_with_the_cpu(precision: str) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(200, 320), torch.randn(70, 320)
    fmt = FORMATS[precision]
    on_cpu, on_gpu = fmt.quantize_weight(w), fmt.quantize_weight(w.cuda())
    for a, b in zip(on_cpu, on_gpu, strict=True):
        differ = ~torch.isclose(a.float(), b.cpu().float(), rtol=1e-6)
        assert differ.float().mean() < 1e-3, "all but ties round alike"
    moved = [t.cuda() for t in on_cpu]
    quantize = fmt.quantize_activation or (lambda x: (x,))
    expected = fmt.matmul(*quantize(x), *on_cpu)
    assert relative_error(fmt.matmul(*quantize(x.cuda()), *moved).cpu(), expected) < 1e-3


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_observes_quantizes_and_runs(precision: str, mode: str | None) -> None:
    m = model()
    reference = m(*inputs())
    run = compiled(m, precision=precision, mode=mode)
    assert torch.equal(run(*inputs()), reference)
    most = {"w4a8": 0.08, "w4a16": 0.08, "int4": 0.14, "nvfp4": 0.14, "w8a8": 0.06}[precision]
    for _ in range(4):
        output = run(*inputs())
        assert 0 < relative_error(output, reference) < most
    assert relative_error(run(*inputs(tokens=40)), model()(*inputs(tokens=40))) < most


def test_regional_with_cuda_graphs() -> None:
    m, reference = model(4), model(4)(*inputs())
    for block in m.blocks:
        block.compile(backend="svdquant", options=quiet(mode="reduce-overhead"))
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        output = m(*inputs()).clone()
    assert 0 < relative_error(output, reference) < 0.1


def test_device_memory_falls() -> None:
    m = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(8))).to("cuda", BF16).requires_grad_(False)
    x = torch.randn(1, 64, 2048, device="cuda", dtype=BF16)
    m(x)  # cuBLAS keeps 32 MiB from its first product on
    before = torch.cuda.memory_allocated()
    run = compiled(m)
    run(x)
    run(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < before - 0.6 * 8 * 2048 * 2048 * 2


def test_quantizing_from_the_cpu_never_holds_the_model_on_the_gpu() -> None:
    m = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(24))).to(BF16).requires_grad_(False)
    total = sum(p.nbytes for p in m.parameters())
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    svdq.quantize(m, svdq.Config(**quiet()), device="cuda")
    assert all(p.is_cuda for p in m.parameters())
    assert torch.cuda.max_memory_allocated() - base < 0.4 * total + 16 * 2048 * 2048 * 4


def test_moving_to_the_cpu_and_back() -> None:
    m = model()
    run = compiled(m)
    run(*inputs())
    expected = run(*inputs())
    held = torch.cuda.memory_allocated()
    m.to("cpu")
    assert svdq.packed(m.blocks[0].to_q.weight).device.type == "cpu"
    assert torch.cuda.memory_allocated() < held
    shared = [svdq.packed(getattr(m.blocks[0], name).weight).shared for name in ("to_q", "to_k")]
    assert shared[0] is shared[1]
    m.to("cuda")
    assert torch.equal(run(*inputs()), expected)


def test_loading_onto_the_gpu_makes_no_16_bit_weight(tmp_path) -> None:
    m = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(8))).to(BF16).requires_grad_(False)
    twin = copy.deepcopy(m).to("meta")
    svdq.quantize(m, svdq.Config(**quiet()), device="cuda")
    svdq.save(m, tmp_path / "m", progress=False)
    del m
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    svdq.load(twin, tmp_path / "m", device="cuda", progress=False)
    size = (tmp_path / "m").stat().st_size
    reordering = 2048 * 2048 * 2  # one weight's codes, a byte each, in two orders
    assert torch.cuda.max_memory_allocated() - base < 1.05 * size + reordering


def test_eager_use_is_in_4_bit() -> None:
    m = model()
    run = compiled(m)
    run(*inputs())
    assert relative_error(m(*inputs()), run(*inputs())) < 0.03


def test_autocast() -> None:
    m = net().cuda()
    x, condition = (t.float() for t in inputs())
    run = compiled(m)
    with torch.autocast("cuda", BF16):
        reference = m(x, condition)
        for _ in range(2):
            output = run(x, condition)
    assert output.dtype == reference.dtype
    assert 0 < relative_error(output, reference) < 0.08


def test_group_statistics_stay_on_the_gpu() -> None:
    statistics = InputStatistics()
    statistics.observe(torch.randn(50, 128, device="cuda", dtype=BF16))
    result = quantize_group([torch.randn(64, 128, device="cuda")], ["a"], "w4a8", svdq.Config(rank=16), statistics)[0]
    assert result.packed.device.type == "cuda"
    assert result.error < 0.1
    assert not any(isinstance(p, QuantizedWeight) for p in model().parameters())
