"""A weight whose values live in 4-bit form: safe in every hand.

Quantizing changes the class of the model's own Parameter, in place. Everything that refers to the Parameter (modules,
state dicts being built, optimizers, adapters) goes on referring to the same object, torch.compile sees another type
and traces again, and every use of the missing 16-bit values passes through `__torch_function__` below, which does one
of five things:

    describe   shape, dtype, device and the like are what they were. detach() and .data give the weight itself, as those
               who load adapters take state dicts and .data of every layer to see shapes; a use of what they got comes
               here again
    move       .to(device), .cuda(), .cpu() move the packed tensors
    multiply   a linear, or a convolution over channels alone, gives its 4-bit result (eager.py), unless the values are
               there and were written to since
    thaw       turn back into a plain Parameter first: when all values are about to be overwritten (load_state_dict), or
               when the originals are still there (weights="keep", "offload")
    refuse     raise WeightsReleased, which names the remedy
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import eager
from .errors import ExportRefused, WeightsReleased
from .lowering.packed import PackedLinear
from .lowering.torch_private import data_property_calls, refuse_export, shell, traced_for_torch_itself

_DATA_GET, _DATA_SET = data_property_calls()

# What tells about a tensor without reading its values.
_DESCRIBE = frozenset(
    (
        "_has_compatible_shallow_copy_type",
        "__hash__",
        "__len__",
        "_is_view",
        "_is_zerotensor",
        "_typed_storage",
        "dim",
        "element_size",
        "get_device",
        "is_complex",
        "is_conj",
        "is_contiguous",
        "is_floating_point",
        "is_inference",
        "is_neg",
        "is_same_size",
        "is_signed",
        "nelement",
        "ndimension",
        "numel",
        "requires_grad_",
        "size",
        "storage_offset",
        "storage_type",
        "stride",
        "untyped_storage",
    )
)
# Properties that hand out the values.
_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag")
_MOVES = frozenset(("to", "cuda", "cpu"))


class QuantizedWeight(nn.Parameter):
    """A Parameter that was quantized. Made by `freeze`, never by calling the class."""

    _svdq: PackedLinear
    _svdq_name: str
    _svdq_original: Tensor | None  # the CPU copy of weights="offload"
    _svdq_version: int | None  # of the kept values when they were packed, weights="keep"
    _svdq_error: float

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            # A compiled graph may hold it: the backend replaces the linear that reads it, or refuses. A backend that
            # does not know of it gets the operators, or kept values, to which somebody may write later.
            call = eager.linear_call(func, args, kwargs)
            if (
                call is not None
                and isinstance(call.weight, QuantizedWeight)
                and not is_kept(call.weight)
                and traced_for_torch_itself()
            ):
                return eager.run(call, call.weight._svdq)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _use(func, args, kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            packed = self._svdq
            return (
                f"QuantizedWeight({self._svdq_name!r}, shape={list(self.shape)}, precision={packed.precision!r}, "
                f"rank={packed.rank}, device={str(packed.device)!r})"
            )

    def __deepcopy__(self, memo: dict) -> "QuantizedWeight":
        """A second weight with the same packed tensors, which nothing ever writes to."""
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                twin = nn.Parameter(self.data.clone() if is_kept(self) else _shell_of(self), self.requires_grad)
            memo[id(self)] = become_quantized(
                twin, self._svdq, self._svdq_name, self._svdq_error, self._svdq_original, is_kept(self)
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if is_kept(self) or self._svdq_original is not None:
            with torch._C.DisableTorchFunctionSubclass():
                return nn.Parameter(originals(self), self.requires_grad).__reduce_ex__(protocol)
        raise WeightsReleased(self._svdq_name, "pickling (torch.save, multiprocessing)")


def packed(weight: Tensor) -> PackedLinear:
    """The 4-bit form of a quantized weight: its tensors, and `dequantize` back to a matrix. TypeError for another."""
    if not isinstance(weight, QuantizedWeight):
        raise TypeError("this weight is not quantized: svdq_compile.report(model) says which are, and why others not")
    return weight._svdq


def is_kept(weight: QuantizedWeight) -> bool:
    """Whether the 16-bit values are still in place (weights="keep")."""
    return weight._svdq_version is not None


def is_stale(weight: QuantizedWeight) -> bool:
    """Whether kept values were written to since they were packed."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight._version != weight._svdq_version


