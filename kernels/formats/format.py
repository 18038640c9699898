"""The shape of a 4-bit format: how a weight is packed, how an activation is quantized, and their product."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Format:
    """One precision. The functions are pure, run on CPU and CUDA, and their module states every tensor.

    fields               names of the tensors `quantize_weight` returns, in order; also their names in a file
    quantize_weight      (w [N, K] fp32, importance [K] or None) -> the tensors named by `fields`
    dequantize_weight    (*tensors) -> [N, Kp] fp32, Kp >= K
    quantize_activation  (x [..., K] fp32, already smoothed) -> (qx, ascales); None: activations stay 16-bit
    dequantize_activation  (qx, ascales) -> [..., Kp] fp32, its inverse but for rounding; None without it
    matmul               (qx, ascales, *tensors) -> [..., N] fp32; without quantize_activation (x, *tensors)
    group_size           input channels that share a scale
    unsigned             quantize_activation takes `unsigned=True` for inputs shifted to be non-negative
    """

    name: str
    fields: tuple[str, ...]
    quantize_weight: Callable[..., tuple[Tensor, ...]]
    dequantize_weight: Callable[..., Tensor]
    matmul: Callable[..., Tensor]
    group_size: int
    quantize_activation: Callable[..., tuple[Tensor, Tensor]] | None = None
    dequantize_activation: Callable[..., Tensor] | None = None
    unsigned: bool = False
