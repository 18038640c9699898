"""`svdq quantize` of a folder: a group of linears at a time, to the bits of `svdq.quantize`; cut off anywhere, it goes
on and ends with the same file.
"""

import os
import resource
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from test_replacing import child, end_of, soon
from torch import Tensor, nn
from typer.testing import CliRunner

import svdq_compile as svdq
from conftest import logged
from svdq_compile import journal
from svdq_compile.cli import app
from svdq_compile.errors import FileRefused, NonFiniteWeight, OptionError, SvdqError
from svdq_compile.model_files import opened_source
from svdq_compile.reading import TensorFile
from svdq_compile.streaming import _facts, quantize_file
from zoo import make

CONFIG = svdq.Config(rank=8, refine=1, precision="int4", progress=False)
CPU = torch.device("cpu")
BF16 = torch.bfloat16
SHARD = "diffusion_pytorch_model-00003-of-00010.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards, between which q, k and v are spread."""
    folder = tmp_path_factory.mktemp("flux")
    make("flux", BF16)[0].save_pretrained(folder, max_shard_size="400KB")  # type: ignore[operator]
    assert (folder / SHARD).exists()
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> bytes:
    """The file of the model that was loaded and quantized."""
    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=BF16)
    svdq.quantize(model, CONFIG)
    svdq.save(model, folder / "expected", config=CONFIG, progress=False)
    return (folder / "expected").read_bytes()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CHUNK", 50_000)


def stream(folder: Path, target: Path, config: svdq.Config = CONFIG) -> None:
    quantize_file(folder, target, config, CPU)


