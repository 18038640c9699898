"""The formats' own arithmetic: packing round trips, and errors no larger than rounding explains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdq_compile.kernels.formats import (
    AUTO,
    FEW_ROWS,
    FORMATS,
    codes_of,
    groups,
    int4,
    layout,
    nibbles,
    nvfp4,
    w4a8,
    w8a8,
)
from svdq_compile.kernels.formats import int8_matmul as int8
from svdq_compile.kernels.formats.int8_matmul import int8_matmul

QUANTIZED = [f.name for f in FORMATS.values() if f.codes is not None]
# Of a group's span: how far an entry may be from what it was, by half a step and by clipping.
STEP = {"w4a8": 2.0 / 7, "int4": 2.0 / 7, "nvfp4": 0.36, "w4a16": 0.2, "w8a8": 0.501 / 127}
# Relative, of a Gaussian; of activations by their codes.
WEIGHT_ERROR = {"w4a8": 0.11, "int4": 0.11, "nvfp4": 0.085, "w4a16": 0.10, "w8a8": 0.009}
ACTIVATION_ERROR = {"int8": 0.012, "int4": 0.15, "fp4": 0.12}
SHAPES = [(64, 64), (96, 128), (70, 100), (128, 640)]  # whole groups, and K that ends within one


def random(n: int, k: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """[n, k] values whose channels differ in size by a factor e^spread."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(k, generator=generator))
    return torch.randn(n, k, generator=generator) * size


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.randoms(use_true_random=False))
def test_nibbles_round_trip(rows: int, pairs: int, source) -> None:
    codes = torch.tensor([[source.randrange(16) for _ in range(2 * pairs)] for _ in range(rows)], dtype=torch.uint8)
    packed = nibbles.pack(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(nibbles.unpack(packed), codes)


def test_nibbles_put_the_even_channel_low() -> None:
    assert nibbles.pack(torch.tensor([[1, 2, 3, 4]])).tolist() == [[0x21, 0x43]]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_representable_survives(name: str, shape: tuple[int, int]) -> None:
    """Quantizing a dequantized weight changes nothing: the scales that are chosen can express it."""
    fmt = FORMATS[name]
    first = fmt.dequantize_weight(*fmt.quantize_weight(random(*shape)))[:, : shape[1]]
    again = fmt.dequantize_weight(*fmt.quantize_weight(first))[:, : shape[1]]
    assert (again - first).norm() <= 0.02 * first.norm()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)), st.integers(1, 40), st.integers(1, 200), st.integers(0, 99), st.floats(-20, 20)
)
def test_weight_error_is_bounded_by_half_a_step(name: str, n: int, k: int, seed: int, log_size: float) -> None:
    """No element is off by more than the step of its group: half of one from rounding, the rest from clipping the
    span.
    """
    fmt = FORMATS[name]
    w = random(n, k, seed) * 2.0**log_size
    got = fmt.dequantize_weight(*fmt.quantize_weight(w))[:, :k]
    size = fmt.group_size or k
    error = groups.split((got - w).abs(), size).amax(-1)
    values = groups.split(w, size)
    span = values.abs().amax(-1)
    if name == "w4a8":  # a group far smaller than its channel's largest has a coarse sub-scale
        span = torch.maximum(span, span.amax(1, keepdim=True) / w4a8.MAX_SUBSCALE * 7)
    assert (error <= STEP[name] * span + 1e-30).all()


@pytest.mark.parametrize("name", FORMATS)
def test_gaussian_weight_error(name: str) -> None:
    """Round-to-nearest of a Gaussian in groups of 64 loses 9 to 11 % in 4 bits; a wrong scale or sign far more."""
    fmt, most = FORMATS[name], WEIGHT_ERROR[name]
    w = random(256, 512, spread=0.0)
    error = (fmt.dequantize_weight(*fmt.quantize_weight(w)) - w).norm() / w.norm()
    assert 0.5 * most < error < most


@pytest.mark.parametrize("name", FORMATS)
def test_importance_moves_the_error_away_from_what_counts(name: str) -> None:
    fmt = FORMATS[name]
    w = random(64, 128, spread=0.0)
    importance = torch.full((128,), 1e-3)
    importance[:8] = 1.0

    def loss(tensors: tuple) -> torch.Tensor:
        return ((fmt.dequantize_weight(*tensors) - w).square() * importance).sum()

    assert loss(fmt.quantize_weight(w, importance)) <= loss(fmt.quantize_weight(w))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", [(0, 128), (1, 64), (5, 100), (2, 3, 256)])
def test_activation_error(name: str, shape: tuple[int, ...]) -> None:
    fmt, codes = FORMATS[name], codes_of(name)
    assert fmt.quantize_activation is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(shape[-1])
    qx, ascales = fmt.quantize_activation(x)
    laid_out = codes.empty(x, x.shape[:-1], shape[-1])
    assert [(t.shape, t.dtype) for t in laid_out] == [(t.shape, t.dtype) for t in (qx, ascales)]
    back = fmt.matmul(qx, ascales, *_exact_identity(name, eye))
    assert back.shape == (*shape[:-1], shape[-1])
    assert (back - x).norm() <= ACTIVATION_ERROR[codes.name] * x.norm()


def _exact_identity(name: str, eye: torch.Tensor) -> tuple:
    """The identity matrix packed without error: its values are the format's largest code times a scale."""
    tensors = FORMATS[name].quantize_weight(eye)
    assert torch.allclose(FORMATS[name].dequantize_weight(*tensors)[:, : eye.shape[1]], eye, atol=4e-3)
    return tensors


