"""Rounding weights on a GPU, against the formats' own functions. Needs CUDA."""

import pytest
import torch

from svdq_compile.config import Config
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.kernels.formats import FORMATS, nibbles
from svdq_compile.lowering import launch
from svdq_compile.quantizer import quantize_group

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PRECISIONS = [f.name for f in FORMATS.values() if f.rounding]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "k"), [(3, 64), (515, 3072), (77, 100)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_is_the_references(precision: str, n: int, k: int, weighted: bool) -> None:
    torch.manual_seed(0)
    w = torch.randn(n, k, device="cuda") * torch.logspace(-3, 2, n, device="cuda")[:, None]
    w[0] = 0.0
    importance = torch.rand(k, device="cuda") + 1e-3 if weighted else None
    fmt = FORMATS[precision]
    tensors, rounded = launch.round_weight(precision, w, importance)
    expected = fmt.quantize_weight(w, importance)
    torch.testing.assert_close(rounded, fmt.dequantize_weight(*tensors)[:, :k], rtol=1e-6, atol=1e-9)
    assert (nibbles.unpack(tensors[0]) != nibbles.unpack(expected[0])).float().mean() < 1e-3, "ties of scales aside"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_linear_is_quantized_as_on_the_cpu(precision: str) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(384, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    errors = []
    for device in ("cpu", "cuda"):
        statistics = InputStatistics()
        statistics.observe(x.to(device))
        result = quantize_group([w.to(device)], ["layer"], precision, Config(progress=False), statistics)[0]
        difference = result.packed.dequantize(torch.float32).cpu() - w.float()
        errors += [result.error, float(difference.norm() / w.float().norm())]
    assert errors[2:] == pytest.approx(errors[:2], rel=0.01)
