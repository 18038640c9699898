"""SVDQuant's arithmetic: what each part is worth, and what it must never do."""

import sys
from pathlib import Path

import pytest
import torch

from svdq_compile.config import Config
from svdq_compile.errors import NonFiniteWeight
from svdq_compile.input_statistics import MAX_ROWS, InputStatistics
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.lowering import ops, reference
from svdq_compile.lowrank import factorize
from svdq_compile.quantizer import quantize_group

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import accuracy


def statistics(x: torch.Tensor) -> InputStatistics:
    known = InputStatistics()
    known.observe(x)
    return known


def test_planted_outliers_order_the_methods() -> None:
    """Plain 4-bit is worst, a remedy alone is better, both still more, then a rotation; 8-bit activations are best."""
    error = {row["method"]: row["error"] for row in accuracy.measure(seeds=3)}
    plain, smoothing = error["int4 plain"], error["int4 smoothing alone"]
    lowrank, both, w4a8 = error["int4 low-rank alone"], error["int4 both (SVDQuant)"], error["w4a8 both (SVDQuant)"]
    rotated = error["int4 rotated as well"]
    assert plain > 1.05 * smoothing
    assert plain > 1.05 * lowrank
    assert min(smoothing, lowrank) > 1.05 * both
    assert both > 1.05 * rotated
    assert rotated > 1.05 * w4a8


@pytest.mark.parametrize("precision", FORMATS)
def test_error_is_what_it_says(precision: str) -> None:
    """The reported error is the layer's own on the observed rows, and the dequantized weight explains it."""
    torch.manual_seed(0)
    w, x = torch.randn(96, 192) / 14, torch.randn(64, 192)
    result = quantize_group([w], ["layer"], precision, Config(precision=precision, rank=16), statistics(x))[0]
    truth = x @ w.t()
    error = (ops.linear(x, result.packed, None, torch.float32) - truth).norm() / truth.norm()
    assert float(error) == pytest.approx(result.error, rel=0.05)
    weight_error = (result.packed.dequantize(torch.float32) - w).norm() / w.norm()
    assert weight_error < 0.12


def test_refinement_lowers_the_error_and_keeps_the_best_round() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(128, 256) / 16, torch.randn(200, 256)
    errors = [
        quantize_group([w], ["layer"], "w4a8", Config(refine=rounds), statistics(x))[0].error for rounds in (0, 2, 10)
    ]
    assert errors[0] > errors[1] >= errors[2]


def test_deterministic() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(128, 128), torch.randn(40, 128)
    first, second = (quantize_group([w], ["layer"], "int4", Config(), statistics(x))[0].packed for _ in range(2))
    for name, tensor in first.own_tensors().items():
        assert torch.equal(tensor, second.own_tensors()[name]), name


def test_members_of_a_group_are_each_their_own_linear() -> None:
    torch.manual_seed(0)
    weights, x = [torch.randn(n, 128) for n in (64, 192, 64)], torch.randn(50, 128)
    group = quantize_group(weights, ["q", "k", "v"], "w4a8", Config(rank=16), statistics(x))
    assert len({id(member.packed.shared) for member in group}) == 1
    assert group[0].packed.shared.down.shape == (48, 128)
    assert [member.packed.rank_start for member in group] == [0, 16, 32]
    for member, w in zip(group, weights, strict=True):
        truth = x @ w.t()
        y = ops.linear(x, member.packed, None, torch.float32)
        assert (y - truth).norm() < 0.1 * truth.norm()


def test_unsigned_input_is_corrected_exactly() -> None:
    """With shift the codes change, the function does not: the error must be below the signed one."""
    torch.manual_seed(0)
    w = torch.randn(96, 256) / 16
    x = torch.nn.functional.gelu(torch.randn(300, 256))
    config = Config(precision="int4")
    signed = quantize_group([w], ["layer"], "int4", config, statistics(x))[0]
    unsigned = quantize_group([w], ["layer"], "int4", config, statistics(x), shift=0.171875)[0]
    assert unsigned.packed.offset is not None
    assert unsigned.error < 0.9 * signed.error


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_tiny_and_huge_weights(precision: str, scale: float) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(64, 128) * scale, torch.randn(30, 128) * 10
    assert quantize_group([w], ["layer"], precision, Config(rank=16), statistics(x))[0].error < 0.12


