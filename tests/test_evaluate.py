"""`svdq_compile.evaluate` and `svdq eval`: the numbers of a page, what is resumed, what is refused."""

import copy
import gc
import inspect
import json
import math
import os
import re
import sys
import weakref
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import svdq_compile as svdq
from snippets import hub
from svdq_compile import recording
from svdq_compile.cli import app
from svdq_compile.drawing import Drawer, Drawing
from svdq_compile.errors import FileRefused, NonFinitePicture, NotAModel, NothingToQuantize, OptionError
from svdq_compile.evaluation import Mean, weight_bytes
from svdq_compile.evaluation_page import SHOWN
from svdq_compile.recording import layer_errors, record
from svdq_compile.similarity import psnr, relative_error, ssim

EMOJI = Path(__file__).parents[1] / "examples" / "emoji"
OPTIONS: dict[str, Any] = {"precision": "int4", "rank": 8, "refine": 1, "progress": False}
WIDTH = 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:
        x = x + text + timestep / 1000
        for block in self.blocks:
            x = block(x)
        return (x,)


class Pipeline:
    """Called as diffusers' pipelines are; 8 x 8 pixels, or `frames` of them."""

    def __init__(self, frames: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.transformer = Denoiser().bfloat16().requires_grad_(False)
        for parameter in self.transformer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 12)
        self.frames, self.drawn = frames, list[tuple[str, int]]()

    def __call__(
        self,
        prompt: str,
        num_inference_steps: int = 3,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        callback_on_step_end: Any = None,
    ) -> SimpleNamespace:
        assert generator is not None
        assert output_type == "np"
        self.drawn.append((prompt, generator.initial_seed()))
        text = torch.full((WIDTH,), len(prompt) / 20).bfloat16()
        latents = torch.randn(1, 64, WIDTH, generator=generator)
        for step in range(num_inference_steps):
            timestep = torch.tensor(1000.0 - 100 * step)
            latents = latents - 0.3 * self.transformer(latents.bfloat16(), timestep.bfloat16(), text=text)[0].float()
            callback_on_step_end(self, step, timestep, {"latents": latents})
        picture = (latents[0, :, :3].sigmoid() * 1.2 - 0.1).clamp(0, 1).reshape(8, 8, 3).numpy()
        if self.frames:
            return SimpleNamespace(frames=np.stack([picture * (i + 1) / self.frames for i in range(self.frames)])[None])
        return SimpleNamespace(images=picture[None])


PROMPTS = ["a dog", "a red apple", "<b>fish</b>"]


def run(pipe: Any, output: Path, **options: Any) -> svdq.Evaluation:
    given = {"prompts": PROMPTS, "seeds": [0, 5], "calibration": ["a cat", "a tree"]} | OPTIONS | options
    return svdq.evaluate(pipe, output, **given)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[svdq.Evaluation, Pipeline, Path]:
    pipe, output = Pipeline(), tmp_path_factory.mktemp("evaluated") / "eval.html"
    return run(pipe, output), pipe, output


