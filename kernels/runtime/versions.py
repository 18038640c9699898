"""What Gluon names differently from one Triton to the next, 3.6 to 3.9, under one name each."""

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core
from typing_extensions import dataclass_transform

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@dataclass_transform()
def aggregate(cls: type) -> Any:
    """Values under names, to be handed on as one within a kernel; made of its fields in their order."""

    def init(self: Any, *values: Any) -> None:
        for (name, kind), value in zip(cls.__annotations__.items(), values, strict=True):
            wrapped = kind is gl.constexpr and not isinstance(value, gl.constexpr)
            setattr(self, name, gl.constexpr(value) if wrapped else value)

    init.__triton_builtin__ = True  # type: ignore[attr-defined]  # as Triton marks its own: not part of the kernel
    cls.__init__ = init  # type: ignore[misc]  # Triton 3.6 makes none
    return core._aggregate(cls)
