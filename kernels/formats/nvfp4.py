"""NVFP4: e2m1 values in groups of 16 with e4m3 scales; weights have one more fp32 scale a tensor.

y[m, n] = wtscale * sum_g ascales[m, g] * wscales[n, g] * sum_{k in g} qx[m, k] * q[n, k]

qweight  [N, Kp/2]       uint8           e2m1 codes (sign in bit 3), two a byte; Kp = K rounded up to groups of 16
wscales  [N, Kp/16]      float8_e4m3fn
wtscale  []              fp32            of files from elsewhere also [N, 1], [1, Kp/16] or [N, Kp/16]
qx       [..., Kp/2]     uint8           e2m1 codes, two a byte
ascales  [..., Kp/16]    float8_e4m3fn   no scale above them; smoothing factors bring the input where e4m3 is exact
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from . import groups, nibbles
from .format import Codes, Format

GROUP_SIZE = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = E2M1[-1]
E4M3_MAX = 448.0
# Scales of a weight that are tried: so many steps of e4m3 from the one that covers a group, 0.8 to 1.5 of it. By a
# larger one a group ends at 4, below which e2m1 is denser. Gaussian weights lose 9 % less than by 0.8, 0.9 and 1 alone.
STEPS = (0, -1, -2, 1, 2, 3, 4, 5)
# Where an input's largest magnitude should be: e4m3 has scales for 20 times that, and exact ones for a thousandth.
PEAK = 128.0


def encode_e2m1(x: Tensor) -> Tensor:
    """Nearest e2m1 code of each value, ties to the even code, saturating at 6: [...] fp32 -> [...] uint8."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for lower, (a, b) in enumerate(itertools.pairwise(E2M1)):
        middle = (a + b) / 2
        code += magnitude > middle if lower % 2 == 0 else magnitude >= middle
    return code + 8 * torch.signbit(x).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """[...] uint8 -> [...] fp32; the inverse of `encode_e2m1` on the 15 values e2m1 has.

    By arithmetic: a table would have to be copied to the device, which a CUDA graph does not allow.
    """
    m = (codes & 7).float()
    magnitude = torch.where(m < 4, m / 2, torch.where(m < 6, m - 2, 2 * m - 8))
    return torch.where(codes > 7, -magnitude, magnitude)


def round_e2m1(x: Tensor) -> Tensor:
    """The value of each one's code: [...] fp32."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (x / step).round_().mul_(step).clamp_(-E2M1_MAX, E2M1_MAX)


def _e4m3(scale: Tensor) -> Tensor:
    """Round a scale to e4m3 (returned as fp32); zero becomes 1, so that dividing by it is safe."""
    rounded = scale.clamp_max(E4M3_MAX).to(torch.float8_e4m3fn).float()
    return torch.where(rounded > 0, rounded, 1.0)


def _near(scale: Tensor) -> Iterator[Tensor]:
    """Scales that e4m3 has, the nearest one first."""
    code = scale.clamp_max(E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).short()
    for step in STEPS:
        yield (code + step).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float()


def quantize_weight(w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """w [N, K] fp32 -> (qweight, wscales, wtscale). importance: [K], see `groups.best_of`."""
    g = groups.split(w, GROUP_SIZE)
    cover = groups.span(g) / E2M1_MAX
    wtscale = (cover.amax() / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    wtscale = wtscale.to(torch.bfloat16).float()  # files of others hold it in 16 bits; a group's scale is far coarser
    weights = None if importance is None else groups.split(importance, GROUP_SIZE)

    def reconstruct(v: Tensor, scale: Tensor) -> Tensor:
        return round_e2m1(v / (scale * wtscale)) * (scale * wtscale)

    scale = groups.best_of(g, _near(cover / wtscale), reconstruct, weights)
    codes = encode_e2m1(g / (scale * wtscale))
    return nibbles.pack(codes.flatten(1)), scale.squeeze(-1).to(torch.float8_e4m3fn), wtscale


def dequantize_weight(qweight: Tensor, wscales: Tensor, wtscale: Tensor) -> Tensor:
    """[N, Kp] fp32."""
    if wtscale.dim():
        return dequantize_activation(qweight, wscales.float() * wtscale)
    return dequantize_activation(qweight, wscales) * wtscale


def dequantize_activation(packed: Tensor, scales: Tensor) -> Tensor:
    """[..., Kp] fp32."""
    values = decode_e2m1(nibbles.unpack(packed)).unflatten(-1, (-1, GROUP_SIZE))
    return (values * scales.float().unsqueeze(-1)).flatten(-2)


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] fp32, already divided by the smoothing factors -> (qx, ascales)."""
    g = groups.split(x, GROUP_SIZE)
    scale = _e4m3(groups.span(g) / E2M1_MAX)
    return nibbles.pack(encode_e2m1(g / scale).flatten(-2)), scale.squeeze(-1).to(torch.float8_e4m3fn)


def matmul(qx: Tensor, ascales: Tensor, qweight: Tensor, wscales: Tensor, wtscale: Tensor) -> Tensor:
    """[..., N] fp32."""
    return dequantize_activation(qx, ascales) @ dequantize_weight(qweight, wscales, wtscale).t()


NVFP4 = Format(
    name="nvfp4",
    summary="4-bit floating-point weights and activations",
    fields=("qweight", "wscales", "wtscale"),
    quantize_weight=quantize_weight,
    dequantize_weight=dequantize_weight,
    matmul=matmul,
    group_size=GROUP_SIZE,
    codes=Codes("fp4", torch.uint8, torch.float8_e4m3fn, GROUP_SIZE, by_block=True, two_a_byte=True, peak=PEAK),
    quantize_activation=quantize_activation,
    dequantize_activation=dequantize_activation,
)