class Outline(HTMLParser):
    """The tags of a page, all of which were closed in their turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.found: dict[str, list[dict[str, str | None]]] = {}
        self.feed(text)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))
        if tag not in ("meta", "img", "input", "br"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


# ** the numbers **


def test_the_pictures_are_the_pipelines_own(evaluated: tuple[svdq.Evaluation, Pipeline, Path]) -> None:
    """PSNR and the errors by step, by hand, from a 16-bit pipeline and the quantized one."""
    result, pipe, _ = evaluated
    assert [(p.prompt, p.seed) for p in result.pictures] == [(p, s) for p in PROMPTS for s in (0, 5)]
    exact, packed = Drawer(Pipeline(), {}), Drawer(pipe, {})
    for picture in result.pictures:
        truth = exact.draw(picture.prompt, picture.seed, bits=16)
        drawn = packed.draw(picture.prompt, picture.seed, bits=4)
        mse = ((truth.frames.double() - drawn.frames.double()) / 255).square().mean()
        assert picture.psnr_db == pytest.approx(-10 * math.log10(mse), abs=2e-3)
        errors = [relative_error(a, b) for a, b in zip(drawn.latents, truth.latents, strict=True)]
        assert picture.step_errors == pytest.approx(errors, abs=1e-6)
        assert 0 < errors[0] < errors[-1] < 0.2
    values = torch.tensor([p.psnr_db for p in result.pictures])
    assert result.psnr_db.mean == pytest.approx(float(values.mean()), abs=1e-3)
    assert result.psnr_db.ci95 == pytest.approx(1.96 * float(values.std()) / 6**0.5, abs=1e-3)
    assert [step.timestep for step in result.steps] == [1000, 900, 800]


def test_layers_and_timesteps_on_the_same_inputs(evaluated: tuple[svdq.Evaluation, Pipeline, Path]) -> None:
    result, pipe, _ = evaluated
    assert {layer.layer for layer in result.layers} == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")}
    assert [layer.error for layer in result.layers] == sorted((x.error for x in result.layers), reverse=True)
    assert {(layer.precision, layer.rank) for layer in result.layers} == {("int4", 8)}
    assert [layer.error for layer in result.layers] == pytest.approx([0.1] * 4, rel=0.6)
    x = torch.randn(1, 64, WIDTH, generator=torch.Generator().manual_seed(5)).bfloat16()
    text = torch.full((WIDTH,), len(PROMPTS[0]) / 20).bfloat16()
    with torch.no_grad():
        models = pipe.transformer, Pipeline().transformer
        drawn, truth = (model(x, torch.tensor(1000.0).bfloat16(), text=text)[0] for model in models)
    assert [step.timestep for step in result.timesteps] == pytest.approx([1000, 900, 800], rel=4e-3)  # in bfloat16
    first = result.timesteps[0].error  # of PROMPTS[0] from seeds 0 and 5
    assert first.ci95 is not None
    assert abs(relative_error(drawn, truth) - first.mean) <= first.ci95


def test_bytes_and_what_the_pipeline_holds_then(evaluated: tuple[svdq.Evaluation, Pipeline, Path]) -> None:
    result, pipe, _ = evaluated
    assert result.bytes_16bit == sum(p.nbytes for p in Pipeline().transformer.parameters())
    assert result.bytes_4bit == weight_bytes(pipe.transformer) < 0.6 * result.bytes_16bit
    assert svdq.report(pipe.transformer).bytes_after < result.bytes_4bit
    assert result.seconds_16bit > 0 < result.seconds_4bit


def test_what_calibrates_is_not_shown_and_not_from_the_same_noise(
    evaluated: tuple[svdq.Evaluation, Pipeline, Path],
) -> None:
    _, pipe, _ = evaluated
    shown = [(p, s) for p in PROMPTS for s in (0, 5)]
    # In 16 bits, the first two again for what the model reads, calibration, in 4 bits; a series begins untimed.
    calibrated = [("a cat", 6), ("a tree", 7)]
    assert pipe.drawn[: 7 + 2 + 2 + 7] == [shown[0], *shown, *shown[:2], *calibrated, shown[0], *shown]


def test_linears_and_convolutions_are_recorded_without_their_bias() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(64, 96, 1), nn.Conv2d(96, 64, 1)) for _ in range(2))
            self.other = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.other(x.movedim(1, -1))

    model = Mixed()
    x = torch.randn(3, 64, 5, 5)
    recorded = record(model, lambda: model(x))
    rows, made = recorded.layers["blocks.0.0"]
    assert rows.shape == (8, 64, 1, 1)
    torch.testing.assert_close(
        rows[:, :, 0, 0], x.movedim(1, -1).reshape(-1, 64)[torch.linspace(0, 74, 8).round().long()]
    )
    torch.testing.assert_close(made[:, :, 0, 0], rows[:, :, 0, 0] @ model.blocks[0][0].weight[:, :, 0, 0].t())
    svdq.quantize(model, precision="w8a8", rank=0, refine=0, progress=False)
    errors = layer_errors(model, recorded.layers)
    assert "blocks.1.1" in errors
    assert all(0 < error < 0.03 for error in errors.values())


def test_calls_that_cannot_be_repeated_are_not_kept() -> None:
    class Odd(Denoiser):
        def forward(self, x: Tensor, control: object) -> Any:  # type: ignore[override]
            result = super().forward(x, torch.zeros(1), torch.zeros(WIDTH))[0]
            return SimpleNamespace(sample=result) if control is None else result

    model, x = Odd(), torch.randn(1, 4, WIDTH)
    recorded = record(model, lambda: [model(x, control=control) for control in (object(), None, 1.0)])
    assert [kwargs for _, kwargs, _ in recorded.calls] == [{"control": 1.0}]
    assert all(rows.shape == (12, k) for (rows, _), k in zip(recorded.layers.values(), (128, 256) * 2, strict=True))


def test_recorded_calls_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts by turns, as with guidance, are kept once each; of many calls every second, fourth, ... one."""
    model, texts = Denoiser(), torch.randn(2, WIDTH)

    def draw() -> None:
        for i in range(20):
            model(torch.randn(1, 4, WIDTH), torch.tensor(float(i)), texts[i % 2].clone())

    calls = record(model, draw).calls
    assert len(calls) == 20
    assert len({id(args[2]) for args, _, _ in calls}) == 2
    each = 2 * 4 * WIDTH * 4 + 4
    monkeypatch.setattr(recording, "MAX_BYTES", 11 * each)
    assert [int(args[1]) for args, _, _ in record(model, draw).calls] == list(range(0, 20, 2))
    monkeypatch.setattr(recording, "MAX_BYTES", 1)
    assert [int(args[1]) for args, _, _ in record(model, draw).calls] == [0]


