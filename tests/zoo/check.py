"""What must hold of a model of the zoo, compiled whole or by its blocks.

The model is called in two sizes: once observed, then in 4 bits. Asserted are the first call's exactness, the error of
each layer and of the output, the number of graphs, and that the memory of what was quantized is given back.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map

import svdq_compile as svdq
from svdq_compile import compiled as compiled_module
from svdq_compile.lowering.torch_private import _settings
from svdq_compile.parameter import QuantizedWeight

from . import ONE, THREE, ZOO, make_sizes

# A layer's own relative output error on the rows it was calibrated on. Gaussian weights are the worst case: without
# structure, rounding to 4 bits loses 10 %, and a branch of rank 16 of 128 takes a part of that away. `int4` rounds
# activations to 4 bits too.
WORST_LAYER = {"w4a8": 0.095, "int4": 0.18}
# Of the whole model: dozens of such layers in a row, half of the error of each passed on by the residual.
WORST_MODEL = {"w4a8": 0.25, "int4": 0.5}
# Dynamo's graph run eagerly is the model's own arithmetic, apart from what it folds into constants.
EXACT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FEWEST_LAYERS = 4

OPTIONS = {"progress": False, "calibration_steps": 1, "refine": 1, "rank": 16}
ONE_SIZE = (0, 0, 0)  # calls, by size: observed, in 4 bits, again
TWO_SIZES = (*ONE_SIZE, 1, 1)  # and another size, again


@dataclass(frozen=True)
class Way:
    """How a model is compiled and run.

    calls     ONE_SIZE or TWO_SIZES
    inductor  through Inductor, and on a GPU the real kernels; without it the rewritten graphs run as they are
    """

    regional: bool = False
    precision: str = "w4a8"
    dtype: torch.dtype = torch.bfloat16
    calls: tuple[int, ...] = TWO_SIZES
    device: str = "cpu"
    inductor: bool = False

    def __str__(self) -> str:
        name = "regional" if self.regional else "whole"
        return f"{name} {self.precision} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Outcome:
    """What a check saw.

    layers         names of the quantized weights
    reached        names of the weights that the way compiles, quantized or not
    bits4          the part of the linears' weights that is in 4 bits
    graphs         in use after the first size: how many parts Dynamo cuts the model into
    error          relative, of the output against the model's own in 16 bits, the worse of both sizes
    inductor       0, or how far 16-bit torch.compile is from the model's own, where that is beyond the bound of 4 bits:
                   `error` is held against torch.compile then
    worst_layer    the largest of the layers' own errors, and where
    """

    layers: frozenset[str]
    reached: frozenset[str]
    bits4: float
    graphs: int
    error: float
    inductor: float
    worst_layer: tuple[float, str]


def without_inductor() -> AbstractContextManager:
    """Within the context, rewritten graphs run as they are, operator by operator."""

    def as_it_is(gm: fx.GraphModule, inputs: list, mode: str | None, rewrite: Callable | None) -> Callable:
        return gm.forward

    return mock.patch.object(compiled_module, "compile_with_inductor", as_it_is)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What one compiles by hand where a class names no repeated blocks: the elements of its lists, outermost first,
    that can be called and hold two linears or more.
    """
    for child in model.children():
        if isinstance(model, nn.ModuleList) and len(model) > 1 and _is_block(child):
            yield child
        else:
            yield from blocks(child)


def _is_block(module: nn.Module) -> bool:
    """Dynamo skips the frames of torch's own containers, so compiling one of those in place does nothing."""
    linears = sum(isinstance(part, nn.Linear) for part in module.modules())
    return linears > 1 and not type(module).__module__.startswith("torch.")


def compile_model(model: nn.Module, way: Way, backend: str, **options: Any) -> nn.Module:
    """The model compiled in one way, in place where it is by blocks."""
    chosen: dict[str, Any] = {"backend": backend} | ({"options": options} if options else {})
    if not way.regional:
        return torch.compile(model, **chosen)
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(**chosen)
    else:
        for block in _compiled_blocks(model):
            block.compile(**chosen)
    return model


def _compiled_blocks(model: nn.Module) -> list[nn.Module]:
    named = getattr(model, "_repeated_blocks", None)
    if not named:
        return list(blocks(model))
    return [module for module in model.modules() if type(module).__name__ in named]


