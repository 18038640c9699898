"""What the operators read, a record each: from the graph's node to the kernel the same names in the same order.

In a graph the fields are nodes: `Gemm(*node.args)`, and `node.args = record._replace(bias=None)`. At run time they are
tensors, with any leading dimensions; `rows()` makes matrices of them for the kernels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor


def as_rows(t: Tensor) -> Tensor:
    """[..., C] -> [rows, C], a view wherever the leading dimensions are evenly spaced."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def as_lines(t: Tensor) -> Tensor:
    """`as_rows`, with the columns of a row side by side."""
    rows = as_rows(t)
    return rows if rows.stride(1) == 1 else rows.contiguous()


class Quantize(NamedTuple):
    """x [..., K] 16- or 32-bit, smooth [K] fp32, down [R, K] -> qx, ascales (the format's) and xd [..., R].

    shift   added to x before an unsigned code; 0 for signed ones
    rotate  what is rounded is rotated first (formats/rotation.py)
    """

    x: Any
    smooth: Any
    down: Any
    precision: str
    shift: float
    rotate: bool = False

    def rows(self) -> "Quantize":
        return self._replace(x=as_lines(self.x), down=self.down.contiguous())


class Gemm(NamedTuple):
    """qx, ascales and xd [..., s r] of `quantize`, the format's weight, up [N, r], bias and offset [N] or None
    -> y [..., N] in out_dtype. Of s linears side by side, each reads r columns of xd.
    """

    qx: Any
    ascales: Any
    xd: Any
    weight: Any
    up: Any
    bias: Any
    offset: Any
    precision: str
    out_dtype: Any

    def rows(self) -> "Gemm":
        qx, ascales, xd = map(as_rows, (self.qx, self.ascales, self.xd))
        return self._replace(qx=qx, ascales=ascales, xd=xd, weight=tuple(self.weight), up=self.up.contiguous())


class Gemv(NamedTuple):
    """x [..., K] 16- or 32-bit, xd [..., r] or None, the format's weight, up [N, r] or None, bias [N] or None
    -> y [..., N] in out_dtype.
    """

    x: Any
    xd: Any
    weight: Any
    up: Any
    bias: Any
    precision: str
    out_dtype: Any

    def rows(self) -> "Gemv":
        xd = None if self.xd is None else as_rows(self.xd)
        up = None if self.up is None else self.up.contiguous()
        return self._replace(x=as_rows(self.x).contiguous(), xd=xd, weight=tuple(self.weight), up=up)


class Attention(NamedTuple):
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, E] -> y [B, H, S, E]. Each head of k and v serves H / G of q's.

    is_causal  the s-th row of q reads the first s + 1 of k and v
    scale      of the products; None: D ** -0.5
    order      y's dimensions as they lie in memory, the outermost first, without gaps
    arithmetic "exact"; "fp8" or "int8" where a kernel may take q, k and v, or q and k, in these 8 bits
    """

    q: Any
    k: Any
    v: Any
    is_causal: bool
    scale: float | None
    order: list[int]
    arithmetic: str = "exact"

    def empty_result(self) -> Tensor:
        return empty_in_order(self.q, (*self.q.shape[:3], self.v.shape[3]), self.order)

    def in_order(self, y: Tensor) -> Tensor:
        """y, copied where its dimensions lie differently."""
        if y.stride() == _strides(y.shape, tuple(self.order)):
            return y
        return _turned_back(y.permute(self.order).contiguous(), self.order)


def empty_in_order(like: Tensor, shape: Sequence[int], order: list[int]) -> Tensor:
    """A tensor of this shape, of like's dtype and device, whose dimensions lie in this order, the outermost first."""
    return _turned_back(like.new_empty([shape[dim] for dim in order]), order)


def _turned_back(outermost_first: Tensor, order: list[int]) -> Tensor:
    return outermost_first.permute([order.index(dim) for dim in range(len(order))])


@lru_cache
def _strides(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor whose dimensions lie in this order, the outermost first, without gaps."""
    sizes = [shape[dim] for dim in order]
    return tuple(math.prod(sizes[order.index(dim) + 1 :]) for dim in range(len(shape)))
