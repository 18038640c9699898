"""Quantizing while loading on a GPU: to the bits of `svdq.quantize(model, device="cuda")`. Needs CUDA:

python -m pytest tests/gpu/test_streaming_gpu.py
"""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import svdq_compile as svdq
from svdq_compile import journal
from svdq_compile.streaming import quantize_file
from zoo import make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIG = svdq.Config(rank=16, refine=2, progress=False)
BF16 = torch.bfloat16
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards, with the file of the loaded model beside them."""
    folder = tmp_path_factory.mktemp("flux")
    make("flux", BF16)[0].save_pretrained(folder, max_shard_size="400KB")  # type: ignore[operator]
    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=BF16)
    svdq.quantize(model, CONFIG, device="cuda")
    svdq.save(model, folder / "expected", config=CONFIG, progress=False)
    return folder


def same(model: nn.Module, folder: Path, tmp_path: Path) -> bool:
    svdq.save(model, tmp_path / "file", config=CONFIG, progress=False)
    return (tmp_path / "file").read_bytes() == (folder / "expected").read_bytes()


@pytest.mark.parametrize("device_map", [None, "cuda", {"": 0}, "auto", "cpu"])
def test_diffusers(device_map: object, folder: Path, tmp_path: Path) -> None:
    config = svdq.SVDQuantConfig(rank=16, refine=2, progress=False)
    model = FluxTransformer2DModel.from_pretrained(
        folder, quantization_config=config, device_map=device_map, torch_dtype=BF16
    )
    assert model.device.type == ("cpu" if device_map in (None, "cpu") else "cuda")
    assert same(model, folder, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", device_map=device_map)
    assert again.device.type == model.device.type
    assert same(again, folder, tmp_path)


def test_from_pretrained(folder: Path, tmp_path: Path) -> None:
    model = svdq.from_pretrained(folder, CONFIG, device="cuda")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert same(model, folder, tmp_path)


def test_to_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "CHUNK", 50_000)
    quantize_file(folder, tmp_path / "out", CONFIG, CUDA)
    assert (tmp_path / "out").read_bytes() == (folder / "expected").read_bytes()
