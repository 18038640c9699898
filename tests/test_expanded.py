"""Weights that no plain linear reads: kept in 4 bits, expanded before use."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import svdq_compile as svdq
from conftest import quiet, relative_error
from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.lowering.packed import as_matrix, expand
from svdq_compile.parameter import QuantizedWeight
from zoo.check import without_inductor

WIDTH, TOKENS = 128, 24
ROUNDED = 0.12  # 16 steps over the range of 64 Gaussian numbers lose 9.4 %


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * WIDTH**-0.5)


class One(nn.Module):
    """One way to multiply by a weight, between two blocks' worth of linears."""

    def __init__(self, multiply: Callable, *shape: int) -> None:
        super().__init__()
        self.w = weight(*shape)
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.w)


class Experts(nn.Module):
    """Of a loop over experts whose weights are one tensor, [experts, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight(3, WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.silu(x @ self.w[i]) for i in range(3))


class Spatial(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: int) -> None:
        super().__init__()
        self.conv = kind(WIDTH, WIDTH, **options)
        self.dims = self.conv.weight.dim() - 2

    def forward(self, x: Tensor) -> Tensor:
        picture = x.transpose(1, 2).unflatten(2, (TOKENS // 4, 4) if self.dims == 2 else (TOKENS,))
        if self.dims == 3:
            picture = picture.unflatten(2, (2, 3, 4)) if picture.dim() == 3 else picture
        return self.conv(picture)


def spatial3(x: Tensor, w: Tensor) -> Tensor:
    return F.conv3d(x.transpose(1, 2).unflatten(2, (2, 3, 4)), w, padding=1)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "matmul": lambda: One(lambda x, w: x @ w, WIDTH, 192),
    "matmul from the left": lambda: One(lambda x, w: torch.matmul(w.t(), x.transpose(1, 2)), WIDTH, 192),
    "einsum": lambda: One(lambda x, w: torch.einsum("btk,kn->btn", x, w), WIDTH, 192),
    "einsum over heads": lambda: One(lambda x, w: torch.einsum("btk,hkd->bhtd", x, w), 2, WIDTH, WIDTH),
    "addmm": lambda: One(lambda x, w: torch.addmm(x.new_ones(192), x.flatten(0, 1), w), WIDTH, 192),
    "baddbmm": lambda: One(lambda x, w: torch.baddbmm(x.new_ones(1), x, w), 2, WIDTH, 192),
    "bmm of experts": lambda: One(lambda x, w: torch.bmm(x.flatten(0, 1).expand(3, -1, -1), w), 3, WIDTH, 192),
    "a loop over experts": Experts,
    "linear by a slice": lambda: One(
        lambda x, w: torch.cat((F.linear(x, w[:64]), F.linear(x, w[64:])), -1), 192, WIDTH
    ),
    "linear by chunks": lambda: One(lambda x, w: sum(F.linear(x, part) for part in w.chunk(3)), 3 * WIDTH, WIDTH),
    "linear and matmul": lambda: One(lambda x, w: F.linear(F.linear(x, w), w.t()), 192, WIDTH),
    "a cast": lambda: One(lambda x, w: F.linear(x.double(), w.to(torch.float64)), 192, WIDTH),
    "bilinear": lambda: nn.Sequential(nn.Identity(), Bilinear()),
    "attention": lambda: Attention(),
    "weight norm": lambda: weight_norm(nn.Linear(WIDTH, 192)),
    "3x3 convolution": lambda: Spatial(nn.Conv2d, kernel_size=3, padding=1),
    "2x2 convolution in steps": lambda: Spatial(nn.Conv2d, kernel_size=2, stride=2),
    "1x1 convolution in steps": lambda: Spatial(nn.Conv2d, kernel_size=1, stride=2),
    "convolution in time": lambda: Spatial(nn.Conv1d, kernel_size=3, padding=1),
    "convolution in space and time": lambda: One(spatial3, WIDTH, WIDTH, 3, 3, 3),
    "transposed convolution": lambda: One(lambda x, w: F.conv_transpose1d(x.transpose(1, 2), w), WIDTH, WIDTH, 2),
}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().eval().requires_grad_(False)


def x() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def expanded(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if isinstance(p, QuantizedWeight) and p._svdq.expanded]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    """Compiled, eagerly and from a file: one result, near that in 16 bits."""
    with without_inductor():
        check(kind, tmp_path)


@pytest.mark.parametrize("kind", ["a loop over experts", "3x3 convolution", "weight norm"])
def test_through_inductor(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path)


def check(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    exact = model(x())
    run = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet(refine=0))
    with torch.no_grad():
        assert torch.allclose(run(x()), exact, atol=1e-4), "observed"
        result = run(x())
        assert expanded(model), svdq.report(model)
        assert 1e-3 < relative_error(result, exact) < 2 * ROUNDED
        assert relative_error(model(x()), result) < 1e-5, "eagerly"
        file = tmp_path / "one.svdq.safetensors"
        svdq.save(model, file, progress=False)
        other = svdq.load(made(kind).to("meta"), file, progress=False)
        assert expanded(other) == expanded(model)
        assert relative_error(torch.compile(other, backend="svdquant", options=quiet())(x()), result) < 1e-5
    for name in expanded(model):
        parameter = model.get_parameter(name)
        error = relative_error(parameter._svdq.dequantize(torch.float32), as_matrix(made(kind).get_parameter(name)))
        assert error < ROUNDED
        with torch._C.DisableTorchFunctionSubclass():
            assert parameter.untyped_storage().nbytes() == 0


STAY: dict[str, Callable[[], nn.Module]] = {
    "a table of positions": lambda: One(lambda x, w: F.layer_norm(x + w[:TOKENS], (WIDTH,)), 4 * TOKENS, WIDTH),
    "positions, and then a product": lambda: One(lambda x, w: (x + w[:TOKENS]) @ x.transpose(1, 2), 96, WIDTH),
    "looked up": lambda: One(lambda x, w: x + F.embedding(torch.arange(TOKENS), w), 256, WIDTH),
    "looked up and multiplied": lambda: One(
        lambda x, w: (x + F.embedding(torch.arange(TOKENS), w)) @ w.t(), 256, WIDTH
    ),
    "learned queries": lambda: One(lambda x, w: F.scaled_dot_product_attention(w.expand(2, -1, -1), x, x), 96, WIDTH),
    "scales of activations": lambda: One(lambda x, w: (x * w[:TOKENS]) @ x.transpose(1, 2), 96, WIDTH),
    "a picture to be convolved": lambda: One(lambda x, w: F.conv1d(w, x.new_ones(8, WIDTH, 3)), 2, WIDTH, 96),
    "small experts": lambda: One(lambda x, w: x[..., :32] @ w[0], 64, 32, WIDTH),
    "a convolution of each channel": lambda: One(
        lambda x, w: F.conv1d(x.transpose(1, 2), w, groups=WIDTH), WIDTH, 1, 3
    ),
}


@pytest.mark.parametrize("kind", STAY)
def test_what_stays(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), STAY[kind]()).eval().requires_grad_(False)
    exact = model(x())
    run = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet())
    with torch.no_grad(), without_inductor():
        run(x())
        assert relative_error(run(x()), exact) < 0.2
    quantized = [name for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)]
    assert quantized == ["0.weight"]


@pytest.mark.parametrize("precision", [f.name for f in FORMATS.values() if f.planar])
@pytest.mark.parametrize("rank", [0, 16])
def test_the_order_of_kernels_is_expanded_alike(precision: str, rank: int) -> None:
    """On a GPU codes lie in another order; torch.compile traces through what turns it."""
    n, k = 96, 200
    plain = FORMATS[precision].quantize_weight(torch.randn(n, k))
    branch = torch.rand(k) + 0.5, torch.randn(n, rank), torch.randn(rank, k)
    expected = expand(precision, False, (4, 24, k), torch.float32, *branch, *plain)
    turned = torch.compile(expand, backend="aot_eager", fullgraph=True)
    actual = turned(precision, False, (4, 24, k), torch.float32, *branch, *layout.to_kernel(precision, plain))
    assert torch.equal(actual, expected)


def test_convolutions_by_weights_alone() -> None:
    """What kind of module it is tells enough; the same weights as on the fly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.SiLU(), nn.Conv2d(WIDTH, 3, 3)).eval().requires_grad_(False)
    picture = torch.randn(1, WIDTH, 8, 8)
    exact = model(picture)
    report = svdq.quantize(model, svdq.Config(**quiet()))
    assert [(row.name, row.precision) for row in report] == [("0", "w4a16")], "the last is too narrow"
    assert expanded(model) == ["0.weight"]
    assert 1e-3 < relative_error(model(picture), exact) < 2 * ROUNDED


