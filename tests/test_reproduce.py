"""A block of a model as a reproduction that stands alone (svdq_compile/reproduce.py)."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import svdq_compile as svdq
from conftest import Net, inputs, net
from svdq_compile.errors import CannotReproduce
from zoo import make

CONFIG = svdq.Config(rank=16, refine=1, progress=False)


def imported(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduction", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs_of(model: nn.Module, name: str, call) -> tuple:
    """What a module gives at its first call."""
    seen: list = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out))
    call()
    handle.remove()
    return seen[0] if isinstance(seen[0], tuple) else (seen[0],)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("flux", "transformer_blocks.0"),
        ("flux", "single_transformer_blocks.1"),
        ("sdxl", "down_blocks.1.attentions.0"),
        ("wan", "blocks.0"),
        ("flux", "transformer_blocks.0.attn.to_q"),
    ],
)
def test_the_block_gives_what_it_gave_in_the_model(name: str, block: str, tmp_path: Path) -> None:
    model, given = make(name, torch.bfloat16)
    script = svdq.reproduce(model, block, tmp_path, call=lambda: model(**given), config=CONFIG)
    expected = outputs_of(model, block, lambda: model(**given))
    made, values = imported(script).load("cpu")
    got = made(*values)
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    linears = [n for n, m in made.named_modules() if isinstance(m, nn.Linear)]
    own = [n for n, m in model.get_submodule(block).named_modules() if isinstance(m, nn.Linear)]
    assert sorted(linears) == (sorted(own) if own != [""] else ["layer"])


def test_the_script_runs_alone_and_compares(tmp_path: Path) -> None:
    model = net(dtype=torch.bfloat16)
    given = inputs(dtype=torch.bfloat16)
    script = svdq.reproduce(model, "blocks.0", tmp_path / "bug", call=lambda: model(*given), config=CONFIG)
    printed = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, capture_output=True, text=True, check=False
    )
    assert printed.returncode == 0, printed.stderr
    errors = [float(n) for n in re.findall(r"from (?:16-bit|reference) +([\d.]+)$", printed.stdout, re.MULTILINE)]
    assert len(errors) == 3
    assert all(0 < error < 0.2 for error in errors[:2])
    assert errors[2] < 0.02  # fused code rounds in fewer places
    assert re.search(r"to_q .* w4a8", printed.stdout)
    text = script.read_text()
    assert f"torch {torch.__version__}" in text
    assert "refine=1" in text
    assert str(tmp_path) not in text


def test_private_weights_are_not_in_it_but_are_alike(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model.blocks[0].up.weight[:, 3] *= 30
    given = inputs()
    svdq.reproduce(model, "blocks.0", tmp_path, call=lambda: model(*given), private=True)
    tensors = load_file(tmp_path / "tensors.safetensors")
    for name, weight in model.blocks[0].named_parameters():
        stored = tensors[f"weights.{name}"]
        assert stored.shape == weight.shape
        # Independent numbers agree to a few percent at most over hundreds of values.
        centred = [(t - t.mean(0)).flatten() for t in (stored, weight)]
        assert torch.nn.functional.cosine_similarity(*centred, dim=0).abs() < 0.6
    spread = tensors["weights.up.weight"].std(0)
    assert spread.argmax() == 3
    assert 20 < spread[3] / spread.median() < 45


@pytest.mark.parametrize(
    ("name", "message"),
    [("blocks.7", "no such module"), ("unused", "`call` did not run it"), ("broken", "as one graph")],
)
def test_what_it_cannot_do_is_said(name: str, message: str, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x

    model = net()
    model.unused, model.broken = nn.Linear(4, 4), Broken()
    given = inputs()
    with pytest.raises(CannotReproduce, match=message):
        svdq.reproduce(model, name, tmp_path, call=lambda: model.broken(model(*given)))


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    model: Net = net()
    given = inputs()
    svdq.quantize(
        model,
        svdq.Config(rank=16, refine=0, progress=False),
        example_inputs=dict(zip(("x", "condition"), given, strict=True)),
    )
    with pytest.raises(CannotReproduce, match="quantized already"):
        svdq.reproduce(model, "blocks.0", tmp_path, call=lambda: model(*given))
