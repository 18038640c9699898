"""The kernel that rounds weights, against the formats' own functions."""

import pytest
import torch
from kernel_testing import builds, compile_for, compiled, interpreted, run_interpreted
from torch import Tensor

from svdq_compile.kernels.formats import FORMATS, nibbles

PRECISIONS = [f.name for f in FORMATS.values() if f.rounding]


def weight(n: int, k: int) -> Tensor:
    """Rows of very different spans, a row and a group of zeros, a group of one value."""
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-3, 2, n)[:, None]
    w[0] = 0.0
    w[-1, :64] = 0.0
    w[n // 2, -(k % 64 or 64) :] = 0.25
    return w


@interpreted
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "k"), [(3, 64), (40, 192), (33, 100)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_interpreted_rounding_is_the_references(precision: str, n: int, k: int, weighted: bool) -> None:
    from svdq_compile.kernels.portable.round_weight import round_weight

    w, fmt = weight(n, k), FORMATS[precision]
    importance = torch.rand(k, generator=torch.Generator().manual_seed(1)).square() + 1e-3 if weighted else None
    tensors, rounded = round_weight(precision, w, importance)
    expected = fmt.quantize_weight(w, importance)
    assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in expected]
    assert rounded.shape == w.shape
    torch.testing.assert_close(rounded, fmt.dequantize_weight(*tensors)[:, :k], rtol=1e-6, atol=1e-9)
    assert (nibbles.unpack(tensors[0]) != nibbles.unpack(expected[0])).float().mean() < 1e-3, "ties of scales aside"

    def loss(t: Tensor) -> Tensor:
        error = (t - w).square() * (1.0 if importance is None else importance)
        return error.sum(1)

    torch.testing.assert_close(loss(rounded), loss(fmt.dequantize_weight(*expected)[:, :k]), rtol=1e-5, atol=1e-12)


@interpreted
def test_interpreted_no_rows() -> None:
    from svdq_compile.kernels.portable.round_weight import round_weight

    tensors, rounded = round_weight("w4a8", torch.empty(0, 128), None)
    assert [tuple(t.shape) for t in tensors] == [(0, 64), (0, 2), (0,)]
    assert rounded.shape == (0, 128)


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@builds
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_values_stay_in_registers(capability: int, precision: str) -> None:
    from svdq_compile.kernels.portable.round_weight import GROUPS, _round_kernel

    types = {"w": "*fp32", "importance": "*fp32", "spans": "*fp32", "codes": "*u8", "rounded": "*fp32"}
    types |= {"scales": "*i8" if precision == "w4a8" else "*bf16", "zeros": "*bf16"}
    built = compile_for(_round_kernel, capability, {"ROUNDING": FORMATS[precision].rounding, "TG": GROUPS}, 4, types)
    assert built.spilled == 0
    assert "ld.global.v4.b32" in built.ptx
    assert "st.global.v4.b32" in built.ptx


@compiled
@pytest.mark.parametrize(
    ("precision", "w", "importance", "complaint"),
    [
        ("nvfp4", torch.zeros(4, 64), None, "no kernel rounds to nvfp4"),
        ("w4a8", torch.zeros(4, 64, dtype=torch.float16), None, "w is torch.float16"),
        ("w4a8", torch.zeros(4, 64), torch.ones(32), r"importance is \(32,\)"),
    ],
)
def test_bad_input(precision: str, w: Tensor, importance: Tensor | None, complaint: str) -> None:
    from svdq_compile.kernels.portable.round_weight import round_weight

    with pytest.raises((TypeError, ValueError), match=complaint):
        round_weight(precision, w, importance)