def journals(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{target.name}.*.unfinished"))


class Cut(BaseException):
    """As Ctrl-C."""


def cut_after(reads: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the tensor after so many be the last that is asked for. The names that are read."""
    names: list[str] = []
    get = TensorFile.get

    def get_or_stop(self: TensorFile, name: str) -> Tensor:
        if len(names) == reads:
            raise Cut
        names.append(name)
        return get(self, name)

    monkeypatch.setattr(TensorFile, "get", get_or_stop)
    return names


# ** the same bits **


def test_a_folder_becomes_the_file_of_the_quantized_model(folder: Path, expected: bytes, tmp_path: Path) -> None:
    stream(folder, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected
    assert os.listdir(tmp_path) == ["out"]


def test_the_command_line(folder: Path, expected: bytes, tmp_path: Path) -> None:
    options = ["--rank", "8", "--refine", "1", "--precision", "int4", "--device", "cpu"]
    result = CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    empty = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
    svdq.save(svdq.load(empty, tmp_path / "out", progress=False), tmp_path / "again", config=CONFIG, progress=False)
    assert (tmp_path / "again").read_bytes() == expected


@pytest.mark.parametrize("in_memory", [True, False])
def test_groups_that_share_an_input(in_memory: bool, folder: Path, tmp_path: Path) -> None:
    """q, k and v, in different shards, are read together."""
    inputs = make("flux", BF16)[1]
    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=BF16)
    svdq.quantize(model, CONFIG, example_inputs=inputs)
    svdq.save(model, tmp_path / "expected", progress=False)
    streamed = svdq.from_pretrained(folder, CONFIG, example_inputs=inputs)
    svdq.save(streamed, tmp_path / "streamed", progress=False)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "expected").read_bytes()
    packs = [svdq.packed(streamed.get_parameter(f"transformer_blocks.0.attn.to_{x}.weight")) for x in "qkv"]
    assert len({id(pack.shared) for pack in packs}) == 1
    assert not streamed.training


def test_one_linear_is_in_memory_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CHUNK", 0)
    alive: dict[int, int] = {}  # address -> bytes
    most, get = 0, TensorFile.get

    def watched(self: TensorFile, name: str) -> Tensor:
        nonlocal most
        tensor = get(self, name)
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        most = max(most, sum(alive.values()))
        return tensor

    monkeypatch.setattr(TensorFile, "get", watched)
    stream(folder, tmp_path / "out")
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    largest = max(tensor.nbytes for tensor in tensors)
    assert largest <= most <= 2 * largest
    assert most < 0.2 * sum(tensor.nbytes for tensor in tensors)


# ** cut off **


@pytest.mark.parametrize("reads", [0, 30, 70, 110])
def test_it_goes_on_where_it_was(
    reads: int, folder: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        cut_after(reads, patched)
        with pytest.raises(Cut):
            stream(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(journals(tmp_path / "out")) == (reads > 0)
    names = cut_after(10_000, monkeypatch)
    stream(folder, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected
    ours = [name for name in names if name.endswith(".weight")]  # parts are read for their checksums
    assert len(ours) < len(load_names(folder)) - reads / 4 or reads == 0
    assert os.listdir(tmp_path) == ["out"]


def load_names(folder: Path) -> list[str]:
    return [name for file in folder.glob("*.safetensors") for name in load_file(file) if name.endswith(".weight")]


def test_a_kill_at_any_moment(folder: Path, expected: bytes, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def work() -> None:
        torch.set_num_threads(1)  # a fork has none of the others
        stream(folder, target)

    begun = time.monotonic()
    assert end_of(child(work)) == 0
    lasts = time.monotonic() - begun
    assert target.read_bytes() == expected
    target.unlink()
    random, ends = Random(0), []
    for _ in range(20):
        pid = child(work)
        time.sleep(random.random() * lasts / 3)
        os.kill(pid, signal.SIGKILL)
        ends.append(end_of(pid))
        assert not target.exists() or target.read_bytes() == expected
        if ends[-1] == 0:
            target.unlink()
    assert ends.count(-signal.SIGKILL) >= 10
    assert end_of(child(work)) == 0
    assert target.read_bytes() == expected
    assert os.listdir(tmp_path) == ["out"]


def interrupted(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch, config: svdq.Config = CONFIG) -> Path:
    """The journal of a run that was cut off."""
    with monkeypatch.context() as patched:
        cut_after(70, patched)
        with pytest.raises(Cut):
            stream(folder, target, config)
    (found,) = journals(target)
    return found


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda b: b[: len(b) // 2],
    "a bit": lambda b: b[:-100] + bytes([b[-100] ^ 1]) + b[-99:],
    "empty": lambda b: b"",
    "a bit of the header": lambda b: b[:300] + bytes([b[300] ^ 1]) + b[301:],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_is_made_again(
    name: str, folder: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = sorted(interrupted(folder, tmp_path / "out", monkeypatch).glob("*.safetensors"))[1]
    part.write_bytes(DAMAGE[name](part.read_bytes()))
    stream(folder, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected


def test_what_other_options_have_left_is_not_taken_up(
    folder: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(folder, tmp_path / "out", monkeypatch, svdq.Config(**CONFIG.to_dict() | {"rank": 16}))
    interrupted(folder, tmp_path / "another", monkeypatch)
    stream(folder, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected
    assert not journals(tmp_path / "out"), "nobody will ask for it"
    assert journals(tmp_path / "another")


def test_other_weights_are_not_taken_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("flux", BF16, seed=1)[0].save_pretrained(tmp_path / "source", max_shard_size="400KB")  # type: ignore[operator]
    interrupted(tmp_path / "source", tmp_path / "out", monkeypatch)
    for file in folder.glob("*.safetensors"):
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    stream(tmp_path / "source", tmp_path / "out")
    stream(folder, tmp_path / "expected")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()


def test_another_folder_of_equal_looks_is_not_taken_up(
    folder: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fine-tune: the same names, sizes and times."""
    other = tmp_path / "other"
    make("flux", BF16, seed=1)[0].save_pretrained(other, max_shard_size="400KB")  # type: ignore[operator]
    for file in other.iterdir():
        state = (folder / file.name).stat()
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert file.stat().st_size == state.st_size
    interrupted(other, tmp_path / "out", monkeypatch)
    stream(folder, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected


def test_want_of_memory_ends_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched for the layers that are left would stay in memory."""
    calls = []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("svdq_compile.convert.quantize_group", full)
    with pytest.raises(torch.OutOfMemoryError):
        stream(folder, tmp_path / "out")
    assert len(calls) == 1
    assert not (tmp_path / "out").exists()


def test_it_is_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    left = interrupted(folder, tmp_path / "out", monkeypatch)
    assert f"what is done is kept in {left}: the same again goes on from there" in capsys.readouterr().err
    with logged("svdq_compile") as records:
        stream(folder, tmp_path / "out")
    assert any("weights are done" in record.getMessage() for record in records)


# ** what is refused **


def test_two_processes_to_one_target(folder: Path, expected: bytes, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def hold() -> None:
        with opened_source(folder) as source:
            facts = _facts(source, CONFIG, CPU)
        with journal.journal_beside(target, source.model, facts):
            time.sleep(60)

    pid = child(hold)
    try:
        soon(lambda: journals(target))
        time.sleep(0.2)
        with pytest.raises(SvdqError, match="another process is quantizing to it"):
            stream(folder, target)
    finally:
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
    stream(folder, target)
    assert target.read_bytes() == expected


def test_a_disk_that_fills(folder: Path, expected: bytes, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")

    def full() -> None:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected) // 2, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=f"cannot write {target}: .*File too large"):
            stream(folder, target)

    assert end_of(child(full)) == 0
    assert target.read_text() == "old"
    stream(folder, target)
    assert target.read_bytes() == expected
    assert os.listdir(tmp_path) == ["out"]


def test_a_source_that_changes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    make("flux", BF16)[0].save_pretrained(source)  # type: ignore[operator]
    get, reads = TensorFile.get, 0

    def change_and_get(self: TensorFile, name: str) -> Tensor:
        nonlocal reads
        reads += 1
        if reads == 30:
            os.utime(source / "diffusion_pytorch_model.safetensors")
        return get(self, name)

    monkeypatch.setattr(TensorFile, "get", change_and_get)
    with pytest.raises(FileRefused, match="it was written to while it was read"):
        stream(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"], "half of it may be of another model"


def test_weights_that_are_no_numbers(folder: Path, tmp_path: Path) -> None:
    model = make("flux", BF16)[0]
    nn.init.constant_(model.get_parameter("transformer_blocks.1.attn.to_k.weight"), float("nan"))
    model.save_pretrained(tmp_path / "source")  # type: ignore[operator]
    config = svdq.Config(**CONFIG.to_dict() | {"fallback": False})
    with pytest.raises(NonFiniteWeight, match=r"transformer_blocks.1.attn.to_k"):
        stream(tmp_path / "source", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_shards_that_lack_a_tensor(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / SHARD)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, tmp_path / SHARD)
    with pytest.raises(FileRefused, match=f"tensor {name} is missing, which a FluxTransformer2DModel"):
        svdq.from_pretrained(tmp_path, CONFIG)


def test_a_folder_that_is_in_4_bits(folder: Path, tmp_path: Path) -> None:
    model = svdq.from_pretrained(folder, CONFIG)
    model.save_pretrained(tmp_path, max_shard_size="200KB")  # type: ignore[operator]
    loaded = svdq.from_pretrained(tmp_path)
    assert type(loaded) is FluxTransformer2DModel
    for file, each in (("a", model), ("b", loaded)):
        svdq.save(each, tmp_path / file, progress=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert svdq.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(OptionError, match="is in 4 bits already"):
        svdq.from_pretrained(tmp_path, rank=16)
    svdq.save(model, tmp_path / "one.safetensors", progress=False)
    one = svdq.from_pretrained(tmp_path / "one.safetensors", model=folder, progress=False)
    svdq.save(one, tmp_path / "c", progress=False)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_arguments_of_from_pretrained(folder: Path, tmp_path: Path) -> None:
    def says(*args: Any, **kwargs: Any) -> str:
        with pytest.raises((SvdqError, FileNotFoundError)) as raised:
            svdq.from_pretrained(*args, **kwargs)
        return str(raised.value)

    assert "there is no such file or folder" in says(tmp_path / "nothing")
    assert "unknown option 'ranc': did you mean 'rank'?" in says(folder, ranc=8)
    assert "goes with a single file" in says(folder, model="FluxTransformer2DModel")
    assert "has no model_index.json" in says(folder, component="unet")
    assert "dtype=torch.int8: a model in 4 bits computes in" in says(folder, dtype=torch.int8)
    assert "device='tpu' is no device" in says(folder, device="tpu")