def test_measures() -> None:
    a = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(psnr(a + 0.1, a), torch.full((2,), 20.0))
    torch.testing.assert_close(psnr(a, a), torch.full((2,), 120.0))
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    assert float(ssim(a[:, :, :4, :4], a[:, :, :4, :4]).min()) == pytest.approx(1)  # smaller than a window
    assert Mean.of([1.0]) == Mean(1.0, None)


# ** the page **


def test_the_page_needs_nothing_but_itself(evaluated: tuple[svdq.Evaluation, Pipeline, Path]) -> None:
    result, _, output = evaluated
    text = output.read_text()
    outline = Outline(text)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    assert len(outline.found["img"]) == 2 * 6
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in outline.found["img"])
    assert [i["type"] for i in outline.found["input"]] == ["range"] * 6
    assert len(outline.found["polyline"]) == 3  # by step, by timestep, by layer
    assert "&lt;b&gt;fish&lt;/b&gt;" in text
    assert "<b>fish" not in text
    assert "Calibrated on 2 other prompts, from other noise: a cat, a tree." in text
    assert f"{result.psnr_db.mean:.2f} ± {result.psnr_db.ci95:.2f} dB" in text


def test_the_json_has_what_the_page_has(evaluated: tuple[svdq.Evaluation, Pipeline, Path]) -> None:
    result, _, output = evaluated
    found = json.loads(output.with_suffix(".json").read_text())
    assert found == json.loads(json.dumps(result.to_dict()))
    assert {"psnr_db", "ssim", "steps", "timesteps", "layers", "pictures", "bytes_4bit"} < found.keys()
    assert not list(output.parent.glob(".*")), "nothing is left beside it"