def freeze(parameter: nn.Parameter, packed: PackedLinear, name: str, error: float, weights: str) -> None:
    """Turn a plain Parameter into a QuantizedWeight, in place.

    weights  "release": give the memory back. "offload": the same, after a copy to the CPU. "keep": leave the values.
    The memory goes back when nothing else refers to it: a state dict taken earlier, or another Parameter with the same
    storage, keeps its values.
    """
    original = parameter.detach().cpu().clone() if weights == "offload" else None
    if weights != "keep":
        parameter.data = shell(parameter.shape, parameter.stride(), parameter.dtype, packed.device)
    become_quantized(parameter, packed, name, error, original, weights == "keep")


def become_quantized(
    parameter: nn.Parameter,
    packed: PackedLinear,
    name: str,
    error: float,
    original: Tensor | None = None,
    keep: bool = False,
) -> QuantizedWeight:
    """Change the class of a Parameter whose memory is already what it should be; `freeze` sees to that."""
    refuse_export(_check_export)
    version = parameter._version if keep else None
    parameter.__class__ = QuantizedWeight
    assert isinstance(parameter, QuantizedWeight)
    parameter._svdq, parameter._svdq_name, parameter._svdq_error = packed, name, error
    parameter._svdq_original, parameter._svdq_version = original, version
    return parameter


def _check_export(model: nn.Module) -> None:
    for weight in model.parameters():
        if isinstance(weight, QuantizedWeight):
            raise ExportRefused(weight._svdq_name)


def originals(weight: QuantizedWeight) -> Tensor:
    """The 16-bit values: the kept ones, or the CPU copy. Raises WeightsReleased where there are none."""
    if is_kept(weight):
        with torch._C.DisableTorchFunctionSubclass():
            return weight.data
    if weight._svdq_original is None:
        raise WeightsReleased(weight._svdq_name, "restoring")
    return weight._svdq_original


def thaw(weight: QuantizedWeight, values: Tensor | None = None) -> nn.Parameter:
    """Turn back into a plain Parameter, in place, on the device where the packed tensors are.

    values  the 16-bit values to take; by default `originals`
    """
    if values is None or isinstance(values, QuantizedWeight):
        values = originals(weight if values is None else values)
    device, dtype = weight._svdq.device, weight.dtype
    for name in ("_svdq", "_svdq_name", "_svdq_error", "_svdq_original", "_svdq_version"):
        delattr(weight, name)
    weight.__class__ = nn.Parameter  # type: ignore[assignment]
    # A copy, or the Parameter would write into the offloaded original or into the caller's tensor.
    weight.data = values.detach().to(device, dtype, copy=True)
    return weight


def _shell_of(weight: Tensor, device: torch.device | None = None) -> Tensor:
    return shell(weight.shape, weight.stride(), weight.dtype, device or weight.device)


