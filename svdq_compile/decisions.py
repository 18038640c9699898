"""What is known of weights that are not quantized (yet): where they stand in their model, what was observed of their
inputs, and why some stay 16-bit.

All tables hold weights weakly, by identity. A quantized weight carries its own state (parameter.py).

A weight's place is found once, from the module tree of the model whose call is under way (roots.py), or of the one that
`svdq_compile.quantize` is given. So it does not matter which piece of a model a graph holds.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .foreign import is_plain
from .input_statistics import InputStatistics
from .layers import BETWEEN, matrices
from .lowering.locks import free_in_child
from .lowering.torch_private import compilations, compilations_under_way
from .parameter import has_quantized
from .passes.scope import OUTSIDE
from .passes.weight_groups import WeightInputs

RESTORED = "restored to 16-bit"  # until somebody asks for 4 bits again

# Held while weights change their form. What is done with it stands on its line: an interruption before the next would
# leave it locked, and other threads waiting for ever.
LOCK = free_in_child(threading.RLock())

_PLACES = WeakIdKeyDictionary()  # Parameter -> Place
_STATISTICS = WeakIdKeyDictionary()  # weight -> InputStatistics of its input, while it is observed
_SHARED = WeakIdKeyDictionary()  # weight that reads the input of another one -> the other one's InputStatistics
_REASONS = WeakIdKeyDictionary()  # weight -> why it stays 16-bit
_left_alone = 0
_COMPILED_BEFORE = WeakIdKeyDictionary()  # weight that was turned back -> what torch.compile had made until then


@dataclass(frozen=True)
class Place:
    """Where a Parameter stands.

    model   the root of the tree
    name    of its layer in there, None if it is no matrix
    reason  why it must stay 16-bit there (Layer.never), None if it may be quantized
    is_between  as in Layer
    """

    model: "ref[nn.Module]"
    name: str | None
    reason: str | None
    is_between: bool = False

    def why_not(self, convolutions: bool) -> str | None:
        """The reason, by this option too."""
        return BETWEEN if self.is_between and not convolutions else self.reason


def place(model: nn.Module) -> None:
    """Note where each Parameter of a model stands."""
    with LOCK: _place(model)  # noqa: E701  # fmt: skip


def _place(model: nn.Module) -> None:
    root = ref(model)
    for parameter in model.parameters():
        _PLACES[parameter] = Place(root, None, "no linear holds it: the table of an embedding")
    for layer in matrices(model):
        _PLACES[layer.weight] = Place(root, layer.name, layer.never, layer.is_between)


def place_weights(weights: Iterable[object], models: Iterable[nn.Module]) -> None:
    """Note where these weights stand, each in the first of the models that holds it."""
    missing = {id(w): w for w in weights if is_undecided(w)}
    for model in models:
        if not missing:
            break
        held = [missing.pop(id(p)) for p in model.parameters() if id(p) in missing]
        if any(not is_placed(w) or _PLACES[w].model() is not model for w in held):
            place(model)


def is_placed(weight: object) -> bool:
    """Whether it is known where a weight stands."""
    return weight in _PLACES


def name_of(weight: nn.Parameter) -> str | None:
    """The full name of a weight's layer; None if it was not found in a model."""
    return _PLACES[weight].name if is_placed(weight) else None


def model_of(values: Iterable[object]) -> nn.Module | None:
    """The model that the first of these weights stands in, as far as it is known."""
    models = (_PLACES[value].model() for value in values if isinstance(value, nn.Parameter) and is_placed(value))
    return next((model for model in models if model is not None), None)


def settle(inputs: WeightInputs, args: Sequence[Any], convolutions: bool) -> None:
    """Leave alone those of a graph's weights that must stay 16-bit: where they stand, by the option `convolutions`, or
    as the graph uses them.
    """
    for index, _, use in inputs.rejected:
        if is_undecided(args[index]):
            leave_alone(args[index], use)
    for index in (index for group in inputs.groups for index in group.indices):
        weight = args[index]
        if is_undecided(weight):
            # Where no model was found, the graph is all there is to ask.
            in_graph = OUTSIDE if index in inputs.outside else None
            reason = _PLACES[weight].why_not(convolutions) if is_placed(weight) else in_graph
            if reason is not None:
                leave_alone(weight, reason)


