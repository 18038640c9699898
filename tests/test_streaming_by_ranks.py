"""Several ranks quantize a model from its files together: the file is that of one process, bit for bit, and goes on
where it was, by however many; or each rank ends up with its part of the model, and never had more.
"""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from ranks_testing import message, results_on_ranks
from test_tensor_parallel import bytes_read, mesh, state
from torch import nn

import svdq_compile as svdq
from svdq_compile import convert, journal, keeping
from svdq_compile.deferred import Deferred
from svdq_compile.filling import fill
from svdq_compile.holders import Holders
from svdq_compile.input_statistics import MAX_ROWS
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.split_plan import Plan
from svdq_compile.splits import OUTPUTS, Split
from svdq_compile.statistics import Statistics
from svdq_compile.streaming import quantize_file
from zoo import make

CONFIG = svdq.Config(rank=8, refine=0, precision="int4", progress=False, fallback=False)
CPU = torch.device("cpu")
BF16 = torch.bfloat16


def flux(seed: int = 0) -> nn.Module:
    return make("flux", BF16, seed=seed)[0]


def stream(source: Path, target: Path, **options: Any) -> None:
    quantize_file(source, target, svdq.Config(**CONFIG.to_dict() | options), CPU)


def quantized_here() -> tuple[mock._patch, list[str]]:
    """What keeps the names of the layers that this process quantizes."""
    names: list[str] = []
    whole = convert.quantize_group

    def counted(weights: Any, told: Any, *args: Any) -> Any:
        names.extend(told)
        return whole(weights, told, *args)

    return mock.patch.object(convert, "quantize_group", counted), names


# What follows runs in the processes, all of it in one run.


def together(folder: Path) -> dict[str, Any]:
    journal.CHUNK = 50_000
    return {name: step(folder) for name, step in STEPS.items()}


def saving_a_part(folder: Path) -> Any:
    """The first that this process does, so that nothing else has taken care of `save_pretrained`. In 16 bits too."""
    part = svdq.from_pretrained(folder / "expected", model=folder / "source", mesh=mesh(), progress=False)
    target = folder / f"part {dist.get_rank()}"

    def save() -> None:
        part.save_pretrained(target)  # type: ignore[operator]

    told = [message(save)]
    svdq.restore(part, dequantize=True, progress=False)
    return [*told, message(save)], target.exists()


def one_file(folder: Path) -> Any:
    """Each reads and quantizes a part."""
    patch, names = quantized_here()
    with patch:
        read = bytes_read(lambda: stream(folder / "source", folder / "out"))
    return names, read


def going_on(folder: Path) -> Any:
    """One rank is at an end in the middle: all are, and the same again goes on."""
    whole, calls = convert.quantize_group, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) > 6:
            raise ZeroDivisionError("a bug")
        return whole(*args)

    with mock.patch.object(convert, "quantize_group", failing):
        told = message(lambda: stream(folder / "source", folder / "again"))
    left = any(name.endswith(".unfinished") for name in os.listdir(folder))
    patch, names = quantized_here()
    dist.barrier()
    with patch:
        stream(folder / "source", folder / "again")
    return told, left, names


def without_a_place(folder: Path) -> str:
    """Only the first rank writes."""
    return message(lambda: stream(folder / "source", folder / "nowhere" / "out"))


def a_full_disk(folder: Path) -> str:
    def add(*args: Any) -> None:
        raise OSError("no space left")

    with mock.patch.object(journal.Journal, "add", add):
        return message(lambda: stream(folder / "source", folder / "full"))


def other_sources(folder: Path) -> Any:
    """A fine-tune on one rank: the same names and sizes; and other options."""
    source = folder / ("source", "fine-tune")[dist.get_rank()]
    return (
        message(lambda: stream(source, folder / "none")),
        message(lambda: stream(folder / "source", folder / "none", rank=8 + dist.get_rank())),
        message(lambda: svdq.from_pretrained(source, CONFIG, mesh=mesh())),
        message(lambda: stream(folder / ("source", "gone")[dist.get_rank()], folder / "none")),
    )


