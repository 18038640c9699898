"""Files: what is saved comes back bit for bit, and nothing but that is believed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import svdq_compile as svdq
from conftest import Net, compiled, inputs, net, quiet
from svdq_compile import checkpoint
from svdq_compile.errors import FileRefused, NothingToQuantize
from svdq_compile.header import UNSEALED, VERSION, read_header, seal
from svdq_compile.kernels.formats import FORMATS


def saved(path: Path, **options) -> tuple[Net, Path]:
    """A quantized model and its file."""
    model = net(dtype=torch.bfloat16)
    svdq.quantize(model, svdq.Config(**quiet(**options)), calibrate=lambda m: m(*inputs(dtype=torch.bfloat16)))
    file = path / "model.safetensors"
    svdq.save(model, file, progress=False)
    return model, file


def on_meta() -> Net:
    with torch.device("meta"):
        return Net().to(torch.bfloat16).eval().requires_grad_(False)


def run(model: Net) -> torch.Tensor:
    return compiled(model)(*inputs(dtype=torch.bfloat16))


@pytest.mark.parametrize("precision", FORMATS)
def test_every_tensor_comes_back(tmp_path: Path, precision: str) -> None:
    model, file = saved(tmp_path, precision=precision)
    again = svdq.load(on_meta(), file, progress=False)
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert torch.equal(run(again), run(model))
    assert str(svdq.report(again)) == str(svdq.report(model))
    block = again.blocks[0]
    assert svdq.packed(block.to_q.weight).shared is svdq.packed(block.to_k.weight).shared


def test_a_new_process_gives_bit_equal_output(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    torch.save(run(model), tmp_path / "expected.pt")
    code = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_checkpoint import on_meta, run, svdq\n"
        f"folder = {str(tmp_path)!r}\n"
        "with torch.no_grad():\n"
        "    output = run(svdq.load(on_meta(), folder + '/model.safetensors', progress=False))\n"
        "print('equal', torch.equal(output, torch.load(folder + '/expected.pt')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("equal True"), done.stderr


def test_load_over_16_bit_weights_and_over_4_bit_ones(tmp_path: Path) -> None:
    model, file = saved(tmp_path)
    other = net(seed=7, dtype=torch.bfloat16)
    assert torch.equal(run(svdq.load(other, file, progress=False)), run(model))
    assert torch.equal(run(svdq.load(other, file, progress=False)), run(model))


def test_loading_makes_no_16_bit_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = saved(tmp_path)
    model = svdq.load(on_meta(), file, progress=False)
    with torch._C.DisableTorchFunctionSubclass():
        assert all(p.untyped_storage().nbytes() == 0 for n, p in model.named_parameters() if n.endswith("to_q.weight"))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = net()
    model.blocks[1].to_q.weight = model.blocks[0].to_q.weight
    svdq.quantize(model, svdq.Config(**quiet()))
    svdq.save(model, tmp_path / "m", progress=False)
    with torch.device("meta"):
        other = Net().requires_grad_(False)
    svdq.load(other, tmp_path / "m", progress=False)
    assert other.blocks[1].to_q.weight is other.blocks[0].to_q.weight


def test_header_reads_without_tensors(tmp_path: Path) -> None:
    _, file = saved(tmp_path, skip=["*.to_k"])
    header = read_header(file)
    assert (header.version, header.model_class) == (VERSION, "Net")
    assert [entry.name for entry in header.layers][:2] == ["blocks.0.modulate", "blocks.0.to_q"]
    assert header.others["blocks.0.to_k"] == "option skip"
    assert header.nbytes == file.stat().st_size


def test_a_layer_left_in_16_bit_stays_so_after_loading(tmp_path: Path) -> None:
    _, file = saved(tmp_path, skip=["*.to_k"])
    model = svdq.load(on_meta(), file, progress=False)
    run(model)
    assert {row.name: row.reason for row in svdq.report(model)}["blocks.0.to_k"] == "option skip"


def test_nothing_to_save() -> None:
    with pytest.raises(NothingToQuantize, match="no weight of this Net is quantized"):
        svdq.save(net(), "never-written")
    assert not Path("never-written").exists()


def test_a_killed_save_leaves_the_old_file(tmp_path: Path) -> None:
    """The process dies in the middle of writing; the file that was there is whole, bit for bit."""
    _, file = saved(tmp_path)
    before = file.read_bytes()
    code = (
        f"import os, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "import svdq_compile.checkpoint as checkpoint\n"
        "def die_halfway(tensors, path, metadata):\n"
        "    Path(path).write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "checkpoint.save_file = die_halfway\n"
        "from test_checkpoint import saved\n"
        f"saved(Path({str(tmp_path)!r}), rank=16)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == -9, done.stderr
    assert file.read_bytes() == before
    svdq.load(on_meta(), file, progress=False)


def test_a_failed_save_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = saved(tmp_path)
    before = file.read_bytes()

    def full_disk(*args) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        svdq.save(model, file, progress=False)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: there is no such file"):
        svdq.load(on_meta(), tmp_path / "nothing.safetensors")


def refused(file: Path, message: str) -> None:
    """The file is refused and the model is as it was."""
    model = net(dtype=torch.bfloat16)
    with pytest.raises(FileRefused, match=message):
        svdq.load(model, file, progress=False)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), net(dtype=torch.bfloat16).parameters(), strict=True)
    )


def rewrite(file: Path, drop: str = "", tensors: dict[str, torch.Tensor] | None = None, **changes: str) -> None:
    """The same file as somebody else might have made it: other metadata, other tensors, and a digest that is right."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | changes | {"digest": UNSEALED}
        own = {name: opened.get_tensor(name) for name in opened.keys() if name != drop}  # noqa: SIM118
    save_file(own | (tensors or {}), file, metadata)
    seal(file)