def _use(func: Callable, args: tuple, kwargs: dict) -> Any:
    """One eager use of a quantized weight: describe, move, thaw or refuse."""
    name = getattr(func, "__name__", str(func))
    first = args[0] if args else None
    with torch._C.DisableTorchFunctionSubclass():
        if name in _DESCRIBE or (name == "__get__" and not _reads_values(func)):
            return func(*args, **kwargs)
        if isinstance(first, QuantizedWeight):
            if func == _DATA_SET and isinstance(args[1], QuantizedWeight):
                return _take_over(first, args[1])
            if name == "__set__" and func != _DATA_SET:  # requires_grad, grad
                return func(*args, **kwargs)
            if not is_kept(first) and name in _MOVES:
                return _moved(func, args, kwargs)
            if name == "detach" or func == _DATA_GET:
                # Of kept values an alias that shares their version, as that of .data would not.
                return first.detach() if is_kept(first) else first
            if func == _DATA_SET or name == "copy_":
                return _overwrite(first, func, args, kwargs)
        call = eager.linear_call(func, args, kwargs)
        if call is not None and _multiplies(call):
            eager.advise()
            return eager.run(call, call.weight._svdq)  # type: ignore[attr-defined]
        for weight in _quantized(args, kwargs):
            if not is_kept(weight):
                if weight._svdq_original is None:
                    raise WeightsReleased(weight._svdq_name, _describe_use(func, name))
                thaw(weight)
            elif _can_write(name):
                thaw(weight)
        # A write through .data records no gradients, and .data was the weight itself.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not _can_write(name)):
            return func(*args, **kwargs)


def _multiplies(call: eager.LinearCall) -> bool:
    """Whether a linear takes the 4-bit form: of its weight alone, and not if kept values were written to since."""
    weight = call.weight
    if not isinstance(weight, QuantizedWeight) or isinstance(call.input, QuantizedWeight):
        return False
    return not (is_kept(weight) and is_stale(weight))


def _reads_values(func: Callable) -> bool:
    return getattr(getattr(func, "__self__", None), "__name__", "") in _VALUES


def _can_write(name: str) -> bool:
    """In-place methods; `w += 1` comes here as add_."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _describe_use(func: Callable, name: str) -> str:
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"reading .{owner}" if name == "__get__" else f"{name}()"


def _quantized(args: tuple, kwargs: dict) -> list[QuantizedWeight]:
    found: list[QuantizedWeight] = []
    for value in (*args, *kwargs.values()):
        nested = value if isinstance(value, tuple | list) else (value,)
        found += [v for v in nested if isinstance(v, QuantizedWeight)]
    return found


def _moved(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """.to(...), .cuda(), .cpu(): a new weight where the call asks for; the dtype must stay."""
    weight = args[0]
    probe = func(torch.empty(0, dtype=weight.dtype, device=weight.device), *args[1:], **kwargs)
    if probe.dtype != weight.dtype:
        if weight._svdq_original is None:
            raise WeightsReleased(weight._svdq_name, f"casting from {weight.dtype} to {probe.dtype}")
        return func(thaw(weight), *args[1:], **kwargs)
    if probe.device == weight.device:
        return weight
    if probe.device.type == "meta":
        return torch.empty_like(weight, device="meta")
    twin = nn.Parameter(_shell_of(weight, probe.device), weight.requires_grad)
    return become_quantized(
        twin, weight._svdq.to(probe.device), weight._svdq_name, weight._svdq_error, weight._svdq_original, False
    )


def _take_over(weight: QuantizedWeight, other: QuantizedWeight) -> None:
    """weight.data = other: what nn.Module.to does with the moved weight."""
    Tensor.data.__set__(weight, _shell_of(other) if not is_kept(other) else Tensor.data.__get__(other))  # type: ignore[attr-defined]
    weight._svdq, weight._svdq_error = other._svdq, other._svdq_error
    weight._svdq_original, weight._svdq_version = other._svdq_original, other._svdq_version


def _overwrite(weight: QuantizedWeight, func: Callable, args: tuple, kwargs: dict) -> Any:
    """copy_, weight.data = values: every value is written, so give the memory back and drop the 4-bit form first."""
    source = args[1] if len(args) > 1 else kwargs.pop("src", None)
    if source is weight:  # load_state_dict(state_dict())
        return weight
    if not isinstance(source, Tensor) or source.shape != weight.shape:
        expected = tuple(weight.shape)
        got = tuple(source.shape) if isinstance(source, Tensor) else source
        raise ValueError(f"{weight._svdq_name}: cannot copy {got} into a weight of shape {expected}")
    if isinstance(source, QuantizedWeight):
        source = originals(source)
    thaw(weight, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))
    return func(weight, source, *args[2:], **kwargs)
