"""Quantize a model before it is compiled or run: `quantize` and `restore`."""

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from . import decisions, stages
from .budget import check_outcome, choose_forms
from .config import ALONE, Config
from .convert import convert, warn_of_skip
from .errors import NothingToQuantize, OptionError
from .foreign import groups_of, renew_copies
from .given import device_in, model_in
from .input_statistics import InputStatistics
from .layers import layers, matrices
from .lowering.torch_private import compiled_in_place, convert_by_our_settings, while_nothing_is_traced
from .observing import ObservingGraph
from .parameter import QuantizedWeight, has_quantized, originals, thaw
from .passes.peft_names import without_adapters
from .progress import say
from .ranks import Ranks, ranks_of, together
from .replays import Recorder
from .report import Report, report, why_nothing
from .roots import find_weights
from .statistics import Statistics
from .summary import forget, tell_again, tell_to_compile
from .task import Task

log = logging.getLogger("svdq_compile")


def quantize(
    model: nn.Module,
    config: Config | Mapping[str, Any] | None = None,
    *,
    calibrate: Callable[[nn.Module], Any] | None = None,
    statistics: Statistics | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Report:
    """Quantize a model in place, layer by layer.

    config, options  a Config or a dict of options, and options by name, which count more
    calibrate       runs the model on what it is for, as in `lambda model: pipe("a dog")`; it runs in 16-bit while the
                    inputs of its layers are observed. The best picture.
    statistics      what `observe` has seen of this model, instead: the same result, to the bit
    example_inputs  keyword arguments of the model's forward, for their shapes only: the model is traced on the meta
                    device, nothing is computed. Shows which layers share an input and which read few rows.
                    Without any of these, every layer is quantized by its weights alone and none shares its input.
    device          where the work is done and the model ends up. From CPU weights to a GPU this way, the GPU never
                    holds more 16-bit weights than one group of layers.

    Returns the report. Raises NotAModel, OptionError, OtherModel, NothingToQuantize, NonFiniteWeight,
    UnsupportedDevice.
    """
    chosen = Config.of(config, options)
    ranks = ranks_of(chosen)
    each = together(ranks)

    def checked() -> torch.device | None:
        check_given(model, calibrate, example_inputs, statistics)
        if calibrate is None:
            chosen.refuse_target("needs to see what the layers do to the model's output, so it goes with calibrate")
        return None if device is None else device_in(device)

    target = each(checked)
    warn_of_skip([model], chosen)
    was_quantized = has_quantized(model)
    _begin(model)
    if not chosen.convolutions:
        decisions.leave_convolutions(model)
    if ranks is not None:
        ranks.agree([[pair] for pair in _named(model)], chosen)
        chosen.refuse_target("is met by one process, and several ranks would choose differently: give it group='alone'")
        ranks.compare(lambda: {"file": [] if statistics is None else [("statistics", statistics.fingerprint())]})
    recorder = Recorder() if chosen.has_target else None
    if calibrate is None:
        tasks = each(lambda: planned(model, example_inputs, statistics, ranks))
    else:
        tasks = _with_unreached(model, _observed(model, calibrate, chosen.progress, recorder))
    if not has_quantized(model) and not _eligible(tasks):
        raise NothingToQuantize(why_nothing(model))
    if recorder is not None and _eligible(tasks):
        try:
            tasks = choose_forms(model, tasks, recorder, chosen, target)
        except BaseException:  # another call begins anew
            for task in tasks:
                decisions.forget_statistics(task.weights)
            raise
    convert(tasks, chosen, target)
    if was_quantized and not tasks and (options or config is not None or calibrate is not None):
        log.warning(
            "svdquant: this %s is quantized already, and stays as it is: svdq_compile.restore(model, state_dict) turns "
            "it back to 16-bit first",
            type(model).__name__,
        )
    if target is not None:
        model.to(target)
    tell_again(model, chosen.progress)
    tell_to_compile(model, chosen.progress)
    outcome = report(model)
    check_outcome(outcome, chosen)
    return outcome


def observe(
    model: nn.Module, calibrate: Callable[[nn.Module], Any], *, convolutions: bool = False, progress: bool = True
) -> Statistics:
    """Watch what the linears of a 16-bit model read, and leave the model as it is: for `quantize(model, statistics=)`,
    here or elsewhere, now or from a file.

        seen = svdq.observe(pipe.transformer, lambda model: pipe("a dog"))
        seen.save("flux.statistics.safetensors")

    calibrate     runs the model on what it is for, as for `quantize`
    convolutions  watch what the option of this name has quantized, too
    progress      show how far it has come

    Raises NotAModel, OptionError, NothingToQuantize where no linear of the model ran.
    """
    check_given(model, calibrate, None)
    if has_quantized(model):
        raise OptionError(f"this {type(model).__name__} is quantized already: observe it before that, in 16 bits")
    weights = tuple(model.parameters())
    _begin(model)
    if not convolutions:
        decisions.leave_convolutions(model)
    decisions.forget_statistics(weights)  # of calls before
    try:
        return Statistics.of(model, _observed(model, calibrate, progress))
    finally:
        decisions.forget_statistics(weights)
        _begin(model)


def _begin(model: nn.Module) -> None:
    """Let it be decided anew what becomes of the layers of a model."""
    decisions.ask_again(model)
    decisions.place(model)
    stages.begin_anew(model)


def check_given(model: Any, calibrate: Any, example_inputs: Any, statistics: Any = None) -> None:
    """What was given beside the options. Raises NotAModel, OptionError."""
    inner = model_in(model, "quantize")
    if calibrate is not None and example_inputs is not None:
        raise OptionError("give calibrate or example_inputs, not both: calibrating shows the shapes too")
    if statistics is not None and not (calibrate is None and example_inputs is None):
        raise OptionError("give statistics alone, without calibrate and example_inputs: they were observed already")
    if not isinstance(statistics, Statistics | None):
        raise OptionError(
            f"statistics={statistics!r:.60} are none: give those of svdq_compile.observe(model, calibrate), or of a "
            "file, by svdq_compile.Statistics.load(path)"
        )
    if calibrate is not None and not _can_be_called(calibrate, model):
        raise OptionError(
            f"calibrate={calibrate!r:.60} is no function of the model: "
            "give one that runs it, as in calibrate=lambda model: pipe('a dog')"
        )
    if example_inputs is None:
        return
    if not isinstance(example_inputs, Mapping):
        raise OptionError(
            f"example_inputs is a {type(example_inputs).__name__}: give a dict of the arguments of "
            f"{type(inner).__name__}.forward{_parameters(inner)}"
        )
    if not _can_be_called(inner.forward, **example_inputs):
        raise OptionError(
            f"example_inputs has {', '.join(map(str, example_inputs)) or 'nothing'}, which does not fit "
            f"{type(inner).__name__}.forward{_parameters(inner)}"
        )


def _can_be_called(function: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether these arguments fit, as far as Python can tell without calling."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except ValueError:  # a function that does not tell
        return True
    except TypeError:
        return False
    return True


def _parameters(model: nn.Module) -> str:
    """The names of what forward takes, those in brackets that may be left out."""
    found = [p for name, p in inspect.signature(model.forward).parameters.items() if name != "self"]
    return f"({', '.join(p.name if p.default is p.empty else f'[{p.name}]' for p in found)})"


def _named(model: nn.Module) -> list[tuple[Tensor, str]]:
    """What may be quantized of a model."""
    return [(m.weight, m.name) for m in matrices(model) if m.never is None and decisions.is_undecided(m.weight)]


def _eligible(tasks: list[Task]) -> list[nn.Parameter]:
    return [w for task in tasks for w in task.weights if decisions.is_undecided(w)]


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
# None of its graphs is ever done with observing; `quantize` has asked the other ranks, and left alone what it leaves.
_ENDLESS = Config(calibration_steps=1_000_000, progress=False, group=ALONE, convolutions=True)


def _watching(gm: fx.GraphModule, example_inputs: list) -> Callable:
    """The backend that observes. There is one for all models and calls: each new one would be a graph more for Dynamo
    to keep, and at its limit it would go on without observing.
    """
    graph = ObservingGraph(gm, find_weights(gm, example_inputs, (), _ENDLESS.convolutions), _ENDLESS)

    def run(*args: Any) -> Any:
        held, visible, tasks = {id(value) for value in args}, False, graph.tasks(args)
        for watch in [watch for watch in _WATCHES if not held.isdisjoint(watch.weights)]:
            watch.has_run = True
            watch.tasks.update((id(task.weights[0]), task) for task in tasks)
            visible |= watch.visible
        calls = [task.statistics.calls for task in tasks]
        with stages.observing(decisions.model_of(args), max(calls, default=0) + 1, None, visible and bool(calls)):
            return graph(*args)

    return run


def _observed(
    model: nn.Module, calibrate: Callable[[nn.Module], Any], visible: bool, recorder: Recorder | None = None
) -> list[Task]:
    """Run `calibrate` with every graph of the model observing, and its calls recorded."""
    watch = _Watch({id(parameter) for parameter in model.parameters()}, visible)
    _WATCHES.append(watch)
    try:
        with ExitStack() as stack:
            stack.enter_context(compiled_in_place(model, convert_by_our_settings(_watching)))
            stack.enter_context(torch.no_grad())
            if recorder is not None:
                stack.enter_context(recorder.watching(model))
            calibrate(model)
    finally:
        _WATCHES.remove(watch)
    if not watch.has_run:
        raise NothingToQuantize(f"calibrate never ran a linear of this {type(model).__name__}: does it call the model?")
    return list(watch.tasks.values())


def planned(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    statistics: Statistics | None = None,
    ranks: Ranks | None = None,
) -> list[Task]:
    """What is known without running the model: by what was observed of it; or by a twin on the meta device, which shows
    shapes and who shares an input. Of the layers that neither has reached, by the weights alone.

    ranks  those that quantize the model together: all know the statistics, and each has seen a part
    """
    if statistics is not None:
        tasks = _with_unreached(model, statistics.tasks(model))
        if ranks is None:
            return tasks
        return [replace(task, statistics=task.statistics.part(ranks.own, ranks.size)) for task in tasks]
    tasks = [] if example_inputs is None else _traced(model, example_inputs)
    return tasks + _by_weights_alone(model, tasks)


def _with_unreached(model: nn.Module, observed: list[Task]) -> list[Task]:
    """And the layers that no call has reached, by their weights alone: which is told."""
    alone = _by_weights_alone(model, observed)
    empty = [task for task in observed if task.statistics.span is None and not task.expanded]
    unseen = [name for task in empty + alone for _, name in task.undecided]
    if unseen:
        log.warning(
            "svdquant: calibration has not reached %d linears, which are quantized by their weights alone: %s%s",
            len(unseen),
            ", ".join(unseen[:5]),
            " and so on" if len(unseen) > 5 else "",
        )
    return observed + alone


def _traced(model: nn.Module, example_inputs: Mapping[str, Any]) -> list[Task]:
    for layer in matrices(model):
        if layer.never is not None and decisions.is_undecided(layer.weight):
            decisions.leave_alone(layer.weight, layer.never)  # its twin does not tell
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in tensors}
    twins = [(memo[id(parameter)], parameter) for parameter in model.parameters()]
    twin = copy.deepcopy(model, memo)
    decisions.place(twin)
    moved = tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, dict(example_inputs))
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
    """The layers that no task covers, each for itself. Only of torch's own modules is it known what they do with their
    weight; that of another class, or one that is a table as well, is left to be seen when it runs.
    """
    covered = {id(w) for task in seen for w in task.weights}
    covered |= {id(w) for module in model.modules() if not _is_known(module) for w in module.parameters(recurse=False)}
    tasks = []
    for layer in layers(model):
        if id(layer.weight) in covered or not decisions.is_undecided(layer.weight):
            continue
        if layer.reason is not None:
            decisions.leave_alone(layer.weight, layer.reason)
        else:
            own = (layer.weight,), (layer.name,)
            tasks.append(Task(*own, False, 0.0, InputStatistics(), expanded=layer.expanded))
    return tasks