def wrong_on_one(folder: Path) -> Any:
    """A file is missing, is in 4 bits, an option does not go with it: on one rank."""
    source, rank = folder / "source", dist.get_rank()
    four = (source, None) if rank == 0 else (folder / "expected", source)

    def parts(**given: Any) -> str:
        return message(lambda: svdq.from_pretrained(source, CONFIG, mesh=mesh(), **given if rank else {}))

    return {
        "gone": message(lambda: svdq.from_pretrained(folder / "gone" if rank else source, CONFIG, mesh=mesh())),
        "4 bits": message(lambda: svdq.from_pretrained(four[0], model=four[1], mesh=mesh(), progress=False)),
        "dtype": parts(dtype=torch.int8),
        "option": parts(weights="keep"),
        "inputs": parts(example_inputs={"no_such": 1}),
    }


def by_parts(folder: Path) -> Any:
    """A part of the model on each rank, as if the whole had been split."""
    largest = [0]
    add = keeping.Parts.add

    def watched(self: Any, weights: Any) -> None:
        add(self, weights)
        here = sum(bytes_of(parameter) for parameter in self._model.parameters())
        largest[0] = max(largest[0], here)

    patch, names = quantized_here()
    options = CONFIG.to_dict() | {"example_inputs": make("flux", BF16)[1]}
    with ExitStack() as patched:
        patched.enter_context(patch)
        patched.enter_context(mock.patch.object(keeping.Parts, "add", watched))
        parts = svdq.from_pretrained(folder / "source", mesh=mesh(), **options)
    whole = svdq.from_pretrained(folder / "source", **options)
    size = sum(map(bytes_of, whole.parameters()))
    split = svdq.parallelize(whole, mesh(), progress=False)
    inputs = make("flux", BF16)[1]
    same = torch.equal(parts(**inputs)[0], split(**inputs)[0])
    loaded = svdq.from_pretrained(folder / "expected", model=folder / "source", mesh=mesh(), progress=False)
    return names, state(parts) == state(split), same, largest[0] / size, len(state(loaded)) == len(state(parts))


def bytes_of(parameter: nn.Parameter) -> int:
    """Of what is behind a Parameter."""
    return parameter._svdq.nbytes() if isinstance(parameter, QuantizedWeight) else parameter.untyped_storage().nbytes()


def with_statistics(folder: Path) -> None:
    seen = Statistics.load(folder / "statistics", progress=False)
    quantize_file(folder / "source", folder / "calibrated", CONFIG, CPU, statistics=seen)


STEPS: dict[str, Callable] = {
    step.__name__: step
    for step in (
        saving_a_part,
        one_file,
        going_on,
        without_a_place,
        a_full_disk,
        other_sources,
        wrong_on_one,
        by_parts,
        with_statistics,
    )
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    flux().save_pretrained(folder / "source", max_shard_size="400KB")  # type: ignore[operator]
    flux(seed=1).save_pretrained(folder / "fine-tune", max_shard_size="400KB")  # type: ignore[operator]
    model = FluxTransformer2DModel.from_pretrained(folder / "source", torch_dtype=BF16)
    svdq.quantize(model, CONFIG)
    svdq.save(model, folder / "expected", config=CONFIG, progress=False)
    model, given = make("flux", BF16)
    generator = torch.Generator().manual_seed(0)

    def calibrate(model: nn.Module) -> None:
        for _ in range(40):  # more rows than count
            noise = torch.randn(given["hidden_states"].shape, generator=generator)
            model(**given | {"hidden_states": noise.to(BF16)})

    svdq.observe(model, calibrate, progress=False).save(folder / "statistics", progress=False)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """Of all steps, for each of two ranks."""
    return results_on_ranks(2, together, folder, folder)


def test_the_file_is_that_of_one_process(folder: Path, results: list[dict]) -> None:
    assert (folder / "out").read_bytes() == (folder / "expected").read_bytes()
    (first, _), (second, other) = (result["one_file"] for result in results)
    assert not set(first) & set(second)
    assert 0.8 < len(first) / len(second) < 1.25
    source = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
    assert other < 0.7 * source  # the first one reads what is not quantized too, and its parts of the file


def test_with_statistics_too(folder: Path, results: list[dict], tmp_path: Path) -> None:
    seen = Statistics.load(folder / "statistics", progress=False)
    assert any(len(own.kept) > MAX_ROWS for _, own in seen.inputs)
    quantize_file(folder / "source", tmp_path / "alone", CONFIG, CPU, statistics=seen)
    assert (tmp_path / "alone").read_bytes() == (folder / "calibrated").read_bytes()


def test_a_part_is_not_saved(results: list[dict]) -> None:
    for result in results:
        told, exists = result["saving_a_part"]
        assert all(text.startswith("SplitRefused: saving needs the whole Flux") for text in told), told
        assert not exists


def test_wholes_do_not_stay() -> None:
    """Of what was quantized a part stays, though tasks know of the Parameters to the end."""
    whole = nn.Sequential(nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))).bfloat16()
    with torch.device("meta"):
        empty = nn.Sequential(nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))).bfloat16()
    files = {name: Deferred.of(tuple(t.shape), t.dtype, t.clone) for name, t in whole.state_dict().items()}
    plan = Plan({f"0.{i}": Split(OUTPUTS, (256,)) for i in range(4)}, frozenset())
    packs: list[weakref.ref] = []
    plain: list[int] = []
    alive: list[int] = []

    class Watched(keeping.Parts):
        def add(self, weights: Mapping[str, nn.Parameter]) -> None:
            packs.extend(
                weakref.ref(weight._svdq) for weight in weights.values() if isinstance(weight, QuantizedWeight)
            )
            super().add(weights)
            alive.append(sum(pack() is not None for pack in packs))
            plain.extend(w.untyped_storage().nbytes() for w in weights.values() if not isinstance(w, QuantizedWeight))

    keeper = Watched(empty, plan, Holders(0, 2, "group", None), CPU, False)
    config = svdq.Config(**CONFIG.to_dict() | {"skip": ["0.3"]})
    fill(empty, files, Path("files"), config, keeper=keeper)
    assert len(packs) == 3
    assert max(alive) <= 1
    assert len(plain) == 5
    assert max(plain) == 128 * 256 * 2


