"""A weight whose values live in 4-bit form: safe in every hand.

Quantizing changes the class of the model's own Parameter, in place. Everything that refers to the Parameter (modules,
state dicts being built, optimizers, adapters) goes on referring to the same object, torch.compile sees another type
and traces again, and every use of the missing 16-bit values passes through `__torch_function__` below, which does one
of five things:

    describe   shape, dtype, device and the like are what they were. detach() and .data give the weight itself, as those
               who load adapters take state dicts and .data of every layer to see shapes; a use of what they got comes
               here again
    move       .to(device), .cuda(), .cpu(), .pin_memory() move the packed tensors, .record_stream() is for them;
               .to(dtype), .half(), .float() and the like change the dtype that is told, and cast the 16-bit branch
    multiply   a linear, or a convolution over channels alone, gives its 4-bit result (eager.py), unless the values are
               there and were written to since; a weight that no linear reads is expanded for what multiplies it
    thaw       turn back into a plain Parameter first: when all values are about to be overwritten (load_state_dict), or
               when the originals are still there (weights="keep", "offload")
    refuse     raise WeightsReleased, which names the remedy

Whatever changes a weight builds all that is new first and then switches in an order in which each step leaves a weight
that computes right: an interruption (Ctrl-C) may come between any two. A QuantizedWeight always has its 4-bit form, and
a plain Parameter always its memory; memory that nobody reads, or a 4-bit form on a plain Parameter, may be left behind.
"""

import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import eager
from .errors import ExportRefused
from .lowering.packed import PackedLinear
from .lowering.torch_private import (
    data_property_calls,
    leave_to_python,
    plainly,
    refuse_export,
    shell,
    traced_for_torch_itself,
)
from .passes.expanded import PRODUCTS, STEPS
from .passes.linears import QUANTIZABLE_DTYPES
from .passes.subgraphs import FIRST_OPERAND
from .released import KEEP_A_COPY, RESTORE, SAVE, SOURCE, is_asked_by, refused

log = logging.getLogger("svdq_compile")

_DATA_GET, _DATA_SET = data_property_calls()

# What tells about a tensor without reading its values, or makes another of its shape.
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
        "empty_like",
        "full_like",
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
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "ndimension",
        "numel",
        "ones_like",
        "rand_like",
        "randn_like",
        "requires_grad_",
        "size",
        "storage_offset",
        "storage_type",
        "stride",
        "untyped_storage",
        "zeros_like",
    )
)
# Properties that hand out the values.
_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag")
_MOVES = frozenset(("to", "cuda", "cpu", "type", "bfloat16", "double", "float", "half"))
# Attributes of a QuantizedWeight that a plain Parameter has not.
_STATE = ("_svdq", "_svdq_name", "_svdq_error", "_svdq_original", "_svdq_version", "_svdq_calibrated", "_svdq_effect")


