"""TMA descriptors: which blocks of a tensor are copied, and how they lie in shared memory.

Layouts are one object each: `launch` knows a layout by its identity.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

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


def describe(tensor: Tensor, rows: int, columns: int, layout: gl.NVMMASharedLayout | None = None) -> Descriptor:
    """What TMA copies by blocks of [rows, columns]; layout: `swizzled` unless given."""
    layout = layout or swizzled(tensor.dtype, rows, columns)
    return Descriptor(tensor, tensor.shape, tensor.stride(), (rows, columns), layout)