def test_rows_of_zeros_stay_zero() -> None:
    for name, fmt in FORMATS.items():
        zeros = torch.zeros(3, 128)
        weight = fmt.quantize_weight(zeros)
        assert not fmt.dequantize_weight(*weight).any(), name
        if fmt.quantize_activation is not None:
            assert not fmt.matmul(*fmt.quantize_activation(zeros), *weight).any(), name


def test_unsigned_codes_use_all_sixteen_steps() -> None:
    x = torch.rand(8, 64)
    qx, ascales = int4.quantize_activation(x, unsigned=True)
    assert (qx.min(), qx.max()) == (0, 15)
    unsigned = (int4.dequantize_activation(qx, ascales) - x).norm()
    signed = (int4.dequantize_activation(*int4.quantize_activation(x)) - x).norm()
    assert unsigned < 0.6 * signed


def test_w4a8_matmul_is_exact_in_integers() -> None:
    """Against the same integers in float64: nothing is lost between the codes and the scales."""
    w, x = random(72, 640, 1), random(9, 640, 2)
    qweight, subscales, wscales = w4a8.quantize_weight(w)
    qx, ascales = w4a8.quantize_activation(x)
    codes = w4a8.expand_weight(qweight, subscales)
    assert -8 * w4a8.MAX_SUBSCALE <= codes.min() < codes.max() <= 7 * w4a8.MAX_SUBSCALE
    exact = qx.double() @ codes.double().t() * ascales.double() * wscales.double()
    got = w4a8.matmul(qx, ascales, qweight, subscales, wscales)
    assert (got - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_w8a8_loses_little() -> None:
    """A product of random matrices is off by about 1 %, a tenth of what 4-bit weights cost."""
    w, x = random(256, 512, 1, spread=0.0), random(300, 512, 2, spread=0.0)
    exact = x.double() @ w.double().t()
    got = w8a8.matmul(*w8a8.quantize_activation(x), *w8a8.quantize_weight(w))
    coarse = w4a8.matmul(*w4a8.quantize_activation(x), *w4a8.quantize_weight(w))
    assert (got - exact).norm() < 0.015 * exact.norm()
    assert (got - exact).norm() < 0.15 * (coarse - exact).norm()


def test_w8a8_matmul_is_exact_in_integers() -> None:
    w, x = random(72, 640, 1), random(9, 640, 2)
    qweight, wscales = w8a8.quantize_weight(w)
    qx, ascales = w8a8.quantize_activation(x)
    assert qweight.abs().amax(1).eq(127).all()
    exact = qx.double() @ qweight.double().t() * ascales.double() * wscales.double()
    got = w8a8.matmul(qx, ascales, qweight, wscales)
    assert (got - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_agrees_with_itself(name: str) -> None:
    """What it says of activations, siblings and rounding fits together, and with what is chosen by default."""
    fmt = FORMATS[name]
    assert (fmt.codes is None) == (fmt.quantize_activation is None) == (fmt.dequantize_activation is None)
    weight = fmt.quantize_weight(random(128, 192))
    assert len(weight) == len(fmt.fields)
    if fmt.siblings:
        for order in (weight, layout.to_kernel(name, weight)):
            sizes = [t.shape[dim] for t, dim in zip(order, layout.feature_dims(name, order), strict=True)]
            assert sizes == [128] * len(order)
    assert FORMATS[AUTO].codes is not None
    assert FORMATS[FEW_ROWS].codes is None


def test_int8_matmul_holds_the_largest_product() -> None:
    k = 16384
    a = torch.full((2, k), 127, dtype=torch.int8)
    b = torch.full((3, k), -126, dtype=torch.int8)
    assert int8_matmul(a, b).tolist() == [[-127 * 126 * k] * 3] * 2


@pytest.mark.parametrize("k", [40, 1024, 1025, 3000])
@pytest.mark.parametrize("quick", [True, False], ids=["int8", "floats"])
def test_int8_matmul_is_exact_with_and_without_int8_products(quick: bool, k: int, monkeypatch) -> None:
    monkeypatch.setattr(int8, "_has_int8_products", lambda: quick)
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator) for rows in (17, 9))
    a[0], b[0] = -128, -128  # the largest sum there is
    assert torch.equal(int8_matmul(a, b), (a.long() @ b.long().t()).int())


def test_e2m1_encodes_every_value_and_rounds_ties_to_even() -> None:
    values = torch.tensor(nvfp4.E2M1 + tuple(-v for v in nvfp4.E2M1[1:]))
    assert torch.equal(nvfp4.decode_e2m1(nvfp4.encode_e2m1(values)), values)
    between = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0])
    assert nvfp4.decode_e2m1(nvfp4.encode_e2m1(between)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    many = torch.cat((between, torch.linspace(-9, 9, 100001), torch.tensor([1e-30, -1e30])))
    assert torch.equal(nvfp4.round_e2m1(many), nvfp4.decode_e2m1(nvfp4.encode_e2m1(many)))


def test_scales_of_nvfp4_are_hardly_worse_than_the_best_that_there_are() -> None:
    """Over all scales of e4m3; those that end a group at 6 or clip it lose 20 % more."""
    w = random(32, 256, spread=0.0)
    _, wscales, wtscale = nvfp4.quantize_weight(w)
    values = groups.split(w, nvfp4.GROUP_SIZE)

    def losses(scales: torch.Tensor) -> torch.Tensor:
        return (nvfp4.round_e2m1(values / scales) * scales - values).square().sum(-1)

    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * wtscale
    least = torch.stack([losses(scale) for scale in every]).amin(0)
    assert losses(wscales.float().unsqueeze(-1) * wtscale).sum() < 1.01 * least.sum()
