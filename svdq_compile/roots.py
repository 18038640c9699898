"""Which model is being called: the modules on the way to whatever graph runs or is made.

A graph may hold any piece of a model: all of it, a block, or what lies between two graph breaks. Who called it stands
on Python's stack, since hooks and torch.compile leave the frames of the modules around a compiled one.
"""

from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

from torch import fx, nn

from . import decisions
from .lowering.stack import frames
from .lowering.torch_private import modules_behind
from .passes.weight_groups import WeightInputs, weight_inputs


def find_weights(
    gm: fx.GraphModule, example_inputs: list, models: Iterable[nn.Module], convolutions: bool
) -> WeightInputs:
    """The weights of linears and other products in a graph that Dynamo has made. Those that must stay 16-bit in their
    model, one of these, or by the option `convolutions`, are left alone from now on.
    """
    decisions.place_weights(example_inputs, models)
    names = {i: decisions.name_of(w) for i, w in enumerate(example_inputs) if isinstance(w, nn.Parameter)}
    inputs = weight_inputs(gm, {i: name for i, name in names.items() if name is not None}, names)
    decisions.settle(inputs, example_inputs, convolutions)
    return inputs


def models_of(gm: fx.GraphModule) -> Iterator[nn.Module]:
    """Called by a backend: the modules that its graph may belong to, the likeliest first."""
    yield from _calling(list(frames()))
    yield from modules_behind(gm)
    yield from _at_hand(frames())


def models_under_way() -> Iterator[nn.Module]:
    """Called by a graph: the modules that it may be a part of in this call, the likeliest first."""
    yield from _calling(list(frames()))
    yield from _at_hand(frames())


def model_of(args: Sequence[Any], models: Iterable[nn.Module]) -> nn.Module | None:
    """The model that a graph with these inputs is a part of: where its weights were found, or the first of the models
    that holds one.
    """
    model = decisions.model_of(args)
    if model is None:
        held = {id(value) for value in args if isinstance(value, nn.Parameter)}
        model = next((m for m in models if not held or any(id(p) in held for p in m.parameters())), None)
    return model


def _calling(calls: list[FrameType]) -> Iterator[nn.Module]:
    """The modules whose methods are being called, outermost first."""
    for frame in reversed(calls):
        if "self" in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
            yield from _modules(frame.f_locals.get("self"))


def _at_hand(calls: Iterable[FrameType]) -> Iterator[nn.Module]:
    """The modules that whoever calls a compiled function, no method, has at hand."""
    caller = next((frame for frame in calls if not _is_machinery(frame)), None)
    if caller is not None:
        for value in list(caller.f_locals.values()):
            yield from _modules(value)


def _modules(value: object) -> Iterator[nn.Module]:
    """A module itself, out of what torch.compile has put around it."""
    if isinstance(value, nn.Module):
        yield getattr(value, "_orig_mod", value)


def _is_machinery(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).split(".")[0] in ("torch", __name__.split(".")[0])