def test_another_backend_gets_the_values() -> None:
    model = made("a loop over experts")
    run = torch.compile(model, backend="svdquant", options=quiet())
    with torch.no_grad(), without_inductor():
        for _ in range(2):
            result = run(x())
        torch._dynamo.reset()
        assert relative_error(torch.compile(model, backend="aot_eager")(x()), result) < 1e-5


def test_reading_is_still_refused() -> None:
    """What is quantized as a linear is not read; nor are experts written to or taken for their values."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Experts()).eval().requires_grad_(False)
    run = torch.compile(model, backend="svdquant", options=quiet())
    with torch.no_grad(), without_inductor():
        for _ in range(2):
            run(x())
    for read in (
        lambda: model[0].weight.t(),
        lambda: model[1].w + 1,
        lambda: model[1].w.numpy(),
        lambda: model[1].w.mul_(2),
    ):
        with pytest.raises(svdq.SvdqError, match="16-bit"):
            read()


class NormedLinear(nn.Linear):
    """One that does not multiply by its weight as it is, nor by what a weight is scaled to by Parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=-1), self.bias)


class StandardizedConv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.weight.mean((1, 2), keepdim=True), self.weight.std((1, 2), keepdim=True)
        return F.conv1d(x.transpose(1, 2), (self.weight - mean) / deviation, padding=1).transpose(1, 2)


