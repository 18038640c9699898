"""The kernel that rounds channels one after another, against the loop in plain torch."""

import pytest
import torch
from kernel_testing import builds, compile_for, compiled, interpreted, run_interpreted
from torch import Tensor

from svdq_compile.kernels.formats import FORMATS
from svdq_compile.lowering.launch import Columns, _reference_columns

PRECISIONS = [f.name for f in FORMATS.values() if f.grid is not None]


def columns(precision: str, blocks: int, channels: int, rows: int) -> Columns:
    """Values that reach beyond the grid, scales that differ from entry to entry."""
    generator = torch.Generator().manual_seed(rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    target = randn(blocks, channels, rows) * 3
    wanted = target + randn(blocks, channels, rows) * 0.1
    weights = randn(blocks, channels, channels) * 0.2  # what is below the diagonal is not read
    scale = randn(blocks, channels, rows).abs() * 0.3 + 0.05
    zero = (randn(blocks, channels, rows),) if FORMATS[precision].rounding == "zeros" else ()
    return Columns(target, wanted, weights, (scale, *zero), precision)


@interpreted
@pytest.mark.parametrize(("blocks", "channels", "rows"), [(1, 64, 200), (3, 64, 33), (2, 20, 5), (1, 1, 1)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_interpreted_rounding_is_the_loops(precision: str, blocks: int, channels: int, rows: int) -> None:
    from svdq_compile.kernels.portable.round_columns import round_columns

    o = columns(precision, blocks, channels, rows)
    rounded, lost = round_columns(o.precision, o.target, o.wanted, o.weights, *o.steps)
    expected, _ = _reference_columns(o)
    assert ((rounded - expected).abs() > 1e-5).float().mean() < 1e-3, "but for values half-way between two codes"
    torch.testing.assert_close(lost, o.target - rounded, rtol=1e-6, atol=1e-6)


@interpreted
def test_interpreted_parts_of_larger_tensors() -> None:
    """As feedback.py cuts them, in memory that is not theirs alone; no rows at all."""
    from svdq_compile.kernels.portable.round_columns import round_columns

    o = columns("w4a8", 2, 128, 40)
    piece = slice(64, 128)
    cut = Columns(o.target[:, piece], o.wanted[:, piece], o.weights[:, piece, piece], (o.steps[0][:, piece],), "w4a8")
    rounded, _ = round_columns("w4a8", cut.target, cut.wanted, cut.weights, *cut.steps)
    torch.testing.assert_close(rounded, _reference_columns(cut)[0])
    nothing = [t[:, :, :0] for t in (cut.target, cut.wanted, *cut.steps)]
    assert round_columns("w4a8", *nothing[:2], cut.weights, nothing[2])[0].shape == (2, 64, 0)


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@builds
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_values_stay_in_registers(capability: int, precision: str) -> None:
    from svdq_compile.kernels.portable.round_columns import CHANNELS, ROWS, _round_columns_kernel

    names = ("target", "wanted", "weights", "scale", "zero", "rounded", "lost")
    grid = FORMATS[precision].rounding
    built = compile_for(
        _round_columns_kernel, capability, {"GRID": grid, "C": CHANNELS, "TN": ROWS}, 4, dict.fromkeys(names, "*fp32")
    )
    assert built.spilled == 0


@compiled
def test_bad_input() -> None:
    from svdq_compile.kernels.portable.round_columns import round_columns

    x = torch.zeros(1, 65, 4)
    with pytest.raises(ValueError, match="at most 64"):
        round_columns("w4a8", x, x, x, x)
    with pytest.raises(ValueError, match="w8a8 has no grid"):
        round_columns("w8a8", x, x, x, x)
