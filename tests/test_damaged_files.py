"""Files that were damaged, or made by somebody else, in any place: refused with what is wrong, or loaded equal; and the
model is as it was after a refusal.
"""

import json
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import svdq_compile as svdq
from conftest import Net, inputs, net, quiet
from svdq_compile.errors import FileRefused
from svdq_compile.header import UNSEALED, seal

SLOW = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


@cache
def contents() -> bytes:
    """Of a small quantized model's file."""
    model = net(dtype=torch.bfloat16)
    svdq.quantize(model, svdq.Config(**quiet()), calibrate=lambda m: m(*inputs(dtype=torch.bfloat16)))
    file = Path(__file__).parent / ".damaged.safetensors"
    try:
        svdq.save(model, file, progress=False)
        return file.read_bytes()
    finally:
        file.unlink(missing_ok=True)


def on_meta() -> Net:
    with torch.device("meta"):
        return Net().to(torch.bfloat16).eval().requires_grad_(False)


@cache
def right() -> torch.Tensor:
    model = net(dtype=torch.bfloat16)
    svdq.quantize(model, svdq.Config(**quiet()), calibrate=lambda m: m(*inputs(dtype=torch.bfloat16)))
    return model(*inputs(dtype=torch.bfloat16))


def refused_or_equal(file: Path) -> bool:
    """Whether a file was refused; if not, the model computes what the saved one does."""
    model, told = on_meta(), ""
    try:
        svdq.load(model, file, progress=False)
    except FileRefused as error:
        told = str(error)
    if told:
        assert told.startswith(f"{file}: ")
        assert all(parameter.is_meta for parameter in model.parameters())
        return True
    assert torch.equal(model(*inputs(dtype=torch.bfloat16)), right())
    return False