def test_a_page_of_many_shows_the_worst_and_the_best(tmp_path: Path) -> None:
    result = run(Pipeline(), tmp_path / "eval.html", seeds=range(9), call={"num_inference_steps": 1}, calibration=())
    values = sorted(picture.psnr_db for picture in result.pictures)
    text = (tmp_path / "eval.html").read_text()
    assert f"{SHOWN} of 27, evenly from the worst" in text
    shown = [float(value) for value in re.findall(r"<br>([\d.]+) dB", text)]
    assert len(shown) == SHOWN
    assert (shown[0], shown[-1]) == pytest.approx((values[0], values[-1]), abs=0.051)
    assert "Quantized by its weights alone" in text


def test_of_a_video_the_first_and_the_middle_frame(tmp_path: Path) -> None:
    pipe = Pipeline(frames=5)
    pipe.transformer_2 = Denoiser()  # type: ignore[attr-defined]
    result = run(pipe, tmp_path / "eval.html", prompts=["a dog"], seeds=[1])
    assert "Its transformer_2 stayed in 16 bits." in (tmp_path / "eval.html").read_text()
    assert len(Outline((tmp_path / "eval.html").read_text()).found["img"]) == 2 * 2
    drawing = Drawer(Pipeline(frames=5), {}).draw("a dog", 1, bits=16)
    assert drawing.frames.shape == (2, 8, 8, 3)
    torch.testing.assert_close(drawing.frames[0].float() * 3, drawing.frames[1].float(), atol=2, rtol=0)
    assert result.psnr_db.ci95 is None
    assert 15 < result.psnr_db.mean < 60


# ** interrupted **


def interrupted(pipe: Any, output: Path, after: int, **options: Any) -> Path:
    """An evaluation that is cut off after so many pictures -> the folder with what was done."""
    draw, count = type(pipe).__call__, 0

    def draw_some(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return draw(self, *args, **kwargs)

    draw_some.__signature__ = inspect.signature(draw)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "__call__", draw_some)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, output, **options)
    (folder,) = output.parent.glob(f".{output.name}.*.unfinished")
    return folder


def without_seconds(result: svdq.Evaluation) -> svdq.Evaluation:
    pictures = tuple(replace(picture, seconds=(0.0, 0.0)) for picture in result.pictures)
    return replace(result, seconds_16bit=0.0, seconds_4bit=0.0, pictures=pictures)


@pytest.mark.parametrize("after", [5, 8, 10, 15])
def test_cut_off_anywhere_it_goes_on(
    evaluated: tuple[svdq.Evaluation, Pipeline, Path], tmp_path: Path, after: int
) -> None:
    """In 16 bits, recording, calibrating, in 4 bits."""
    interrupted(Pipeline(), tmp_path / "eval.html", after)
    pipe = Pipeline()
    result = run(pipe, tmp_path / "eval.html")
    assert without_seconds(result) == without_seconds(evaluated[0])
    # What was begun and not kept is done again: what is recorded and calibrated on, 2 pictures each; so is the untimed
    # picture of a series of which some is missing.
    assert len(pipe.drawn) == {5: 1 + 2 + 4 + 7, 8: 4 + 7, 10: 2 + 7, 15: 1 + 3}[after]
    assert sorted(os.listdir(tmp_path)) == ["eval.html", "eval.json"]


def changed_weights() -> Pipeline:
    pipe = Pipeline()
    pipe.transformer.blocks[1].down.weight[5, 7] += 0.5
    return pipe


@pytest.mark.parametrize(
    ("pipe", "options", "named"),
    [
        (changed_weights, {}, "weights"),
        (Pipeline, {"prompts": [*PROMPTS, "a boat"]}, "prompts or seeds"),
        (Pipeline, {"seeds": [0, 4, 5]}, "prompts or seeds"),
        (Pipeline, {"rank": 16}, "options"),
        (Pipeline, {"calibration": ["a cat"]}, "calibration"),
        (Pipeline, {"call": {"num_inference_steps": 2}}, "arguments of the call"),
    ],
)
def test_what_was_left_of_another_evaluation_is_not_mixed_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    pipe: Any,
    options: dict[str, Any],
    named: str,
) -> None:
    left = interrupted(Pipeline(), tmp_path / "eval.html", 8)
    again = pipe()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Drawing, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(again, tmp_path / "eval.html", **options)
    assert again.drawn == 2 * [(PROMPTS[0], 0)], "the first picture is drawn anew"
    assert left.exists()
    assert f"what was left unfinished had other {named}\n" in capsys.readouterr().err


