"""Convolutions outside the repeated blocks, as a UNet's: kept in 4 bits by the option `convolutions`."""

import copy
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import svdq_compile as svdq
import zoo
from conftest import logged, quiet, relative_error, run_eagerly
from svdq_compile import decisions, observing
from svdq_compile.errors import FileRefused, NonFiniteWeight, OptionError
from svdq_compile.header import UNSEALED, read_header, seal
from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.layers import BETWEEN
from svdq_compile.lowering.packed import as_matrix, expand
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.passes.scope import OUTSIDE
from svdq_compile.patches import patches
from svdq_compile.sharing import _read, _written
from svdq_compile.streaming import quantize_file

WIDTH = 64
CONVOLUTIONS = ["resnets.0.conv1", "resnets.0.conv2", "down", "up"]
# 4-bit storage is 0.5 bytes for each value and 4 for each 64, fp32 has 4; and 4 bytes a column for smoothing factors.
SHARE = (0.5 + 4 / 64) / 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.up, self.down = nn.Linear(2 * WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Resnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class UNet(nn.Module):
    """What UNets have in common: convolutions at several sizes, and repeated blocks between them."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, WIDTH, 3, padding=1)
        self.resnets = nn.ModuleList([Resnet()])
        self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.proj_in = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 1)
        self.blocks = nn.ModuleList([Block()])
        self.up = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding="same", bias=False)
        self.conv_out = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.resnets[0](self.conv_in(x))
        x = self.proj_in(self.down(skipped))
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        x = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.conv_out(self.up(F.interpolate(x, scale_factor=2.0)) + skipped)


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet().eval().requires_grad_(False)


def pictures(seed: int = 1, count: int = 2) -> Tensor:
    """Smooth ones: neighbours are alike, as they are in a model."""
    noise = torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, scale_factor=2.0, mode="bicubic") * 2


def quantized(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = unet() if model is None else model
    given = {"calibrate": lambda model: model(pictures())} | options
    svdq.quantize(model, **(quiet(convolutions=True) | given))
    return model


def in_4_bits(model: nn.Module) -> list[str]:
    """The convolutions that are."""
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, nn.Conv2d) and isinstance(m.weight, QuantizedWeight)]


def plain(model: nn.Module) -> nn.Module:
    """The same in 16 bits, of the values that its 4-bit weights stand for."""
    other = copy.deepcopy(model)
    svdq.restore(other, dequantize=True, progress=False)
    return other


def test_they_stay_by_default() -> None:
    report = svdq.quantize(model := unet(), quiet(), calibrate=lambda model: model(pictures()))
    assert not in_4_bits(model)
    assert {row.name: row.reason for row in report if row.name in CONVOLUTIONS} == dict.fromkeys(CONVOLUTIONS, BETWEEN)


def test_the_option_takes_them() -> None:
    model = quantized()
    assert in_4_bits(model) == CONVOLUTIONS
    rows = {row.name: row for row in svdq.report(model)}
    for name in CONVOLUTIONS:
        row = rows[name]
        assert (row.precision, row.rank) == ("w4a16", 0)
        columns = as_matrix(model.get_submodule(name).weight).shape[1]
        assert row.bytes_after == row.bytes_before * SHARE + 4 * columns
        assert 0 < row.error < 0.1
    assert rows["conv_in"].reason == "it is small (64 x 4)"
    assert rows["conv_out"].reason == "it is small (4 x 64)"
    assert "outside the repeated blocks" in rows["proj_in"].reason, "a 1x1 convolution is a linear"
    planned = svdq.doctor(unet(), convolutions=True).plans
    assert {plan.name: plan.bytes_after for plan in planned if plan.name in CONVOLUTIONS} == {
        name: rows[name].bytes_after for name in CONVOLUTIONS
    }


def test_skip_names_them_too() -> None:
    assert in_4_bits(quantized(skip=["resnets.0"])) == ["down", "up"]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_every_way_gives_one_result(order: torch.memory_format, tmp_path: Path, without_inductor: None) -> None:
    """On the fly, eagerly and from a file, in the strides of the 16-bit model."""
    model, x = unet().to(memory_format=order), pictures().to(memory_format=order)
    exact = model(x)
    run = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet(convolutions=True))
    assert torch.equal(run(x), exact), "observed"
    result = run(x)
    assert in_4_bits(model) == CONVOLUTIONS
    assert 1e-3 < relative_error(result, exact) < 0.1
    assert result.stride() == exact.stride()
    assert relative_error(result, plain(model)(x)) < 0.02, "4-bit activations of linears aside"
    assert relative_error(model(x), result) < 1e-5, "eagerly"
    svdq.save(model, tmp_path / "unet", progress=False)
    with torch.device("meta"):
        empty = UNet()
    loaded = svdq.load(empty, tmp_path / "unet", progress=False)
    assert in_4_bits(loaded) == CONVOLUTIONS
    assert relative_error(loaded(x), result) < 1e-5, "from a file"
    assert relative_error(svdq.compile(loaded, quiet())(x), result) < 1e-5, "compiled from a file"


@pytest.mark.parametrize("order", ["plain", "of kernels"])
def test_inductor_makes_one_kernel_of_a_weight(order: str) -> None:
    """Codes are read and values written in one, in the order that a convolution wants."""
    out, channels = 64, 128
    weight = torch.randn(out, channels, 3, 3)
    codes = FORMATS["w4a16"].quantize_weight(as_matrix(weight))
    codes = layout.to_kernel("w4a16", codes) if order == "of kernels" else codes
    columns = 9 * channels
    branch = torch.ones(columns), torch.zeros(out, 0), torch.zeros(0, columns)

    def convolve(x: Tensor, *tensors: Tensor) -> Tensor:
        form = "w4a16", False, (out, channels, 3, 3), torch.bfloat16
        return F.conv2d(x, expand(*form, *branch, *tensors, taps_first=True), padding=1)

    x = torch.randn(1, channels, 8, 8, dtype=torch.bfloat16)
    result, (code,) = run_and_get_code(torch.compile(convolve), x, *codes)
    made = re.findall(r"= empty_strided_cpu\(\(64, (.*)\), torch\.\w+\)", code)
    assert made == ["128, 3, 3), (1152, 1, 384, 128"], "one tensor of the weight's size, its channels last"
    assert relative_error(result, convolve(x, *codes)) < 1e-2
    assert relative_error(convolve(x, *codes), F.conv2d(x, weight.bfloat16(), padding=1)) < 0.12


def test_a_branch_lies_in_the_same_order() -> None:
    """Which a target may give a convolution."""
    weight, up, down = torch.randn(WIDTH, 32, 3, 3), torch.randn(WIDTH, 8), torch.randn(8, 9 * 32)
    codes = FORMATS["w4a16"].quantize_weight(as_matrix(weight))
    expected = as_matrix(weight) + up @ down
    values = expand(
        "w4a16", False, (WIDTH, 32, 3, 3), torch.float32, torch.ones(9 * 32), up, down, *codes, taps_first=True
    )
    assert values.is_contiguous()
    assert relative_error(as_matrix(values), expected) < 0.05


def test_what_was_observed_counts() -> None:
    """On other pictures than those that calibrated, whose channels and neighbours are alike, as they are in models."""

    def inputs(seed: int) -> Tensor:
        return torch.einsum("oc,bchw->bohw", mixed, pictures(seed, count=8)) + 0.03 * torch.randn(8, WIDTH, 12, 12)

    mixed = torch.randn(WIDTH, 4)
    torch.manual_seed(0)
    conv, x = nn.Conv2d(WIDTH, WIDTH, 3, padding=1).requires_grad_(False), inputs(2)
    exact = conv(x)
    alone = relative_error(quantized(copy.deepcopy(conv), calibrate=None)(x), exact)
    observed = relative_error(quantized(conv, calibrate=lambda conv: [conv(inputs(i)) for i in (1, 3, 4)])(x), exact)
    assert observed < 0.5 * alone


def test_statistics_of_a_file_give_the_same_bits(tmp_path: Path) -> None:
    seen = svdq.observe(unet(), lambda model: model(pictures()), convolutions=True, progress=False)
    seen.save(tmp_path / "seen", progress=False)
    known = svdq.Statistics.load(tmp_path / "seen", progress=False)
    model, other = quantized(), quantized(calibrate=None, statistics=known)
    for name in CONVOLUTIONS:
        packs = (svdq.packed(m.get_submodule(name).weight) for m in (model, other))
        assert all(torch.equal(a, b) for a, b in zip(*(pack.weight for pack in packs), strict=True))


def test_statistics_without_them_are_no_hindrance() -> None:
    """They are rounded by their weights alone then, and watched for nobody who has not asked."""
    seen = svdq.observe(unet(), lambda model: model(pictures()), progress=False)
    assert not any(name in CONVOLUTIONS for known, _ in seen.inputs for name in known.names)
    model = quantized(calibrate=None, statistics=seen)
    assert in_4_bits(model) == CONVOLUTIONS
    x = pictures(seed=5)
    assert relative_error(model(x), quantized(calibrate=None)(x)) < 0.05


def from_before() -> svdq.Statistics:
    """As they were before the option: a convolution outside the blocks was left as a linear there is."""
    seen = svdq.observe(unet(), lambda model: model(pictures()), progress=False)
    return replace(seen, others={**seen.others, **dict.fromkeys(CONVOLUTIONS, OUTSIDE)})


def test_statistics_from_before_are_no_hindrance(tmp_path: Path) -> None:
    from_before().save(tmp_path / "older", progress=False)
    older = svdq.Statistics.load(tmp_path / "older", progress=False)
    with logged("svdq_compile") as records:
        model = quantized(calibrate=None, statistics=older)
    assert in_4_bits(model) == CONVOLUTIONS
    assert "not reached 4 linears" in records[0].getMessage()
    assert ", ".join(CONVOLUTIONS) in records[0].getMessage()
    rows = svdq.quantize(model := unet(), quiet(), statistics=older)
    assert not in_4_bits(model)
    assert {row.name: row.reason for row in rows if row.name in CONVOLUTIONS} == dict.fromkeys(CONVOLUTIONS, BETWEEN)


@pytest.mark.parametrize("is_first", [True, False])
def test_merging_with_statistics_from_before_keeps_what_was_observed(is_first: bool) -> None:
    newer = svdq.observe(unet(), lambda model: model(pictures()), convolutions=True, progress=False)
    merged = svdq.Statistics.merge(*((from_before(), newer) if is_first else (newer, from_before())))
    assert merged.others == newer.others
    model = quantized(calibrate=None, statistics=merged)
    assert in_4_bits(model) == CONVOLUTIONS
    assert all(model.get_submodule(name).weight._svdq_calibrated for name in CONVOLUTIONS)


def test_other_reasons_of_statistics_count() -> None:
    newer = svdq.observe(unet(), lambda model: model(pictures()), convolutions=True, progress=False)
    left = replace(newer, others={**newer.others, "down": "it is a table too"})
    model = quantized(calibrate=None, statistics=svdq.Statistics.merge(left, newer))
    assert in_4_bits(model) == [name for name in CONVOLUTIONS if name != "down"]


SHAPES: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "3x3": (nn.Conv2d, (2, 5, 9, 7), {"kernel_size": 3, "padding": 1}),
    "in steps and apart": (
        nn.Conv2d,
        (2, 5, 9, 7),
        {"kernel_size": (3, 2), "padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)},
    ),
    "even, same size, without a batch": (nn.Conv2d, (5, 9, 7), {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "in time": (nn.Conv1d, (2, 5, 9), {"kernel_size": 3, "padding": "valid", "stride": 2}),
    "in space and time": (nn.Conv3d, (2, 5, 4, 5, 6), {"kernel_size": (2, 3, 1), "padding": (1, 1, 0)}),
    "no sample": (nn.Conv2d, (0, 5, 9, 7), {"kernel_size": 3}),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_convolution_is_a_linear_over_patches(kind: str) -> None:
    module, shape, options = SHAPES[kind]
    conv, x = module(5, 6, bias=False, **options), torch.randn(shape)
    sizes = conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation
    y = conv(x) if x.dim() == conv.weight.dim() else conv(x[None])
    rows = patches(x, *sizes, most=10**6)
    torch.testing.assert_close(rows @ as_matrix(conv.weight).t(), y.movedim(1, -1).flatten(0, -2))
    assert patches(x, *sizes, most=7).shape == (min(7, len(rows)), rows.shape[1])


@pytest.mark.parametrize("padding", [0, "valid", (0, 0)])
def test_nothing_is_copied_to_pad_by_nothing(padding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, sizes = torch.randn(2, 5, 9, 7), ((3, 3), 2)
    expected = patches(F.pad(x, (1, 1, 1, 1)), *sizes, padding, 1, 99)
    assert torch.equal(patches(x, *sizes, 1, 1, 99), expected)
    monkeypatch.setattr(F, "pad", None)
    assert torch.equal(patches(x, *sizes, padding, 1, 6), patches(x, *sizes, 0, 1, 6))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("you can't allocate memory")])
def test_a_call_needs_no_memory_to_be_watched(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes as it would alone; what could not be observed is rounded by its weight alone, and told once."""

    def pad(*_: Any) -> Tensor:
        raise error

    observing._tell_of_memory.cache_clear()
    x, results = pictures(), []
    exact = unet()(x)
    model = unet()
    with logged("svdq_compile") as records, monkeypatch.context() as context:
        context.setattr("svdq_compile.patches.F.pad", pad)
        quantized(model, calibrate=lambda model: results.append(model(x)))
    assert torch.equal(results[0], exact)
    assert in_4_bits(model) == CONVOLUTIONS
    assert not any(model.get_submodule(name).weight._svdq_calibrated for name in CONVOLUTIONS)
    assert model.blocks[0].up.weight._svdq_calibrated
    assert sum("no memory to observe" in record.getMessage() for record in records) == 1
    assert relative_error(model(x), exact) < 0.15


def test_other_errors_of_watching_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def patches(*_: Any) -> Tensor:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(observing, "patches", patches)
    with pytest.raises(RuntimeError, match="a mistake"):
        quantized()


@pytest.mark.parametrize(("channels", "groups"), [(WIDTH, 1), (2 * WIDTH, 2)], ids=["one", "in groups"])
def test_a_long_kernel_is_rounded_by_its_weight_alone(channels: int, groups: int, tmp_path: Path) -> None:
    """One of 64 taps in a row counts as several matrices, which read no patches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(channels, WIDTH, WIDTH, groups=groups)).requires_grad_(False)
    x = torch.randn(2, channels, 80)
    exact = model(x)
    seen = svdq.observe(model, lambda model: model(x), progress=False)
    seen.save(tmp_path / "seen", progress=False)
    known = svdq.Statistics.load(tmp_path / "seen", progress=False)
    assert [(own.names, own.moment_rows) for own, _ in known.inputs] == [(("0",), None)]
    other = copy.deepcopy(model)
    (row,) = svdq.quantize(model, quiet(), calibrate=lambda model: model(x))
    assert row.precision == "w4a16"
    assert 1e-3 < relative_error(model(x), exact) < 0.15
    svdq.quantize(other, quiet(), statistics=known)
    assert torch.equal(other(x), model(x))


def test_a_padding_that_is_a_step_of_its_own_is_observed() -> None:
    """`padding_mode` pads before the convolution; and a module called twice is one weight."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect", bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    torch.manual_seed(0)
    model, x = Twice().eval().requires_grad_(False), torch.randn(1, WIDTH, 6, 6)
    exact = model(x)
    report = svdq.quantize(model, quiet(), calibrate=lambda model: model(x))
    assert [row.name for row in report] == ["conv"]
    assert model.conv.weight._svdq_calibrated
    assert 1e-3 < relative_error(model(x), exact) < 0.2


def test_restoring_gives_each_value_its_place() -> None:
    model = quantized()
    restored, original = plain(model), unet()
    for name in CONVOLUTIONS:
        values, exact = (m.get_submodule(name).weight for m in (restored, original))
        assert values.stride() == exact.stride()
        assert relative_error(values, exact) < 0.15
    svdq.restore(model, original.state_dict(), progress=False)
    assert torch.equal(model(pictures()), original(pictures()))


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same file with its layers said otherwise, and a digest that is right."""
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    entries = json.loads(metadata["layers"])
    for entry in entries:
        change(entry)
    save_file(tensors, file, metadata | {"layers": json.dumps(entries), "digest": UNSEALED})
    seal(file)


def test_files_from_before_have_their_columns_otherwise(tmp_path: Path) -> None:
    """[I, kh, kw] in a row, which no entry said then. They load, compute as they did, and are saved so again."""
    model, x = quantized(), pictures()
    result, file = model(x), tmp_path / "older"
    for name in CONVOLUTIONS:
        weight = model.get_submodule(name).weight
        values = weight._svdq.values(weight)
        codes = FORMATS["w4a16"].quantize_weight(values.flatten(1))
        weight._svdq = replace(weight._svdq, weight=codes, taps_first=False)
    older = model(x)
    assert relative_error(older, result) < 0.1
    svdq.save(model, file, progress=False)
    rewritten(file, lambda entry: entry.pop("taps_first"))
    loaded = svdq.load(unet(), file, progress=False)
    assert torch.equal(loaded(x), older)
    svdq.save(loaded, file, progress=False)
    assert torch.equal(svdq.load(unet(), file, progress=False)(x), older)
    assert not any(entry.taps_first for entry in read_header(file).layers if entry.name in CONVOLUTIONS)


def test_columns_of_a_convolution_that_is_none_are_refused(tmp_path: Path) -> None:
    svdq.save(quantized(), tmp_path / "unet", progress=False)
    rewritten(tmp_path / "unet", lambda entry: entry.update(taps_first=True))
    with pytest.raises(FileRefused, match=r"blocks.0.up.weight has the columns of a convolution, and the shape"):
        svdq.load(unet(), tmp_path / "unet", progress=False)


def test_the_whole_model_is_compiled_where_they_are_in_4_bits(capsys: pytest.CaptureFixture) -> None:
    """Blocks alone would never meet them."""
    svdq.compile(unet(), calibration_steps=1)
    assert "compiled by its blocks" in capsys.readouterr().err
    svdq.compile(unet(), calibration_steps=1, convolutions=True)
    assert "compiled as a whole" in capsys.readouterr().err
    svdq.compile(quantized(), calibration_steps=1)
    assert "compiled as a whole" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["quantized", "loaded", "loaded from before"])
def test_compiling_what_was_quantized_without_them_says_so(way: str, tmp_path: Path, capsys: Any) -> None:
    """And compiles the blocks, since nothing else is in 4 bits."""
    model = quantized(convolutions=False)
    if way != "quantized":
        if way == "loaded from before":
            for name in CONVOLUTIONS:
                decisions.leave_alone(model.get_submodule(name).weight, OUTSIDE)
        svdq.save(model, tmp_path / "unet", progress=False)
        model = svdq.load(unet(), tmp_path / "unet", progress=False)
    with logged("svdq_compile", logging.WARNING) as records:
        svdq.compile(model, convolutions=True)
    (told,) = [record.getMessage() for record in records]
    assert "this UNet was quantized without it, so its 4 convolutions stay in 16-bit" in told
    assert "svdq_compile.quantize(model, convolutions=True)" in told
    assert "compiled by its blocks" in capsys.readouterr().err
    with logged("svdq_compile", logging.WARNING) as records:
        svdq.compile(model)
        svdq.compile(quantized(), convolutions=True)
        svdq.compile(quantized(skip=["down"]), convolutions=True)
        svdq.compile(unet(), convolutions=True)
    assert not records


class OnlyConvolutions(nn.Module):
    """Of which nothing else may be quantized; in two graphs."""

    _repeated_blocks = ("SiLU",)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(WIDTH, WIDTH, 1)
        self.act = nn.SiLU()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.embed(x))
        torch._dynamo.graph_break()
        return self.conv1(x)


@pytest.mark.parametrize("asked", [True, False])
def test_the_summary_waits_for_them(asked: bool, without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    model = OnlyConvolutions().eval().requires_grad_(False)
    run = torch.compile(
        model, backend="svdquant", options=quiet(convolutions=asked, progress=True, calibration_steps=2)
    )
    run(x := torch.randn(1, WIDTH, 6, 6))
    assert ("nothing was quantized" in capsys.readouterr().err) is not asked
    run(x)
    run(x)
    told = capsys.readouterr().err
    assert "nothing was quantized" not in told
    assert ("OnlyConvolutions: 1 linears quantized" in told) is asked


def test_the_progress_counts_them(without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    """Two graphs without calibration: the first one's line tells of what the second one has."""

    class Two(OnlyConvolutions):
        def __init__(self) -> None:
            super().__init__()
            self.conv0 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.conv0(x))

    model = Two().eval().requires_grad_(False)
    options = quiet(convolutions=True, progress=True, calibration_steps=0)
    torch.compile(model, backend="svdquant", options=options)(torch.randn(1, WIDTH, 6, 6))
    assert "quantizing 2 linears" in capsys.readouterr().err