def _is_known(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight and does nothing else with it, or has none."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return type(module).forward.__module__.startswith("torch.nn.")
    return not isinstance(module, nn.Embedding)


def restore(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    dequantize: bool = False,
    progress: bool = True,
) -> int:
    """Turn every quantized weight back into a plain 16-bit one, in place. Returns how many.

    The values are the originals with weights="keep" or "offload". With "release" they are gone: they come from
    `state_dict` (by the model's names), or with `dequantize=True` from the 4-bit form, which is close to the originals
    but not equal. The model stays in 16-bit, compiled or not, until `quantize` or `compile` is called, or torch.compile
    anew. progress: say so in a line.

    Raises NotAModel, OptionError for what is no state dict or does not fit, and WeightsReleased if some weight has none
    of these: before anything is changed.
    """
    model_in(model, "restore")
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise OptionError(
            f"state_dict={state_dict!r:.60} is no state dict: give the tensors by name, as "
            "safetensors.torch.load_file(path) or another_model.state_dict() has them"
        )
    with while_nothing_is_traced(), decisions.LOCK: count = _restore(model, state_dict, dequantize)  # noqa: E701  # fmt: skip
    forget(model)
    stages.begin_anew(model)
    if count:
        say(
            f"svdquant: {count} linears are 16-bit again and stay so; svdq_compile.quantize(model) or compiling the "
            "model anew quantizes them",
            progress,
        )
    return count


def _restore(model: nn.Module, state_dict: Mapping[str, Tensor] | None, dequantize: bool) -> int:
    found = _quantized_by_names(model)
    values: list[Tensor | None] = []
    for names, weight in found:
        name = next((name for name in names if name in (state_dict or {})), None)
        if state_dict is not None and name is not None:
            values.append(given := state_dict[name])
            if not isinstance(given, Tensor):
                raise OptionError(f"{name}: state_dict has {given!r:.60}, not a tensor")
            if isinstance(given, QuantizedWeight):
                originals(given)  # raises where there are none
            if given.shape != weight.shape:
                raise OptionError(f"{name}: state_dict has shape {tuple(given.shape)}, not {tuple(weight.shape)}")
        elif dequantize:
            values.append(None)
        else:
            originals(weight)
            values.append(weight)
    for (_, weight), value in zip(found, values, strict=True):
        thaw(weight, weight._svdq.values(weight) if value is None else value)
    renew_copies(groups_of(model))
    thawed = {id(weight) for _, weight in found}
    decisions.turn_back(m.weight for m in matrices(model) if id(m.weight) in thawed or m.reason is None)
    return len(found)


def _quantized_by_names(model: nn.Module) -> list[tuple[list[str], QuantizedWeight]]:
    """Each quantized weight with all the names that a state dict may have for it: tied, with adapters and without."""
    named = list(model.named_parameters(remove_duplicate=False))
    found: dict[int, tuple[list[str], QuantizedWeight]] = {}
    for name, weight in (*without_adapters(named), *named):
        if isinstance(weight, QuantizedWeight):
            found.setdefault(id(weight), ([], weight))[0].append(name)
    return list(found.values())