def test_a_picture_that_was_not_written_whole_is_drawn_again(tmp_path: Path) -> None:
    folder = interrupted(Pipeline(), tmp_path / "eval.html", 8)
    kept = sorted(folder.glob("16-bit-*"))
    assert len(kept) == 6
    kept[2].write_bytes(kept[2].read_bytes()[:-9])
    kept[4].write_bytes(b"")
    pipe = Pipeline()
    run(pipe, tmp_path / "eval.html")
    assert pipe.drawn[:3] == [*2 * [("a red apple", 0)], ("<b>fish</b>", 0)]


def test_arguments_are_told_apart_by_their_bytes() -> None:
    """Large ones, that differ where repr shows nothing."""
    ones, other = torch.ones(5000), torch.ones(5000)
    other[2500] = 2
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    touched = picture.copy()
    touched.putpixel((3, 3), (1, 0, 0))
    pairs = [(ones, other), (ones.numpy(), other.numpy()), (ones.bfloat16(), other.bfloat16()), (picture, touched)]
    pairs += [([a, a], [a, b]) for a, b in pairs] + [({"scale": a}, {"scale": b}) for a, b in pairs] + [(1.0, 2.0)]
    told = sys.modules["svdq_compile.evaluate"]._told
    for a, b in pairs:
        assert told(a) == told(copy.deepcopy(a)) != told(b)


def test_other_parts_may_be_quantized_already(tmp_path: Path) -> None:
    """By this package, or by another, whose weights are taken as they are."""

    class Foreign(nn.Parameter):
        def detach(self) -> Any:
            return self

        def reshape(self, *_: Any) -> Any:
            raise NotImplementedError

    prints = []
    for scale in (1.0, 1.0, 2.0):
        pipe = Pipeline()
        pipe.transformer_2, pipe.encoder = Pipeline().transformer, nn.Linear(8, 8)  # type: ignore[attr-defined]
        pipe.transformer_2.blocks[0].up.weight.mul_(scale)  # type: ignore[attr-defined]
        svdq.quantize(pipe.transformer_2, **OPTIONS)  # type: ignore[attr-defined]
        pipe.encoder.weight = Foreign(torch.zeros(8, 8), requires_grad=False)  # type: ignore[attr-defined]
        prints.append(sys.modules["svdq_compile.evaluate"]._fingerprint(pipe.transformer_2))  # type: ignore[attr-defined]
    assert prints[0] == prints[1] != prints[2]
    assert run(pipe, tmp_path / "eval.html", prompts=["a dog"]).psnr_db.mean > 15


@pytest.mark.parametrize("way", ["enable_group_offload", "enable_sequential_cpu_offload"])
def test_weights_that_move_during_a_call_are_refused(tmp_path: Path, way: str) -> None:
    pipe = Pipeline()
    if way == "enable_group_offload":
        cpu = torch.device("cpu")
        apply_group_offloading(pipe.transformer, cpu, cpu, "leaf_level")
    else:
        accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(OptionError, match="transformer is offloaded by parts"):
        run(pipe, tmp_path / "eval.html")
    assert pipe.drawn == []


