"""Rounding with feedback: against the textbook's GPTQ, on inputs not observed, on statistics that say little."""

import pytest
import torch
from torch import Tensor

from conftest import logged
from svdq_compile import input_statistics
from svdq_compile.config import Config
from svdq_compile.feedback import Feedback
from svdq_compile.input_statistics import InputStatistics, Moment
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.lowering import ops
from svdq_compile.lowering.launch import round_weight
from svdq_compile.quantizer import quantize_group

GRIDS = [name for name, form in FORMATS.items() if form.grid is not None]


def correlated(rows: int, k: int, seed: int) -> Tensor:
    """Rows whose channels go together, as those of a network do; the same mixture for every seed."""
    mixture = torch.randn(k, k, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1.5, k)[:, None]
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) @ mixture


def matrix(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3)) / k**0.5


def output_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float((x @ (rounded - weight).t()).norm() / (x @ weight.t()).norm())


def test_it_is_gptq() -> None:
    """As published: each error, over the inverse's Cholesky factor, is taken from all channels that are to come."""
    w, x = matrix(24, 128), correlated(2000, 128, 1)
    moment = Moment.of(x)
    feedback = Feedback(moment, torch.ones(128))
    tensors, got = feedback.round("w4a8", w, torch.ones(128))
    hessian = (moment.sum[0] / moment.rows).double()
    ridge = 10.0 * 128 / 2000 + 1e-3
    hessian.diagonal().add_(ridge * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    (steps,) = FORMATS["w4a8"].grid.steps(*tensors)
    left, expected = w.double().clone(), torch.empty_like(w)
    for k in range(128):
        expected[:, k] = FORMATS["w4a8"].grid.nearest(left[:, k], steps[:, k // 64].double()).float()
        error = (left[:, k] - expected[:, k]) / factor[k, k]
        left[:, k:] -= error[:, None] * factor[k, k:]
    assert ((got - expected).abs() > 1e-5).float().mean() < 0.01, "but for values half-way between two codes"


@pytest.mark.parametrize("precision", GRIDS)
@pytest.mark.parametrize("k", [100, 640])
def test_outputs_gain_on_rows_that_were_not_observed(precision: str, k: int) -> None:
    w = matrix(48, k)
    feedback = Feedback(Moment.of(correlated(20000, k, 1)), torch.ones(k))
    tensors, rounded = feedback.round(precision, w, torch.ones(k))
    torch.testing.assert_close(FORMATS[precision].dequantize_weight(*tensors)[:, :k], rounded, rtol=1e-5, atol=1e-6)
    nearest = round_weight(precision, w, torch.ones(k))[1]
    x = correlated(500, k, 2)
    assert output_error(w, rounded, x) < 0.9 * output_error(w, nearest, x)


def test_formats_of_many_steps_are_rounded_to_nearest() -> None:
    w = matrix(8, 64)
    rounded = Feedback(Moment.of(correlated(200, 64, 1)), torch.ones(64)).round("w8a8", w, torch.ones(64))[1]
    assert torch.equal(rounded, round_weight("w8a8", w, torch.ones(64))[1])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_rows_are_not_believed(rows: int) -> None:
    """What one row a sample has shown: other samples must not pay for it."""
    w, x = matrix(64, 256), torch.randn(400, 256, generator=torch.Generator().manual_seed(8))
    feedback = Feedback(Moment.of(x[:rows]), torch.ones(256))
    rounded = feedback.round("w4a16", w, torch.ones(256))[1]
    nearest = round_weight("w4a16", w, torch.ones(256))[1]
    assert output_error(w, rounded, x[200:]) < 1.02 * output_error(w, nearest, x[200:])


def test_a_gpu_that_is_nearly_full_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    known, x = InputStatistics(), correlated(100, 128, 1)
    monkeypatch.setattr(input_statistics, "_free_memory", lambda device: 255 * Moment.nbytes(128))
    known.observe(x)
    assert known.moment is None
    assert known.span is not None
    monkeypatch.setattr(input_statistics, "_free_memory", lambda device: 256 * Moment.nbytes(128))
    known = InputStatistics()
    known.observe(x)
    assert known.moment is not None
    assert known.moment.sum.nbytes == Moment.nbytes(128)


@pytest.mark.parametrize("precision", ["int4", "w8a8"])
def test_formats_without_a_grid_need_no_moment(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known, w = InputStatistics(), matrix(64, 128)
    known.observe(correlated(100, 128, 1))
    with_it = quantize_group([w], ["layer"], precision, Config(), known)[0].packed
    known.moment = None
    without = quantize_group([w], ["layer"], precision, Config(), known)[0].packed
    assert all(torch.equal(a, b) for a, b in zip(with_it.weight, without.weight, strict=True))


def test_a_moment_of_huge_values_is_left_out() -> None:
    known, w = InputStatistics(), matrix(64, 128)
    known.observe(correlated(100, 128, 1))
    assert known.moment is not None
    known.moment.sum.fill_(float("inf"))
    assert quantize_group([w], ["layer"], "w4a8", Config(), known)[0].error < 0.1


@pytest.mark.parametrize("precision", GRIDS)
def test_moments_that_say_nothing(precision: str) -> None:
    """No input but zeros, a constant channel, a dead one, and all channels the same."""
    w, ones = matrix(16, 128), torch.ones(128)
    nearest = round_weight(precision, w, ones)[1]
    zeros = Feedback(Moment.of(torch.zeros(40, 128)), ones).round(precision, w, ones)[1]
    torch.testing.assert_close(zeros, nearest)
    x = correlated(4000, 128, 1)
    x[:, 5], x[:, 7] = 1.0, 0.0
    for inputs in (x, x[:, :1].expand(-1, 128)):
        rounded = Feedback(Moment.of(inputs), ones).round(precision, w, ones)[1]
        assert rounded.isfinite().all()
        assert output_error(w, rounded, inputs) <= 1.02 * output_error(w, nearest, inputs)


def test_the_same_bits_again_and_better_than_without() -> None:
    w, known, x = matrix(128, 192), InputStatistics(), correlated(300, 192, 2)
    known.observe(correlated(4096, 192, 1))
    first, second = (quantize_group([w], ["layer"], "w4a8", Config(), known)[0].packed for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.weight, second.weight, strict=True))
    known.moment = None
    without = quantize_group([w], ["layer"], "w4a8", Config(), known)[0].packed
    errors = [(ops.linear(x, packed, None, torch.float32) - x @ w.t()).norm() for packed in (first, without)]
    assert errors[0] < 0.95 * errors[1]


def test_moments_add_up_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(300, 1100, 1)
    whole, parts = InputStatistics(), InputStatistics()
    whole.observe(x)
    for part in x.split(70):
        parts.observe(part)
    assert whole.moment.sum.shape == (3, 384, 384)
    assert parts.moment.rows == whole.moment.rows == 300
    torch.testing.assert_close(parts.moment.sum, whole.moment.sum, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(whole.moment.sum[1], x[:, 384:768].t() @ x[:, 384:768], rtol=1e-4, atol=1e-2)
    assert not whole.moment.sum[2, 1100 - 768 :].any()
    monkeypatch.setattr(input_statistics, "MOMENT_ROWS", 100)
    whole.observe(x)
    assert whole.moment.rows == 400


def test_a_moment_that_finds_no_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known, x, w = InputStatistics(), correlated(100, 128, 1), matrix(64, 128)
    known.observe(x)

    def full(_: Tensor) -> Moment:
        raise torch.OutOfMemoryError("none left")

    input_statistics._tell_of_memory.cache_clear()
    monkeypatch.setattr(Moment, "of", full)
    with logged("svdq_compile") as records:
        known.observe(x)
    monkeypatch.undo()
    known.observe(x)
    assert known.moment is None
    assert ["no memory for second moments" in record.getMessage() for record in records] == [True]
    assert quantize_group([w], ["layer"], "w4a8", Config(rank=16), known)[0].error < 0.1
