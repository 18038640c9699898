"""int8 weights with one scale an output channel, int8 activations with one scale a token: little is lost, for layers
that 4 bits harm, and to see what 4 bits cost.

    y = (qx @ qweight^T) * ascales * wscales

    qweight  [N, Kp]      int8   -127..127; Kp = K rounded up to a multiple of 64, as in qx
    wscales  [N]          fp32
    qx       [..., Kp]    int8   w4a8's
    ascales  [..., 1]     fp32
"""

from torch import Tensor

from .format import Format
from .int8_matmul import int8_matmul
from .w4a8 import INT8, dequantize_activation, quantize_activation


def quantize_weight(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """w [N, K] fp32 -> (qweight, wscales). Rows are rounded as tokens are; with 255 steps clipping would gain nothing,
    so `importance` decides nothing.
    """
    qweight, wscales = quantize_activation(w)
    return qweight, wscales.squeeze(-1)


def dequantize_weight(qweight: Tensor, wscales: Tensor) -> Tensor:
    """[N, Kp] fp32."""
    return dequantize_activation(qweight, wscales.unsqueeze(-1))


def matmul(qx: Tensor, ascales: Tensor, qweight: Tensor, wscales: Tensor) -> Tensor:
    """[..., N] fp32: the exact integer product, scaled."""
    acc = int8_matmul(qx.reshape(-1, qx.shape[-1]), qweight).float()
    return acc.view(*qx.shape[:-1], qweight.shape[0]) * ascales * wscales


W8A8 = Format(
    name="w8a8",
    summary="int8 weights and activations",
    fields=("qweight", "wscales"),
    quantize_weight=quantize_weight,
    dequantize_weight=dequantize_weight,
    matmul=matmul,
    codes=INT8,
    quantize_activation=quantize_activation,
    dequantize_activation=dequantize_activation,
    siblings=True,
)
