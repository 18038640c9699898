"""`svdq_compile.observe` and Statistics: the result of calibrating, whichever way they were gathered; their file."""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import ok, refused
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import logged
from svdq_compile import decisions, input_statistics, sharing
from svdq_compile.checkpoint import contents
from svdq_compile.errors import FileRefused, NothingToQuantize, OptionError, OtherModel
from svdq_compile.header import read_header
from svdq_compile.input_statistics import MAX_ROWS, InputStatistics, Moment, evenly
from svdq_compile.quantizer import TRIAL_ROWS
from svdq_compile.statistics import Statistics
from svdq_compile.task import Task
from zoo import make

EMOJI = Path(__file__).parents[1] / "examples" / "emoji"
BF16 = torch.bfloat16
CONFIG = svdq.Config(rank=8, refine=1, precision="w4a8", progress=False)


def flux() -> tuple[nn.Module, dict[str, Any]]:
    return make("flux", BF16)


def calls(inputs: dict[str, Any], scales: list[float]) -> Callable[[nn.Module], None]:
    """Calibration by several calls, which differ."""

    def calibrate(model: nn.Module) -> None:
        for scale in scales:
            model(**inputs | {"hidden_states": inputs["hidden_states"] * scale})

    return calibrate


@cache
def observed(*scales: float) -> Statistics:
    model, inputs = flux()
    return svdq.observe(model, calls(inputs, list(scales)), progress=False)


def file_of(model: nn.Module) -> dict[str, Tensor]:
    """All that a file of it would hold."""
    tensors, metadata = contents(model)
    told = {key: metadata[key] for key in ("layers", "others", "calibrated")}
    return tensors | {"told": torch.tensor(list(json.dumps(told).encode()))}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a: Statistics, b: Statistics) -> bool:
    return a.fingerprint() == b.fingerprint() and a.model_class == b.model_class


def test_the_fingerprint_is_of_all_that_quantizing_reads(whole: Statistics) -> None:
    other = replace(whole, others={**whole.others, "blocks.9": "it is a table too"})
    assert other.fingerprint() != whole.fingerprint()
    turned = replace(other, others=dict(reversed(other.others.items())))
    assert turned.fingerprint() == other.fingerprint()


@pytest.mark.parametrize("rows", [0, 1, 2, 6, 512, 4096, 5001, 2**24 + 2, 2**31 + 9])
@pytest.mark.parametrize("most", [1, 3, 512, 4096])
def test_rows_are_chosen_evenly_of_any_number(rows: int, most: int) -> None:
    count = min(rows, most)
    expected = [round(Fraction(i * (rows - 1), max(count - 1, 1))) for i in range(count)]
    assert evenly(rows, most, torch.device("cpu")).tolist() == expected


@pytest.fixture(scope="module")
def calibrated() -> dict[str, Tensor]:
    """What quantizing with calibration makes."""
    model, inputs = flux()
    svdq.quantize(model, CONFIG, calibrate=calls(inputs, [1.0, 2.0, 0.5]))
    return file_of(model)


@pytest.fixture(scope="module")
def whole() -> Statistics:
    return observed(1.0, 2.0, 0.5)


def quantized_by(statistics: Statistics) -> dict[str, Tensor]:
    model, _ = flux()
    svdq.quantize(model, CONFIG, statistics=statistics)
    return file_of(model)


# ** the same, whichever way **


def test_as_calibrating(whole: Statistics, calibrated: dict[str, Tensor]) -> None:
    assert same(quantized_by(whole), calibrated)
    assert same(quantized_by(whole), calibrated), "used once more"


def test_through_a_file(whole: Statistics, calibrated: dict[str, Tensor], tmp_path: Path) -> None:
    whole.save(tmp_path / "flux.statistics", progress=False)
    again = Statistics.load(tmp_path / "flux.statistics", progress=False)
    assert equal(again, whole)
    assert same(quantized_by(again), calibrated)
    again.save(tmp_path / "again", progress=False)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "flux.statistics").read_bytes()
    assert "FluxTransformer2DModel" in repr(again)
    assert "3 calls" in repr(again)


def test_merged_call_by_call_it_is_equal_bit_for_bit(whole: Statistics, calibrated: dict[str, Tensor]) -> None:
    """Each part a call: the sums are made in the same order."""
    merged = Statistics.merge(observed(1.0), observed(2.0), observed(0.5))
    assert equal(merged, whole)
    assert same(quantized_by(merged), calibrated)