def test_it_works_where_the_pipeline_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is offloaded as a whole, that is not where its weights are."""
    pipe = Pipeline()
    pipe._execution_device = torch.device("meta")  # type: ignore[attr-defined]
    jobs: list[Any] = []

    def measured(job: Any, _: Path) -> Any:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["svdq_compile.evaluate"], "_measured", measured)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path / "eval.html")
    assert jobs[0].device.type == "meta"


# ** a file, memory **


def test_a_quantized_file_is_what_is_evaluated(
    evaluated: tuple[svdq.Evaluation, Pipeline, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    svdq.save(evaluated[1].transformer, file, progress=False)
    given: dict[str, Any] = {"prompts": PROMPTS, "seeds": [0, 5], "quantized": file, "progress": False}
    result = svdq.evaluate(Pipeline(), tmp_path / "eval.html", **given)
    assert result.psnr_db == evaluated[0].psnr_db
    assert result.layers == evaluated[0].layers
    assert "Loaded from model.safetensors" in (tmp_path / "eval.html").read_text()
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        svdq.evaluate(Pipeline(), tmp_path / "eval.html", **given | {"quantized": tmp_path / "missing"})
    with pytest.raises(OptionError, match="is quantized already: leave out calibration"):
        svdq.evaluate(Pipeline(), tmp_path / "eval.html", **given, calibration=["a cat"])
    other = Pipeline()
    del other.transformer.blocks[1]
    with pytest.raises(FileRefused, match=r"the model has no weight blocks\.1\.up\.weight"):
        svdq.evaluate(other, tmp_path / "eval.html", **given)
    assert other.drawn == [], "before anything is drawn"


def test_16_bit_weights_are_gone_before_a_file_is_loaded(
    evaluated: tuple[svdq.Evaluation, Pipeline, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    svdq.save(evaluated[1].transformer, file, progress=False)
    pipe = Pipeline()
    weights = [weakref.ref(parameter) for parameter in pipe.transformer.parameters()]
    alive: list[int] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return svdq.load(*args, **kwargs)

    monkeypatch.setattr(sys.modules["svdq_compile.evaluate"], "load", load)
    svdq.evaluate(pipe, tmp_path / "eval.html", prompts=["a dog"], quantized=file, progress=False)
    assert alive == [0]


# ** what is refused **


class Broken(Pipeline):
    """Its pictures hold NaN once its weights are in 4 bits, or always."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __call__(self, prompt: str, generator: Any = None, output_type: str = "pil", callback_on_step_end: Any = None):  # type: ignore[no-untyped-def]
        result = super().__call__(prompt, 1, generator, output_type, callback_on_step_end)
        if self.bits == 16 or svdq.report(self.transformer).bytes_after < svdq.report(self.transformer).bytes_before:
            result.images[0, 3, 3] = np.nan
        return result


@pytest.mark.parametrize("bits", [16, 4])
def test_pictures_that_hold_nan(tmp_path: Path, bits: int) -> None:
    with pytest.raises(NonFinitePicture, match=f"the {bits}-bit picture of 'a dog', seed 0, holds NaN or Inf"):
        run(Broken(bits), tmp_path / "eval.html", calibration=())
    assert not (tmp_path / "eval.html").exists()


def test_latents_that_hold_nan(tmp_path: Path) -> None:
    pipe = Pipeline()
    pipe.transformer.blocks[0].up.bias[0] = torch.inf
    with pytest.raises(NonFinitePicture, match="16-bit picture"):
        run(pipe, tmp_path / "eval.html")


class NoDenoiser:
    def __call__(self, prompt: str) -> None:
        pass


class NoPictures(Pipeline):
    def __call__(self, prompt: str) -> Any:  # type: ignore[override]
        return SimpleNamespace(audios=torch.zeros(1, 100))


class Small(Pipeline):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Sequential(nn.Linear(8, 8))  # type: ignore[assignment]


class NoPrompt(Pipeline):
    def __call__(self, class_labels: list[int]) -> Any:  # type: ignore[override]
        raise AssertionError


def quantized_already() -> Pipeline:
    pipe = Pipeline()
    svdq.quantize(pipe.transformer, **OPTIONS)
    return pipe


def compiled_already() -> Pipeline:
    pipe = Pipeline()
    pipe.transformer.compile(backend="eager")
    return pipe


