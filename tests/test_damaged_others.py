"""Files of others, Nunchaku's and diffusers', that are damaged, or change while they are read. They have no checksums,
so not all damage shows; what shows is refused, and the model is as it was.
"""

import json
import os
import resource
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_damaged_files import EXAMPLES, PLACE, RANDOMLY, cut, flipped, header_size, overwritten
from test_nunchaku import flux, lite_folder, on_meta, quantized, saved
from test_replacing import child, end_of
from torch import nn
from typer.testing import CliRunner

import svdq_compile as svdq
from svdq_compile.cli import app
from svdq_compile.errors import FileRefused
from svdq_compile.reading import TensorFile

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@cache
def contents() -> bytes:
    """Of a single file of Nunchaku's."""
    with TemporaryDirectory() as folder:
        return saved(Path(folder), "flux")[1].read_bytes()


def stays_empty(path: Path) -> str:
    """What a refusal says; "" if there was none."""
    model, refused = on_meta("flux"), ""
    try:
        svdq.load(model, path, progress=False)
    except FileRefused as error:
        refused = str(error)
    assert refused.startswith(str(path)) == bool(refused)
    assert any(p.is_meta for p in model.parameters()) == all(p.is_meta for p in model.parameters()) == bool(refused)
    return refused


@settings(RANDOMLY, max_examples=EXAMPLES // 4)
@given(place=PLACE, bit=st.integers(0, 7))
def test_a_bit_of_the_header(place: float, bit: int) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        file.write_bytes(flipped(contents(), int(place * header_size(contents())), bit))
        stays_empty(file)


@pytest.mark.parametrize("when", [0, 30, 80])
@pytest.mark.parametrize("change", [overwritten, cut, os.unlink])
@pytest.mark.parametrize("name", ["single", "folder"])
def test_a_checkpoint_that_changes_while_it_is_read(
    name: str, change: Callable[[Path], None], when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file = tmp_path / "x.safetensors"
    file.write_bytes(contents())
    if name == "folder":
        path, file = tmp_path / "x", tmp_path / "x" / WEIGHTS
        lite_folder(path, "int4")
    reads, get = 0, TensorFile.get

    def change_and_get(self: TensorFile, name: str) -> torch.Tensor:
        nonlocal reads
        reads += 1
        if reads == when + 1:
            change(file)
        return get(self, name)

    monkeypatch.setattr(TensorFile, "get", change_and_get)
    assert stays_empty(path) == f"{path}: it was written to while it was read: load it again"
    assert reads > when


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b""])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(name: str, content: bytes, tmp_path: Path) -> None:
    lite_folder(tmp_path, "int4")
    (tmp_path / name).write_bytes(content)
    assert stays_empty(tmp_path)


def test_two_files_with_a_damaged_configuration(tmp_path: Path) -> None:
    (tmp_path / "whole").write_bytes(contents())
    tensors = load_file(tmp_path / "whole")
    for name, in_blocks in (("transformer_blocks", True), ("unquantized_layers", False)):
        own = {n: t for n, t in tensors.items() if ("transformer_blocks." in n) == in_blocks}
        save_file(own, tmp_path / f"{name}.safetensors")
    assert not stays_empty(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    assert "its config is no JSON" in stays_empty(tmp_path)


# ** models of diffusers' in 16 bits **


@cache
def folders() -> TemporaryDirectory:
    """A model whole and in shards."""
    folder = TemporaryDirectory()
    torch.manual_seed(0)
    model = flux().to(torch.bfloat16)
    model.save_pretrained(Path(folder.name) / "whole")
    model.save_pretrained(Path(folder.name) / "shards", max_shard_size="400KB")
    return folder


def json_with(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def second(folder: Path) -> Path:
    return sorted(folder.glob("*-of-*.safetensors"))[1]


FOLDERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut": ("whole", lambda d: cut(d / WEIGHTS), "not a whole safetensors file"),
    "no-weights": ("whole", lambda d: (d / WEIGHTS).unlink(), f"there is no {WEIGHTS} in it"),
    "configuration-deep": ("whole", lambda d: (d / "config.json").write_text("[" * 100_000), "is no JSON"),
    "configuration-of-other-types": ("whole", json_with("config.json", lambda c: c.update(num_layers="a")), "no Flux"),
    "configuration-with-a-zero": (
        "whole",
        json_with("config.json", lambda c: c.update(attention_head_dim=0)),
        "no Flux",
    ),
    "more-heads": ("whole", json_with("config.json", lambda c: c.update(num_attention_heads=3)), "in the model"),
    "layers-missing": ("whole", json_with("config.json", lambda c: c.update(num_layers=2)), "is missing"),
    "layers-more": ("whole", json_with("config.json", lambda c: c.update(num_layers=0)), "config.json has no tensor"),
    "index-no-json": ("shards", lambda d: (d / INDEX).write_text("{"), "is no JSON"),
    "index-a-list": ("shards", lambda d: (d / INDEX).write_text("[]"), "is no JSON object"),
    "index-empty": ("shards", lambda d: (d / INDEX).write_text("{}"), "it has no weight_map"),
    "index-outside": ("shards", json_with(INDEX, lambda c: c["weight_map"].update(x="../x")), "it points to"),
    "index-of-numbers": ("shards", json_with(INDEX, lambda c: c["weight_map"].update(x=3)), "it has no weight_map"),
    "a-shard-cut": ("shards", lambda d: cut(second(d)), "not a whole safetensors file"),
    "a-shard-missing": (
        "shards",
        lambda d: second(d).unlink(),
        "there is no such file, and diffusion_pytorch_model.safetensors.index.json names it",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_damaged_folder_of_diffusers(name: str, tmp_path: Path) -> None:
    kind, damage, message = FOLDERS[name]
    folder, output = tmp_path / "folder", tmp_path / "out.safetensors"
    shutil.copytree(Path(folders().name) / kind, folder)
    damage(folder)
    result = CliRunner().invoke(app, ["quantize", str(folder), str(output), "--refine", "0"])
    told = " ".join(result.output.split())
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # no error of Python's
    assert f"svdq: {folder}" in told
    assert message in told
    assert not output.exists()
    assert torch.get_default_dtype() == torch.float32, "diffusers changes it while it loads"


# ** written **


@cache
def in_4_bits() -> nn.Module:
    return quantized()


@pytest.mark.parametrize("target", ["x.safetensors", "x"])
def test_an_export_to_a_disk_that_fills(target: str, tmp_path: Path) -> None:
    model, place = in_4_bits(), tmp_path / target
    svdq.export_nunchaku(model, place, progress=False)
    file = place / WEIGHTS if place.is_dir() else place
    before = file.read_bytes()

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=f"cannot write {file}: .*File too large"):
            svdq.export_nunchaku(model, place, progress=False)

    assert end_of(child(full)) == 0
    assert file.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [target]
    if place.is_dir():
        assert sorted(os.listdir(place)) == ["config.json", WEIGHTS]


def test_exports_replace_the_target_of_a_link(tmp_path: Path) -> None:
    model, link = in_4_bits(), tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "file")
    svdq.export_nunchaku(model, link, progress=False)
    assert link.is_symlink()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").symlink_to(tmp_path / "config")
    svdq.export_nunchaku(model, folder, progress=False)
    assert (folder / "config.json").is_symlink()
    assert json.loads((tmp_path / "config").read_text())["quantization_config"]["quant_method"] == "nunchaku_lite"


def umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old
