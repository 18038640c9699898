"""That the zoo is complete, and a dozen of its models through the same one line, whole and by their blocks.

`make zoo` runs all of them, in two formats and two sizes (zoo/sweep.py).
"""

import argparse
import inspect
import time

import diffusers
import pytest
import torch
from diffusers import ModelMixin

from conftest import FLIPPED_CODES, quiet, relative_error
from svdq_compile.parameter import QuantizedWeight
from zoo import NOT_DENOISERS, ONE, ZOO, make, table
from zoo.check import ONE_SIZE, Way, blocks, check
from zoo.sweep import is_right, run_alone

QUICK = (
    "flux",
    "flux2",
    "sd3",
    "sdxl",
    "pixart",
    "sana",
    "qwen_image",
    "wan",
    "hunyuan_video",
    "ltx_video",
    "cogvideox",
    "auraflow",
)


def exported() -> dict[str, type]:
    """The model classes that diffusers exports, but for autoencoders and vocoders: those run once for a picture."""
    classes = {name: getattr(diffusers, name) for name in diffusers._import_structure["models"]}
    return {
        name: model_class
        for name, model_class in classes.items()
        if inspect.isclass(model_class)
        and issubclass(model_class, ModelMixin)
        and not model_class.__module__.startswith("diffusers.models.autoencoders")
    }


def test_every_denoiser_has_an_entry() -> None:
    classes, titles = set(exported()), {entry.title for entry in ZOO.values()}
    assert len(classes) > 100  # the walk finds them
    assert classes - titles - set(NOT_DENOISERS) == set()
    assert set(NOT_DENOISERS) <= classes  # none that is gone
    assert titles & set(NOT_DENOISERS) == set()


def way(regional: bool) -> Way:
    return Way(regional, "w4a8", torch.float32, ONE_SIZE)


@pytest.mark.parametrize("name", QUICK)
def test_whole(name: str) -> None:
    outcome = check(name, way(regional=False))
    assert len(outcome.layers) >= 8
    assert outcome.graphs == 1  # without a break


@pytest.mark.parametrize("name", [name for name in QUICK if ZOO[name].regional])
def test_regional(name: str) -> None:
    assert len(check(name, way(regional=True)).layers) >= 8


def test_through_inductor() -> None:
    check("wan", Way(True, "w4a8", torch.float32, ONE_SIZE, inductor=True))


def test_regional_quantizes_the_blocks_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdq_compile.compiled.compile_with_inductor", lambda gm, *_: gm.forward)
    whole, inputs = make("flux")
    regional, _ = make("flux")
    compiled = torch.compile(whole, backend="svdquant", fullgraph=True, options=quiet(rank=16, refine=1))
    regional.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=quiet(rank=16, refine=1))
    for _ in range(2):
        a, b = compiled(**inputs)[0], regional(**inputs)[0]
    names = [{n for n, p in m.named_parameters() if isinstance(p, QuantizedWeight)} for m in (whole, regional)]
    assert names[0] == names[1]
    assert relative_error(a, b) < FLIPPED_CODES


def test_blocks_are_found_in_lists_and_not_in_their_parts() -> None:
    model, _ = make("plain_dit")
    assert list(blocks(model)) == list(model.blocks)
    model, _ = make("sd3")
    assert list(blocks(model)) == list(model.transformer_blocks)


def test_a_process_that_dies_is_a_row() -> None:
    options = argparse.Namespace(device="no such device", inductor=False, sizes=1, timeout=100, seconds=100)
    row = run_alone("wan", options, time.monotonic())
    assert not is_right(row)
    assert "no such device" in row["whole"]


def test_a_model_that_has_no_time_left_is_a_row() -> None:
    options = argparse.Namespace(device="cpu", inductor=False, sizes=1, timeout=100, seconds=0)
    row = run_alone("wan", options, time.monotonic())
    assert row["whole"].startswith("not run")


@pytest.mark.parametrize("name", ["flux", "wan", "operators"])
def test_a_model_is_the_same_each_time_it_is_made(name: str) -> None:
    (a, given), (b, again) = make(name), make(name)
    with torch.no_grad():
        assert torch.equal(a(**given)[0], b(**again)[0])
    assert ONE.batch == 1


def test_the_page_of_models_is_what_was_found() -> None:
    cpu, gpu, sizes = table.found()
    assert table.PAGE.read_text() == table.page(cpu, gpu, sizes)  # if not: python -m tests.zoo.table
    assert {row["name"] for found in (cpu, gpu) for row in found["classes"]} <= set(ZOO)
