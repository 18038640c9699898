"""Every snippet of the README and of docs/ runs as written, in order, in a fresh process for each document.

How a reader's machine is stood in for: snippets/run.py. What is not run, and why: snippets/document.py.
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

from snippets import hub
from snippets.document import EXCLUDED, RUN, SHOWN, blocks, indented_code, why_excluded

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLUX = "black-forest-labs/FLUX.1-dev"
RUN_PY = ROOT / "tests" / "snippets" / "run.py"


def runs(document: Path) -> bool:
    return any(block.language in RUN and block.to_run().strip() for block in blocks(document))


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


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if runs(path)], ids=lambda path: path.stem)
def test_document(document: Path, cache: Path, reader: Path) -> None:
    run(document, cache, reader)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_block_says_what_it_is(document: Path) -> None:
    strange = [f"line {b.line}: {b.language!r}" for b in blocks(document) if b.language not in RUN + SHOWN]
    assert strange == [], f"a block is {', '.join(RUN)} and runs, or {', '.join(SHOWN)}"
    assert indented_code(document) == [], "fence the code at these lines, with its language"


def test_every_exclusion_is_needed() -> None:
    lines = [line for path in DOCUMENTS for b in blocks(path) if b.language == "bash" for line in b.text.split("\n")]
    assert {start for start in EXCLUDED for line in lines if line.startswith(start)} == set(EXCLUDED)


def test_a_snippet_that_is_wrong_fails(cache: Path, tmp_path: Path) -> None:
    """With the document and the line, so the harness looks at what it runs."""
    wrong = tmp_path / "wrong.md"
    wrong.write_text("One\n\n```python\nx = 1\n```\n\n```bash\npip install .\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError, match=r'wrong.md", line 12'):
        run(wrong, cache, tmp_path)
    wrong.write_text("```bash\nfalse\n```\n")
    with pytest.raises(AssertionError, match="non-zero exit status 1"):
        run(wrong, cache, tmp_path)
    assert why_excluded("pip install .")
    assert why_excluded("svdq inspect FILE") is None
