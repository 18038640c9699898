"""Files that were damaged, or made by somebody else, in any place: refused with what is wrong, or loaded equal; and the
model is as it was after a refusal.
"""

import json
import os
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
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
from svdq_compile.header import UNSEALED, VERSION, seal
from svdq_compile.reading import TensorFile

EXAMPLES = int(os.environ.get("EXAMPLES", "100"))  # of a test that damages files at random; 5000 take ten minutes
RANDOMLY = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
FIRST = "blocks.0.modulate.weight"
LATEST = str(VERSION)


@cache
def quantized() -> Net:
    model = net(dtype=torch.bfloat16)
    svdq.quantize(model, svdq.Config(**quiet()), calibrate=lambda m: m(*inputs(dtype=torch.bfloat16)))
    return model


@cache
def contents(version: str = LATEST) -> bytes:
    """Of a small quantized model's file."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "x"
        svdq.save(quantized(), file, progress=False)
        if version != LATEST:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() | {"format_version": version, "digest": UNSEALED}
            later = ("rotate", "effect")
            layers = [{k: v for k, v in layer.items() if k not in later} for layer in json.loads(metadata["layers"])]
            metadata["layers"] = json.dumps(layers)
            if version == "1":
                del metadata["digest"]
            save_file(load_file(file), file, metadata)
            if version != "1":
                seal(file)
        return file.read_bytes()


def on_meta() -> Net:
    with torch.device("meta"):
        return Net().to(torch.bfloat16).eval().requires_grad_(False)


@cache
def right() -> torch.Tensor:
    return quantized()(*inputs(dtype=torch.bfloat16))


def loaded(file: Path) -> Net | None:
    """A model that was filled from a file; None if that was refused, and the model is as it was."""
    model, refused = on_meta(), ""
    try:
        svdq.load(model, file, progress=False)
    except FileRefused as error:
        refused = str(error)
    if not refused:
        return model
    assert refused.startswith(f"{file}: ")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return None


def is_right(model: Net) -> bool:
    return torch.equal(model(*inputs(dtype=torch.bfloat16)), right())


def loaded_from(content: bytes) -> Net | None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(content)
        return loaded(file)


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


PLACE = st.floats(0, 1, exclude_max=True)


def refused_or_right(new: bytes, version: str) -> bool:
    """Without a digest a header may say something else that fits as well: then it makes a whole model at least."""
    model = loaded_from(new)
    if model is None:
        return True
    if version == "1":
        return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return new == contents(version) and is_right(model)


VERSIONS = st.sampled_from(("1", "2", LATEST))


@RANDOMLY
@given(place=PLACE, bit=st.integers(0, 7), version=VERSIONS)
def test_a_bit_of_the_header(place: float, bit: int, version: str) -> None:
    old = contents(version)
    assert refused_or_right(flipped(old, int(place * header_size(old)), bit), version)


@RANDOMLY
@given(place=PLACE, bit=st.integers(0, 7), version=VERSIONS)
def test_a_bit_of_the_tensors(place: float, bit: int, version: str) -> None:
    old = contents(version)
    begin, end = header_size(old), len(old)
    assert loaded_from(flipped(old, begin + int(place * (end - begin)), bit)) is None


@RANDOMLY
@given(
    at=PLACE,
    length=st.integers(0, 300),
    other=PLACE,
    kind=st.sampled_from(("cut", "lost", "zero", "moved", "more")),
    version=VERSIONS,
)
def test_damage_of_several_bytes(at: float, length: int, other: float, kind: str, version: str) -> None:
    """A file that was cut, or in whose header or tensors something is missing, zero, or from elsewhere in the file."""
    old = contents(version)
    size = len(old) if other > 0.5 else header_size(old)  # one half of the damage is in the header, which is short
    begin, there = int(at * size), old[int(other * len(old)) :][:length]
    end = begin + length
    new = {
        "cut": old[:begin],
        "lost": old[:begin] + old[end:],
        "zero": old[:begin] + bytes(len(old[begin:end])) + old[end:],
        "moved": old[:begin] + there + old[begin + len(there) :],
        "more": old[:begin] + there + old[begin:],
    }[kind]
    assert refused_or_right(new, version)


TENSOR = '{"dtype": "F32", "shape": [SHAPE], "data_offsets": [0, END]}'
ABSURD = {
    "longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "longer than any file": b"\xff" * 8 + b"{}",
    "deep": b"[" * 100_000,
    "a large tensor": TENSOR.replace("SHAPE", str(10**12)).replace("END", str(4 * 10**12)),
    "a tensor larger than can be counted": TENSOR.replace("SHAPE", f"{2**62}, {2**62}").replace("END", "0"),
    "a tensor of less than nothing": TENSOR.replace("SHAPE", "-1").replace("END", "4"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_header(name: str) -> None:
    content = ABSURD[name]
    if isinstance(content, str):
        content = f'{{"__metadata__": {{"format": "svdq-compile", "format_version": "2"}}, "x": {content}}}'.encode()
        content = len(content).to_bytes(8, "little") + content + bytes(64)
    assert loaded_from(content) is None


NAMES = st.sampled_from([FIRST, f"{FIRST}.qweight", "embed.weight", "blocks.1.to_q.bias", "nowhere", ""])
WORDS = st.sampled_from(["BF16", "F16", "F4", "I8", "U8", "F8_E4M3", "w4a16", "bfloat16", "float16", "int64", "Tensor"])
NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(-2, 520), st.sampled_from([2**63, -(10**30)]), st.floats())
ONE = NUMBERS | NAMES | WORDS
VALUES = ONE | st.lists(ONE, max_size=3) | st.dictionaries(NAMES, ONE, max_size=2) | st.lists(st.lists(ONE), max_size=2)


@RANDOMLY
@given(draw=st.data(), version=st.sampled_from("12"))
def test_a_header_with_another_value(draw: st.DataObject, version: str) -> None:
    """As another writer might make it, with a digest that is right, or none. Many of these fit; none is an error of
    Python's, or half a model.
    """
    size = header_size(contents())
    header = json.loads(contents()[8:size])
    metadata = header["__metadata__"]
    parts = {
        key: json.loads(metadata[key]) for key in ("layers", "others", "tied", "calibrated", "checksums", "config")
    }
    place: Any = draw.draw(st.sampled_from([header, metadata, parts, parts]))
    for _ in range(draw.draw(st.integers(0, 3))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        inner = [key for key in keys if isinstance(place[key], dict | list)]
        if inner:
            place = place[draw.draw(st.sampled_from(inner))]
    keys = list(place) if isinstance(place, dict) else range(len(place))
    if keys and draw.draw(st.booleans()):
        place[draw.draw(st.sampled_from(list(keys)))] = draw.draw(VALUES)
    elif isinstance(place, dict):
        place[draw.draw(NAMES)] = draw.draw(VALUES)
    else:
        place.append(draw.draw(VALUES))
    if isinstance(header.get("__metadata__"), dict):
        metadata |= {key: json.dumps(part) for key, part in parts.items() if key in metadata}
        metadata |= {"format_version": version, "digest": UNSEALED}
        if version == "1":
            del metadata["digest"]
    raw = json.dumps(header).encode()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + contents()[size:])
        if raw.count(UNSEALED.encode()) == 1:
            seal(file)
        model = loaded(file)
        if model is not None:
            model(*inputs(dtype=torch.bfloat16))


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


def twice(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    layers = json.loads(metadata["layers"])
    metadata["layers"] = json.dumps([layers[0], *layers])


def tie(alias: str, name: str) -> Change:
    """Let a tensor be stored as another one."""

    def apply(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        del tensors[alias]
        metadata["checksums"] = json.dumps({n: c for n, c in json.loads(metadata["checksums"]).items() if n != alias})
        metadata["tied"] = json.dumps({alias: name})

    return apply


def other_shift(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    layers = json.loads(metadata["layers"])
    assert layers[1]["shared"] == layers[2]["shared"]
    layers[2]["shift"] = 0.5
    metadata["layers"] = json.dumps(layers)


def branch_of_integers(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    for name in ("up", "down"):
        tensor(f"{FIRST}.{name}", lambda t: t.view(torch.int16))(tensors, metadata)


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
    "smoothing of another dtype": (tensor(f"{FIRST}.smooth", lambda t: t.view(torch.int32)), "is wanted"),
    "half a branch of another dtype": (tensor(f"{FIRST}.up", lambda t: t.view(torch.float16)), "they go together"),
    "a branch of integers": (branch_of_integers, "they go together"),
    "a bias of integers": (tensor("blocks.0.modulate.bias", lambda t: t.view(torch.int16)), r"int16 in the file"),
    "a bias of another 16 bits": (
        tensor("blocks.0.modulate.bias", lambda t: t.view(torch.float16)),
        r"float16 in the file, torch\.bfloat16 in the model",
    ),
    "a dtype of integers": (entry(dtype="int64"), "unknown to this version"),
    "a weight twice": (twice, "layers has one weight twice"),
    "a bias that is quantized": (entry(weight="blocks.0.modulate.bias", shape=[256]), "no matrix"),
    "an input that is quantized otherwise": (
        other_shift,
        "quantize it differently",
    ),
    "tied to what is not there": (metadata_with(tied='{"embed.weight": "nowhere"}'), "has not both"),
    "tied to a module": (metadata_with(tied='{"embed.weight": "embed"}'), "has not both"),
    "tied to another shape": (tie("embed.weight", FIRST), "cannot be one"),
    "tied, and there itself": (metadata_with(tied=f'{{"blocks.1.modulate.weight": "{FIRST}"}}'), "cannot be one"),
    "tied to what is tied": (tie("blocks.0.up.bias", "blocks.0.up.bias"), "is missing"),
    "a stranger that is tied": (metadata_with(tied='{"nowhere": "embed.weight"}'), "has not both"),
    "a bias of another shape": (tensor("blocks.0.modulate.bias", lambda t: t[:-1]), "in the model"),
}


@pytest.mark.parametrize("version", ["1", LATEST])
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
    if version != "1":
        seal(file)
    model = on_meta()
    with pytest.raises(FileRefused, match=message):
        svdq.load(model, file, progress=False)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("version", ["1", "2", LATEST])
def test_a_file_as_it_was_saved(version: str) -> None:
    """By this version, and by those before."""
    model = loaded_from(contents(version))
    assert model is not None
    assert is_right(model)


def test_a_digest_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    del metadata["digest"]
    save_file(load_file(file), file, metadata)
    with pytest.raises(FileRefused, match="has no digest"):
        svdq.load(on_meta(), file, progress=False)


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(contents())
    other.replace(file)


def overwritten(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        opened.write(b"another")


def cut(file: Path) -> None:
    os.truncate(file, 20_000)


def written_anew(file: Path) -> None:
    file.write_bytes(contents())
    os.utime(file, ns=(0, 0))


@pytest.mark.parametrize("when", [0, 1, 20, "at the end"])
@pytest.mark.parametrize("change", [replaced, overwritten, cut, os.unlink, written_anew])
def test_a_file_that_changes_while_it_is_read(
    change: Callable[[Path], None], when: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    reads, get, count = 0, TensorFile.get, len(json.loads(contents()[8 : header_size(contents())])) - 1

    def get_and_change(self: TensorFile, name: str) -> torch.Tensor:
        nonlocal reads
        if reads == when:
            change(file)
        reads += 1
        tensor = get(self, name)
        if reads == count and when == "at the end":
            change(file)
        return tensor

    monkeypatch.setattr(TensorFile, "get", get_and_change)
    model = on_meta()
    with pytest.raises(FileRefused, match="it was written to while it was read: load it again"):
        svdq.load(model, file, progress=False)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("change", [overwritten, cut, os.unlink])
def test_a_file_that_changes_after_it_was_loaded(change: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    model = svdq.load(on_meta(), file, progress=False)
    change(file)
    assert is_right(model)
