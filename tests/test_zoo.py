"""Twelve diffusers models through the same one line, whole and by their repeated blocks.

Inductor takes minutes for all of them on two cores, so here the rewritten graphs run as they are; `make zoo` runs the
same tests with SVDQ_ZOO_INDUCTOR=1, through Inductor. One model goes through it here too.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import fx

import svdq_compile as svdq
from conftest import FLIPPED_CODES, quiet, relative_error
from svdq_compile import compiled as compiled_module
from svdq_compile.parameter import QuantizedWeight
from zoo import ZOO, make

# A layer's own relative output error on the rows it was calibrated on. Gaussian weights are the worst case: without
# structure, rounding to 4 bits loses 10 %, and a branch of rank 16 of 128 takes a part of that away.
WORST_LAYER = 0.09
# Of the whole model: dozens of such layers in a row, half of the error of each passed on by the residual.
WORST_MODEL = 0.25

USE_INDUCTOR = bool(os.environ.get("SVDQ_ZOO_INDUCTOR"))


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_is(gm: fx.GraphModule, inputs: list, mode: str | None, rewrite: Callable | None) -> Callable:
        return gm.forward

    monkeypatch.setattr(compiled_module, "compile_with_inductor", as_it_is)


@pytest.fixture
def without_inductor_unless_asked_for(request: pytest.FixtureRequest) -> None:
    if not USE_INDUCTOR:
        request.getfixturevalue("without_inductor")


def check(model: torch.nn.Module, run: Callable, reference: torch.Tensor) -> None:
    """The first call is exact, the second in 4-bit and near, and every layer's own error is bounded."""
    assert relative_error(run(), reference) < 1e-6
    output = run()
    assert output.isfinite().all()
    rows = [row for row in svdq.report(model) if row.error is not None]
    assert len(rows) >= 8
    worst = max(rows, key=lambda row: row.error)
    assert worst.error < WORST_LAYER, worst
    error = relative_error(output, reference)
    print(f"{len(rows)} layers, worst {worst.error:.3f} ({worst.name}), model {error:.3f}")
    assert 0 < error < WORST_MODEL


def check_whole(name: str) -> None:
    model, inputs = make(name)
    reference = model(**inputs)[0]
    compiled = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet(rank=16, refine=1))
    check(model, lambda: compiled(**inputs)[0], reference)


def check_regional(name: str) -> None:
    model, inputs = make(name)
    reference = model(**inputs)[0]
    model.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=quiet(rank=16, refine=1))
    check(model, lambda: model(**inputs)[0], reference)


@pytest.mark.usefixtures("without_inductor_unless_asked_for")
@pytest.mark.parametrize("name", ZOO)
def test_whole(name: str) -> None:
    check_whole(name)


@pytest.mark.usefixtures("without_inductor_unless_asked_for")
@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.regional])
def test_regional(name: str) -> None:
    check_regional(name)


def test_through_inductor() -> None:
    check_regional("wan")


@pytest.mark.usefixtures("without_inductor")
def test_regional_quantizes_the_blocks_of_the_whole() -> None:
    whole, inputs = make("flux")
    regional, _ = make("flux")
    compiled = torch.compile(whole, backend="svdquant", fullgraph=True, options=quiet(rank=16, refine=1))
    regional.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=quiet(rank=16, refine=1))
    for _ in range(2):
        a, b = compiled(**inputs)[0], regional(**inputs)[0]
    names = [{n for n, p in m.named_parameters() if isinstance(p, QuantizedWeight)} for m in (whole, regional)]
    assert names[0] == names[1]
    assert relative_error(a, b) < FLIPPED_CODES
