"""Rounding with feedback: against the textbook's GPTQ, on inputs not observed, on statistics that say little."""

import pytest
import torch
import torch.nn.functional as F
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
    moment = Moment.of(x, 512)
    feedback = Feedback(moment, torch.ones(128))
    tensors, got = feedback.round("w4a8", w, torch.ones(128))
    hessian = (moment.sum[0] / moment.rows).double()
    ridge = 3.0 * 128 / 2000 + 1e-3
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
    feedback = Feedback(Moment.of(correlated(20000, k, 1), 512), torch.ones(k))
    tensors, rounded = feedback.round(precision, w, torch.ones(k))
    torch.testing.assert_close(FORMATS[precision].dequantize_weight(*tensors)[:, :k], rounded, rtol=1e-5, atol=1e-6)
    nearest = round_weight(precision, w, torch.ones(k))[1]
    x = correlated(500, k, 2)
    assert output_error(w, rounded, x) < 0.9 * output_error(w, nearest, x)


def test_formats_of_many_steps_are_rounded_to_nearest() -> None:
    w = matrix(8, 64)
    rounded = Feedback(Moment.of(correlated(200, 64, 1), 512), torch.ones(64)).round("w8a8", w, torch.ones(64))[1]
    assert torch.equal(rounded, round_weight("w8a8", w, torch.ones(64))[1])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_rows_are_not_believed(rows: int) -> None:
    """What one row a sample has shown: other samples must not pay for it."""
    w, x = matrix(64, 256), torch.randn(400, 256, generator=torch.Generator().manual_seed(8))
    feedback = Feedback(Moment.of(x[:rows], 512), torch.ones(256))
    rounded = feedback.round("w4a16", w, torch.ones(256))[1]
    nearest = round_weight("w4a16", w, torch.ones(256))[1]
    assert output_error(w, rounded, x[200:]) < 1.02 * output_error(w, nearest, x[200:])


def test_a_gpu_that_is_nearly_full_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    known, x = InputStatistics(), correlated(100, 128, 1)
    monkeypatch.setattr(input_statistics, "_free_memory", lambda device: 255 * Moment.nbytes(128, 512))
    known.observe(x)
    assert known.moment is None
    assert known.span is not None
    monkeypatch.setattr(input_statistics, "_free_memory", lambda device: 256 * Moment.nbytes(128, 512))
    known = InputStatistics()
    known.observe(x)
    assert known.moment is not None
    assert known.moment.sum.nbytes == Moment.nbytes(128, 512)


def test_blocks_are_large_where_a_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all memory that there is: what else is on a GPU changes no bits."""
    known, x = InputStatistics(), correlated(100, 1024, 1)
    monkeypatch.setattr(input_statistics, "_whole_memory", lambda device: 24 << 30)
    known.observe(x)
    assert known.moment is not None
    assert known.moment.sum.shape == (2, 512, 512)
    monkeypatch.setattr(input_statistics, "_whole_memory", lambda device: 80 << 30)
    known.observe(x)
    torch.testing.assert_close(known.moment.sum, Moment.of(x.repeat(2, 1), 512).sum, rtol=1e-4, atol=1e-2)
    large = InputStatistics()
    large.observe(x)
    assert large.moment is not None
    assert large.moment.sum.shape == (1, 1024, 1024)


def test_the_memory_of_a_machine_is_known() -> None:
    assert 1 << 28 < input_statistics._whole_memory(torch.device("cpu")) < 1 << 50


@pytest.mark.parametrize("k", [1024, 1100])
def test_moments_of_other_blocks_add_up(k: int) -> None:
    """What one does not know of two channels counts as if they did not go together."""
    x, y = correlated(60, k, 1), correlated(40, k, 2)
    small, large = Moment.of(x, 512), Moment.of(y, 1024)
    blocks, size, _ = small.sum.shape
    place = torch.arange(k)
    is_known = (place[:, None] // large.sum.shape[1]) == (place // large.sum.shape[1])
    dense = F.pad(x.t() @ x + (y.t() @ y) * is_known, (0, blocks * size - k) * 2)
    expected = torch.stack([dense[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(blocks)])
    for total in (small + large, large + small):
        assert total.rows == 100
        torch.testing.assert_close(total.sum, expected, rtol=1e-4, atol=1e-2)


def test_wide_inputs_are_believed_as_narrow_ones_are() -> None:
    """What is known of a block does not depend on how many others there are."""
    x = correlated(5000, 512, 1)
    narrow = Feedback(Moment.of(x, 512), torch.ones(512)).weights
    wide = Feedback(Moment.of(x.repeat(1, 3), 512), torch.ones(1536)).weights
    assert narrow.abs().amax() > 0.1
    torch.testing.assert_close(wide, narrow.expand_as(wide), rtol=1e-3, atol=1e-4)


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
    zeros = Feedback(Moment.of(torch.zeros(40, 128), 512), ones).round(precision, w, ones)[1]
    torch.testing.assert_close(zeros, nearest)
    x = correlated(4000, 128, 1)
    x[:, 5], x[:, 7] = 1.0, 0.0
    for inputs in (x, x[:, :1].expand(-1, 128)):
        rounded = Feedback(Moment.of(inputs, 512), ones).round(precision, w, ones)[1]
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
    monkeypatch.setattr(input_statistics, "_whole_memory", lambda device: 80 << 30)
    x = correlated(300, 1100, 1)
    whole, parts = InputStatistics(), InputStatistics()
    whole.observe(x)
    for part in x.split(70):
        parts.observe(part)
    assert whole.moment.sum.shape == (2, 576, 576)
    assert parts.moment.rows == whole.moment.rows == 300
    torch.testing.assert_close(parts.moment.sum, whole.moment.sum, rtol=1e-4, atol=1e-2)
    second = F.pad(x[:, 576:], (0, 52))
    torch.testing.assert_close(whole.moment.sum[1], second.t() @ second, rtol=1e-4, atol=1e-2)
    assert not whole.moment.sum[1, 1100 - 576 :].any()
    monkeypatch.setattr(input_statistics, "MOMENT_ROWS", 100)
    whole.observe(x)
    assert whole.moment.rows == 400


def test_a_moment_that_finds_no_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known, x, w = InputStatistics(), correlated(100, 128, 1), matrix(64, 128)
    known.observe(x)

    def full(*_: object) -> Moment:
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
