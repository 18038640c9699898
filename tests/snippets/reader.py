"""A reader's machine: the fixtures and the call with which the tests of documents and examples run what they are about.

from snippets.reader import cache, reader, run
run(ROOT / "README.md", cache, reader)
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from . import hub

FLUX = "black-forest-labs/FLUX.1-dev"
RUN_PY = Path(__file__).with_name("run.py")


class Machine:
    """A process that has imported what documents import, and is copied for each.

    hub   the folder with the tiny pipelines
    """

    def __init__(self, folder: Path) -> None:
        self.hub = folder
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SVDQ_")}
        environment |= hub.environment(folder) | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(RUN_PY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, file: Path, folder: Path, *arguments: str) -> str:
        """Run a document or a script as its reader would, in a folder; what it prints. It must succeed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        printed = folder / "printed.txt"
        self.process.stdin.write(json.dumps([str(file), str(folder), str(printed), *arguments]) + "\n")
        self.process.stdin.flush()
        status = self.process.stdout.readline().strip()
        assert status == "0", f"{file.name} ended with {status}:\n{printed.read_text()[-6000:]}"
        return printed.read_text()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("hub")
    hub.fill(folder)
    machine = Machine(folder)
    yield machine
    machine.process.communicate()  # it ends with its input


@pytest.fixture
def reader(machine: Machine, tmp_path: Path) -> Path:
    """The folder in which a reader works: a downloaded pipeline, and two adapters for it."""
    shutil.copytree(hub.snapshot(machine.hub, FLUX), tmp_path / "FLUX.1-dev")
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
