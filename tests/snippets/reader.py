"""A reader's machine: the fixtures and the call with which the tests of documents and examples run what they are about.

from snippets.reader import cache, reader, run
run(ROOT / "README.md", cache, reader)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from . import hub

FLUX = "black-forest-labs/FLUX.1-dev"
RUN_PY = Path(__file__).with_name("run.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face's cache, with the tiny pipelines."""
    folder = tmp_path_factory.mktemp("hub")
    hub.fill(folder)
    return folder


@pytest.fixture
def reader(cache: Path, tmp_path: Path) -> Path:
    """The folder in which a reader works: a downloaded pipeline, and two adapters for it."""
    shutil.copytree(hub.snapshot(cache, FLUX), tmp_path / "FLUX.1-dev")
    for seed, name in enumerate(("style", "night")):
        save_file(_adapter(tmp_path / "FLUX.1-dev" / "transformer", seed), tmp_path / f"{name}.safetensors")
    return tmp_path


def _adapter(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 on the attention of all blocks, in the names of diffusers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in FluxTransformer2DModel.from_pretrained(folder).named_modules():
        if isinstance(layer, torch.nn.Linear) and ".attn.to_" in name:
            n, k = layer.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, k, generator=generator) * k**-0.5
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(n, 4, generator=generator) * 0.1
    return tensors


def run(file: Path, cache: Path, folder: Path, *arguments: str) -> str:
    """Run a document or a script as its reader would; what it prints. It must succeed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SVDQ_")}
    environment |= hub.environment(cache) | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RUN_PY), str(file), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{file.name}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
