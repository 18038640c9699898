"""What the svdq:: operators compute, in plain torch: the oracle for every kernel, on any device.

    y = Q_w(R) . Q_a((x + shift) / smooth) - offset  +  up (down x)  +  bias          (SVDQuant, arXiv 2411.05007)

Where the input is rotated, Q_a reads the rotated x / smooth, and Q_w holds R rotated alike.

Accumulation is int32 or fp32 throughout; only the low-rank activations and the result are rounded to 16 bits. Inputs
may have any strides, results are contiguous.
"""

import torch
from torch import Tensor

from ..kernels.formats import FORMATS, check_rotation
from ..kernels.formats.rotation import rotate as rotated


def quantize(
    x: Tensor, smooth: Tensor, down: Tensor, precision: str, shift: float, rotate: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K], smooth [K], down [R, K] -> qx, ascales (the format's) and down x [..., R] in down's dtype."""
    quantize_activation = FORMATS[precision].quantize_activation
    if quantize_activation is None:
        raise ValueError(f"{precision} does not quantize activations; use svdq::gemv")
    if rotate:
        check_rotation(precision, x.shape[-1], shift)
    x32 = x.float().contiguous()
    if shift:
        qx, ascales = quantize_activation((x32 + shift) / smooth, unsigned=True)
    else:
        smoothed = x32 / smooth
        qx, ascales = quantize_activation(rotated(smoothed) if rotate else smoothed)
    return qx, ascales, (x32 @ down.float().t()).to(down.dtype)


def gemm(
    qx: Tensor,
    ascales: Tensor,
    xd: Tensor,
    weight: list[Tensor],
    up: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """qx, ascales, xd from `quantize` -> y [..., N] in out_dtype. xd [..., r] holds this linear's own columns.

    Or those of s linears that lie side by side as one: with xd [..., s r] and up [N, r], each s-th part of the N
    features reads r columns of its own.
    """
    y = FORMATS[precision].matmul(qx, ascales, *weight)
    if offset is not None:
        y = y - offset
    y = y + low_rank(xd, up)
    return (y if bias is None else y + bias.float()).to(out_dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """q [B, H, S, D], k [B, G, T, D], v [B, G, T, E] -> y [B, H, S, E] in q's dtype, as `operands.Attention` says."""
    k, v = (t.float().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    products = q.float() @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if is_causal:
        products = products.masked_fill(torch.ones_like(products, dtype=torch.bool).triu(1), float("-inf"))
    return (products.softmax(-1) @ v).to(q.dtype)


def low_rank(xd: Tensor, up: Tensor) -> Tensor:
    """xd [..., s r], up [N, r] -> [..., N] fp32: what the branches of s linears side by side add."""
    rank = max(up.shape[1], 1)
    if xd.shape[-1] <= rank:
        return xd.float() @ up.float().t()
    columns = xd.float().split(rank, -1)
    if xd.shape[-1] % rank or up.shape[0] % len(columns):
        raise ValueError(f"xd has {xd.shape[-1]} columns, up is {tuple(up.shape)}: not so many equal parts")
    return torch.cat([x @ u.t() for x, u in zip(columns, up.float().chunk(len(columns)), strict=True)], -1)


def gemv(
    x: Tensor,
    xd: Tensor | None,
    weight: list[Tensor],
    up: Tensor | None,
    bias: Tensor | None,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """x [..., K] 16-bit, xd = down x [..., r] -> y [..., N] in out_dtype: 4-bit weights, activations as they are.

    xd and up are None where there is no low-rank branch.
    """
    y = FORMATS[precision].matmul(x.contiguous(), *weight)
    if xd is not None and up is not None:
        y = y + xd.float() @ up.float().t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


def row_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] -> variance (of the population), mean, and mean of squares, [..., 1] fp32 each."""
    variance, mean = torch.var_mean(x.float().contiguous(), dim=-1, correction=0, keepdim=True)
    return variance, mean, variance + mean.square()