@SLOW
@given(place=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_bit_of_the_header(place: float, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    damaged = bytearray(contents())
    header = 8 + int.from_bytes(damaged[:8], "little")
    damaged[int(place * (header - 1))] ^= 1 << bit
    file = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    file.write_bytes(damaged)
    assert refused_or_equal(file)


@settings(SLOW, max_examples=30)
@given(place=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_bit_of_the_tensors(place: float, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    damaged = bytearray(contents())
    header = 8 + int.from_bytes(damaged[:8], "little")
    damaged[header + int(place * (len(damaged) - header - 1))] ^= 1 << bit
    file = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    file.write_bytes(damaged)
    assert refused_or_equal(file)


@settings(SLOW, max_examples=30)
@given(length=st.floats(0, 1))
def test_a_file_that_was_cut(length: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    file.write_bytes(contents()[: int(length * (len(contents()) - 1))])
    assert refused_or_equal(file)


# Not damage but another writer: the digest is right, or there is none, and what it covers is wrong.

Change = Callable[[dict[str, torch.Tensor], dict[str, str]], None]


def layers_of(metadata: dict[str, str], change: Callable[[dict[str, Any]], Any]) -> None:
    layers = json.loads(metadata["layers"])
    change(layers[0])
    metadata["layers"] = json.dumps(layers)


def entry(**values: Any) -> Change:
    return lambda tensors, metadata: layers_of(metadata, lambda layer: layer.update(values))


def metadata_with(**values: str) -> Change:
    return lambda tensors, metadata: metadata.update(values)


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors[name] = change(tensors[name]).contiguous()
        checksums = json.loads(metadata["checksums"])
        checksums[name] = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy())
        metadata["checksums"] = json.dumps(checksums)

    return apply


FIRST = "blocks.0.modulate.weight"
CHANGES: dict[str, tuple[Change, str]] = {
    "layers is no list": (metadata_with(layers='{"a": 1}'), "layers"),
    "layers holds numbers": (metadata_with(layers="[1, 2]"), "layers"),
    "layers is no JSON": (metadata_with(layers="["), "layers"),
    "layers is deep": (metadata_with(layers="[" * 5000 + "]" * 5000), "layers"),
    "checksums are text": (metadata_with(checksums='{"a": "b"}'), "checksums"),
    "checksums is a list": (metadata_with(checksums="[]"), "checksums"),
    "tied is null": (metadata_with(tied="null"), "tied"),
    "tied to a number": (metadata_with(tied='{"a": 3}'), "tied"),
    "others is text": (metadata_with(others='"x"'), "others"),
    "config is a number": (metadata_with(config="1"), "config"),
    "calibrated is a list": (metadata_with(calibrated="[1]"), "calibrated"),
    "a rank that is text": (entry(rank="32"), "rank"),
    "a rank that is a bool": (entry(rank=True), "rank"),
    "a rank below zero": (entry(rank=-1), "wanted"),
    "another rank": (entry(rank=8), "wanted"),
    "a first row below zero": (entry(rank_start=-1), "cannot use"),
    "a first row beyond the end": (entry(rank_start=10**9), "cannot use"),
    "a shape that is text": (entry(shape="ab"), "shape"),
    "a shape with a float": (entry(shape=[1.5, 2]), "shape"),
    "a shape that is null": (entry(shape=None), "shape"),
    "a huge shape": (entry(shape=[10**15, 10**15]), r"in the file, \(256, 128\) in the model"),
    "a dtype that is none": (entry(dtype="nn"), "unknown to this version"),
    "a precision that is none": (entry(precision="int3"), "unknown to this version"),
    "another precision": (entry(precision="int4"), "the model has no tensor"),
    "a field that is unknown": (entry(extra=1), "extra"),
    "an offset that is not there": (entry(has_offset=True), "is missing"),
    "a shared input that is not there": (entry(shared="nowhere"), "is missing"),
    "a reversed shape": (tensor(f"{FIRST}.qweight", torch.t), "wanted"),
    "a flat tensor": (tensor(f"{FIRST}.qweight", torch.flatten), "wanted"),
    "scales of another dtype": (tensor(f"{FIRST}.wscales", lambda t: t.double()), "is wanted"),
    "codes of another dtype": (tensor(f"{FIRST}.qweight", lambda t: t.view(torch.float8_e4m3fn)), "is wanted"),
    "a short branch": (tensor(f"{FIRST}.up", lambda t: t[:-1]), "wanted"),
    "a narrow branch": (tensor(f"{FIRST}.down", lambda t: t[:, :-1]), "cannot use"),
    "a smoothing of two dimensions": (tensor(f"{FIRST}.smooth", lambda t: t[None]), "wanted"),
    "a bias of another shape": (tensor("blocks.0.modulate.bias", lambda t: t[:-1]), "in the model"),
}


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_file_of_another_writer(name: str, version: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    change, message = CHANGES[name]
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | {"format_version": version, "digest": UNSEALED}
    if version == "1":
        del metadata["digest"]
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    if version == "2":
        seal(file)
    model = on_meta()
    with pytest.raises(FileRefused, match=message):
        svdq.load(model, file, progress=False)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_file_of_the_version_before(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | {"format_version": "1"}
    del metadata["digest"]
    save_file(load_file(file), file, metadata)
    assert not refused_or_equal(file)


def test_a_file_as_it_was_saved(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    assert not refused_or_equal(file)


def test_a_digest_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    del metadata["digest"]
    save_file(load_file(file), file, metadata)
    with pytest.raises(FileRefused, match="has no digest"):
        svdq.load(on_meta(), file, progress=False)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    check = svdq.checkpoint.check_layout

    def replaced_meanwhile(*args: Any) -> None:
        (tmp_path / "y").write_bytes(contents())
        (tmp_path / "y").replace(file)
        check(*args)

    monkeypatch.setattr(svdq.checkpoint, "check_layout", replaced_meanwhile)
    model = on_meta()
    with pytest.raises(FileRefused, match="while it was read"):
        svdq.load(model, file, progress=False)
    assert all(parameter.is_meta for parameter in model.parameters())
