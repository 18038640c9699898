"""Ctrl-C at any line: each weight is whole afterwards, and the next try is right."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import quiet, relative_error
from svdq_compile import checkpoint, convert, decisions, parameter, quantize_model
from svdq_compile.lowering import packed, torch_private
from svdq_compile.parameter import QuantizedWeight, is_kept

SOURCES = {m.__file__ for m in (parameter, convert, checkpoint, packed, decisions, quantize_model, torch_private)}
CLOSE = 0.12  # 4 bits of a small weight without refinement; two unrelated weights are 1.4 apart


def lines_run(act: Callable[[], Any], stop: int | None = None) -> list[tuple[str, int]]:
    """Do something, with a KeyboardInterrupt before the line number `stop` of those that it runs. The lines."""
    lines: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in SOURCES:
            return None
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == stop:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return lines


def values(weight: nn.Parameter, name: str) -> Tensor:
    """What a weight stands for. AssertionError if it does not have what its class promises."""
    with torch._C.DisableTorchFunctionSubclass():
        has_memory = weight.untyped_storage().nbytes() >= weight.numel() * weight.element_size()
    if not isinstance(weight, QuantizedWeight):
        assert has_memory, f"{name} is plain and has no memory"
        return weight.detach().clone()
    assert weight.__dict__.keys() >= set(parameter._STATE), f"{name} has lost its 4-bit form"
    assert has_memory or not is_kept(weight), f"{name} is kept and has no memory"
    return weight._svdq.dequantize(torch.float32)


def linears(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).requires_grad_(False)


def quantize(model: nn.Module, weights: str = "release") -> None:
    svdq.quantize(model, svdq.Config(**quiet(weights=weights, rank=8, refine=0, skip=["nothing"])))


OLD, NEW = linears(0), linears(1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, path = copy.deepcopy(NEW), tmp_path_factory.mktemp("model") / "new.svdq.safetensors"
    quantize(model)
    svdq.save(model, path, progress=False)
    return path


def assign_data(model: nn.Module) -> None:
    for weight, new in zip(model.parameters(), NEW.parameters(), strict=True):
        weight.data = new.data.clone()


def take_over(model: nn.Module) -> None:
    other = copy.deepcopy(NEW)
    quantize(other)
    for weight, new in zip(model.parameters(), other.parameters(), strict=True):
        weight.data = new.data


# What is done, to a model that was quantized how (None: not yet), and whether the weights are then NEW's.
ACTS: dict[str, tuple[str | None, Callable[[nn.Module], Any], bool]] = {
    "quantize, release": (None, lambda m: quantize(m, "release"), False),
    "quantize, offload": (None, lambda m: quantize(m, "offload"), False),
    "quantize, keep": (None, lambda m: quantize(m, "keep"), False),
    "restore the offloaded": ("offload", svdq.restore, False),
    "restore the kept": ("keep", svdq.restore, False),
    "restore by dequantizing": ("release", lambda m: svdq.restore(m, dequantize=True), False),
    "restore others, released": ("release", lambda m: svdq.restore(m, NEW.state_dict()), True),
    "restore others, kept": ("keep", lambda m: svdq.restore(m, NEW.state_dict()), True),
    "load_state_dict, released": ("release", lambda m: m.load_state_dict(NEW.state_dict()), True),
    "load_state_dict, kept": ("keep", lambda m: m.load_state_dict(NEW.state_dict()), True),
    "load_state_dict, offloaded": ("offload", lambda m: m.load_state_dict(NEW.state_dict()), True),
    "assign .data, released": ("release", assign_data, True),
    "assign .data, kept": ("keep", assign_data, True),
    "assign a quantized .data, released": ("release", take_over, True),
    "assign a quantized .data, kept": ("keep", take_over, True),
    "cast": ("release", lambda m: m.to(torch.float64).to(torch.float32), False),
    "cast the offloaded": ("offload", lambda m: m.bfloat16().float(), False),
    "cast the kept": ("keep", lambda m: m.bfloat16().float(), False),
    "deepcopy": ("release", copy.deepcopy, False),
}


@pytest.mark.parametrize("name", [*ACTS, "load a file", "load a file over a quantized model"])
def test_at_any_line(name: str, file: Path) -> None:
    if name.startswith("load a file"):
        how, is_new = None if name == "load a file" else "release", True
        act: Callable[[nn.Module], Any] = lambda m: svdq.load(m, file, progress=False)  # noqa: E731
    else:
        how, act, is_new = ACTS[name]
    start = copy.deepcopy(OLD)
    if how is not None:
        quantize(start, how)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    model = copy.deepcopy(start)
    lines = lines_run(lambda: act(model))
    # Of each line of the source the first time and the last.
    stops = {*{line: i for i, line in enumerate(lines)}.values(), *map(lines.index, set(lines))}
    assert len(stops) > 10
    for stop in sorted(stops):
        model = copy.deepcopy(start)
        lines_run(lambda model=model: act(model), stop)
        where = f"stopped at {lines[stop]}"
        assert not decisions.LOCK._is_owned(), f"{where}: other threads would wait for ever"  # type: ignore[attr-defined]
        assert not packed._LOCK.locked(), f"{where}: whoever comes next would wait for ever"
        for (key, weight), old, new in zip(model.named_parameters(), OLD.parameters(), NEW.parameters(), strict=True):
            found = values(weight, f"{where}: {key}").float()
            error = min(relative_error(found, v) for v in ((old, new) if is_new else (old,)))
            assert error < CLOSE, f"{where}: {key} is neither what it was nor what it becomes"
        model.float()
        model(x)
        act(model)
        error = relative_error(model(x), (NEW if is_new else OLD)(x))
        assert error < CLOSE, f"{where}: {error}"
