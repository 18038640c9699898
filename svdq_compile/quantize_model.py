"""Quantize a model before it is compiled or run: `quantize` and `restore`."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import decisions
from .config import Config
from .convert import Task, convert
from .errors import NothingToQuantize
from .input_statistics import InputStatistics
from .layers import layers
from .lowering.torch_private import compiled_in_place
from .observing import ObservingGraph
from .parameter import QuantizedWeight, originals, thaw
from .passes.weight_groups import weight_inputs
from .report import Report, report
from .summary import TALLY, tell_to_compile


def quantize(
    model: nn.Module,
    config: Config | None = None,
    *,
    calibrate: Callable[[nn.Module], Any] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> Report:
    """Quantize a model in place, layer by layer.

    calibrate       runs the model on what it is for, as in `lambda model: pipe("a dog")`; it runs in 16-bit while the
                    inputs of its layers are observed. The best picture.
    example_inputs  keyword arguments of the model's forward, for their shapes only: the model is traced on the meta
                    device, nothing is computed. Shows which layers share an input and which read few rows.
                    Without either, every layer is quantized by its weights alone and none shares its input.
    device          where the work is done and the model ends up. From CPU weights to a GPU this way, the GPU never
                    holds more 16-bit weights than one group of layers.

    Returns the report. Raises NothingToQuantize, NonFiniteWeight, UnsupportedDevice.
    """
    config = config or Config()
    target = None if device is None else torch.empty(0, device=device).device
    if calibrate is not None and example_inputs is not None:
        raise ValueError("give calibrate or example_inputs, not both: calibrating shows the shapes too")
    if calibrate is not None:
        tasks = _observed(model, config, calibrate)
    elif example_inputs is not None:
        tasks = _traced(model, example_inputs)
    else:
        tasks = []
    tasks += _by_weights_alone(model, tasks)
    if not any(isinstance(p, QuantizedWeight) for p in model.parameters()) and not _eligible(tasks):
        raise NothingToQuantize(
            f"{type(model).__name__} has no linear layer that can be quantized. "
            "svdq_compile.report(model) says why for each."
        )
    convert(tasks, config, target)
    if target is not None:
        model.to(target)
    TALLY.tell(config.progress)
    tell_to_compile(model, config.progress)
    return report(model)


def _eligible(tasks: list[Task]) -> list[nn.Parameter]:
    return [w for task in tasks for w in task.weights if decisions.is_undecided(w)]


def _observed(model: nn.Module, config: Config, calibrate: Callable[[nn.Module], Any]) -> list[Task]:
    """Run `calibrate` with every graph of the model observing, and none ever done with it."""
    endless = replace(config, calibration_steps=1_000_000)
    tasks: dict[int, Task] = {}

    def observe(gm: fx.GraphModule, example_inputs: list) -> Callable:
        graph = ObservingGraph(gm, weight_inputs(gm), endless)

        def run(*args: Any) -> Any:
            tasks.update((id(task.weights[0]), task) for task in graph.tasks(args))
            return graph(*args)

        return run

    with compiled_in_place(model, observe), torch.no_grad():
        calibrate(model)
    if not tasks:
        raise NothingToQuantize(f"calibrate never ran a linear of this {type(model).__name__}: does it call the model?")
    names = {id(layer.weight): layer.name for layer in layers(model)}
    return [
        replace(task, names=tuple(names.get(id(w), n) for w, n in zip(task.weights, task.names, strict=True)))
        for task in tasks.values()
    ]


def _traced(model: nn.Module, example_inputs: Mapping[str, Any]) -> list[Task]:
    """Trace a twin of the model on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in tensors}
    original: dict[int, Any] = {id(memo[id(t)]): t for t in tensors}
    twin = copy.deepcopy(model, memo)
    tasks: list[Task] = []

    def collect(gm: fx.GraphModule, example_inputs: list) -> Callable:
        inputs = weight_inputs(gm)

        def run(*args: Any) -> Any:
            for group in inputs.groups:
                weights = tuple(original[id(args[i])] for i in group.indices)
                tasks.append(Task(weights, group.names, group.few_rows, group.shift, InputStatistics()))
            for index, _, reason in inputs.rejected:
                if decisions.is_undecided(original.get(id(args[index]))):
                    decisions.leave_alone(original[id(args[index])], reason)
            return gm(*args)

        return run

    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in example_inputs.items()}
    with compiled_in_place(twin, collect), torch.no_grad():
        twin(**moved)
    return tasks


def _on_meta(tensor: Tensor) -> Tensor:
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _by_weights_alone(model: nn.Module, seen: list[Task]) -> list[Task]:
    """The layers that no task covers, each for itself."""
    covered = {id(w) for task in seen for w in task.weights}
    tasks = []
    for layer in layers(model):
        if id(layer.weight) in covered or not decisions.is_undecided(layer.weight):
            continue
        if layer.reason is not None:
            decisions.leave_alone(layer.weight, layer.reason)
        else:
            tasks.append(Task((layer.weight,), (layer.name,), few_rows=False, shift=0.0, statistics=InputStatistics()))
    return tasks


def restore(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, *, dequantize: bool = False) -> int:
    """Turn every quantized weight back into a plain 16-bit one, in place. Returns how many.

    The values are the originals with weights="keep" or "offload". With "release" they are gone: they come from
    `state_dict` (by the model's names), or with `dequantize=True` from the 4-bit form, which is close to the originals
    but not equal. Raises WeightsReleased, before anything is changed, if some weight has none of these.
    """
    named = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
    values: dict[str, Tensor | None] = {}
    for name, weight in named.items():
        if state_dict is not None and name in state_dict:
            given = state_dict[name]
            values[name] = given
            if isinstance(given, QuantizedWeight):
                originals(given)  # raises where there are none
            if given.shape != weight.shape:
                raise ValueError(
                    f"{name}: state_dict has shape {tuple(state_dict[name].shape)}, not {tuple(weight.shape)}"
                )
        elif dequantize:
            values[name] = None
        else:
            originals(weight)
            values[name] = weight
    for name, weight in named.items():
        value = values[name]
        thaw(weight, weight._svdq.dequantize(weight.dtype).reshape(weight.shape) if value is None else value)
    for parameter in model.parameters():
        decisions.forget_reason(parameter)
    return len(named)
