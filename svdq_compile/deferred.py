"""Tensors that are still in their files, and stay there until each is needed."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .lowering.torch_private import plainly

_WRITES = re.compile(r"[a-z]\w*_|__setitem__|__i(add|sub|mul|truediv)__")


class Deferred(Tensor):
    """A tensor without memory, which tells its shape and dtype and is made by `now`.

    What torch makes of it is deferred too: diffusers' converters, which rename, cut and join the tensors of a
    checkpoint, run on these, and what they do to a tensor is done when it is read. TypeError where one would write to a
    tensor, or read its values.
    """

    _make: Callable[[], Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> "Deferred":
        return _deferred(torch.empty(shape, dtype=dtype, device="meta"), make)

    def now(self) -> Tensor:
        """The tensor, made anew at each call."""
        return self._make()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _WRITES.fullmatch(func.__name__):
            raise TypeError(f"{func.__name__} writes to a tensor that was not read yet")
        result = plainly(func, *args, **kwargs)
        results, structure = tree_flatten(result)
        if isinstance(result, Deferred) or not any(isinstance(one, Tensor) for one in results):
            return result

        def make(place: int) -> Tensor:
            return tree_flatten(func(*tree_map(_now, args), **tree_map(_now, kwargs)))[0][place]

        return tree_unflatten([_deferred(one, partial(make, i)) for i, one in enumerate(results)], structure)


def _deferred(meta: Tensor, make: Callable[[], Tensor]) -> Deferred:
    deferred = meta.as_subclass(Deferred)
    deferred._make = make
    return deferred


def _now(value: Any) -> Any:
    return value.now() if isinstance(value, Deferred) else value
