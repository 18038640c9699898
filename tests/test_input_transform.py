"""What is done to an input before it is rounded: rotation is exact, chosen by error, and reaches all that needs it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import compiled, relative_error
from svdq_compile import input_transform, quantizer
from svdq_compile.config import Config
from svdq_compile.errors import FileRefused
from svdq_compile.header import check_layout, read_header
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.input_transform import EXPONENTS, Transform, choose
from svdq_compile.kernels.formats import FORMATS, int4, nvfp4
from svdq_compile.kernels.formats.rotation import rotate
from svdq_compile.lowering import ops, reference
from svdq_compile.lowering.packed import expand
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.quantizer import Quantized, quantize_group


def with_outliers(rows: int, k: int, seed: int) -> Tensor:
    """Inputs of a network: some channels are loud, and not the same ones in each row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    return x * (1 + 15 * (torch.rand(rows, k, generator=generator) < 0.02))


def matrix(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3)) / k**0.5


def quantized(x: Tensor | None, w: Tensor, precision: str = "int4", shift: float = 0.0, **options) -> Quantized:
    known = InputStatistics()
    if x is not None:
        known.observe(x)
    return quantize_group([w], ["layer"], precision, Config(precision, rank=16, refine=1, **options), known, shift)[0]


def loss(result: Quantized, w: Tensor, x: Tensor) -> float:
    truth = x @ w.t()
    return float((ops.linear(x, result.packed, None, torch.float32) - truth).norm() / truth.norm())


# ** rotation **


def test_it_is_hadamards_matrix_and_its_own_inverse() -> None:
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    x = torch.randn(3, 128)
    expected = (x.double().view(3, 2, 64) @ h / 8).view(3, 128)
    torch.testing.assert_close(rotate(x).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("precision", "k", "shift"), [("w4a8", 128, 0.0), ("int4", 100, 0.0), ("int4", 128, 0.5)])
def test_what_is_not_rotated(precision: str, k: int, shift: float) -> None:
    with pytest.raises(ValueError, match=f"{precision} does not rotate an input of {k} channels and shift {shift}"):
        reference.quantize(torch.randn(2, k), torch.ones(k), torch.zeros(0, k), precision, shift, rotate=True)