@pytest.mark.parametrize(
    ("pipe", "options", "error", "told"),
    [
        (NoDenoiser, {}, NotAModel, "is not a model"),
        (Denoiser, {}, NotAModel, "Denoiser is a model: give svdq_compile.evaluate the pipeline"),
        (lambda: "no/such-pipeline", {}, NotAModel, "is a path, not a model"),
        (NoPictures, {}, OptionError, "NoPictures gives no pictures that could be compared"),
        (NoPrompt, {}, OptionError, "NoPrompt takes no prompt, but class_labels"),
        (Small, {}, NothingToQuantize, "Sequential has no linear layer that can be quantized"),
        (quantized_already, {}, OptionError, "transformer is quantized already"),
        (compiled_already, {}, OptionError, "transformer is compiled"),
        (Pipeline, {"component": "unet"}, OptionError, "component='unet': this Pipeline has transformer"),
        (Pipeline, {"prompts": []}, OptionError, "prompts: there is none"),
        (Pipeline, {"prompts": ["", "  "]}, OptionError, "prompts: there is none"),
        (Pipeline, {"prompts": "a dog"}, OptionError, "must be a list, as in"),
        (Pipeline, {"prompts": [b"a dog"]}, OptionError, "is no text"),
        (Pipeline, {"seeds": []}, OptionError, "whole numbers from 0"),
        (Pipeline, {"seeds": [-1]}, OptionError, "whole numbers from 0"),
        (Pipeline, {"seeds": [True]}, OptionError, "whole numbers from 0"),
        (Pipeline, {"calibration": ["A Dog."]}, OptionError, "'A Dog.' is among the prompts that are evaluated"),
        (Pipeline, {"call": {"num_inference_step": 2}}, OptionError, "did you mean 'num_inference_steps'?"),
        (Pipeline, {"call": ["steps"]}, OptionError, "call=['steps']: must be a dict of arguments"),
        (Pipeline, {"call": {"generator": None}}, OptionError, "generator is not to be given"),
        (Pipeline, {"target_bytes": 10**6, "calibration": ()}, OptionError, "needs calibration prompts"),
        (Pipeline, {"rnak": 3}, OptionError, "did you mean 'rank'?"),
        (Pipeline, {"quantized": "missing.safetensors"}, OptionError, "leave out calibration"),
    ],
)
def test_refused(tmp_path: Path, pipe: Any, options: dict[str, Any], error: type, told: str) -> None:
    given = pipe()
    with pytest.raises(error, match=re.escape(told)):
        run(given, tmp_path / "eval.html", **options)
    assert getattr(given, "drawn", []) == []
    assert os.listdir(tmp_path) == []


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="is a folder: give the page to write"):
        run(Pipeline(), tmp_path)
    with pytest.raises(OptionError, match=r"ends in \.html"):
        run(Pipeline(), tmp_path / "eval.json")
    with pytest.raises(FileNotFoundError, match=r"there is no such folder to write eval\.html to"):
        run(Pipeline(), tmp_path / "missing" / "eval.html")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", full)
    pipe = Pipeline()
    with pytest.raises(OSError, match=r"cannot write .*eval\.html: Read-only file system"):
        run(pipe, tmp_path / "eval.html")
    assert pipe.drawn == []


