"""The kernel order of a packed weight, and back."""

import pytest
import torch

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.lowering import launch, reference


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("precision", [f.name for f in FORMATS.values() if f.planar])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (3, 128), (24, 192), (16, 100), (5, 448)])
def test_layout_round_trip(precision, n, k):
    plain = FORMATS[precision].quantize_weight(torch.randn(n, k))
    packed = layout.to_kernel(precision, plain)
    assert layout.is_planar(packed[0])
    assert layout.to_kernel(precision, packed) is packed
    back = layout.to_plain(precision, packed, k)
    assert [t.dtype for t in back] == [t.dtype for t in plain]
    assert all(torch.equal(a, b) for a, b in zip(back, plain, strict=True))
    assert layout.to_plain(precision, plain, k) is plain


def test_planar_order():
    """Byte j holds channel j and channel 64 + j."""
    codes = torch.arange(128, dtype=torch.uint8).unsqueeze(0) % 16
    qweight = codes[:, 0::2] | (codes[:, 1::2] << 4)
    subscales = torch.tensor([[3, 7]], dtype=torch.int8)
    planar, pairs, _ = layout.to_kernel("w4a8", (qweight, subscales, torch.ones(1)))
    assert torch.equal(planar.view(torch.uint8), codes[:, :64] | (codes[:, 64:] << 4))
    assert pairs.tolist() == [[3 + (7 << 8)]]


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
def test_launch_on_cpu_takes_either_order(precision):
    fmt = FORMATS[precision]
    weight = fmt.quantize_weight(torch.randn(24, 192))
    qx, ascales = fmt.quantize_activation(torch.randn(2, 5, 192))
    xd, up = torch.randn(2, 5, 16), torch.randn(24, 16)
    expected = reference.gemm(qx, ascales, xd, list(weight), up, None, None, precision, torch.float32)
    assert launch.in_device_order(precision, weight) is weight
    for order in (weight, layout.to_kernel(precision, weight)):
        y = launch.gemm(qx, ascales, xd, list(order), up, None, None, precision, torch.float32)
        assert torch.equal(y, expected)