def test_truncated_file(tmp_path: Path) -> None:
    _, file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    refused(file, "not a whole safetensors file")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x00" * 64])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    refused(tmp_path / "x", "not a whole safetensors file")


def test_flipped_bit_is_found_and_the_tensor_named(tmp_path: Path) -> None:
    _, file = saved(tmp_path)
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    refused(file, r"tensor \S+ is damaged: its checksum differs")


def test_foreign_and_newer_files(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4)}, tmp_path / "foreign")
    refused(tmp_path / "foreign", "did not write it")
    _, file = saved(tmp_path)
    rewrite(file, format_version=str(VERSION + 1))
    refused(file, f"format version {VERSION + 1}; this svdq-compile reads up to {VERSION}")
    rewrite(file, format_version="x")
    refused(file, "which is no number")


def test_damaged_metadata_and_missing_tensors(tmp_path: Path) -> None:
    _, file = saved(tmp_path)
    rewrite(file, layers="[{}]")
    refused(file, "its metadata is damaged")
    _, file = saved(tmp_path)
    rewrite(file, drop="blocks.0.to_q.weight.qweight")
    refused(file, r"tensor blocks\.0\.to_q\.weight\.qweight is missing")
    _, file = saved(tmp_path)
    rewrite(file, layers=safe_open(file, "pt").metadata()["layers"].replace('"w4a8"', '"int3"'))
    refused(file, "'int3' of 'bfloat16', unknown to this version")


def test_file_of_another_model(tmp_path: Path) -> None:
    _, file = saved(tmp_path)
    torch.manual_seed(0)
    wide = Net(width=256).to(torch.bfloat16).requires_grad_(False)
    with pytest.raises(
        FileRefused, match=r"blocks\.0\.modulate\.weight is \(256, 128\) in the file, \(512, 256\) in the"
    ):
        svdq.load(wide, file, progress=False)
    deep = Net(blocks=3).to(torch.bfloat16).requires_grad_(False)
    with pytest.raises(FileRefused, match=r"tensor blocks\.2\.\S+ of the model is missing \(the file is of a Net"):
        svdq.load(deep, file, progress=False)


def test_buffers_that_are_never_saved_may_be_missing(tmp_path: Path) -> None:
    """A file made from a plain state dict has no non-persistent buffers; a model that made its own keeps them."""
    _, file = saved(tmp_path)
    model = net(seed=3, dtype=torch.bfloat16)
    model.register_buffer("positions", torch.arange(4.0), persistent=False)
    model.register_buffer("made_later", None, persistent=False)
    svdq.load(model, file, progress=False)
    assert torch.equal(model.positions, torch.arange(4.0))
    model = on_meta()
    model.register_buffer("positions", torch.empty(4, device="meta"), persistent=False)
    with pytest.raises(FileRefused, match="tensor positions of the model is missing"):
        svdq.load(model, file, progress=False)


def test_a_tensor_the_model_does_not_have(tmp_path: Path) -> None:
    model = net(dtype=torch.bfloat16)
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(2), requires_grad=False))
    svdq.quantize(model, svdq.Config(**quiet()))
    svdq.save(model, tmp_path / "m", progress=False)
    refused(tmp_path / "m", "the model has no tensor extra")