def test_merged_otherwise_second_moments_differ_by_rounding(whole: Statistics) -> None:
    merged = Statistics.merge(observed(1.0), observed(2.0, 0.5))
    for (known, seen), (wanted, expected) in zip(merged.inputs, whole.inputs, strict=True):
        assert known == wanted
        assert expected.span is not None
        assert torch.equal(seen.span, expected.span)
        assert torch.equal(seen.kept, expected.kept)
        torch.testing.assert_close(seen.moment.sum, expected.moment.sum, rtol=1e-5, atol=1e-4)


def test_rows_of_many_are_thinned_out() -> None:
    def part() -> Statistics:
        return svdq.observe(Halves(), lambda model: [model(torch.randn(1, 64, 128)) for _ in range(8)], progress=False)

    parts = [part() for _ in range(3)]
    assert all(len(seen.kept) == MAX_ROWS for one in parts for _, seen in one.inputs)
    for _, seen in Statistics.merge(*parts).inputs:
        assert len(seen.kept) == MAX_ROWS
        assert seen.calls == 24


def test_moments_in_smaller_blocks_load_and_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files from before have them, and GPUs with little memory."""
    model = nn.Sequential(nn.Linear(1024, 64, bias=False))
    x = torch.randn(40, 1024, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(input_statistics, "_whole_memory", lambda device: 80 << 30)
    large = svdq.observe(model, lambda model: model(x), progress=False)
    monkeypatch.setattr(input_statistics, "_whole_memory", lambda device: 24 << 30)
    svdq.observe(model, lambda model: model(x), progress=False).save(tmp_path / "small", progress=False)
    small = Statistics.load(tmp_path / "small", progress=False)
    ((_, seen),) = Statistics.merge(small, large).inputs
    assert seen.moment is not None
    assert seen.moment.rows == 80
    torch.testing.assert_close(seen.moment.sum, 2 * small.inputs[0][1].moment.sum)  # type: ignore[union-attr]


def test_ranks_that_all_have_the_file_count_it_once(whole: Statistics) -> None:
    for _, seen in whole.inputs:
        parts = [seen.part(own, 3) for own in range(3)]
        assert seen.span is not None
        assert seen.moment is not None
        moment = parts[0].moment + parts[1].moment + parts[2].moment  # type: ignore[operator]
        assert torch.equal(moment.sum, seen.moment.sum)
        assert moment.rows == seen.moment.rows
        spans, rows = [part.span for part in parts if part.span is not None], [part.rows for part in parts]
        again = InputStatistics.of(spans, rows, seen.most_rows, moment)
        assert torch.equal(again.rows, seen.rows)


class Told:
    """Ranks that come one after another: the last one knows what all have said."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.found: list[Any] = []

    def exchange(self, make: Callable[[], Any], device: Any) -> list[Any]:
        self.found.append(make())
        return self.found

    def each(self, make: Callable[[], Any]) -> Any:
        return make()

    def summed(self, own: list[Any], *_: Any) -> list[None]:
        return [None] * len(own)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_any_number_of_ranks_counts_the_same_rows(size: int) -> None:
    """In their order, where more were kept than count."""
    seen, ranks = InputStatistics(), Told(size)
    for scale in range(1, 11):
        seen.observe(torch.randn(64, 32) * scale)
    assert len(seen.kept) > MAX_ROWS
    for own in range(size):
        task = Task((nn.Parameter(torch.ones(2, 32)),), ("layer",), False, 0.0, seen.part(own, size))
        whole = sharing._observed_by_all(ranks, [task], [0], torch.device("cpu"))[0].statistics  # type: ignore[arg-type]
    assert torch.equal(whole.rows, seen.rows)
    assert torch.equal(whole.thinned(TRIAL_ROWS), seen.thinned(TRIAL_ROWS))


