"""TMA descriptors: which blocks of a tensor are copied, and how they lie in shared memory.

Layouts are one object each: `launch` knows a layout by its identity.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from ..formats.layout import GATE_STEP
from ..runtime.launcher import Descriptor

_ELEMENTS = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16,
             torch.float16: gl.float16}  # fmt: skip


@cache
def plain(bits: int) -> gl.NVMMASharedLayout:
    """No swizzle: read back as plain rows."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=bits, rank=2)


@cache
def swizzled(dtype: torch.dtype, rows: int, columns: int) -> gl.NVMMASharedLayout:
    """As `wgmma` reads a block [rows, columns]."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _ELEMENTS[dtype])


@cache
def _in_four(layout: gl.NVMMASharedLayout) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(layout.swizzle_byte_width, layout.element_bitwidth, rank=4)


def describe(tensor: Tensor, rows: int, columns: int, layout: gl.NVMMASharedLayout | None = None) -> Descriptor:
    """What TMA copies by blocks of [rows, columns]; layout: `swizzled` unless given."""
    layout = layout or swizzled(tensor.dtype, rows, columns)
    return Descriptor(tensor, tensor.shape, tensor.stride(), (rows, columns), layout)


def of_both_halves(whole: Descriptor, dim: int) -> Descriptor:
    """The same with features in dimension `dim`, copied from the two halves in turn (portable/gates.py)."""

    def replaced(sizes: tuple[int, ...], *three: int) -> tuple[int, ...]:
        return *sizes[:dim], *three, *sizes[dim + 1 :]

    n, stride, block = whole.shape[dim], whole.strides[dim], whole.block_shape[dim]
    return whole._replace(
        shape=replaced(whole.shape, n // (2 * GATE_STEP), 2, GATE_STEP),
        strides=replaced(whole.strides, GATE_STEP * stride, n // 2 * stride, stride),
        block_shape=replaced(whole.block_shape, block // (2 * GATE_STEP), 2, GATE_STEP),
        layout=_in_four(whole.layout),
    )