class QuantizedWeight(nn.Parameter):
    """A Parameter that was quantized. Made by `freezing`; calling the class, as those do who make another weight of the
    same class (accelerate), gives a quantized weight back, and makes a plain Parameter of other values.
    """

    _svdq: PackedLinear
    _svdq_name: str
    _svdq_original: Tensor | None  # the CPU copy of weights="offload"
    _svdq_version: int | None  # of the kept values when they were packed, weights="keep"
    _svdq_error: float
    _svdq_calibrated: bool | None  # whether its inputs were observed; None: an older file does not say
    _svdq_effect: float | None  # the error it makes in the model's output; None: not measured

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # type: ignore[misc]
        return data if isinstance(data, QuantizedWeight) else nn.Parameter(data, requires_grad)

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
            if traced_for_torch_itself():
                args, kwargs = _in_16_bit(func, (args, kwargs))
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in FIRST_OPERAND:  # a graph inside a graph, run eagerly: its linears come here one by one
            return args[0](*args[FIRST_OPERAND[func] :])
        return plainly(_use, func, args, kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        packed = self._svdq
        return (
            f"QuantizedWeight({self._svdq_name!r}, shape={list(self.shape)}, precision={packed.precision!r}, "
            f"rank={packed.rank}, device={str(packed.device)!r})"
        )

    def __deepcopy__(self, memo: dict) -> "QuantizedWeight":
        """A second weight with the same packed tensors, which nothing ever writes to."""
        if id(self) not in memo:
            values = _made_like(self, lambda: originals(self).clone() if is_kept(self) else _shell_of(self))
            twin = nn.Parameter(values, self.requires_grad)
            memo[id(self)] = become_quantized(
                twin,
                self._svdq,
                self._svdq_name,
                self._svdq_error,
                self._svdq_calibrated,
                self._svdq_original,
                is_kept(self),
                self._svdq_effect,
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if is_kept(self) or self._svdq_original is not None:
            return nn.Parameter(originals(self).to(self.dtype), self.requires_grad).__reduce_ex__(protocol)
        raise refused(self._svdq_name, "pickling (as to another process)", SAVE)


leave_to_python(QuantizedWeight.__torch_function__.__func__)  # type: ignore[attr-defined]


def has_quantized(model: nn.Module) -> bool:
    """Whether some weight of a model is quantized."""
    return any(isinstance(parameter, QuantizedWeight) for parameter in model.parameters())


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
    return weight._version != weight._svdq_version


def freezing(
    parameter: nn.Parameter,
    packed: PackedLinear,
    name: str,
    error: float,
    weights: str,
    calibrated: bool,
    effect: float | None = None,
) -> Callable[[], None]:
    """What turns a plain Parameter into a QuantizedWeight, in place. What needs memory is done at once, ahead of that.

    error, calibrated  how far it is from the original, and whether that was seen on observed inputs
    effect   the error that it makes in the model's output, if that was measured
    weights  "release": give the memory back. "offload": the same, after a copy to the CPU. "keep": leave the values.
    The memory goes back when nothing else refers to it: a state dict taken earlier, or another Parameter with the same
    storage, keeps its values.
    """
    original = parameter.detach().cpu().clone() if weights == "offload" else None
    empty = None if weights == "keep" else _made_like(parameter, lambda: _shell_of(parameter, packed.device))

    def freeze() -> None:
        become_quantized(parameter, packed, name, error, calibrated, original, weights == "keep", effect)
        if empty is not None:
            _set_data(parameter, empty)

    return freeze


def become_quantized(
    parameter: nn.Parameter,
    packed: PackedLinear,
    name: str,
    error: float,
    calibrated: bool | None,
    original: Tensor | None = None,
    keep: bool = False,
    effect: float | None = None,
) -> QuantizedWeight:
    """Change the class of a Parameter. Its memory, if it has any, is read by nobody from now on unless `keep`."""
    refuse_export(_check_export)
    version = parameter._version if keep else None
    parameter.__dict__.update(zip(_STATE, (packed, name, error, original, version, calibrated, effect), strict=True))
    parameter.__class__ = QuantizedWeight
    assert isinstance(parameter, QuantizedWeight)
    return parameter


def _check_export(use: str, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if isinstance(tensor, QuantizedWeight):
            raise ExportRefused(tensor._svdq_name, use)


def originals(weight: QuantizedWeight, use: str = "restoring", remedy: str = SOURCE) -> Tensor:
    """The 16-bit values: the kept ones, or the CPU copy. Raises WeightsReleased where there are none, with what they
    are for and the remedy.
    """
    if is_kept(weight):
        return plainly(_DATA_GET, weight)
    if weight._svdq_original is None:
        raise refused(weight._svdq_name, use, remedy)
    return weight._svdq_original


def thaw(weight: QuantizedWeight, values: Tensor | None = None) -> nn.Parameter:
    """Turn back into a plain Parameter, in place, on the device where the packed tensors are.

    values  the 16-bit values to take, or a weight whose `originals` to take; by default this one's
    """
    if is_kept(weight) and (values is None or values is weight):
        return _become_plain(weight, None)
    if values is None or isinstance(values, QuantizedWeight):
        values = originals(weight if values is None else values)
    source = values.detach()
    # A copy, or the Parameter would write into the offloaded original or into the caller's tensor.
    return _become_plain(weight, _made_like(weight, lambda: source.to(weight._svdq.device, weight.dtype, copy=True)))


def _become_plain(weight: QuantizedWeight, values: Tensor | None) -> nn.Parameter:
    """Change the class back. values: to take, as they are, instead of the kept ones"""
    if values is not None:
        weight._svdq_version = None  # from here on nobody reads what was kept
        _set_data(weight, values)
    weight.__class__ = nn.Parameter  # type: ignore[assignment]
    weight.__dict__ = {name: value for name, value in weight.__dict__.items() if name not in _STATE}
    return weight


def _set_data(weight: Tensor, data: Tensor) -> None:
    plainly(_DATA_SET, weight, data)


def _made_like(weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, made under inference_mode if the weight was, and else not, whoever asks: with data of the
    other kind a Parameter has no version, which torch's linear asks for.
    """
    # On one line: an interruption before the next would leave the mode on.
    with torch.inference_mode(weight.is_inference()): return make()  # noqa: E701  # fmt: skip


def _shell_of(weight: Tensor, device: torch.device | None = None) -> Tensor:
    return shell(weight.shape, weight.stride(), weight.dtype, device or weight.device)


def _use(func: Callable, args: tuple, kwargs: dict) -> Any:
    """One eager use of a quantized weight, called past __torch_function__: describe, move, multiply, thaw or refuse."""
    name = getattr(func, "__name__", str(func))
    first = args[0] if args else None
    if name in _DESCRIBE or (name == "__get__" and not _reads_values(func)):
        return func(*args, **kwargs)
    if isinstance(first, QuantizedWeight):
        if func == _DATA_SET and isinstance(args[1], QuantizedWeight):
            return _take_over(first, args[1])
        if name == "__set__" and func != _DATA_SET:  # requires_grad, grad
            return func(*args, **kwargs)
        if not is_kept(first) and name in _MOVES:
            return _moved(func, args, kwargs)
        if not is_kept(first) and name in _HOST:
            return _HOST[name](first, *args[1:], **kwargs)
        if not is_kept(first) and name == "data_ptr" and is_asked_by("accelerate"):
            return first._svdq.weight[0].data_ptr()  # to know tied ones by
        if not is_kept(first) and func == _DATA_GET and is_asked_by("diffusers", "group_offloading.py", "_to_cpu"):
            return _twin(first, first._svdq, first)  # to be kept while the weight moves
        if name == "detach" or func == _DATA_GET:
            # Of kept values an alias that shares their version, as that of .data would not.
            return first.detach() if is_kept(first) else first
        if func == _DATA_SET or name == "copy_":
            return _overwrite(first, func, args, kwargs)
    call = eager.linear_call(func, args, kwargs)
    if call is not None and _multiplies(call):
        eager.advise()
        return eager.run(call, call.weight._svdq)  # type: ignore[attr-defined]
    args, kwargs = _in_16_bit(func, (args, kwargs))
    for weight in _quantized(args, kwargs):
        if not is_kept(weight):
            if weight._svdq_original is None:
                raise refused(weight._svdq_name, _describe_use(func, name))
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


def _in_16_bit(func: Callable, operands: Any) -> Any:
    """The operands of a call, with weights expanded: for a product all, for a step on the way to one those that no
    linear reads.
    """
    name = getattr(func, "__name__", "")
    name = _property(func) if name == "__get__" else name
    if name not in PRODUCTS and name not in STEPS:
        return operands

    def expand(value: Any) -> Any:
        if not isinstance(value, QuantizedWeight):
            return value
        # A graph cannot see a later write to kept values, so it reads them.
        if is_kept(value) and (torch.compiler.is_dynamo_compiling() or is_stale(value)):
            return value
        if name not in PRODUCTS and not value._svdq.expanded:
            return value
        if not torch.compiler.is_compiling():
            eager.advise()
        return eager.expanded(value, value._svdq)

    return tree_map(expand, operands)


def _reads_values(func: Callable) -> bool:
    return _property(func) in _VALUES


def _property(func: Callable) -> str:
    """Which one a call of __get__ reads, as "T"."""
    return getattr(getattr(func, "__self__", None), "__name__", "")


def _can_write(name: str) -> bool:
    """In-place methods; `w += 1` comes here as add_."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _describe_use(func: Callable, name: str) -> str:
    return f"reading .{_property(func)}" if name == "__get__" else f"{name}()"


def _quantized(args: tuple, kwargs: dict) -> list[QuantizedWeight]:
    found: list[QuantizedWeight] = []
    for value in (*args, *kwargs.values()):
        nested = value if isinstance(value, tuple | list) else (value,)
        found += [v for v in nested if isinstance(v, QuantizedWeight)]
    return found


def _moved(func: Callable, args: tuple, kwargs: dict) -> Any:
    """.to(...), .cuda(), .half(), .type(...) and the like: a new weight where the call asks for another device, dtype
    or order of dimensions. Of a dtype that no linear computes in (fp8, in which weights may be stored between calls)
    the branch stays as it is.
    """
    weight = args[0]
    probe = func(torch.empty((0,) * weight.dim(), dtype=weight.dtype, device=weight.device), *args[1:], **kwargs)
    if not isinstance(probe, Tensor):  # the name of the type
        return probe
    if not probe.dtype.is_floating_point:
        raise refused(weight._svdq_name, f"casting from {weight.dtype} to {probe.dtype}", RESTORE)
    like: Tensor = weight
    order = kwargs.get("memory_format", torch.preserve_format)
    if probe.device.type == "meta" or probe.dtype != weight.dtype or order != torch.preserve_format:
        values = shell(weight.shape, weight.stride(), probe.dtype, torch.device("meta"))
        like = torch.empty_like(values, memory_format=order)
    if probe.device.type == "meta":
        return like
    # Where a move was interrupted the packed tensors are somewhere else than the weight says.
    here = weight.dtype, weight.stride(), weight.device, weight._svdq.device
    if (like.dtype, like.stride(), probe.device, probe.device) == here:
        return weight
    branch = like.dtype if like.dtype in QUANTIZABLE_DTYPES else weight._svdq.up.dtype
    return _twin(weight, weight._svdq.to(probe.device, branch, _non_blocking(args, kwargs)), like)


def _non_blocking(args: tuple, kwargs: dict) -> bool:
    """Of .to(), .cuda() and .type() the first truth value that is given by its place, or the one by this name."""
    return next((a for a in args[1:] if isinstance(a, bool)), kwargs.get("non_blocking", False))


def _twin(weight: QuantizedWeight, packed: PackedLinear, like: Tensor) -> QuantizedWeight:
    """A weight of the same values in another 4-bit form, of the dtype and strides of `like`."""
    twin = nn.Parameter(_shell_of(like, packed.device), weight.requires_grad)
    state = weight._svdq_name, weight._svdq_error, weight._svdq_calibrated, weight._svdq_original
    return become_quantized(twin, packed, *state, effect=weight._svdq_effect)


def _pinned(weight: QuantizedWeight) -> QuantizedWeight:
    return weight if weight._svdq.is_pinned() else _twin(weight, weight._svdq.pin_memory(), weight)


# What offloading does to a weight beside moving it.
_HOST: dict[str, Callable] = {
    "pin_memory": _pinned,
    "is_pinned": lambda weight: weight._svdq.is_pinned(),
    "record_stream": lambda weight, stream: weight._svdq.record_stream(stream),
}


def _take_over(weight: QuantizedWeight, other: QuantizedWeight) -> None:
    """weight.data = other: what nn.Module.to does with the moved weight."""
    state = {name: other.__dict__[name] for name in _STATE if name != "_svdq_name"}
    if is_kept(other):
        _set_data(weight, originals(other))
        weight.__dict__.update(state, _svdq_version=weight._version)
    else:
        empty = _shell_of(other)
        weight.__dict__.update(state)
        _set_data(weight, empty)


def _overwrite(weight: QuantizedWeight, func: Callable, args: tuple, kwargs: dict) -> Any:
    """copy_, weight.data = values: every value is written, so the 4-bit form goes."""
    source = args[1] if len(args) > 1 else kwargs.pop("src", None)
    if source is weight:  # load_state_dict(state_dict())
        return weight
    if not isinstance(source, Tensor) or source.shape != weight.shape:
        expected = tuple(weight.shape)
        got = tuple(source.shape) if isinstance(source, Tensor) else source
        raise ValueError(f"{weight._svdq_name}: cannot copy {got} into a weight of shape {expected}")
    if isinstance(source, QuantizedWeight):
        source = originals(source, "copying it into another weight", KEEP_A_COPY)
    if func == _DATA_SET:
        if is_kept(weight) and (source.dtype, source.device) != (weight.dtype, weight.device):
            _tell_of_kept()
        _become_plain(weight, source.detach())
        return None

    def copied() -> Tensor:
        values = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight._svdq.device)
        with torch.no_grad():
            return values.copy_(source, *args[2:], **kwargs)

    return _become_plain(weight, _made_like(weight, copied))


@cache
def _tell_of_kept() -> None:
    """Say once that what was quantized is so no more."""
    log.warning(
        "svdquant: casting or moving a model with weights='keep' turns its layers back to 16-bit: the kept values are "
        "what moves. A compiled model quantizes them again in its next calls, svdq_compile.quantize(model) at once"
    )
