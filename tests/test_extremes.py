"""Values and settings that a user may bring along: NaN while observing, huge numbers, other defaults of torch."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import svdq_compile as svdq
from conftest import compiled, inputs, net, relative_error
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.parameter import QuantizedWeight


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [1, 24])
def test_a_call_with_nan_spoils_nothing(value: float, tokens: int) -> None:
    """Whole calls of it, or a single token."""
    clean, spoilt = net(), net()
    for model, bad in ((clean, False), (spoilt, True)):
        call = compiled(model, calibration_steps=4)
        for i in range(5):
            x, condition = inputs()
            if bad and i == 1:
                x[:, :tokens] = value
            call(x, condition)
    errors = []
    for model in (clean, spoilt):
        expected = net()(*inputs())
        errors.append(relative_error(model(*inputs()), expected))
        assert all(row.error is None or row.error < 0.3 for row in svdq.report(model))
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_statistics_of_nothing_but_nan_are_empty() -> None:
    statistics = InputStatistics()
    statistics.observe(torch.full((4, 8), float("nan")))
    assert statistics.span is None


def test_another_default_dtype(default_dtype: torch.dtype) -> None:
    model = net(dtype=torch.float32)
    expected = model(*inputs())
    call = compiled(model)
    for _ in range(2):
        out = call(*inputs())
    assert any(isinstance(p, QuantizedWeight) for p in model.parameters())
    assert relative_error(out, expected) < 0.1


def test_another_default_device() -> None:
    model = net()
    expected = model(*inputs())
    torch.set_default_device("meta")
    try:
        svdq.quantize(model, svdq.Config(progress=False, refine=1))
    finally:
        torch.set_default_device(None)
    assert relative_error(model(*inputs()), expected) < 0.3


HUGE = [("weight", 1e20, "w4a8"), ("weight", 1e30, "w4a8"), ("input", 1e20, "w4a8"), ("input", 1e30, "w4a8")]


@pytest.mark.parametrize(("what", "scale", "precision"), [*HUGE, ("input", 1e30, "nvfp4")])
def test_huge_numbers(what: str, scale: float, precision: str) -> None:
    """Quantized within the budget, or left in 16-bit with a reason; the others as ever."""
    model = net()
    if what == "weight":
        model.blocks[0].up.weight.data.mul_(scale)
    else:
        model.blocks[0].norm = Scaled(scale)
    call = compiled(model, precision=precision)
    for _ in range(2):
        call(*inputs())
    rows = {row.name: row for row in svdq.report(model)}
    assert all(row.error is None or row.error <= 0.3 for row in rows.values())
    assert all(row.error is not None or row.reason for row in rows.values())
    assert rows["blocks.1.up"].error is not None


class Scaled(nn.Module):
    """A norm gone wrong."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale
