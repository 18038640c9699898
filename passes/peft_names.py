"""PEFT's names: what a layer is called once adapters are around it.

blocks.0.to_q                  before: the layer
blocks.0.to_q                  after: PEFT's module that stands around it
blocks.0.to_q.base_layer       the layer
blocks.0.to_q.lora_A.style     one of PEFT's own, as lora_B, lora_embedding_A, lora_magnitude_vector, ...
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from torch import nn

_LAYER, _OWN = "base_layer", "lora_"


def is_adapter(name: str) -> bool:
    """Whether a layer is one of PEFT's own: "blocks.0.to_q.lora_A.style"."""
    return f".{_OWN}" in f".{name}"


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module's class is one of PEFT's own."""
    return type(module).__module__.startswith("peft.")


def without_wrapper(name: str) -> str:
    """The name a layer had before PEFT put adapters around it: "blocks.0.to_q.base_layer" -> "blocks.0.to_q"."""
    return name.removesuffix(f".{_LAYER}")


def wrapped_layer(module: nn.Module) -> nn.Module:
    """The layer that a module of PEFT's stands around; any other module is its own."""
    return getattr(module, _LAYER, module)


def without_adapters(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Of a model's named parameters or buffers, those it would have without PEFT, by the names they would have."""
    named, layer = list(named), f".{_LAYER}."
    wrapped = {name.partition(layer)[0] for name, _ in named if layer in name}
    for name, value in named:
        if layer in name:
            yield name.replace(layer, "."), value
        elif wrapped.isdisjoint(accumulate(name.split("."), "{}.{}".format)):
            yield name, value
