"""The orders in which Nunchaku's files hold a linear, each as one formula that is read in both directions.

Its tensors lie as the registers of a warp load them, so the shapes in a file are nominal. An order here is the list of
what an element's place in memory counts, outermost first, and the same axes sorted into the matrix's rows and columns:

    n = 128 N + 16 a + 8 p + l                        row "N a p l"
    k = 64 K + 32 q + 8 m + e                         column "K q m e"
    code 8 (2 (2 (4 (8 (8 (Ks N + K) + a) + l) + m) + p) + q) + e      memory "N K a l m p q e", of Ks values of K

N and K, in capitals, are as many as there are; the other axes' sizes are in `_Order.sizes`.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .kernels.formats import nibbles

TILE = 128  # rows of a tile; what output and input channels are padded to


@dataclass(frozen=True)
class _Order:
    """How a matrix lies in memory. Axes are words; `sizes` has those whose size is fixed."""

    memory: str
    row: str
    column: str
    sizes: dict[str, int]

    def unpack(self, flat: Tensor, rows: int, columns: int) -> Tensor:
        """[rows * columns] as in a file -> [rows, columns]."""
        memory, matrix = self.memory.split(), [*self.row.split(), *self.column.split()]
        known = self._all_sizes(rows, columns)
        view = flat.reshape([known[axis] for axis in memory])
        return view.permute([memory.index(axis) for axis in matrix]).reshape(rows, columns)

    def pack(self, matrix: Tensor) -> Tensor:
        """[rows, columns] -> [rows * columns]; the inverse of `unpack`."""
        memory, axes = self.memory.split(), [*self.row.split(), *self.column.split()]
        known = self._all_sizes(*matrix.shape)
        view = matrix.reshape([known[axis] for axis in axes])
        return view.permute([axes.index(axis) for axis in memory]).reshape(-1)

    def _all_sizes(self, rows: int, columns: int) -> dict[str, int]:
        found = dict(self.sizes)
        for axes, size in ((self.row.split(), rows), (self.column.split(), columns)):
            outer = next(axis for axis in axes if axis not in self.sizes)
            step = prod(self.sizes[axis] for axis in axes if axis != outer)
            if size % step:
                raise ValueError(f"{size} rows or columns are no multiple of {step}")
            found[outer] = size // step
        return found


_CODES = _Order("N K a l m p q e", "N a p l", "K q m e", {"a": 8, "l": 8, "m": 4, "p": 2, "q": 2, "e": 8})
_SCALES = _Order("N G a c b d", "N a b c d", "G", {"a": 8, "b": 2, "c": 4, "d": 2})
_FP8_SCALES = _Order("N K l q s j", "N s q l", "K j", {"l": 8, "q": 4, "s": 4, "j": 4})
_DOWN = _Order("K R l m p q e", "R p l", "K q m e", {"l": 8, "m": 4, "p": 2, "q": 2, "e": 2})
_UP = _Order("N R l m p q e", "N p l", "R q m e", {"l": 8, "m": 4, "p": 2, "q": 2, "e": 2})
_AWQ_CODES = _Order("N K n h e j", "N n", "K h j e", {"n": 4, "h": 2, "e": 8, "j": 4})


def unpack_codes(qweight: Tensor) -> Tensor:
    """qweight [N, K/2] int8 of a 4-bit linear -> [N, K] uint8, the nibbles: two's complement, or e2m1 codes."""
    n, half = qweight.shape
    return _CODES.unpack(nibbles.unpack(qweight.contiguous().view(torch.uint8).reshape(-1)), n, 2 * half)


def pack_codes(codes: Tensor) -> Tensor:
    """[N, K] uint8, 0..15 -> [N, K/2] int8; the inverse of `unpack_codes`."""
    n, k = codes.shape
    return nibbles.pack(_CODES.pack(codes)).view(torch.int8).reshape(n, k // 2)


def unpack_scales(wscales: Tensor) -> Tensor:
    """wscales of an int4 linear, nominally [K/64, N] -> [N, K/64]."""
    groups, n = wscales.shape
    return _SCALES.unpack(wscales.reshape(-1), n, groups)


def pack_scales(scales: Tensor) -> Tensor:
    """[N, K/64] -> nominally [K/64, N]; the inverse of `unpack_scales`."""
    return _SCALES.pack(scales).reshape(scales.shape[1], scales.shape[0])


def unpack_vector(vector: Tensor) -> Tensor:
    """A bias, smoothing factors or scales of channels [N], in the order of one group of scales -> [N]."""
    return unpack_scales(vector[None]).squeeze(1)


def pack_vector(vector: Tensor) -> Tensor:
    """The inverse of `unpack_vector`."""
    return pack_scales(vector[:, None]).squeeze(0)


def unpack_fp8_scales(wscales: Tensor) -> Tensor:
    """wscales of an nvfp4 linear, float8_e4m3fn, nominally [K/16, N] -> [N, K/16]."""
    groups, n = wscales.shape
    return _FP8_SCALES.unpack(wscales.contiguous().view(torch.uint8).reshape(-1), n, groups).view(wscales.dtype)


def pack_fp8_scales(scales: Tensor) -> Tensor:
    """[N, K/16] -> nominally [K/16, N]; the inverse of `unpack_fp8_scales`."""
    n, groups = scales.shape
    return _FP8_SCALES.pack(scales.contiguous().view(torch.uint8)).view(scales.dtype).reshape(groups, n)


def unpack_down(down: Tensor) -> Tensor:
    """The low-rank branch's first matrix, nominally [K, r] -> [r, K]."""
    k, rank = down.shape
    return _DOWN.unpack(down.reshape(-1), rank, k)


def pack_down(down: Tensor) -> Tensor:
    """[r, K] -> nominally [K, r]; the inverse of `unpack_down`."""
    return _DOWN.pack(down).reshape(down.shape[1], down.shape[0])


def unpack_up(up: Tensor) -> Tensor:
    """The low-rank branch's second matrix, nominally [N, r] -> [N, r]."""
    return _UP.unpack(up.reshape(-1), *up.shape)


def pack_up(up: Tensor) -> Tensor:
    """The inverse of `unpack_up`."""
    return _UP.pack(up).reshape(up.shape)


def unpack_awq_codes(qweight: Tensor) -> Tensor:
    """qweight of a weight-only linear, int32, nominally [N/4, K/2] -> [N, K] uint8, 0..15."""
    quarter, half = qweight.shape
    codes = nibbles.unpack(qweight.contiguous().view(torch.uint8).reshape(-1))
    return _AWQ_CODES.unpack(codes, 4 * quarter, 2 * half)


def pack_awq_codes(codes: Tensor) -> Tensor:
    """[N, K] uint8, 0..15 -> int32, nominally [N/4, K/2]; the inverse of `unpack_awq_codes`."""
    n, k = codes.shape
    return nibbles.pack(_AWQ_CODES.pack(codes)).view(torch.int32).reshape(n // 4, k // 2)


def deinterleave(rows: Tensor, chunks: int) -> Tensor:
    """Rows that a file holds chunk by chunk within each channel, [d * chunks, ...] -> chunk after chunk."""
    return rows.unflatten(0, (-1, chunks)).transpose(0, 1).flatten(0, 1)


def interleave(rows: Tensor, chunks: int) -> Tensor:
    """The inverse of `deinterleave`."""
    return rows.unflatten(0, (chunks, -1)).transpose(0, 1).flatten(0, 1)
