"""What torch's modes make of an operator that is called as such: within compiled code they are dealt with already, but
not in what somebody has traced (torch.jit.trace), nor where a quantized model runs eagerly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.library import Library
from torch.utils._pytree import tree_leaves

_AUTOCAST = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


def keep_from_autocast(library: Library, name: str) -> None:
    """An operator computes in the dtypes that it says: integer products in fp16 would overflow."""
    for key in _AUTOCAST:
        library.impl(name, partial(_without_autocast, _operator(library, name)), key)


def map_over_rows(library: Library, name: str, rows: int) -> None:
    """vmap of an operator whose first `rows` operands have any number of leading dimensions: it adds one."""
    torch.library.register_vmap(
        f"{library.ns}::{name}", partial(_over_rows, _operator(library, name), rows), lib=library
    )


def _operator(library: Library, name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, library.ns), name).default


def _without_autocast(operator: Callable[..., Any], *args: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
        return operator(*args)


def _over_rows(operator: Callable[..., Any], rows: int, info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    if any(dim is not None for dim in tree_leaves(in_dims[rows:])):
        raise RuntimeError(
            "torch.vmap goes over the inputs of a quantized layer, not over its bias or another weight: "
            "map the model in 16-bit, after svdq_compile.restore(model, state_dict)"
        )
    mapped = (_in_front(arg, dim, info.batch_size) for arg, dim in zip(args[:rows], in_dims, strict=False))
    result = operator(*mapped, *args[rows:])
    return result, (0,) * len(result) if isinstance(result, tuple) else 0


def _in_front(arg: Any, dim: int | None, size: int) -> Any:
    """An operand with the mapped dimension before the others."""
    if arg is None or dim is not None:
        return arg if arg is None else arg.movedim(dim, 0)
    return arg.expand(size, *arg.shape)
