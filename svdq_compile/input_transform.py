"""What is done to an input before it is rounded, with the opposite done to the weight: smoothing, rotation, a shift.

    x W^T = T(x) T'(W)^T       T(x) = rotate(x / smooth),   T'(W) = rotate(W diag(smooth))

Smoothing moves an input's outliers into the weight, rotation spreads them over 64 neighbours. How much of each is best
differs from layer to layer, so there are several candidates, which the quantizer tries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config
from .input_statistics import InputStatistics
from .kernels.formats import FORMATS, can_rotate
from .kernels.formats.rotation import rotate

# smooth = (input span)^a / (weight span)^b. The first is for inputs that were not observed, and is kept where no other
# is better by MARGIN: 0.3 beats SmoothQuant's 0.5 in W4A8, since the branch takes what the weight gets.
EXPONENTS = ((0.3, 0.7), (0.5, 0.5), (0.5, 0.2), (0.7, 0.3), (0.15, 0.15))
MARGIN = 0.01


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


def candidates(
    weights: Sequence[Tensor], statistics: InputStatistics, precision: str, config: Config, shift: float
) -> list[Transform]:
    """For linears [N_i, K] that share an input, what is best without a trial first.

    shift  makes the input non-negative, or 0
    """
    codes = FORMATS[precision].codes
    if codes is None:
        return [Transform(_smoothing(weights, None, None), 0.0, False)]
    shift = shift if codes.unsigned else 0.0
    exponents = EXPONENTS if config.smooth else (None,)
    smooths = [_smoothing(weights, statistics.span, e) for e in exponents]
    plain = [Transform(smooth, shift, False) for smooth in smooths]
    if not (config.rotate and can_rotate(precision, weights[0].shape[1])):
        return plain
    rotated = [Transform(smooth, 0.0, True) for smooth in smooths]
    return plain + rotated if shift else rotated + plain


def _smoothing(weights: Sequence[Tensor], span: Tensor | None, exponents: tuple[float, float] | None) -> Tensor:
    """[K] fp32, around 1; a channel with no span keeps 1. Of the weights' dtype, in which files of others hold it.

    span  [K] of the input, or None where it was not observed
    """
    ones = torch.ones(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    if exponents is None:
        return ones
    of_input, of_weight = exponents
    weight_span = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    input_span = ones if span is None else span.to(ones.device)
    smooth = input_span**of_input / weight_span**of_weight
    usable = torch.isfinite(smooth) & (smooth > 0)
    smooth = smooth / smooth[usable].log().mean().exp() if bool(usable.any()) else ones
    # Outside this range a 16-bit D = D' / smooth would lose what it is for.
    return torch.where(usable, smooth, 1.0).clamp(1e-3, 1e3).to(weights[0].dtype).float()
