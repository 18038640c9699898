"""A linear's scales and smoothing factors brought to where a file's 16-bit dtype has normal numbers, by powers of two:

    (codes wscales above) Q(x / smooth) = (codes (wscales / 2^k) (above 2^(k + e))) Q(x / (smooth 2^e))

float16 has 2^-14 to 65504. Where inputs are small the quantizer's smoothing factors are, and the scale above nvfp4's
scales is 1e-8. What e4m3 can take over exactly (k) leaves the input alone; e moves its scales, so it is the least one.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .errors import OptionError
from .kernels.formats import FORMATS, groups
from .nunchaku_linear import Linear, fits_16_bit

MOST_HALVINGS = 16  # that e4m3 has between its largest and its smallest
HARMLESS = 2.0**-8  # of the whole weight: what rounding to bfloat16 takes


def in_range(linear: Linear, name: str, dtype: torch.dtype) -> Linear:
    """The same W4A4 linear, of which a file of this dtype loses nothing but digits.

    Raises OptionError, with the name, where there are no such powers and the weight would be another.
    """
    if fits_16_bit(linear, dtype):
        return linear
    qweight, scales, *above = linear.weight
    values = FORMATS[linear.precision].dequantize_weight(*linear.weight)
    used = groups.span(groups.split(values, values.shape[1] // scales.shape[1])).squeeze(-1) > 0
    outer = above[0] if above else scales  # what is in 16 bits
    halvings = _exact_halvings(scales[used]) if above else 0
    low, high = _exponents(linear.smooth, dtype)
    outer_low, outer_high = _exponents(outer.float().expand(used.shape)[used], dtype)
    low, high = max(low, outer_low - halvings), min(high, outer_high)
    if low > high or outer_low > outer_high:
        _check_harmless(linear, name, dtype)
        return linear
    e = min(max(0, low), high)
    k = max(0, outer_low - e)
    # Only the scale of a group of zeros, which may be any, is larger than the dtype's largest.
    outer = (outer.float() * 2.0 ** (e + k)).clamp_max(torch.finfo(dtype).max).to(outer.dtype)
    if above:
        halved = torch.where(used, scales.float() / 2.0**k, scales.float()).to(scales.dtype)
        weight: tuple[Tensor, ...] = (qweight, halved, outer)
    else:
        weight = (qweight, outer)
    return replace(linear, weight=weight, smooth=linear.smooth * 2.0**e)


def _exact_halvings(scales: Tensor) -> int:
    """How often e4m3 scales can all be halved and keep their digits."""
    exact = scales.float()
    for k in range(MOST_HALVINGS, 0, -1):
        if torch.equal((exact / 2.0**k).to(scales.dtype).float() * 2.0**k, exact):
            return k
    return 0


def _exponents(numbers: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """The least and the largest power of two by which all are normal numbers of the dtype; a 0 is one anyway."""
    sizes, info = numbers[numbers != 0].abs(), torch.finfo(dtype)
    if not sizes.numel():
        return -(info.bits**2), info.bits**2
    return -_whole_log2(float(sizes.min()) / info.smallest_normal), _whole_log2(info.max / float(sizes.max()))


def _whole_log2(ratio: float) -> int:
    return math.frexp(ratio)[1] - 1


def _check_harmless(linear: Linear, name: str, dtype: torch.dtype) -> None:
    """Raises OptionError if the file's weight would be clearly another: the branch may have most of it."""
    kept = tuple(t if t.dtype in (torch.uint8, torch.float8_e4m3fn) else t.to(dtype).float() for t in linear.weight)
    written = replace(linear, weight=kept, smooth=linear.smooth.to(dtype).float())
    error = float((written.dense - linear.dense).norm() / linear.dense.norm().clamp_min(1e-30))
    if not error <= HARMLESS:
        raise OptionError(
            f"{name}: its scales and smoothing factors do not fit into {str(dtype).removeprefix('torch.')}, in which "
            "Nunchaku's file of this model would hold them: quantize the model in bfloat16, or leave the layer out "
            "with option skip where the file may have it in 16 bits"
        )
