"""What is done to an input before it is rounded, with the opposite done to the weight: smoothing, rotation, a shift.

    x W^T = T(x) T'(W)^T       T(x) = rotate(x / smooth),   T'(W) = rotate(W diag(smooth))

Smoothing moves an input's outliers into the weight, rotation spreads them over 64 neighbours. Which is best differs
from layer to layer; where it matters the quantizer tries several (`choose`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import Config
from .kernels.formats import FORMATS, can_rotate, groups
from .kernels.formats.format import Codes
from .kernels.formats.rotation import rotate

# smooth = (input span)^a / (weight span)^b. The first serves where nothing is tried: 0.3 beats SmoothQuant's 0.5 in
# W4A8, since the branch takes what the weight gets. (0.7, 0.3) betters most layers of int4 on the demo model, and its
# velocity at other prompts gets worse.
EXPONENTS = ((0.3, 0.7), (0.3, 0.3), (0.5, 0.5))
# Where one channel is far louder than the others: by so much it may exceed a format's peak and is not cut off, and so
# much of the peak is left to the median group, whose quieter rows then have exact scales.
ABOVE_PEAK, TYPICAL = 8, 1 / 128
MOST_DOUBLINGS = 60  # of smoothing factors: the weight that they are multiplied into still has squares in fp32
MARGIN = 0.01  # by so much another transform must be better than the one it replaces


@dataclass(frozen=True)
class Transform:
    """smooth [K] fp32; shift, rotate: as in SharedInput. Not both of these."""

    smooth: Tensor
    shift: float
    rotate: bool

    def input(self, x: Tensor) -> Tensor:
        """x [..., K] fp32 -> what is rounded of it, but for the shift."""
        return self._rotated(x / self.smooth)

    def weight(self, w: Tensor) -> Tensor:
        """w [N, K] fp32 -> the weight that reads it."""
        return self._rotated(w * self.smooth)

    def undo(self, w: Tensor) -> Tensor:
        """The inverse of `weight`."""
        return self._rotated(w) / self.smooth

    def _rotated(self, t: Tensor) -> Tensor:
        return rotate(t) if self.rotate else t


def choose(
    weights: Sequence[Tensor],
    span: Tensor | None,
    precision: str,
    config: Config,
    shift: float,
    loss: Callable[[Transform], float] | None,
) -> Transform:
    """For linears [N_i, K] that share an input: first whether it is rotated, then how much is smoothed.

    span   [K] of the input, or None where it was not observed
    shift  makes the input non-negative, or 0
    loss   how far their outputs are off, a number of any unit; None: what is best for most layers
    """
    codes = FORMATS[precision].codes
    if codes is None or not config.smooth:
        smooth = torch.ones(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    else:
        smooth = smoothing(weights, span, *EXPONENTS[0])
    shift = shift if codes is not None and codes.unsigned else 0.0
    tried = [Transform(reaching, shift, False) for reaching in _within_reach(smooth, weights, span, codes)]
    if config.rotate and can_rotate(precision, len(smooth)):
        rotated = replace(tried[0], shift=0.0, rotate=True)
        tried = [*tried, rotated] if shift else [rotated, *tried]
    if loss is None or not (tried[1:] or config.smooth):
        return tried[0]
    best, least = _best(tried, loss)
    if not config.smooth:
        return best
    others = [
        replace(best, smooth=reaching)
        for exponents in EXPONENTS[1:]
        for reaching in _within_reach(smoothing(weights, span, *exponents), weights, span, codes)
    ]
    return _best([best, *others], loss, least)[0]


def _best(
    transforms: Sequence[Transform], loss: Callable[[Transform], float], least: float | None = None
) -> tuple[Transform, float]:
    """The first one, whose loss may be known, or another that is clearly better; and its loss."""
    best, least = transforms[0], loss(transforms[0]) if least is None else least
    for transform in transforms[1:]:
        found = loss(transform)
        if found < (1 - MARGIN) * least:
            best, least = transform, found
    return best, least


def smoothing(weights: Sequence[Tensor], span: Tensor | None, of_input: float, of_weight: float) -> Tensor:
    """[K] fp32, around 1; a channel with no span keeps 1. Of the weights' dtype, in which files of others hold it."""
    ones = torch.ones(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    weight_span = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    input_span = ones if span is None else span.to(ones.device)
    smooth = input_span**of_input / weight_span**of_weight
    usable = torch.isfinite(smooth) & (smooth > 0)
    smooth = smooth / smooth[usable].log().mean().exp() if bool(usable.any()) else ones
    # Outside this range a 16-bit D = D' / smooth would lose what it is for.
    return torch.where(usable, smooth, 1.0).clamp(1e-3, 1e3).to(weights[0].dtype).float()


def _within_reach(smooth: Tensor, weights: Sequence[Tensor], span: Tensor | None, codes: Codes | None) -> list[Tensor]:
    """smooth times the power of two that brings the largest magnitude of the input to peak / 2 to peak.

    By a power of two nothing else changes: the weight's own scale takes it up. Where that would leave too little to
    the median group it is less, and where the largest would then be cut off there are two to choose from: one that
    keeps it, and one that keeps the others.
    """
    if codes is None or codes.peak is None or span is None:
        return [smooth]
    read = torch.stack([(weight != 0).any(0) for weight in weights]).any(0)
    smoothed = torch.where(read, span.to(smooth) / smooth, 0.0)
    spans = groups.span(groups.split(smoothed, codes.block))
    if not bool(spans.any()):
        return [smooth]
    largest, median = float(spans.amax()), float(spans[spans > 0].median())
    exponents = [_halvings(largest, codes.peak)]
    spares = max(0, _halvings(median, TYPICAL * codes.peak) - 1)
    if exponents[0] > spares:
        keeps = max(0, _halvings(largest, ABOVE_PEAK * codes.peak))
        exponents = [keeps, spares] if keeps > spares else [spares]
    return [smooth * 2.0 ** max(-MOST_DOUBLINGS, min(MOST_DOUBLINGS, exponent)) for exponent in exponents]


def _halvings(size: float, limit: float) -> int:
    """How many bring it to half the limit or more, and below it; negative: doublings."""
    return math.frexp(size / limit)[1]