class Adding(Told):
    """Second moments of a single input are summed over those that came."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.sums: list[Tensor] = []

    def summed(self, own: list[Any], *_: Any) -> list[Any]:
        self.sums += own
        return [torch.stack(self.sums).sum(0)]


def test_ranks_whose_moments_have_other_blocks_agree_on_the_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ranks = torch.randn(40, 1024, generator=torch.Generator().manual_seed(1)), Adding(2)
    for memory in (24 << 30, 80 << 30):
        monkeypatch.setattr(input_statistics, "_whole_memory", lambda device, memory=memory: memory)
        seen = InputStatistics()
        seen.observe(x)
        task = Task((nn.Parameter(torch.ones(2, 1024)),), ("layer",), False, 0.0, seen)
        whole = sharing._observed_by_all(ranks, [task], [0], torch.device("cpu"))[0].statistics  # type: ignore[arg-type]
    assert whole.moment is not None
    assert whole.moment.rows == 80
    torch.testing.assert_close(whole.moment.sum, Moment.of(x, 512).sum * 2)


def test_parts_that_saw_other_layers(calibrated: dict[str, Tensor]) -> None:
    """As two processes that share the blocks out: together they are the whole."""
    whole = observed(1.0, 2.0, 0.5)
    halves = [Statistics(whole.model_class, whole.inputs[i::2], whole.others) for i in (0, 1)]
    assert same(quantized_by(Statistics.merge(*halves)), calibrated)


def test_observing_leaves_the_model_as_it_is(calibrated: dict[str, Tensor]) -> None:
    model, inputs = flux()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    svdq.observe(model, calls(inputs, [3.0]), progress=False)
    assert same(dict(model.state_dict()), before)
    assert all(decisions.reason_of(p) is None and not decisions.is_observed(p) for p in model.parameters())
    svdq.quantize(model, CONFIG, calibrate=calls(inputs, [1.0, 2.0, 0.5]))
    assert same(file_of(model), calibrated), "what was observed before counts no more"


def test_streaming_by_the_command_line(whole: Statistics, calibrated: dict[str, Tensor], tmp_path: Path) -> None:
    flux()[0].save_pretrained(tmp_path / "flux", max_shard_size="400KB")  # type: ignore[operator]
    observed(1.0).save(tmp_path / "1", progress=False)
    Statistics.merge(observed(2.0), observed(0.5)).save(tmp_path / "2", progress=False)
    merged = Statistics.merge(*(Statistics.load(tmp_path / name, progress=False) for name in "12"))
    out = tmp_path / "out.safetensors"
    options = ("--precision", "w4a8", "--rank", 8, "--refine", 1, "--device", "cpu")
    ok("quantize", tmp_path / "flux", out, *options, "--statistics", tmp_path / "1", "--statistics", tmp_path / "2")
    model, _ = flux()
    svdq.quantize(model, CONFIG, statistics=merged)
    svdq.save(model, tmp_path / "expected", progress=False)
    assert same(load_file(out), load_file(tmp_path / "expected"))
    assert read_header(out).calibration == "calibrated, on inputs that were observed"
    streamed = svdq.from_pretrained(tmp_path / "flux", CONFIG, statistics=whole)
    assert same(file_of(streamed), calibrated)
    streamed.save_pretrained(tmp_path / "4-bit")  # type: ignore[operator]
    with pytest.raises(OptionError, match="is in 4 bits already: leave statistics out"):
        svdq.from_pretrained(tmp_path / "4-bit", statistics=whole)


# ** what was not reached **


class Halves(nn.Module):
    """Of which calibration runs one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize("by_statistics", [False, True])
def test_layers_that_calibration_has_not_reached_are_named(by_statistics: bool) -> None:
    model = Halves().requires_grad_(False)

    def calibrate(model: nn.Module) -> None:
        model(torch.randn(1, 64, 128))

    seen = svdq.observe(model, calibrate, progress=False) if by_statistics else None
    with logged("svdq_compile") as records:
        svdq.quantize(model, CONFIG, statistics=seen, calibrate=None if by_statistics else calibrate)
    assert [r.getMessage() for r in records if "has not reached" in r.getMessage()] == [
        "svdquant: calibration has not reached 2 linears, which are quantized by their weights alone: "
        "blocks.1.0, blocks.1.1"
    ]
    assert [model.get_submodule(f"blocks.{i}.0").weight._svdq_calibrated for i in (0, 1)] == [True, False]


def test_nothing_was_reached() -> None:
    with pytest.raises(NothingToQuantize, match="calibrate never ran a linear"):
        svdq.observe(Halves(), lambda model: None, progress=False)


def test_a_quantized_model_is_not_observed() -> None:
    model = Halves()
    svdq.quantize(model, CONFIG)
    with pytest.raises(OptionError, match="this Halves is quantized already: observe it before that, in 16 bits"):
        svdq.observe(model, lambda model: None)


