"""What a 16-bit model reads and gives while it draws, to be held against its 4-bit form: the same inputs, for the whole
model and for each linear.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .input_statistics import thinned
from .layers import layers
from .parameter import QuantizedWeight
from .replacing import replacing
from .similarity import relative_error
from .thinning import Thinned

ROWS_PER_CALL, MAX_ROWS = 8, 128  # of each linear's input
MAX_BYTES = 2**30  # of the calls that are kept, evenly over all; one is in any case
Call = tuple[tuple, dict[str, Any], Tensor]
_PRODUCTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Recorded:
    """Of some pictures that a model has drawn.

    calls   of the whole model, or some of them, evenly: its arguments, by position and by name, and the tensor it gave
    layers  by name: rows that a linear has read, [S, K], of a convolution [S, K, 1, ...]; and what it made of them
            without its bias
    """

    calls: list[Call]
    layers: dict[str, tuple[Tensor, Tensor]]

    def save(self, path: Path) -> None:
        with replacing(path) as temporary:
            torch.save({"calls": self.calls, "layers": self.layers}, temporary)

    @staticmethod
    def load(path: Path) -> "Recorded":
        return Recorded(**torch.load(path, weights_only=True, mmap=True))


def record(model: nn.Module, draw: Callable[[], Any]) -> Recorded:
    """Run `draw` and remember what the model reads. A call with arguments that are no tensors or plain values, or
    without a tensor as its result, is not kept.
    """
    calls = Thinned[Call](lambda kept: _nbytes(kept) > MAX_BYTES)
    rows: dict[str, list[Tensor]] = {}

    def called(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = _first_tensor(output)
        if _is_plain((args, kwargs)) and given is not None:
            calls.add(lambda: (*_shared(_on_host((args, kwargs)), calls.kept[-2:]), _on_host(given)))

    linears = dict(_linears(model))
    with ExitStack() as hooks, torch.no_grad():
        hooks.callback(model.register_forward_hook(called, with_kwargs=True).remove)
        for name, module in linears.items():
            hooks.callback(module.register_forward_pre_hook(_watching(rows.setdefault(name, []))).remove)
        draw()
        seen = {name: thinned(torch.cat(own), MAX_ROWS) for name, own in rows.items() if own}
        return Recorded(calls.kept, {name: (x, _product(linears[name], x)) for name, x in seen.items()})


def call_error(model: nn.Module, call: Call, device: torch.device) -> tuple[float | None, float]:
    """The timestep that a call was for, None where that is not told; and the relative error of what the model gives
    now, of inputs on this device.
    """
    args, kwargs, expected = call
    with torch.no_grad():
        args, kwargs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        actual = _first_tensor(model(*args, **kwargs))
    assert actual is not None, "it gave one when the call was recorded"
    return _timestep(model, args, kwargs), relative_error(actual.cpu(), expected)


def _timestep(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> float | None:
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments.get("timestep")
    if isinstance(given, Tensor):
        given = given.flatten()[0].item() if given.numel() else None
    return None if given is None else float(given)


def layer_errors(model: nn.Module, recorded: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The relative output error of each linear that is quantized now, by name. recorded: as in Recorded.layers"""
    with torch.no_grad():
        return {
            name: relative_error(_product(module, recorded[name][0]), recorded[name][1])
            for name, module in _linears(model)
            if name in recorded and isinstance(module.weight, QuantizedWeight)
        }


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that may be quantized, or are."""
    names = {id(layer.weight): layer.name for layer in layers(model) if layer.is_linear and layer.reason is None}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            name = names.pop(id(module.weight), None)
            if name is not None:
                yield name, module


def _watching(rows: list[Tensor]) -> Callable[[nn.Module, tuple], None]:
    """A hook that keeps a few rows of each call."""

    def watch(module: nn.Module, args: tuple) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        spatial = _spatial(module)
        x = args[0].detach().movedim(-1 - spatial, -1)
        rows.append(thinned(x.reshape(-1, x.shape[-1]), ROWS_PER_CALL).cpu().reshape(-1, x.shape[-1], *[1] * spatial))
        if len(rows) > 2 * MAX_ROWS // ROWS_PER_CALL:
            rows[:] = [thinned(torch.cat(rows), MAX_ROWS)]

    return watch


def _spatial(module: nn.Module) -> int:
    """How many dimensions of its input lie behind the channels: of a linear none."""
    return len(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0


def _product(module: nn.Module, x: Tensor) -> Tensor:
    """A linear of rows without its bias, in 16 bits or in 4; on the host."""
    weight = module.get_parameter("weight")
    return _PRODUCTS[_spatial(module)](x.to(weight.device, weight.dtype), weight).cpu()


def _first_tensor(output: Any) -> Tensor | None:
    return next((leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)), None)


def _is_plain(values: Any) -> bool:
    return all(isinstance(leaf, Tensor | str | bool | int | float | None) for leaf in tree_flatten(values)[0])


def _on_host(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf, values)


def _shared(values: Any, before: Any) -> Any:
    """The same values, with the tensors of earlier calls where they are equal: a text is the same at each step, with
    guidance at every second call.
    """
    leaves, structure = tree_flatten(values)
    earlier: Iterable[Any] = tree_flatten(before)[0]

    def same(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return next((old for old in earlier if isinstance(old, Tensor) and _is_same(old, leaf)), leaf)

    return tree_unflatten([same(leaf) for leaf in leaves], structure)


def _nbytes(calls: list[Call]) -> int:
    return sum({id(leaf): leaf.nbytes for leaf in tree_flatten(calls)[0] if isinstance(leaf, Tensor)}.values())


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