class TiedTable(nn.Module):
    """A table whose rows are looked up, and which a linear reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.table(torch.arange(TOKENS)))


OTHERWISE = {
    "normalized": lambda: NormedLinear(WIDTH, WIDTH),
    "standardized": lambda: StandardizedConv(WIDTH, WIDTH, 3),
    "looked up": TiedTable,
}


@pytest.mark.parametrize("ahead", ["calibrated", "by shapes", "by weights alone", "on the fly"])
@pytest.mark.parametrize("kind", OTHERWISE)
def test_weights_that_are_read_otherwise_stay(kind: str, ahead: str) -> None:
    """Whatever kind of module holds them; they would be gone, and the model could not be called any more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), OTHERWISE[kind]()).eval().requires_grad_(False)
    exact = model(x())
    with torch.no_grad(), without_inductor():
        if ahead == "calibrated":
            svdq.quantize(model, quiet(), calibrate=lambda model: model(x()))
        elif ahead == "by shapes":
            svdq.quantize(model, quiet(), example_inputs={"input": x()})
        elif ahead == "by weights alone":
            svdq.quantize(model, quiet())
        run = svdq.compile(model, quiet())
        for _ in range(2):
            y = run(x())
        assert relative_error(y, exact) < ROUNDED
        assert relative_error(model._call_impl(x()), y) < 1e-5, "eagerly"
    quantized = [name for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)]
    assert quantized == ["0.weight"]
    if ahead != "by weights alone" and kind != "looked up":
        (row,) = [row for row in svdq.report(model) if row.error is None]
        assert row.reason == "something other than a linear reads its weight"


def test_kept_values_do_not_make_another_picture() -> None:
    """Eagerly, expanded weights are as in compiled code."""
    model = made("a loop over experts")
    svdq.quantize(model, quiet(weights="keep"), calibrate=lambda model: model(x()))
    kept = model(x())
    other = made("a loop over experts")
    svdq.quantize(other, quiet(), calibrate=lambda model: model(x()))
    assert torch.equal(kept, other(x()))


def test_what_was_asked_for_and_left_is_reported() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Experts()).eval().requires_grad_(False)
    svdq.quantize(model, quiet(skip=["*.w"]), calibrate=lambda model: model(x()))
    assert {row.name: row.reason for row in svdq.report(model)} == {"0": "", "1.w": "option skip"}
