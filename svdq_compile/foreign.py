"""Weights that another library keeps in a form of its own, or puts back at each call: they stay as they are.

A Parameter of another class than torch's own is a quantized one (torchao, bitsandbytes, GGUF) or a piece of one
(DTensor): its values are no plain matrix, and its class would be lost. diffusers' group offloading writes the 16-bit
values back at each call where it goes through a file or a stream, and has no values in between.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .parameter import QuantizedWeight

OFFLOADED = (
    "group offloading puts its 16-bit values back at each call: quantize before it is enabled, and leave out "
    "offload_to_disk_path and use_stream"
)


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
    """What the hooks of diffusers' group offloading keep elsewhere: on disk, or in a copy for a stream."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    for group in (getattr(hook, "group", None) for hook in hooks.values()):
        yield from getattr(group, "tensor_to_key", ())
        yield from getattr(group, "cpu_param_dict", ())