def test_restored_in_the_middle_they_stay(without_inductor: None) -> None:
    """Those that were not quantized yet, too."""
    model = unet()
    run = torch.compile(model, backend="svdquant", options=quiet(convolutions=True, calibration_steps=2))
    exact = run(pictures())
    svdq.restore(model, progress=False)
    for _ in range(3):
        assert torch.equal(run(pictures()), exact)
    assert not in_4_bits(model)


def test_moving_and_casting_keep_them() -> None:
    model, x = quantized(), pictures()
    result = model(x)
    assert torch.equal(model.to(memory_format=torch.channels_last)(x), model(x))
    assert relative_error(model(x), result) < 1e-5
    assert in_4_bits(model.bfloat16()) == CONVOLUTIONS
    assert relative_error(model(x.bfloat16()), result) < 0.03
    assert in_4_bits(copy.deepcopy(model)) == CONVOLUTIONS
    with pytest.raises(svdq.SvdqError, match="16-bit"):
        model.down.weight.numpy()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(bad: float) -> None:
    model = unet()
    model.down.weight[3, 1, 0, 2] = bad
    with pytest.raises(NonFiniteWeight, match="down"):
        quantized(model)


def test_channels_that_say_nothing() -> None:
    """Outputs that are zero stay so, and inputs that are never there do no harm."""
    model = unet()
    model.down.weight[5], model.down.bias[5] = 0.0, 0.0
    model.resnets[0].conv2.weight[7], model.resnets[0].conv2.bias[7] = 0.0, 0.0
    model.conv_in.weight[7], model.conv_in.bias[7] = 0.0, 0.0
    x = pictures()
    exact = copy.deepcopy(model)(x)
    assert relative_error(quantized(model)(x), exact) < 0.1
    assert not model.down.weight._svdq.values(model.down.weight)[5].any()


