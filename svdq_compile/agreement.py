"""Ranks whose compiled code exchanges tensors agree on what they run.

Those that quantize together compare all of it then. Whoever loads a model from a file does not meet the others, and
with other options would send otherwise, or compute a part of another picture. So before the first graph of a model is
called that exchanges tensors, the ranks that it exchanges them with meet: each is about to run it, since none could
alone. When it was compiled says nothing: a model may be served by graphs that were compiled for another one, and later
graphs are compiled where something has changed, which need not be so on all ranks at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, fx, nn

from .config import ALONE, Config
from .foreign import await_copies, groups_of
from .lowering.torch_private import ranks_in
from .parameter import QuantizedWeight
from .passes.order import groups_in
from .ranks import about, among, checksums
from .roots import model_of, models_under_way
from .split_linear import ranks_sharing

# By model: the ranks that have met, and the options with which they did.
_MET: "WeakKeyDictionary[nn.Module, set[tuple[tuple[int, ...], str]]]" = WeakKeyDictionary()


class Agreement:
    """Of the ranks that a graph, as Dynamo made it, exchanges tensors with."""

    def __init__(self, gm: fx.GraphModule, config: Config) -> None:
        self._options = about(config)
        self._progress = config.progress
        talks = config.group != ALONE and dist.is_available() and dist.is_initialized()
        members = dict.fromkeys(ranks_in(group) for group in groups_in(gm)) if talks else ()
        self._peers = [ranks for ranks in members if len(ranks) > 1]

    def reach(self, args: Sequence[Any]) -> None:
        """Called before the graph runs with these inputs, whose layers are all decided.

        Raises RanksDiffer, which names what differs, and RanksApart if one of the others does not come.
        """
        model = model_of(args, models_under_way()) if self._peers else None
        if model is None:
            return
        met = _MET.setdefault(model, set())
        for members in self._peers:
            meeting = members, repr(self._options)
            if meeting not in met:
                among(members, self._progress).compare(lambda: self._options | _facts(model))
                met.add(meeting)


def _facts(model: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    await_copies(groups_of(model))
    quantized = {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
    return facts_of(quantized, values=ranks_sharing(model) == 1)


def facts_of(parameters: Mapping[str, Tensor], *, values: bool) -> dict[str, list[tuple[str, Any]]]:
    """Parameters as ranks compare them. values: checksums of all that stands for each too"""
    facts: dict[str, list[tuple[str, Any]]] = {
        "format": [(name, f"{list(weight.shape)} {_kind(weight)}") for name, weight in parameters.items()]
    }
    if values:
        tensors = [
            (f"{name} {field}".rstrip(), t) for name, w in parameters.items() for field, t in _tensors(w).items()
        ]
        sums = checksums(tensor for _, tensor in tensors)
        facts["weight"] = [(name, total) for (name, _), total in zip(tensors, sums, strict=True)]
    return facts


def _kind(weight: Tensor) -> str:
    if not isinstance(weight, QuantizedWeight):
        return str(weight.dtype)
    return f"{weight.dtype} {weight._svdq.precision} of rank {weight._svdq.rank}"


def _tensors(weight: Tensor) -> dict[str, Tensor]:
    if not isinstance(weight, QuantizedWeight):
        return {"": weight}
    packed = weight._svdq
    return packed.plain_tensors() | {"smooth": packed.shared.smooth, "down": packed.down}