@pytest.mark.parametrize("precision", FORMATS)
def test_dead_channels_and_zero_weights(precision: str) -> None:
    w, x = torch.zeros(64, 128), torch.zeros(10, 128)
    packed = quantize_group([w], ["layer"], precision, Config(rank=16), statistics(x))[0].packed
    assert not ops.linear(torch.randn(5, 128), packed, None, torch.float32).any()
    w = torch.randn(64, 128)
    w[:, 5] = 0
    x = torch.randn(40, 128)
    x[:, 7] = 0
    assert quantize_group([w], ["layer"], precision, Config(rank=16), statistics(x))[0].error < 0.12


def test_non_finite_weight_is_named() -> None:
    w = torch.randn(64, 64)
    w[0, :3] = torch.nan
    with pytest.raises(NonFiniteWeight, match="the weight of second holds 3 NaN or Inf"):
        quantize_group([torch.randn(64, 64), w], ["first", "second"], "int4", Config(rank=8), InputStatistics())


def test_factorize_is_near_the_best() -> None:
    torch.manual_seed(0)
    a = torch.randn(200, 300) * torch.logspace(0, -3, 300)
    values = torch.linalg.svdvals(a)
    up, down, basis = factorize(a, 16)
    best = values[16:].square().sum().sqrt()
    assert (a - up @ down).norm() <= 1.01 * best
    up, down, _ = factorize(a, 16, basis)
    assert (a - up @ down).norm() <= 1.005 * best
    torch.testing.assert_close(up.t() @ up, torch.eye(16), atol=1e-4, rtol=0)


def test_factorize_of_a_matrix_of_lower_rank() -> None:
    torch.manual_seed(0)
    a = torch.randn(64, 3) @ torch.randn(3, 80)
    for basis in (None, factorize(a, 16)[2]):
        up, down, _ = factorize(a, 16, basis)
        assert (a - up @ down).norm() < 1e-4 * a.norm()


def test_statistics_see_every_row_and_keep_some() -> None:
    x = torch.randn(7, 300, 64)
    known = statistics(x)
    for _ in range(40):
        known.observe(x / 2)
    assert known.span is not None
    torch.testing.assert_close(known.span, x.abs().amax((0, 1)))
    assert known.rows.shape == (MAX_ROWS, 64)
    known.observe(torch.zeros(0, 64))
    assert InputStatistics().span is None


@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("precision", FORMATS)
def test_operators_agree_with_their_shape_functions(precision: str, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(64, 100), torch.randn(*lead, 100)
    packed = quantize_group([w], ["layer"], precision, Config(rank=16), InputStatistics())[0].packed
    weight, bias = list(packed.weight), torch.randn(64)
    # torch's schema check compares inputs before and after, which it cannot do for float8.
    checks = ("test_faketensor",) if precision == "nvfp4" else ("test_faketensor", "test_schema")
    if FORMATS[precision].quantize_activation is None:
        xd = x @ packed.down.t()
        arguments = (x, xd, weight, packed.up, bias, precision, torch.bfloat16)
        torch.library.opcheck(ops.gemv, arguments, test_utils=checks)
        y = ops.gemv(*arguments)
    else:
        arguments = (x, packed.shared.smooth, packed.shared.down, precision, 0.0)
        torch.library.opcheck(ops.quantize, arguments, test_utils=checks)
        qx, ascales, xd = ops.quantize(*arguments)
        arguments = (qx, ascales, xd, weight, packed.up, bias, None, precision, torch.bfloat16)
        torch.library.opcheck(ops.gemm, arguments, test_utils=checks)
        y = ops.gemm(*arguments)
    assert y.shape == (*lead, 64)
    assert y.dtype == torch.bfloat16
    truth = x @ w.t() + bias
    assert (y.float() - truth).norm() <= 0.2 * truth.norm()


def test_quantize_reads_the_raw_input_for_the_branch() -> None:
    x, smooth, down = torch.randn(4, 64), torch.full((64,), 3.0), torch.randn(8, 64)
    _, _, xd = reference.quantize(x, smooth, down, "w4a8", 0.0)
    torch.testing.assert_close(xd, x @ down.t())
