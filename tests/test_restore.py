"""`restore` gives 16-bit weights back, and they stay until somebody asks for 4 bits again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from test_compile import count
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import Net, inputs, net, quiet, relative_error

pytestmark = pytest.mark.usefixtures("without_inductor")

Run = Callable[..., Tensor]


def in_place(model: nn.Module) -> Run:
    model.compile(backend="svdquant", options=quiet(calibration_steps=2))
    return model


def by_blocks(model: Net) -> Run:
    for block in model.blocks:
        block.compile(backend="svdquant", fullgraph=True, options=quiet(calibration_steps=2))
    return model


def wrapped(model: nn.Module) -> Run:
    return torch.compile(model, backend="svdquant", options=quiet(calibration_steps=2))


def by_one_call(model: nn.Module) -> Run:
    return svdq.compile(model, **quiet(calibration_steps=2))


WAYS: dict[str, Callable[[Any], Run]] = {f.__name__: f for f in (in_place, by_blocks, wrapped, by_one_call)}


def quantized_by(way: str) -> tuple[Net, Run]:
    model = net(blocks=1)
    run = WAYS[way](model)
    for _ in range(3):
        run(*inputs())
    assert count(model) == 5
    return model, run


def stays(model: Net, run: Run) -> None:
    expected = net(blocks=1)(*inputs())
    for _ in range(3):
        assert relative_error(run(*inputs()), expected) < 1e-6
    assert count(model) == 0
    assert {row.reason for row in svdq.report(model) if "blocks" in row.name} == {"restored to 16-bit"}


@pytest.mark.parametrize("way", WAYS)
def test_it_stays_in_16_bit(way: str) -> None:
    model, run = quantized_by(way)
    assert svdq.restore(model, net(blocks=1).state_dict(), progress=False) == 5
    stays(model, run)
    stays(model, model)


@pytest.mark.parametrize(
    ("way", "again"),
    [("in_place", "in_place"), ("in_place", "wrapped"), ("wrapped", "by_blocks"), ("by_blocks", "by_one_call")],
)
def test_compiling_anew_asks_again(way: str, again: str) -> None:
    model, run = quantized_by(way)
    svdq.restore(model, net(blocks=1).state_dict(), progress=False)
    stays(model, run)
    anew = WAYS[again](model)
    for _ in range(3):
        anew(*inputs())
    assert count(model) == 5
    assert 1e-3 < relative_error(anew(*inputs()), net(blocks=1)(*inputs())) < 0.06


def test_compiling_anew_at_once_asks_again() -> None:
    model, _ = quantized_by("wrapped")
    svdq.restore(model, net(blocks=1).state_dict(), progress=False)
    anew = wrapped(model)
    for _ in range(3):
        anew(*inputs())
    assert count(model) == 5


def test_another_backend_asks_for_nothing() -> None:
    model, run = quantized_by("wrapped")
    svdq.restore(model, net(blocks=1).state_dict(), progress=False)
    other = torch.compile(model, backend="eager")
    for _ in range(3):
        other(*inputs())
    stays(model, run)


@pytest.mark.parametrize("way", ["by_blocks", "wrapped"])
def test_quantizing_asks_again(way: str) -> None:
    model, run = quantized_by(way)
    svdq.restore(model, net(blocks=1).state_dict(), progress=False)
    stays(model, run)
    svdq.quantize(model, **quiet())
    assert count(model) == 5
    assert 1e-3 < relative_error(run(*inputs()), net(blocks=1)(*inputs())) < 0.06


def test_of_a_model_that_is_still_watched() -> None:
    model = net(blocks=1)
    run = wrapped(model)
    run(*inputs())
    assert svdq.restore(model, progress=False) == 0
    stays(model, run)


def test_after_dynamo_has_forgotten_everything() -> None:
    model, run = quantized_by("wrapped")
    svdq.restore(model, net(blocks=1).state_dict(), progress=False)
    torch._dynamo.reset()
    stays(model, run)


def test_with_other_sizes() -> None:
    model, run = quantized_by("in_place")
    svdq.restore(model, net(blocks=1).state_dict(), progress=False)
    for tokens in (7, 9, 11):
        assert relative_error(run(*inputs(tokens=tokens)), net(blocks=1)(*inputs(tokens=tokens))) < 1e-6
    assert count(model) == 0


def test_it_says_so(capsys: pytest.CaptureFixture) -> None:
    model, _ = quantized_by("in_place")
    svdq.restore(model, net(blocks=1).state_dict())
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith("svdquant: 5 linears are 16-bit again and stay so; svdq_compile.quantize(model)")
    svdq.restore(model)
    assert not capsys.readouterr().err, "nothing was to do"


def test_other_options_are_asked_anew() -> None:
    """What was left alone by a call's options is not left alone for ever."""
    model = net(blocks=1)
    svdq.quantize(model, **quiet(error_budget=1e-6))
    assert count(model) == 0
    svdq.quantize(model, **quiet())
    assert count(model) == 5
    run = svdq.compile(net(blocks=1), **quiet(error_budget=1e-6))
    for _ in range(3):
        run(*inputs())
    assert count(run) == 0
    svdq.compile(run, **quiet())
    for _ in range(3):
        run(*inputs())
    assert count(run) == 5


def test_with_adapters_loaded() -> None:
    """A state dict has the names of the model without them."""
    model, state = net(), net().state_dict()
    svdq.quantize(model, quiet())
    config = LoraConfig(r=4, target_modules=["to_q", "up"], init_lora_weights=True)
    inject_adapter_in_model(config, model)
    model.requires_grad_(False)
    assert svdq.restore(model, state, progress=False) == 10
    assert torch.equal(model(*inputs()), net()(*inputs()))


def test_what_was_never_quantized_keeps_its_reason() -> None:
    model = net()
    svdq.quantize(model, quiet())
    before = {row.name: row.reason for row in svdq.report(model) if row.reason}
    svdq.restore(model, dequantize=True, progress=False)
    after = {row.name: row.reason for row in svdq.report(model)}
    assert before
    assert {name: after[name] for name in before} == before