def test_what_must_stay_16_bit_in_one_part_stays_so() -> None:
    """Another product than a linear's may read a weight in some calls only."""
    model = Halves()
    seen = svdq.observe(model, lambda model: model(torch.randn(1, 64, 128)), progress=False)
    merged = Statistics.merge(seen, replace(seen, inputs=(), others={"blocks.0.1": "it is a table too"}))
    report = {row.name: row for row in svdq.quantize(model, CONFIG, statistics=merged)}
    assert report["blocks.0.0"].precision == "w4a8"
    assert (report["blocks.0.1"].precision, report["blocks.0.1"].reason) == ("float32", "it is a table too")


# ** what is refused **


def wrong_shape() -> nn.Module:
    model = Halves()
    model.blocks[0][1] = nn.Linear(128, 256)
    return model


def missing() -> nn.Module:
    model = Halves()
    del model.blocks[0][1]
    return model


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (wrong_shape, r"blocks\.0\.1 is \(128, 128\) in them, \(256, 128\) in this model"),
        (missing, r"they have a linear blocks\.0\.1, a Halves's, which this model has not"),
    ],
)
def test_statistics_of_another_model(model: Callable[[], nn.Module], told: str) -> None:
    seen = svdq.observe(Halves(), lambda model: model(torch.randn(1, 64, 128)), progress=False)
    other = model()
    with pytest.raises(OtherModel, match=told):
        svdq.quantize(other, CONFIG, statistics=seen)
    assert all(decisions.is_undecided(p) or p.dim() == 1 for p in other.parameters())


def test_merging_what_is_not_of_one_model(whole: Statistics) -> None:
    half = svdq.observe(Halves(), lambda model: model(torch.randn(1, 64, 128)), progress=False)
    with pytest.raises(OtherModel, match="some of a FluxTransformer2DModel, some of a Halves"):
        Statistics.merge(whole, half)
    with pytest.raises(OptionError, match="was given no statistics"):
        Statistics.merge()
    other = svdq.observe(wrong_shape(), lambda model: model(torch.randn(1, 64, 128)), progress=False)
    with pytest.raises(OtherModel, match=r"blocks\.0\.1 has shapes"):
        Statistics.merge(half, other)
    siblings = next(known for known, _ in whole.inputs if len(known.names) > 2)
    alone = replace(siblings, names=siblings.names[:1], shapes=siblings.shapes[:1])
    parted = Statistics(whole.model_class, ((alone, whole.inputs[0][1]),), {})
    with pytest.raises(OtherModel, match=f"{alone.names[0]} shares its input with .* in some, not in others"):
        Statistics.merge(whole, parted)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"statistics": "file"}, r"statistics='file' are none: give those of svdq_compile\.observe"),
        ({"statistics": "whole", "calibrate": lambda model: None}, "give statistics alone"),
        ({"statistics": "whole", "example_inputs": {}}, "give statistics alone"),
    ],
)
def test_arguments_that_do_not_go_together(whole: Statistics, given: dict[str, Any], told: str) -> None:
    given = {name: whole if value == "whole" else value for name, value in given.items()}
    with pytest.raises(OptionError, match=told):
        svdq.quantize(Halves(), CONFIG, **given)


