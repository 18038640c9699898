"""Quantize a model before it is compiled or run: `quantize` and `restore`."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import decisions, stages
from .config import Config
from .convert import Task, convert
from .errors import NothingToQuantize
from .input_statistics import InputStatistics
from .layers import layers
from .lowering.torch_private import compiled_in_place, convert_by_our_settings
from .observing import ObservingGraph
from .parameter import QuantizedWeight, originals, thaw
from .report import Report, report
from .roots import find_weights
from .summary import tell_again, tell_to_compile


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
    decisions.place(model)
    stages.begin_anew(model)
    if calibrate is not None:
        tasks = _observed(model, calibrate, config.progress)
    elif example_inputs is not None:
        tasks = _traced(model, example_inputs)
    else:
        tasks = []
    tasks += _by_weights_alone(model, tasks)
    if not any(isinstance(p, QuantizedWeight) for p in model.parameters()) and not _eligible(tasks):
        raise NothingToQuantize(_why_nothing(model))
    convert(tasks, config, target)
    if target is not None:
        model.to(target)
    tell_again(model, config.progress)
    tell_to_compile(model, config.progress)
    return report(model)


def _eligible(tasks: list[Task]) -> list[nn.Parameter]:
    return [w for task in tasks for w in task.weights if decisions.is_undecided(w)]


def _why_nothing(model: nn.Module) -> str:
    reasons = Counter(row.reason for row in report(model))
    text = f"{type(model).__name__} has no linear layer that can be quantized"
    if not reasons:
        return f"{text}: it has no nn.Linear and no 1x1 convolution"
    most = "; ".join(f"{count} of them: {reason}" for reason, count in reasons.most_common(3))
    return f"{text}. It has {reasons.total()} linears; {most}. svdq_compile.report(model) says why for each."


@dataclass(eq=False)
class _Watch:
    """A model whose graphs run for `_observed`.

    weights   ids of its Parameters; whose graph it is that runs is told by them
    visible   whether it is told how far it has come
    has_run   whether any graph did
    tasks     what was found, by the id of the first weight
    """

    weights: set[int]
    visible: bool
    has_run: bool = False
    tasks: dict[int, Task] = field(default_factory=dict)


_WATCHES: list[_Watch] = []  # one for each `_observed` that is under way
_ENDLESS = Config(calibration_steps=1_000_000, progress=False)  # none of its graphs is ever done with observing


def _watching(gm: fx.GraphModule, example_inputs: list) -> Callable:
    """The backend that observes. There is one for all models and calls: each new one would be a graph more for Dynamo
    to keep, and at its limit it would go on without observing.
    """
    graph = ObservingGraph(gm, find_weights(gm, example_inputs, ()), _ENDLESS)

    def run(*args: Any) -> Any:
        held, visible = {id(value) for value in args}, False
        for watch in [watch for watch in _WATCHES if not held.isdisjoint(watch.weights)]:
            watch.has_run = True
            watch.tasks.update((id(task.weights[0]), task) for task in graph.tasks(args))
            visible |= watch.visible
        calls = [task.statistics.calls for task in graph.tasks(args)]
        with stages.observing(decisions.model_of(args), max(calls, default=0) + 1, None, visible and bool(calls)):
            return graph(*args)

    return run


def _observed(model: nn.Module, calibrate: Callable[[nn.Module], Any], visible: bool) -> list[Task]:
    """Run `calibrate` with every graph of the model observing."""
    watch = _Watch({id(parameter) for parameter in model.parameters()}, visible)
    _WATCHES.append(watch)
    try:
        with compiled_in_place(model, convert_by_our_settings(_watching)), torch.no_grad():
            calibrate(model)
    finally:
        _WATCHES.remove(watch)
    if not watch.has_run:
        raise NothingToQuantize(f"calibrate never ran a linear of this {type(model).__name__}: does it call the model?")
    return list(watch.tasks.values())


def _traced(model: nn.Module, example_inputs: Mapping[str, Any]) -> list[Task]:
    """Observe a twin of the model on the meta device, which shows shapes and who shares an input."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in tensors}
    twins = [(memo[id(parameter)], parameter) for parameter in model.parameters()]
    twin = copy.deepcopy(model, memo)
    decisions.place(twin)
    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in example_inputs.items()}
    tasks = _observed(twin, lambda model: model(**moved), visible=False)
    for parameter, original in twins:
        reason = decisions.reason_of(parameter)
        if reason is not None and decisions.is_undecided(original):
            decisions.leave_alone(original, reason)
    originals = {id(parameter): original for parameter, original in twins}
    return [replace(task, weights=tuple(originals[id(w)] for w in task.weights)) for task in tasks]


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