def test_a_transform_leaves_the_product() -> None:
    x, w, smooth = torch.randn(5, 128), torch.randn(7, 128), torch.rand(128) + 0.5
    for rotates in (False, True):
        transform = Transform(smooth, 0.0, rotates)
        torch.testing.assert_close(transform.input(x) @ transform.weight(w).t(), x @ w.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(transform.undo(transform.weight(w)), w, rtol=1e-5, atol=1e-5)


# ** the code -8 **


def test_the_largest_magnitude_of_a_group_has_the_code_minus_8() -> None:
    x = torch.tensor([[1.0, -0.5] * 32, [-1.0, 0.25] * 32, [0.0] * 64])
    qx, scales = int4.quantize_activation(x)
    assert [int(row.min()) for row in qx] == [-8, -8, 0]
    assert scales.flatten().tolist() == [-0.125, 0.125, 1.0]
    assert torch.equal(int4.dequantize_activation(qx, scales), x)


def test_sixteen_values_are_better_than_fifteen() -> None:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(1, keepdim=True) / 7
    fifteen = ((x / scale).round() * scale - x).norm()
    assert (int4.dequantize_activation(*int4.quantize_activation(x)) - x).norm() < 0.93 * fifteen


# ** the choice **


def test_loud_channels_are_rotated_and_lose_less_on_other_rows() -> None:
    w, x, other = matrix(96, 192), with_outliers(256, 192, 1), with_outliers(256, 192, 2)
    rotated, plain = quantized(x, w), quantized(x, w, rotate=False)
    assert (rotated.packed.shared.rotate, plain.packed.shared.rotate) == (True, False)
    assert loss(rotated, w, other) < 0.9 * loss(plain, w, other)
    assert loss(rotated, w, x) == pytest.approx(rotated.error, rel=0.05)
    torch.testing.assert_close(rotated.packed.dequantize(torch.float32), w, rtol=0, atol=0.05)


def test_it_is_not_rotated_where_that_loses_more() -> None:
    """A few channels that are 0 or 1, and others nearly silent: rounding leaves nothing to spread."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(256, 128, generator=generator) < 0.5).float() * torch.tensor([1.0] * 8 + [1e-4] * 56).repeat(2)
    result = quantized(x, matrix(64, 128), smooth=False)
    assert not result.packed.shared.rotate


def test_a_shift_is_kept_where_that_is_better() -> None:
    w, x = matrix(64, 128), nn.functional.gelu(torch.randn(256, 128, generator=torch.Generator().manual_seed(0)))
    for options in ({}, {"rotate": False}):
        shared = quantized(x, w, shift=0.171875, **options).packed.shared
        assert (shared.shift > 0) != shared.rotate
    assert quantized(None, w, shift=0.171875).packed.shared.shift > 0


@pytest.mark.parametrize("precision", FORMATS)
def test_of_unknown_inputs_int4_alone_is_rotated(precision: str) -> None:
    assert quantized(None, matrix(64, 128), precision).packed.shared.rotate == (precision == "int4")
    assert not quantized(None, matrix(64, 100), precision).packed.shared.rotate


def test_the_least_loss_is_chosen_and_a_tie_changes_nothing() -> None:
    weights, span = [matrix(64, 128)], torch.rand(128) + 0.5
    given = weights, span, "int4", Config("int4"), 0.0
    first = choose(*given, None)
    same = choose(*given, lambda transform: 1.0)
    assert torch.equal(first.smooth, same.smooth)
    assert first.rotate
    assert same.rotate
    plain = choose(*given, lambda transform: 2.0 if transform.rotate else 1.0)
    assert not plain.rotate
    tried: list[Tensor] = []

    def last_is_best(transform: Transform) -> float:
        tried.append(transform.smooth)
        return 1 / len(tried)

    assert torch.equal(choose(*given, last_is_best).smooth, tried[-1])
    assert len(tried) == 2 + len(EXPONENTS) - 1
    assert choose(*given, lambda transform: float("nan")).rotate


@pytest.mark.parametrize(("k", "options"), [(128, {"rotate": False}), (100, {})])
def test_one_candidate_is_not_measured(k: int, options: dict) -> None:
    def loss(_: Transform) -> float:
        raise AssertionError

    assert not choose([matrix(64, k)], None, "int4", Config("int4", smooth=False, **options), 0.0, loss).rotate


@pytest.mark.parametrize("rows", [1, 63])
def test_few_rows_choose_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix(64, 128)
    result = quantized(with_outliers(rows, 128, 1), w)
    monkeypatch.setattr(quantizer, "_trial", lambda *_: None)
    assert torch.equal(result.packed.shared.smooth, quantized(with_outliers(rows, 128, 1), w).packed.shared.smooth)


def test_inputs_that_say_nothing() -> None:
    """Dead channels, constant ones, and no input but zeros."""
    w, x = matrix(64, 128), with_outliers(200, 128, 1)
    x[:, 5], x[:, 7] = 0.0, 3.0
    assert quantized(x, w).error < 0.2
    silent = quantized(torch.zeros(200, 128), w)
    assert silent.error == 0
    assert loss(silent, w, with_outliers(50, 128, 2)) < 0.5


def test_the_same_bits_again() -> None:
    w, x = matrix(64, 192), with_outliers(200, 192, 1)
    first, second = (quantized(x, w).packed for _ in range(2))
    assert torch.equal(first.shared.smooth, second.shared.smooth)
    for name, tensor in first.own_tensors().items():
        assert torch.equal(tensor, second.own_tensors()[name]), name


# ** the reach of a format's scales **


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("size", [1e-8, 1e-3, 1e3, 1e8])
def test_nvfp4_takes_inputs_of_any_size(size: float, smooth: bool) -> None:
    """e4m3 has scales from 2^-9 to 448 only."""
    w, known, new = matrix(32, 128), with_outliers(128, 128, 0), with_outliers(64, 128, 1)
    usual, other = (loss(quantized(known * s, w, "nvfp4", smooth=smooth), w, new * s) for s in (1.0, size))
    assert usual < 0.12
    assert other == pytest.approx(usual, rel=0.1)  # else 0.2 and more


def test_the_peak_of_nvfp4s_inputs_leaves_room_for_others() -> None:
    x = with_outliers(128, 128, 0) * 1e-3
    smooth = quantized(x, matrix(32, 128), "nvfp4").packed.shared.smooth
    peak = float((x / smooth).abs().amax())
    assert nvfp4.PEAK / 2 <= peak < nvfp4.PEAK
    assert 20 * peak < nvfp4.E4M3_MAX * nvfp4.E2M1_MAX


def beside_a_loud_channel(rows: int, loud: float, seed: int) -> Tensor:
    x = with_outliers(rows, 128, seed)
    x[:, 5] *= loud
    return x


def unmoved(monkeypatch: pytest.MonkeyPatch, x: Tensor, w: Tensor, **options) -> Quantized:
    """By smoothing factors as they are without regard to e4m3."""
    with monkeypatch.context() as patch:
        patch.setattr(input_transform, "_within_reach", lambda smooth, *_: [smooth])
        return quantized(x, w, "nvfp4", **options)


@pytest.mark.parametrize("rows", [32, 128], ids=["few-rows", "rows-to-try"])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("loud", [1e3, 1e5, 1e7])
def test_a_loud_channel_that_nothing_reads_takes_nothing_from_others(
    monkeypatch: pytest.MonkeyPatch, loud: float, smooth: bool, rows: int
) -> None:
    w = matrix(32, 128)
    w[:, 5] = 0
    known, new = beside_a_loud_channel(rows, loud, 0), beside_a_loud_channel(64, loud, 1)
    result, before = quantized(known, w, "nvfp4", smooth=smooth), unmoved(monkeypatch, known, w, smooth=smooth)
    assert loss(result, w, new) < 1.02 * loss(before, w, new)


@pytest.mark.parametrize("rows", [32, 128], ids=["few-rows", "rows-to-try"])
@pytest.mark.parametrize("loud", [300.0, 2e3, 1e5])
def test_others_beside_a_loud_channel_keep_their_scales(
    monkeypatch: pytest.MonkeyPatch, loud: float, rows: int
) -> None:
    """Measured where the channel is as loud as they are, too: they have not become zeros."""
    w, known = matrix(32, 128), beside_a_loud_channel(rows, loud, 0)
    result, before = quantized(known, w, "nvfp4", smooth=False), unmoved(monkeypatch, known, w, smooth=False)
    for now in (1.0, loud):
        new = beside_a_loud_channel(64, now, 1)
        if loud < 1e4 or now == loud:  # else nothing holds both
            assert loss(result, w, new) < 1.02 * loss(before, w, new)


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
def test_other_formats_keep_their_smoothing(precision: str) -> None:
    x, w = with_outliers(128, 128, 0), matrix(32, 128)
    smooth = quantized(x * 1e-3, w, precision).packed.shared.smooth
    assert float(smooth.log().mean().exp()) == pytest.approx(1, rel=0.01)


def test_an_input_of_zeros_says_nothing_of_its_size() -> None:
    smooth = quantized(torch.zeros(128, 128), matrix(32, 128), "nvfp4").packed.shared.smooth
    assert float(smooth.log().mean().exp()) == pytest.approx(1, rel=0.01)


# ** files and graphs **


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 192, dtype=torch.bfloat16), nn.Linear(192, 128, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)) * 0.5)


@pytest.fixture
def rotated(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = Two().eval()
    svdq.quantize(model, precision="int4", rank=16, refine=0, progress=False)
    svdq.save(model, tmp_path / "m.svdq.safetensors")
    return model, tmp_path / "m.svdq.safetensors"


def test_a_file_keeps_it(rotated: tuple[nn.Module, Path]) -> None:
    model, path = rotated
    x = with_outliers(70, 128, 1).bfloat16()
    again = Two().eval()
    svdq.load(again, path, progress=False)
    assert svdq.packed(again.up.weight).shared.rotate
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_header_that_cannot_be(rotated: tuple[nn.Module, Path]) -> None:
    entry = read_header(rotated[1]).layers[0]
    assert entry.rotate
    for wrong in (replace(entry, shift=0.5), replace(entry, precision="w4a8")):
        with pytest.raises(FileRefused, match="reads a rotated input"):
            check_layout(wrong, {}, rotated[1])


def test_compiled_as_eager(rotated: tuple[nn.Module, Path]) -> None:
    """Where the two round to 16 bits at other places some 4-bit codes differ by one; without rotation nothing fits."""
    model, _ = rotated
    x = with_outliers(70, 128, 1).bfloat16()
    with torch.no_grad():
        expected = model(x)
        got = torch.compile(model, backend="svdquant", options={"progress": False})(x)
    assert (got - expected).float().norm() < 0.06 * expected.float().norm()


class _Read(nn.Module):
    """Weights that other products than a linear's read."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
        self.a = nn.Linear(256, 192)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.einsum("oi,bti->bto", self.a.weight, x)
        return torch.cat([self.attention(x, x, x)[0], product, self.a(x)], -1)


@pytest.mark.parametrize("run", ["eagerly", "compiled"])
def test_weights_that_are_expanded(run: str) -> None:
    """They are turned back, so each result is as near as without a rotation."""
    torch.manual_seed(0)
    model = _Read().to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 32, 256, dtype=torch.bfloat16)
    exact = model(x)
    svdq.quantize(model, precision="int4", progress=False)
    assert any(isinstance(p, QuantizedWeight) and p._svdq.shared.rotate for p in model.parameters())
    result = (compiled(model) if run == "compiled" else model)(x)
    for actual, expected in zip(result.split([256, 192, 192], -1), exact.split([256, 192, 192], -1), strict=True):
        assert relative_error(actual, expected) < 0.15


def test_a_weight_that_is_expanded_is_the_one_that_is_multiplied_by() -> None:
    packed = quantized(None, matrix(96, 256)).packed
    shared = packed.shared
    assert shared.rotate
    tensors = shared.smooth, packed.up, packed.down, *packed.weight
    actual = expand("int4", True, (96, 256), torch.float32, *tensors)
    assert relative_error(actual, packed.dequantize(torch.float32)) < 1e-6
