"""What a user is told of a model on its way from 16-bit to 4: each stage once, a summary that is the model's own, and a
sign of life while it lasts.
"""

import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import svdq_compile as svdq
from conftest import inputs, logged, net, quiet
from svdq_compile import convert, decisions, progress, summary


@pytest.fixture(autouse=True)
def no_other_models() -> None:
    """Of other tests, whose compiled code may keep them."""
    summary._TITLES.clear()


def loud(**options: Any) -> dict[str, Any]:
    return quiet(calibration_steps=2, refine=0) | {"progress": True} | options


def compile_it(model: nn.Module, way: str, **options: Any) -> nn.Module:
    """By its blocks, or whole; the model."""
    for part in model.blocks if way == "blocks" else [model]:  # type: ignore[union-attr]
        part.compile(backend="svdquant", options=loud(**options))
    return model


def run(model: nn.Module, calls: int = 4) -> nn.Module:
    for _ in range(calls):
        model(*inputs())
    return model


def summaries(err: str) -> list[str]:
    return [line for line in err.splitlines() if " linears quantized" in line or "nothing was" in line]


WAYS = pytest.mark.parametrize("way", ["blocks", "whole"])


@WAYS
def test_each_stage_once_and_no_empty_line(way: str, without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    model = run(compile_it(net(), way), calls=6)
    observing, quantizing, summary, compiling = capsys.readouterr().err.splitlines()
    assert observing.startswith("svdquant: Net: observing 1 of 2 calls, in exact 16-bit")
    assert quantizing == "svdquant: Net: quantizing 2 blocks"
    assert summary.startswith("svdquant: Net: 10 linears quantized (2 w4a16, 8 w4a8)")
    assert compiling == "svdquant: Net: compiling, the first time takes about a minute"
    del model


@WAYS
def test_at_once_by_the_weights_alone(way: str, without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    run(compile_it(net(), way, calibration_steps=0))
    quantizing, summary, _ = capsys.readouterr().err.splitlines()
    assert quantizing == "svdquant: Net: quantizing 2 blocks"
    assert "10 linears quantized" in summary


def test_one_block_of_several(without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    model = net(blocks=3)
    model.blocks[1].compile(backend="svdquant", options=loud())
    run(model)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "svdquant: Net: quantizing 1 block"
    assert "5 linears quantized" in lines[2]


def test_a_plain_network_has_no_blocks(without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)).requires_grad_(False)
    run = torch.compile(model, backend="svdquant", options=loud())
    for _ in range(4):
        run(torch.randn(64, 128))
    assert "svdquant: Sequential: quantizing 2 linears" in capsys.readouterr().err.splitlines()


@WAYS
def test_models_of_one_class_are_told_apart(way: str, without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    first, second = compile_it(net(), way, skip=["*.to_q"]), compile_it(net(seed=1), way)
    for _ in range(5):  # their calls mix
        first(*inputs())
        second(*inputs())
    one, other = sorted(summaries(capsys.readouterr().err), key=len, reverse=True)
    assert one.startswith("svdquant: Net: 8 linears quantized")
    assert "2 option skip" in one
    assert other.startswith("svdquant: Net #2: 10 linears quantized")
    assert "option skip" not in other


@WAYS
def test_nothing_quantized_and_then_another_model(
    way: str, without_inductor: None, capsys: pytest.CaptureFixture
) -> None:
    first = run(compile_it(net(), way, error_budget=0.001))
    (line,) = summaries(capsys.readouterr().err)
    assert line.startswith("svdquant: Net: nothing was quantized; 12 left in 16-bit: 10 its error would be 0.")
    assert "above error_budget" in line
    second = run(compile_it(net(seed=1), way))
    (line,) = summaries(capsys.readouterr().err)
    assert line.startswith("svdquant: Net #2: 10 linears quantized")
    assert "error_budget" not in line
    third = run(compile_it(net(seed=2), way, error_budget=0.001))  # of whose graphs all are compiled
    (line,) = summaries(capsys.readouterr().err)
    assert line.startswith("svdquant: Net #3: nothing was quantized; 12 left in 16-bit: 10 its error")
    del first, second, third


NOTHING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no linears": (lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU()), "it has no nn.Linear and no convolution"),
    "small": (lambda: nn.Sequential(nn.Linear(8, 8)), "1 left in 16-bit: 1 it is small (8 x 8)"),
    "double": (lambda: nn.Sequential(nn.Linear(128, 128)).double(), "1 its weight is torch.float64"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_why_nothing_was_quantized(kind: str, without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    make, why = NOTHING[kind]
    model = make().requires_grad_(False)
    run = torch.compile(model, backend="svdquant", options=loud())
    x = torch.randn(8, 8 if kind != "double" else 128, dtype=next(model.parameters()).dtype)
    for _ in range(3):
        run(x)
    (line,) = summaries(capsys.readouterr().err)
    assert line.startswith("svdquant: Sequential: nothing was quantized")
    assert why in line


def test_a_second_quantization_counts_once(without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    config = svdq.Config(**loud())
    model = net()
    svdq.quantize(model, config)
    (first,) = summaries(capsys.readouterr().err)
    svdq.quantize(model, config)
    (second,) = summaries(capsys.readouterr().err)
    svdq.restore(model, dequantize=True)
    capsys.readouterr()
    svdq.quantize(model, config)
    err = capsys.readouterr().err
    (third,) = summaries(err)
    assert first == second == third
    assert err.splitlines()[0] == "svdquant: Net: quantizing 2 blocks", "told anew"
    compile_it(model, "whole")(*inputs())
    assert not summaries(capsys.readouterr().err), "it was told already"


def test_a_loaded_model_is_told_of(without_inductor: None, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    model = net()
    svdq.quantize(model, svdq.Config(**quiet()))
    svdq.save(model, tmp_path / "file")
    capsys.readouterr()
    other = compile_it(svdq.load(net(), tmp_path / "file"), "blocks")
    run(other)
    _, summary, compiling = capsys.readouterr().err.splitlines()
    assert summary.startswith("svdquant: Net #2: 10 linears quantized")
    assert compiling.startswith("svdquant: Net #2: compiling")


def test_calibrating_is_observing(without_inductor: None, capsys: pytest.CaptureFixture) -> None:
    svdq.quantize(net(), svdq.Config(**loud()), calibrate=lambda m: run(m, calls=3))
    observing, quantizing, *_ = capsys.readouterr().err.splitlines()
    assert observing == "svdquant: Net: observing call 1, in exact 16-bit"
    assert quantizing == "svdquant: Net: quantizing 2 blocks"


def test_progress_false_silences_all(without_inductor: None, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    options = {"progress": False}
    for way in ("blocks", "whole"):
        run(compile_it(net(), way, **options))
        run(compile_it(net(), way, error_budget=0.001, **options))
    model = net()
    svdq.quantize(model, svdq.Config(**loud(**options)), calibrate=lambda m: run(m, calls=2))
    svdq.save(model, tmp_path / "file", progress=False)
    svdq.load(net(), tmp_path / "file", progress=False)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_saving_and_loading_write_no_bars_into_a_log(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    model = net()
    svdq.quantize(model, svdq.Config(**quiet()))
    svdq.save(model, tmp_path / "file")
    svdq.load(net(), tmp_path / "file")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("svdquant: quantized; now compile it")
    assert err.count("\n") == 1


@WAYS
def test_slow_stages_give_a_sign_of_life(
    way: str, without_inductor: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that take 0.25 s each, with a line due every 0.3 s, for 15."""
    monkeypatch.setattr(progress, "EVERY", 0.3)
    monkeypatch.setattr(progress, "REFRESH", 0.05)
    quantize_group = convert.quantize_group

    def slowly(*args: Any) -> Any:
        time.sleep(0.25)
        return quantize_group(*args)

    monkeypatch.setattr(convert, "quantize_group", slowly)
    with logged("svdq_compile") as records:
        run(compile_it(net(blocks=4), way))
    times = [r.created for r in records if "quantizing" in r.getMessage()]
    lines = [line for line in capsys.readouterr().err.splitlines() if "quantizing" in line]
    assert lines[0] == "svdquant: Net: quantizing 4 blocks"
    assert any(re.search(r"quantizing [1-3] of 4 blocks.* so far$", line) for line in lines)
    assert max(later - earlier for earlier, later in pairwise(times)) < 1.0


PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_grad_enabled(False)
from conftest import inputs, net, quiet, run_eagerly
from svdq_compile import compiled, undecided
compiled.compile_with_inductor = undecided.compile_with_inductor = run_eagerly
model = net()
for block in model.blocks:
    block.compile(backend="svdquant", options=quiet(calibration_steps=3) | {{"progress": True}})
for _ in range(5):
    model(*inputs())
"""


def on_a_terminal(code: str) -> str:
    """What a program writes to its terminal."""
    ours, its = pty.openpty()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=its, stderr=its, env=os.environ | {"TERM": "xterm"}) as process:
        os.close(its)
        written = b""
        while chunk := _read(ours):
            written += chunk
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


def _read(end: int) -> bytes:
    try:
        return os.read(end, 4096)
    except OSError:  # the program has closed its end
        return b""


def test_on_a_terminal() -> None:
    written = on_a_terminal(PROGRAM)
    shown = re.split(r"[\r\n]+(?:\x1b\[K)?", written)
    for text in ("observing 3 of 3", "quantizing 0 of 2 blocks", "compiling, the first time takes about a minute"):
        assert any(line.startswith(f"svdquant: Net: {text}") for line in shown), text
    stays = [line.rpartition("\r\x1b[K")[2] for line in written.replace("\r\n", "\n").split("\n")]
    summary, end = stays
    assert summary.startswith("svdquant: Net: 10 linears quantized")
    assert end == "", "the line has gone away"


def test_the_summary_comes_once_under_torch_logs(tmp_path: Path) -> None:
    environment = os.environ | {"TORCH_LOGS": "+svdq_compile"}
    with open(tmp_path / "log", "w") as log:
        subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=log, stderr=log, check=True, timeout=300, env=environment
        )
    text = (tmp_path / "log").read_text()
    assert "changed" in text, "the passes' lines are there"
    for line in ("observing 1 of 3", "quantizing 2 blocks", "10 linears quantized", "compiling, the first"):
        assert text.count(f"svdquant: Net: {line}") == 1, line


def test_a_dump_says_that_graphs_came_from_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a second run: the graph in memory is forgotten, Inductor's file is not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))

    def dumped(name: str) -> list[str]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 128), nn.GELU("tanh"), nn.Linear(128, 128)).requires_grad_(False)
        model.to(torch.bfloat16)
        monkeypatch.setenv("SVDQ_DUMP", str(tmp_path / name))
        run = torch.compile(model, backend="svdquant", options=quiet(calibration_steps=0))
        for _ in range(2):
            run(torch.ones(64, 128, dtype=torch.bfloat16))
        return sorted(path.name.split(".", 1)[1] for path in (tmp_path / name).glob("[0-9]*"))

    first, second = dumped("first"), dumped("second")
    assert first.count("before.py") == 3, "observed, quantized, fused"
    assert "from_cache.txt" not in first
    assert second.count("before.py") == 2
    assert "from_cache.txt" in second
    (note,) = (tmp_path / "second").glob("*.from_cache.txt")
    assert "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1" in note.read_text()
    with torch._inductor.config.patch(force_disable_caches=True):
        assert dumped("third") == first, "as the note says"


def test_a_call_does_not_look_through_the_model(without_inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph all of whose layers stay 16-bit is called again and again while others are still watched."""
    model, seen = net(), []
    count = summary.layers
    monkeypatch.setattr(summary, "layers", lambda model: seen.append(model) or count(model))
    for weight in model.blocks[0].parameters():
        decisions.leave_alone(weight, "option skip")
    for block in model.blocks:
        block.compile(backend="svdquant", options=quiet(calibration_steps=9))
    for _ in range(2):
        model(*inputs())
    seen.clear()
    for _ in range(4):
        model(*inputs())
    assert not seen