def leave_convolutions(model: nn.Module) -> None:
    """Leave alone what the option `convolutions` would take."""
    for layer in matrices(model):
        if layer.is_between and is_undecided(layer.weight):
            leave_alone(layer.weight, BETWEEN)


def statistics_of(weights: tuple[nn.Parameter, ...]) -> InputStatistics:
    """The statistics of the input that these weights share; empty ones if nothing was observed yet."""
    with LOCK: found = _STATISTICS.setdefault(weights[0], InputStatistics())  # noqa: E701  # fmt: skip
    for weight in weights[1:]:
        _SHARED[weight] = found
    return found


def seen_by(weight: nn.Parameter) -> InputStatistics | None:
    """What was observed of a weight's input; None if nothing was."""
    return _STATISTICS.get(weight) or _SHARED.get(weight)


def is_observed(weight: nn.Parameter) -> bool:
    """Whether there are statistics of the input of a weight, by its own name: of those that share it, the first's."""
    return weight in _STATISTICS


def may_be_quantized(weight: nn.Parameter, convolutions: bool) -> bool:
    """Whether nothing speaks against it where a weight stands, by the option `convolutions` either."""
    place = _PLACES.get(weight)
    return place is not None and place.name is not None and place.why_not(convolutions) is None


def forget_statistics(weights: tuple[nn.Parameter, ...]) -> None:
    """Free what was observed, once it has served."""
    for weight in weights:
        _STATISTICS.pop(weight, None)
        _SHARED.pop(weight, None)


def leave_alone(weight: nn.Parameter, reason: str) -> None:
    """Decide that a weight stays 16-bit, and why."""
    global _left_alone
    _REASONS[weight] = reason
    _left_alone += 1


def left_alone() -> int:
    """How often it was decided that a weight stays 16-bit: as long as it is the same, no weight has become one."""
    return _left_alone


def reason_of(weight: nn.Parameter) -> str | None:
    """Why a weight stays 16-bit; None if that was not decided."""
    return _REASONS.get(weight)


def turn_back(weights: Iterable[nn.Parameter]) -> None:
    """Decide that what is now 16-bit stays so, until somebody asks for 4 bits again: by `ask_again`, or by compiling
    the model anew, which shows when compiled code is called (`note_compiled_anew`).
    """
    before = compilations()
    for weight in weights:
        if is_undecided(weight):
            forget_statistics((weight,))
            leave_alone(weight, RESTORED)
            _COMPILED_BEFORE[weight] = before


def note_compiled_anew(weights: Iterable[object]) -> None:
    """Called in compiled code, or where it is made: let weights be quantized that were turned back before this code's
    torch.compile was called.
    """
    if not _COMPILED_BEFORE:
        return
    turned = [w for w in weights if isinstance(w, nn.Parameter) and w in _COMPILED_BEFORE]
    running = list(compilations_under_way()) if turned else []
    for weight in turned:
        if any(this not in _COMPILED_BEFORE[weight] for this in running):
            forget_reason(weight)


def ask_again(model: nn.Module) -> None:
    """Let be quantized what was turned back. Of a model nothing of which is quantized all is decided anew: it may have
    been left alone by other options.
    """
    is_plain = not has_quantized(model)
    for weight in model.parameters():
        if is_plain or weight in _COMPILED_BEFORE:
            forget_reason(weight)


def forget_reason(weight: nn.Parameter) -> None:
    """Let a weight be considered again, and looked for."""
    _REASONS.pop(weight, None)
    _COMPILED_BEFORE.pop(weight, None)
    _PLACES.pop(weight, None)


def is_undecided(weight: object) -> bool:
    """Whether a graph input is a weight still to be quantized or left alone."""
    return is_plain(weight) and weight not in _REASONS
