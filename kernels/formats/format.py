"""The shape of a format: how a weight is packed, how an activation is quantized, their product, and all that others
ask of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import padded
from .planar import Planar


@dataclass(frozen=True)
class Codes:
    """How quantized activations lie in memory: qx [..., Kp] and its scales [..., groups].

    name         of the arithmetic, as kernels know it: "int8", "int4", "fp4"
    dtype        of qx; scale_dtype: of ascales
    block        K is padded to whole blocks of so many channels
    by_block     each block has a scale of its own; if not, a whole row has one
    two_a_byte   neighbours share a byte, and qx is [..., Kp/2]
    unsigned     there are codes for inputs shifted to be non-negative
    rotates      the input may be rotated before it is rounded (rotation.py), where K is whole blocks of it
    in_fp8       sm_90 kernels write and read them as e4m3, which holds them exactly
    peak         where the largest magnitude of an input should lie, half of it at least, for its scales to be neither
                 too large for scale_dtype nor too small; None: anywhere
    """

    name: str
    dtype: torch.dtype
    scale_dtype: torch.dtype
    block: int
    by_block: bool
    two_a_byte: bool = False
    unsigned: bool = False
    rotates: bool = False
    in_fp8: bool = False
    peak: float | None = None

    def empty(self, like: Tensor, lead: torch.Size, k: int, fp8: bool = False) -> tuple[Tensor, Tensor]:
        """Memory for qx and ascales of inputs [*lead, k], on the device of `like`.

        fp8  qx is float8_e4m3fn, and ascales [rows, groups] the transposed view of rows that are a multiple of 4 apart
        """
        kp = padded(k, self.block)
        groups = kp // self.block if self.by_block else 1
        if fp8:
            rows = lead.numel()
            by_block = like.new_empty(groups, padded(rows, 4), dtype=self.scale_dtype)
            return like.new_empty(*lead, kp, dtype=torch.float8_e4m3fn), by_block[:, :rows].t()
        qx = like.new_empty(*lead, kp // 2 if self.two_a_byte else kp, dtype=self.dtype)
        return qx, like.new_empty(*lead, groups, dtype=self.scale_dtype)


@dataclass(frozen=True)
class Grid:
    """The values that a packed weight can take while its scales stay as they are.

    steps    (*tensors) -> what the codes of a group are decoded with, [N, G] fp32 each: a scale, or scale and zero
    nearest  (v, *steps) -> the nearest value to each of v that has a code
    encode   (values [N, K], all of them such values, *tensors) -> the tensors with these values' codes
    """

    steps: Callable[..., tuple[Tensor, ...]]
    nearest: Callable[..., Tensor]
    encode: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Format:
    """One precision. The functions are pure, run on CPU and CUDA, and their module states every tensor.

    name                 as in Config(precision=...) and in files; summary: what it is, in a few words
    fields               names of the tensors `quantize_weight` returns, in order; also their names in a file
    quantize_weight      (w [N, K] fp32, importance [K] or None) -> the tensors named by `fields`
    dequantize_weight    (*tensors) -> [N, Kp] fp32, Kp >= K
    matmul               (qx, ascales, *tensors) -> [..., N] fp32; without quantize_activation (x, *tensors)
    group_size           input channels that share a scale of the weight; None: a whole row
    codes                of activations; None: they stay 16-bit
    quantize_activation  (x [..., K] fp32, already smoothed) -> (qx, ascales); takes `unsigned=True` if its codes do
    dequantize_activation  (qx, ascales) -> [..., Kp] fp32, its inverse but for rounding
    planar               the order of its tensors that kernels want; None: the plain one
    grid                 of a weight whose scales are known, for rounding with feedback; None: it gains nothing by that
                         (w8a8 has many steps, int4 and nvfp4 lose more by their 4-bit activations)
    rounding             the arithmetic of portable/round_weight.py that packs a weight; None: only quantize_weight does
    siblings             linears of one input can be one product: every tensor has a dimension that counts features
    tiles                its GEMM kernels load what an epilogue reads beside the result in tiles
    """

    name: str
    summary: str
    fields: tuple[str, ...]
    quantize_weight: Callable[..., tuple[Tensor, ...]]
    dequantize_weight: Callable[..., Tensor]
    matmul: Callable[..., Tensor]
    group_size: int | None = None
    codes: Codes | None = None
    quantize_activation: Callable[..., tuple[Tensor, Tensor]] | None = None
    dequantize_activation: Callable[..., Tensor] | None = None
    planar: Planar | None = None
    grid: Grid | None = None
    rounding: str | None = None
    siblings: bool = False
    tiles: bool = False
