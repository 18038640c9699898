"""Which model is being called: the modules on the way to whatever graph runs or is made.

A graph may hold any piece of a model: all of it, a block, or what lies between two graph breaks. Who called it stands
on Python's stack, since hooks and torch.compile leave the frames of the modules around a compiled one.
"""

import sys
from collections.abc import Iterator
from itertools import chain
from types import FrameType

from torch import fx, nn

from . import decisions
from .lowering.torch_private import modules_behind
from .passes.weight_groups import WeightInputs, weight_inputs


def find_weights(gm: fx.GraphModule, example_inputs: list) -> WeightInputs:
    """The weights of linears in a graph that Dynamo is making. Those that must stay 16-bit in their model are left
    alone from now on.
    """
    decisions.place_weights(example_inputs, chain(models_under_way(), modules_behind(gm)))
    names = {i: decisions.name_of(w) for i, w in enumerate(example_inputs) if isinstance(w, nn.Parameter)}
    inputs = weight_inputs(gm, {i: name for i, name in names.items() if name is not None})
    decisions.settle(inputs, example_inputs)
    return inputs


def models_under_way() -> Iterator[nn.Module]:
    """The modules whose methods the calling thread is in, outermost first; then those at hand where a compiled function
    is called that is no method.
    """
    frames = _frames()
    for frame in reversed(frames):
        if "self" in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
            yield from _modules(frame.f_locals.get("self"))
    caller = next((frame for frame in frames if not _is_machinery(frame)), None)
    if caller is not None:
        for value in list(caller.f_locals.values()):
            yield from _modules(value)


def _frames() -> list[FrameType]:
    """Of the calling thread, innermost first."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return frames


def _modules(value: object) -> Iterator[nn.Module]:
    """A module itself, out of what torch.compile has put around it."""
    if isinstance(value, nn.Module):
        yield getattr(value, "_orig_mod", value)


def _is_machinery(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).split(".")[0] in ("torch", __name__.split(".")[0])