def test_where_nothing_can_be_written(whole: Statistics, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a folder"):
        whole.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder to write x to"):
        whole.save(tmp_path / "missing" / "x")


def test_other_files(tmp_path: Path) -> None:
    model, _ = flux()
    svdq.quantize(model, rank=0, refine=0, progress=False)
    svdq.save(model, tmp_path / "model", progress=False)
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    for name in ("model", "plain"):
        with pytest.raises(FileRefused, match="these are no statistics"):
            Statistics.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Statistics.load(tmp_path / "missing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(FileRefused, match="not a whole safetensors file"):
        Statistics.load(tmp_path / "text")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small model."""
    path = tmp_path_factory.mktemp("statistics") / "small"
    svdq.observe(Halves(), lambda model: model(torch.randn(1, 64, 128)), progress=False).save(path, progress=False)
    return path


def test_no_damage_goes_unnoticed(small: Path, tmp_path: Path) -> None:
    """Bytes changed anywhere, ends cut off or added: refused, or the same."""
    raw, chance = small.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    places = [*range(8), *chance.sample(range(8, header), 60), *chance.sample(range(header, len(raw)), 30)]
    damaged = [raw[:at] + bytes([raw[at] ^ (1 << chance.randrange(8))]) + raw[at + 1 :] for at in places]
    damaged += [raw[: chance.randrange(len(raw))] for _ in range(20)] + [raw + b"\0", b""]
    for content in damaged:
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(FileRefused):
            Statistics.load(tmp_path / "damaged", progress=False)


def changed(path: Path, out: Path, tensors: dict[str, Tensor | None], **parts: Any) -> Path:
    """The file with other tensors (None: without one) and metadata, sealed as if it were right."""
    from safetensors import safe_open

    from svdq_compile.checkpoint import write

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    given = load_file(path) | tensors
    write({out: {name: t for name, t in given.items() if t is not None}}, metadata | parts)
    return out


def inputs_of(path: Path) -> list[dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["inputs"])


FIRST = "blocks.0.0"


@pytest.mark.parametrize(
    ("tensors", "entry", "told"),
    [
        ({f"{FIRST}.span": torch.ones(64)}, {}, r"span is \(64,\), where \(128,\) is wanted"),
        ({f"{FIRST}.span": torch.full((128,), torch.inf)}, {}, "span holds other than finite numbers"),
        ({f"{FIRST}.span": torch.ones(128, dtype=torch.int32)}, {}, "span holds other than finite numbers"),
        ({f"{FIRST}.span": None}, {}, "span or .* is missing"),
        ({f"{FIRST}.rows": torch.zeros(0, 128)}, {}, "rows is"),
        ({f"{FIRST}.rows": torch.tensor(1.0)}, {}, "rows is"),
        ({f"{FIRST}.rows": torch.zeros(4, 128).fill_(torch.nan)}, {}, "rows holds other than finite"),
        ({f"{FIRST}.moment": torch.zeros(2, 64, 64)}, {}, "moment is"),
        ({f"{FIRST}.moment": None}, {}, "do not go together"),
        ({"other.span": torch.ones(3)}, {}, r"tensor other\.span is of no input"),
        ({}, {"moment_rows": 0}, "do not go together"),
        ({}, {"moment_rows": -1}, "do not go together"),
        ({}, {"moment_rows": None}, "do not go together"),
        ({}, {"names": []}, "inputs has one wrongly"),
        ({}, {"names": ["blocks.0.1"]}, "inputs has blocks.0.1 wrongly"),
        ({}, {"shapes": [[128, 64]]}, "span is"),
        ({}, {"shapes": [[128]]}, "has the shape"),
        ({}, {"shapes": [[128, 2**70]]}, "has the shape"),
        ({}, {"shapes": [[2**50, 128, 2**50]]}, "has the shape"),
        ({}, {"calls": "3"}, r"inputs\[0\]\['calls'\]"),
        ({}, {"more": 1}, r"inputs\[0\]\['more'\]"),
    ],
)
def test_files_that_were_sealed_wrong(
    small: Path, tmp_path: Path, tensors: dict[str, Tensor | None], entry: dict[str, Any], told: str
) -> None:
    inputs = inputs_of(small)
    inputs[0] |= entry
    path = changed(small, tmp_path / "changed", tensors, inputs=json.dumps(inputs))
    with pytest.raises(FileRefused, match=told):
        Statistics.load(path, progress=False)


def test_a_newer_file(small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path / "newer", {}, format_version="2")
    with pytest.raises(FileRefused, match="it has format version 2; this svdq-compile reads up to 1"):
        Statistics.load(path)


def test_svdq_observe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ("observe", EMOJI, tmp_path / "emoji", "--steps", 1, "--device", "cpu", "--trust-code")
    assert "there is no prompt to draw: give --prompt or --prompts" in refused(*command)
    assert "98 linears, 2 calls" in ok(*command, "--prompt", "dog face", "--prompt", "red apple")
    found = Statistics.load(tmp_path / "emoji", progress=False)
    assert found.model_class == "FluxTransformer2DModel"
    assert all(seen.span is not None and seen.moment is not None for _, seen in found.inputs)
    assert "exists already; --force overwrites it" in refused(*command, "--prompt", "dog face")


def test_the_command_line_refuses(small: Path, tmp_path: Path) -> None:
    flux()[0].save_pretrained(tmp_path / "flux")  # type: ignore[operator]
    command = ("quantize", tmp_path / "flux", tmp_path / "out", "--statistics", small)
    assert "these statistics are of another model: they have a linear blocks.0.0" in refused(*command)
    assert "is among the statistics" in refused(*command[:2], small, *command[3:], "--force")
    assert "--statistics are of a calibration that was done" in refused(*command, "--prompt", "a dog")
    assert not (tmp_path / "out").exists()


def test_the_bench_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import observe

    observe.main(["--tiny", "--output", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["observe", "calibrate", "statistics"]
    assert rows[-1]["same_bits"] is True
    assert 0 < rows[0]["file_gib"] < 1
