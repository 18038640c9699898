"""The statistics of a norm's rows: the kernel, and the pass that puts it where Inductor's reductions were."""

import pytest
import torch
import torch.nn.functional as F
from fusion_testing import count, run, run_as_aten
from kernel_testing import HALF, builds, compile_for, compiled, error, interpreted, run_interpreted, waits_first
from torch import Tensor, nn

from conftest import relative_error
from svdq_compile.lowering import ops, reference

SHAPES = [(1, 512), (5, 513), (7, 3072), (40, 96), (3, 8192)]


def rows(m: int, k: int) -> Tensor:
    """A mean far from zero, where sums of squares would lose the variance."""
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(k)) + 20.0).to(HALF)


@interpreted
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_interpreted_moments_are_the_references(m: int, k: int) -> None:
    from svdq_compile.kernels.portable.row_moments import row_moments

    wide = torch.cat((rows(m, k), torch.full((m, 3), torch.nan, dtype=HALF)), 1)
    for result, expected in zip(row_moments(wide[:, :k]), reference.row_moments(rows(m, k)), strict=True):
        assert error(result, expected[:, 0]) < 1e-6
    assert [t.shape for t in row_moments(wide[:0, :k])] == [(0,)] * 3


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@builds
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_rows_are_read_in_wide_pieces(capability: int) -> None:
    from svdq_compile.kernels.portable.row_moments import _moments_kernel

    types = {"x": "*bf16", "variance": "*fp32", "mean": "*fp32", "square": "*fp32"}
    built = compile_for(_moments_kernel, capability, {"ROWS": 1, "TK": 4096, "EARLY": capability >= 90}, 4, types)
    assert built.spilled == 0
    assert "ld.global.v4.b32" in built.ptx
    assert waits_first(built.ptx) == (capability >= 90)


@compiled
@pytest.mark.parametrize(
    ("x", "problem", "complaint"),
    [
        (torch.zeros(4, 512), TypeError, "x is torch.float32"),
        (torch.zeros(4, 8193, dtype=HALF), ValueError, "8193 columns"),
        (torch.zeros(512, 4, dtype=HALF).t(), ValueError, "strides"),
    ],
)
def test_bad_input(x: Tensor, problem: type, complaint: str) -> None:
    from svdq_compile.kernels.portable.row_moments import row_moments

    with pytest.raises(problem, match=complaint):
        row_moments(x)


class Normed(nn.Module):
    def __init__(self, norm, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.norm = nn.Linear(width, width), nn.Linear(width, 128), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


@compiled
@pytest.mark.parametrize(
    ("norm", "width", "measured"),
    [
        (lambda y: F.layer_norm(y, y.shape[-1:]), 512, 1),
        (lambda y: F.rms_norm(y, y.shape[-1:]), 512, 1),
        (lambda y: F.layer_norm(y, y.shape[-1:]) + F.rms_norm(y, y.shape[-1:]), 512, 1),
        (lambda y: F.layer_norm(y, y.shape[-1:]), 128, 0),
        (lambda y: F.layer_norm(torch.cat((y, y.flip(1)), 1), y.shape[-1:]), 512, 1),
        (lambda y: F.layer_norm(torch.cat((y[..., :256], y[..., 256:].flip(1)), -1), y.shape[-1:]), 512, 0),
        (lambda y: y - y.mean(-1, keepdim=True), 512, 0),
        (lambda y: y * y.float().var(-1, keepdim=True).to(y.dtype), 512, 0),
        (lambda y: y * y.square().mean(1, keepdim=True), 512, 0),
        (lambda y: F.group_norm(y.transpose(1, 2), 1).transpose(1, 2), 512, 0),
    ],
)
def test_reductions_over_rows_are_replaced(norm, width: int, measured: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    x = torch.randn(2, 24, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    outputs = [
        run(Normed(norm, width).to(torch.bfloat16).eval().requires_grad_(False), (x,), fuse=fuse)
        for fuse in (True, False)
    ]
    assert count(graphs, ops.row_moments) == measured
    assert relative_error(*outputs) < 0.02