# ** the command line **


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers copies code to before it runs it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_the_demo_model(tmp_path: Path, code_cache: None) -> None:
    """A diffusers pipeline folder with its own code, prompts of a file, options of the command line."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "eval.html"
    prompts.write_text("dog face\n\n")
    given = (EMOJI, output, "--prompts", prompts, "--steps", 2, "--call", "guidance_scale=1.0", "--device", "cpu")
    options = ("--precision", "w4a8", "--refine", 0, "--skip", "single_transformer_blocks.0")
    assert "brings its own code (pipeline.py)" in command(*given).stderr
    result = command(*given, *options, "--trust-code")
    assert result.exit_code == 0, result.output
    assert re.match(r"FluxTransformer2DModel: PSNR [\d.]+ dB, SSIM [\d.]+ over 1 pictures", result.stdout)
    found = json.loads(output.with_suffix(".json").read_text())
    assert 15 < found["psnr_db"]["mean"] < 60
    assert len(found["steps"]) == len(found["timesteps"]) == 2
    assert {layer["precision"] for layer in found["layers"]} == {"w4a8"}
    assert not any(layer["layer"].startswith("single_transformer_blocks.0.") for layer in found["layers"])
    assert "num_inference_steps=2, guidance_scale=1.0" in output.read_text()
    assert "eval.html exists already; --force overwrites it" in command(*given).stderr
    output.unlink()
    assert "eval.json exists already; --force overwrites it" in command(*given).stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((EMOJI, "eval.html"), "there is no prompt to draw: give --prompt or --prompts"),
        ((EMOJI, "eval.html", "--prompts", "empty.txt"), "empty.txt: there is no prompt in it"),
        ((EMOJI, "eval.html", "--prompts", "binary.txt"), "binary.txt is no text file in UTF-8"),
        ((EMOJI, "eval.html", "--prompts", "missing.txt"), "No such file or directory: 'missing.txt'"),
        ((EMOJI, "eval.html", "--prompt", "a dog", "--call", "guidance"), "must be NAME=VALUE"),
        (("missing", "eval.txt", "--prompt", "a dog"), "has a name that ends in .html"),
        (("missing", "eval.html", "--prompt", "a dog"), "missing: there is no such file or folder"),
        ((EMOJI / "transformer", "eval.html", "--prompt", "a dog"), "has no model_index.json"),
        ((EMOJI, "eval.html", "--prompt", "a dog", "--component", "unet"), "its models are: transformer"),
    ],
)
def test_commands_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code_cache: None, arguments: tuple, told: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    monkeypatch.chdir(tmp_path)
    result = command(*arguments, "--device", "cpu", "--trust-code")
    assert result.exit_code == 1
    assert result.stderr.startswith("svdq: ")
    assert told in result.stderr
    assert not (tmp_path / "eval.html").exists()


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str) -> str:
        asked.append(name)
        if name == "no/such":
            raise OSError("no/such is not a repository\nand more")
        return str(EMOJI)

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    monkeypatch.chdir(tmp_path)
    assert (
        "no/such: there is no such folder, and the hub does not give it (no/such is not"
        in command("no/such", "x.html", "--prompt", "a dog").stderr
    )
    assert "brings its own code" in command("some/emoji", "x.html", "--prompt", "a dog").stderr
    assert asked == ["no/such", "some/emoji"]


# ** pipelines of diffusers **


@pytest.mark.parametrize(
    ("name", "frames", "size"),
    [
        ("black-forest-labs/FLUX.1-dev", 1, 64),
        ("stabilityai/stable-diffusion-xl-base-1.0", 1, 64),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 2, 32),
    ],
)
def test_diffusers_pipelines(tmp_path: Path, name: str, frames: int, size: int) -> None:
    """Packed latents, a unet that is called by position, a video."""
    pipe = hub.PIPELINES[name]().to(torch.bfloat16)
    call: dict[str, Any] = {"num_inference_steps": 2, "height": size, "width": size}
    call |= {"num_frames": 5} if frames > 1 else {}
    result = svdq.evaluate(pipe, tmp_path / "eval.html", prompts=["a dog"], calibration=["a cat"], call=call, **OPTIONS)
    assert len(Outline((tmp_path / "eval.html").read_text()).found["img"]) == 2 * frames
    assert len(result.steps) == len(result.timesteps) == 2
    assert all(step.timestep is not None and 0 < step.error.mean < 0.5 for step in result.steps + result.timesteps)
    assert all(0 < layer.error < 0.3 for layer in result.layers)
    assert len(result.layers) > 5
    assert pipe._progress_bar_config == {}
