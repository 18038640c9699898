"""Offloading of quantized models on a CUDA device, compiled: python -m pytest tests/gpu/test_offload_gpu.py."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import svdq_compile as svdq
from conftest import quiet
from svdq_compile.parameter import packed

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import step_models

if not torch.cuda.is_available():
    raise RuntimeError("these tests need a CUDA device")

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
REPEATS = 20  # what is read before it is there, or written over too early, shows now and then only


def groups(level: str, **more: Any) -> Callable[[nn.Module], Any]:
    how = {"num_blocks_per_group": 1} if level == "block_level" else {}

    def way(model: nn.Module) -> None:
        model.to(CPU)
        model.enable_group_offload(onload_device=GPU, offload_device=CPU, offload_type=level, **how, **more)

    return way


def sequential(model: nn.Module) -> None:
    accelerate.cpu_offload(model.to(CPU), execution_device=GPU)


def device_map(model: nn.Module) -> None:
    """Half of it waits in CPU memory."""
    names = [name for name, _ in model.named_children()]
    places = {name: "cpu" if i % 2 else 0 for i, name in enumerate(names)}
    accelerate.dispatch_model(model.to(CPU), places, main_device=0)


STREAM = {"use_stream": True}
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "block": groups("block_level"),
    "leaf": groups("leaf_level"),
    "block, stream": groups("block_level", **STREAM),
    "leaf, stream": groups("leaf_level", **STREAM),
    "block, stream, recorded": groups("block_level", record_stream=True, **STREAM),
    "leaf, stream, recorded": groups("leaf_level", record_stream=True, **STREAM),
    "block, stream, pinned at each call": groups("block_level", low_cpu_mem_usage=True, **STREAM),
    "block, not waited for": groups("block_level", non_blocking=True),
    "sequential": sequential,
    "device_map": device_map,
    "whole": lambda model: accelerate.cpu_offload_with_hook(model, execution_device=GPU),
}


def quantized(name: str, weights: str = "release", device: torch.device = GPU) -> tuple[nn.Module, dict]:
    model = step_models.build(name, True, GPU)
    call = step_models.inputs(name, True, model, GPU)
    svdq.quantize(model.to(device), svdq.Config(**quiet(weights=weights)), example_inputs=call)
    return model, call


def by_blocks(model: nn.Module) -> None:
    for blocks in step_models.repeated_blocks(model).values():
        for block in blocks:
            block.compile(backend="svdquant", options=quiet())


def resident(name: str) -> torch.Tensor:
    model, call = quantized(name)
    by_blocks(model)
    model(**call)
    return model(**call)[0]


# Hooks on single layers break the graph of their block: what would be one kernel rounds in between.
WHOLE_BLOCKS = [way for way in WAYS if way.startswith(("block", "whole"))]
WHEN = ["hooks, compiled", "compiled, hooks", "compiled, run, hooks"]
CASES = [("flux", way, when) for way in WAYS for when in WHEN] + [("sdxl", way, WHEN[0]) for way in WAYS]


@pytest.mark.parametrize(("name", "way", "when"), CASES)
def test_the_same_picture_each_time(name: str, way: str, when: str) -> None:
    expected = resident(name)
    torch._dynamo.reset()
    model, call = quantized(name)
    if when == "hooks, compiled":
        WAYS[way](model)
        by_blocks(model)
    else:
        by_blocks(model)
        if "run" in when:
            assert torch.equal(model(**call)[0], expected)
        WAYS[way](model)
    model(**call)
    first = model(**call)[0]
    error = float((first.float() - expected.float()).norm() / expected.float().norm())
    assert error == 0 if way in WHOLE_BLOCKS else error < 0.02
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(REPEATS):
            assert torch.equal(model(**call)[0], first)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_hooks_before_quantizing(level: str) -> None:
    """The copies that are on their way while it quantizes are waited for."""
    model = step_models.build("flux", True, GPU)
    call = step_models.inputs("flux", True, model, GPU)
    reference = model(**call)[0]
    groups(level, **STREAM)(model)
    by_blocks(model)
    outputs = [model(**call)[0] for _ in range(REPEATS)]
    assert torch.equal(outputs[0], reference)
    assert all(torch.equal(output, outputs[-1]) for output in outputs[3:])
    error = float((outputs[-1].float() - reference.float()).norm() / reference.float().norm())
    assert 0 < error < 0.15


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_it_is_pinned_once_in_the_order_of_the_gpu(device: torch.device) -> None:
    model, call = quantized("flux", "offload", device)
    WAYS["block, stream"](model)
    model(**call)
    block = model.transformer_blocks[1]
    weight = block.attn.to_q.weight
    here = packed(weight)
    assert here.is_pinned()
    there = here.to(GPU, here.up.dtype)
    assert [t.dtype for t in there.weight] == [t.dtype for t in here.weight]
    model(**call)
    assert packed(weight) is here


def test_memory_stays_bounded() -> None:
    """At no time more than some groups are on the GPU, and CUDA graphs do not pile up."""
    model, call = quantized("flux")
    by_blocks(model)
    held = sum(p._svdq.nbytes() for p in model.parameters() if hasattr(p, "_svdq"))
    WAYS["block, stream"](model)
    for _ in range(5):
        model(**call)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(REPEATS):
        model(**call)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= base
    assert torch.cuda.max_memory_allocated() < base + held  # two blocks of four, and activations of a few tokens


def test_and_back() -> None:
    expected = resident("flux")
    model, call = quantized("flux")
    by_blocks(model)
    model.to(CPU).to(GPU)
    assert torch.equal(model(**call)[0], expected)
    accelerate.cpu_offload(model.to(CPU), execution_device=GPU)
    model(**call)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model.to(GPU)(**call)[0], expected)