def check(name: str, way: Way) -> Outcome:
    """Run one model in one way. AssertionError for what does not hold."""
    entry = ZOO[name]
    expected = _outputs(name, way)
    torch._dynamo.reset()
    model, inputs = _on_device(name, way)
    run = compile_model(model, way, "svdquant", precision=way.precision, **OPTIONS)
    with torch.no_grad(), nullcontext() if way.inductor else without_inductor():
        graphs, outputs = [], []
        for size in way.calls:
            with _counted() as count:
                outputs.append(_flat(run(**_fresh(inputs[size]))))
            graphs.append(count[0])

    drift = _relative(outputs[0], expected[0])
    exact = WORST_LAYER[way.precision] if entry.read_again and way.regional else EXACT[way.dtype]
    assert drift < exact, f"the observed call is off by {drift:.2g}"
    rows = [row for row in svdq.report(model) if row.error is not None]
    assert len(rows) >= FEWEST_LAYERS, f"{len(rows)} layers are quantized: {svdq.report(model)}"
    worst = max(rows, key=lambda row: row.error)
    assert worst.error < WORST_LAYER[way.precision], f"{worst.name} is off by {worst.error:.3f}"
    bound = entry.tolerance * WORST_MODEL[way.precision]
    error, inductor = _worst(way, outputs, expected), 0.0
    if error > bound and way.inductor:
        expected, eager = _outputs(name, way, compiled=True), expected
        error, inductor = _worst(way, outputs, expected), max(map(_relative, expected, eager))
    assert 0 < error < bound, f"the output is off by {error:.3f}, more than {bound}"
    _assert_few_graphs(name, way, model, graphs)
    _assert_released(model)
    quantized = {name for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
    before = sum(row.bytes_before for row in svdq.report(model))
    bits4 = sum(row.bytes_before for row in rows) / before
    layer = (worst.error, worst.name)
    return Outcome(frozenset(quantized), _reached(model, way), bits4, graphs[1], error, inductor, layer)


def _worst(way: Way, outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of the calls in 4 bits."""
    return max(_relative(output, expected[size]) for size, output in zip(way.calls[1:], outputs[1:], strict=True))


def _reached(model: nn.Module, way: Way) -> frozenset[str]:
    """Names of the weights that a way can quantize. A class that names its blocks names all that matters; blocks that
    were chosen by hand are held to what they hold.
    """
    if not way.regional or getattr(model, "_repeated_blocks", None):
        return frozenset(name for name, _ in model.named_parameters())
    held = {id(parameter) for block in blocks(model) for parameter in block.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in held)


def _outputs(name: str, way: Way, compiled: bool = False) -> list[Tensor]:
    """The model's own, in each size, or those of torch.compile in 16 bits."""
    model, inputs = _on_device(name, way)
    if compiled:
        torch._dynamo.reset()
        model = compile_model(model, way, "inductor")
    with torch.no_grad():
        return [_flat(model(**_fresh(given))) for given in inputs]


def _assert_few_graphs(name: str, way: Way, model: nn.Module, graphs: list[int]) -> None:
    """Each graph of the first call is compiled once more in 4 bits and once more for another size, at most; beyond that
    no call compiles more than Dynamo needs for the model, by itself or with those before it: a graph that our backend
    leaves alone at one call may be due at a later one.
    """
    kinds = len({type(block) for block in _compiled_blocks(model)}) if way.regional else 1
    if all(count <= (kinds if call in (0, 1, 3) else 0) for call, count in enumerate(graphs)):
        return  # one for each kind of block: nothing needs fewer
    needed = _graphs(name, way)
    for call, (count, most) in enumerate(zip(graphs, needed, strict=True), start=1):
        again = graphs[0] if call in (2, 4) else 0
        enough = count <= max(most, again) or sum(graphs[:call]) <= sum(needed[:call])
        assert enough, f"call {call} compiled {count} graphs, where Dynamo needs {most} ({graphs}, {needed})"


def _graphs(name: str, way: Way) -> list[int]:
    """How many graphs Dynamo makes of the model at each call, whatever the backend, if its weights change their class
    after the first as ours do, and guards look at them as ours do: those of torch 2.11 may skip that.
    """
    torch._dynamo.reset()
    model, inputs = _on_device(name, way)
    run = compile_model(model, way, "eager")
    counts = []
    with torch.no_grad(), torch._dynamo.config.patch(_settings()):
        for size in way.calls:
            with _counted() as count:
                run(**_fresh(inputs[size]))
            counts.append(count[0])
            if len(counts) == 1:
                for parameter in model.parameters():
                    parameter.__class__ = _AnotherClass
    return counts


class _AnotherClass(nn.Parameter):
    """What Dynamo's guards take for another type of tensor."""

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})


def _on_device(name: str, way: Way) -> tuple[nn.Module, list[dict[str, Any]]]:
    dtype = torch.float32 if way.device == "cpu" and ZOO[name].float32_on_cpu else way.dtype
    model, inputs = make_sizes(name, dtype, ONE, THREE)
    return model.to(way.device), tree_map(lambda x: x.to(way.device) if isinstance(x, Tensor) else x, inputs)


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """New containers around the same tensors: some models write into a dictionary or list that they are given."""
    return tree_map(lambda x: x, inputs)


def _flat(output: Any) -> Tensor:
    """All that a model returns, as one vector in float32."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def _relative(a: Tensor, b: Tensor) -> float:
    assert a.isfinite().all(), "the output is not finite"
    return float((a - b).norm() / b.norm())


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The list gets the number of graphs that were compiled within the context."""
    count, before = [0], counters["stats"]["unique_graphs"]
    yield count
    count[0] = counters["stats"]["unique_graphs"] - before


def _assert_released(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedWeight):
            with torch._C.DisableTorchFunctionSubclass():
                held = parameter.untyped_storage().nbytes()
            assert held == 0, f"{name} still holds {held} bytes of its 16-bit values"
