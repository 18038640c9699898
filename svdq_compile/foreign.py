"""Weights that another library keeps in a form of its own, or puts back at each call: they stay as they are.

A Parameter of another class than torch's own is a quantized one (torchao, bitsandbytes, GGUF) or a piece of one
(DTensor): its values are no plain matrix, and its class would be lost. diffusers' group offloading puts values back at
each call: from a file, where they stay 16-bit, or from copies in memory, which can be those of the quantized weights.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .parameter import QuantizedWeight

OFFLOADED = "group offloading puts its 16-bit values back at each call from a file: leave out offload_to_disk_path"


def is_plain(weight: object) -> bool:
    """Whether it is a Parameter of torch's own class."""
    return type(weight) is nn.Parameter


def foreign_weights(modules: Iterable[nn.Module]) -> dict[int, str]:
    """Those among the Parameters of some modules, by id, and why each stays as it is."""
    found: dict[int, str] = {}
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if not is_plain(parameter) and not isinstance(parameter, QuantizedWeight) and not is_lazy(parameter):
                found[id(parameter)] = _whose(parameter)
        found |= {id(tensor): OFFLOADED for tensor in _put_back(module)}
    return found


def _whose(parameter: nn.Parameter) -> str:
    kind = type(parameter)
    library = kind.__module__.split(".")[0]
    return f"its weight is of {library}'s class {kind.__name__}: to quantize it here, load the model in 16-bit"


def _put_back(module: nn.Module) -> Iterator[Tensor]:
    """What the hooks of diffusers' group offloading keep on disk."""
    for group in _groups(module):
        yield from getattr(group, "tensor_to_key", ())


def groups_of(model: nn.Module | None) -> list[Any]:
    """What diffusers' group offloading moves at once, of a model."""
    return [group for module in (model.modules() if model is not None else ()) for group in _groups(module)]


def await_copies(groups: Iterable[Any]) -> None:
    """Wait until what group offloading fetches ahead on its stream is there: nobody but its hooks knows of it."""
    for stream in {group.stream for group in groups if getattr(group, "stream", None) is not None}:
        stream.synchronize()


def renew_copies(groups: Iterable[Any]) -> None:
    """Let group offloading put back what each weight is now, quantized or plain, and not what it was."""
    for group in groups:
        copies = getattr(group, "cpu_param_dict", {})
        for weight, copy in copies.items():
            if isinstance(weight, QuantizedWeight) != isinstance(copy, QuantizedWeight):
                copies[weight] = group._to_cpu(weight, group.low_cpu_mem_usage)


def _groups(module: nn.Module) -> Iterator[Any]:
    """The groups of diffusers' group offloading that a module's hooks move."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    yield from (hook.group for hook in hooks.values() if hasattr(hook, "group"))
