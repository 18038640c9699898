"""A state dict of which nothing is known but its names and shapes, as a tree of modules."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import FileRefused

_HALVES = (torch.bfloat16, torch.float16)
_STORED = (torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)  # what nobody runs 4-bit weights in


def most_common(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The 16-bit dtype that most numbers are stored in, bfloat16 where that is another."""
    stored = _stored_in(tensors)
    return stored if stored in _HALVES else torch.bfloat16


def _stored_in(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype that holds most of the numbers."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def state_dict_model(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> nn.Module:
    """Modules on the meta device with these names. dtype: by default each tensor's own, and 16 bits for float32 and
    less where most are that. Raises FileRefused.
    """
    most = _stored_in(tensors)
    cast = set(_STORED) if dtype is not None else set() if most not in _STORED else {most}
    metas = {
        name: torch.empty_like(tensor, dtype=(dtype or torch.bfloat16) if tensor.dtype in cast else None, device="meta")
        for name, tensor in ((name, tensors[name].as_subclass(Tensor)) for name in sorted(tensors, key=_in_order))
    }
    try:
        return skeleton(metas)
    except KeyError as error:
        raise FileRefused(path, f"its tensor names are not those of a model's state dict ({error})") from error


def _in_order(name: str) -> list[str]:
    """A sort key: block 2 before block 10, which files do not do."""
    return [part.zfill(6) if part.isdigit() else part for part in name.split(".")]


class StateDict(nn.Module):
    """A tree of modules that holds a state dict and cannot be run."""


def skeleton(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Modules that have these tensors as their state dict, without the model's class.

    `x.weight` of two dimensions becomes an nn.Linear `x`, of four with 1x1 pixels an nn.Conv2d, each with its `x.bias`;
    everything else a plain Parameter. Names cannot tell an embedding table from a linear: both are a `weight` of two
    dimensions. What protects tables is the rule of passes/scope.py that layers outside the repeated blocks stay 16-bit;
    in a file without such blocks, name the tables with `skip`.
    Nor do they tell a grouped or strided 1x1 convolution from a plain one; loading into the real model shows that.
    """
    modules: dict[str, nn.Module] = {"": StateDict()}

    def module(path: str) -> nn.Module:
        if path not in modules:
            parent, _, leaf = path.rpartition(".")
            modules[path] = _module_of(tensors.get(f"{path}.weight"))
            module(parent).add_module(leaf, modules[path])
        return modules[path]

    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = module(path)
        if owner._parameters.get(leaf) is None:
            owner.register_parameter(leaf, _frozen(tensor))
    return modules[""].eval()


def _module_of(weight: Tensor | None) -> nn.Module:
    """A linear that holds the weight, without a bias yet; an empty module if it is not a linear's."""
    layer: nn.Module
    if weight is not None and weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    elif weight is not None and weight.dim() == 4 and weight.shape[2:] == (1, 1):
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False, device="meta")
    else:
        return StateDict()
    layer.weight = _frozen(weight)
    return layer


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