def test_it_goes_on_where_it_was(folder: Path, results: list[dict]) -> None:
    (first, left, names), (second, _, others) = (result["going_on"] for result in results)
    assert first == "RankFailed: rank 1 failed, so all ranks stop: ZeroDivisionError: a bug"
    assert second == "ZeroDivisionError: a bug"
    assert left
    assert 0 < len(names) + len(others) < sum(len(result["one_file"][0]) for result in results)
    assert (folder / "again").read_bytes() == (folder / "expected").read_bytes()
    assert not [name for name in os.listdir(folder) if name.endswith(".unfinished")]


def test_an_error_on_one_ends_all(results: list[dict]) -> None:
    first, second = (result["without_a_place"] for result in results)
    assert first.startswith("FileNotFoundError: ")
    assert second.startswith("RankFailed: rank 0 failed, so all ranks stop: FileNotFoundError: ")
    first, second = (result["a_full_disk"] for result in results)
    assert first == "OSError: no space left"
    assert second.endswith("OSError: no space left")


def test_ranks_that_differ(results: list[dict]) -> None:
    (files, options, parts, gone), (*same, missing) = (result["other_sources"] for result in results)
    assert same == [files, options, parts]
    for told in (files, parts):
        assert told.startswith("RanksDiffer: rank 0 reads diffusion_pytorch_model-00001-of-")
    assert "rank=8" in options
    assert "rank=9" in options
    assert gone.startswith("RankFailed: rank 1 failed")
    assert missing.startswith("FileNotFoundError")


def test_what_is_wrong_on_one_ends_all(results: list[dict]) -> None:
    first, second = (result["wrong_on_one"] for result in results)
    assert first.pop("4 bits") == (told := second.pop("4 bits"))
    assert told.startswith("RanksDiffer: rank 0 reads weights of 16 bits, rank 1 of 4 bits")
    for step, told in second.items():
        assert told.startswith(("FileNotFoundError: ", "OptionError: ")), (step, told)
        assert first[step] == f"RankFailed: rank 1 failed, so all ranks stop: {told}"


def test_each_rank_keeps_its_part(results: list[dict]) -> None:
    for result in results:
        names, equal, same, share, loaded = result["by_parts"]
        assert names
        assert equal
        assert same
        assert share < 0.8  # norms, embedders and modulations are whole
        assert loaded
    assert not set(results[0]["by_parts"][0]) & set(results[1]["by_parts"][0])


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    options = ["--rank", "8", "--refine", "0", "--precision", "int4", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "svdq_compile", "quantize", str(folder / "source"), str(tmp_path / "out"), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Next: svdq_compile.load") == 1
    empty = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder / "source"))
    svdq.save(svdq.load(empty, tmp_path / "out", progress=False), tmp_path / "again", config=CONFIG, progress=False)
    assert (tmp_path / "again").read_bytes() == (folder / "expected").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again", "out"]