def test_ranks_send_packs_whole() -> None:
    """What one rank has quantized another one computes with."""
    weight = quantized().down.weight
    sent = {0: svdq.quantizer.Quantized(weight._svdq, 0.1)}
    words, tensors = _written(sent)
    received = _read(words, iter(tensors))[0].packed
    assert (received.expanded, received.taps_first) == (True, True)
    assert torch.equal(received.values(weight), weight._svdq.values(weight))


@pytest.mark.parametrize("way", ["eagerly", "compiled"])
def test_an_adapter_computes_beside(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    for module in ("compiled", "undecided"):
        monkeypatch.setattr(f"svdq_compile.{module}.compile_with_inductor", run_eagerly)
    model, x = quantized(), pictures()
    before, expected = model(x), plain(model)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["conv2", "down"], init_lora_weights=False)
    for adapted in (model, expected):
        torch.manual_seed(3)
        peft.inject_adapter_in_model(config, adapted)
    run = model if way == "eagerly" else torch.compile(model, backend="svdquant", options=quiet(convolutions=True))
    run(x)
    assert in_4_bits(model) == ["resnets.0.conv1", "resnets.0.conv2.base_layer", "down.base_layer", "up"]
    moved = relative_error(before, run(x))
    assert moved > 0.1, "the adapter does something"
    assert relative_error(run(x), expected(x)) < 0.05
    with pytest.raises(svdq.SvdqError, match="16-bit"):
        model.down.merge()


def test_a_diffusers_unet() -> None:
    """All but its first and last ones, and those of 1x1."""
    pytest.importorskip("diffusers")
    model, call = zoo.make("sd15")
    spatial = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}
    exact = model(**call)[0]
    quantized(model, calibrate=lambda model: model(**call))
    assert set(in_4_bits(model)) == spatial - {"conv_in", "conv_out"}
    assert len(in_4_bits(model)) > 10
    assert relative_error(model(**call)[0], exact) < 0.15


def test_a_file_that_does_not_say_its_class_is_refused(tmp_path: Path) -> None:
    save_file({"blocks.0.conv.weight": torch.randn(64, 64, 3, 3)}, file := tmp_path / "one.safetensors")
    with pytest.raises(OptionError, match=r"option convolutions: one.safetensors does not say of which class"):
        quantize_file(file, tmp_path / "out", svdq.Config(convolutions=True), torch.device("cpu"))


def test_what_is_no_truth_value_is_refused() -> None:
    with pytest.raises(OptionError, match="option convolutions='3x3': must be True or False"):
        svdq.Config(convolutions="3x3")
