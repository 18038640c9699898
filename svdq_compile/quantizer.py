"""SVDQuant: a 16-bit weight becomes 4-bit codes plus a low-rank branch (Li et al., arXiv 2411.05007).

    W diag(smooth) = R + U D'        smooth moves the outliers of the input into the weight,
                                     U D' takes them out of what is rounded,
    y = Q(R) Q(x / smooth) + U (D x) D = D' / smooth, so the branch reads the raw input

Rounding R loses Q(R) - R; the refinement rounds refit U D' to what is lost and round again, in the last of them with
each channel's error corrected by the next ones (feedback.py). Each fit counts errors by the inputs that were observed
(whitening.py), and the output error on sampled rows decides which round is kept.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config
from .errors import NonFiniteWeight
from .feedback import Feedback
from .input_statistics import InputStatistics
from .kernels.formats import FORMATS
from .lowering import reference
from .lowering.launch import in_device_order, round_weight
from .lowering.packed import PackedLinear, SharedInput
from .lowrank import factorize
from .whitening import Whitening

log = logging.getLogger("svdq_compile")

# How much of an input outlier moves into the weight. 0.3 beats SmoothQuant's 0.5 here, since the branch takes what the
# weight gets: on the demo model 33.1 against 32.3 dB of velocity error in W4A8, equal in W4A4.
SMOOTH_ALPHA = 0.3
# Refinement rounds, the last ones, that round with feedback; they take longer. The first brings most.
FEEDBACK_ROUNDS = 2


@dataclass(frozen=True)
class Quantized:
    """A packed linear and how far it is from the original.

    error   relative: of the output on the observed rows, or of the weight where nothing was observed
    """

    packed: PackedLinear
    error: float


@torch.no_grad()
def quantize_group(
    weights: Sequence[Tensor],
    names: Sequence[str],
    precision: str,
    config: Config,
    statistics: InputStatistics,
    shift: float = 0.0,
) -> list[Quantized]:
    """Quantize linears that read the same input.

    weights     [N_i, K] each, any float dtype, on the device where the work is done
    names       for error messages, one a weight
    precision   a key of kernels.FORMATS
    statistics  of the input they share; empty: only the weights are known
    shift       makes the input non-negative where the format has unsigned codes, else 0
    """
    for weight, name in zip(weights, names, strict=True):
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        if bad:
            raise NonFiniteWeight(name, bad)
    smooth = _smoothing(weights, statistics, precision, config)
    codes = FORMATS[precision].codes
    shift = shift if codes is not None and codes.unsigned else 0.0
    seen = None if statistics.span is None else _see(statistics, smooth, precision, shift)
    fits = [_fit(weight, smooth, precision, config, seen, shift) for weight in weights]

    down = torch.cat([fit.down for fit, _ in fits])
    shared = SharedInput(precision, smooth, down, shift)
    quantized, start = [], 0
    for fit, error in fits:
        packed = PackedLinear(shared, in_device_order(precision, fit.weight), fit.up, start, fit.offset)
        quantized.append(Quantized(packed, error))
        start += fit.up.shape[1]
    return quantized


def _smoothing(weights: Sequence[Tensor], statistics: InputStatistics, precision: str, config: Config) -> Tensor:
    """[K] fp32: (input span)^alpha / (weight span)^(1 - alpha), around 1; a channel with no span keeps 1. Of the
    weights' dtype, in which files of others hold it.
    """
    ones = torch.ones(weights[0].shape[1], dtype=torch.float32, device=weights[0].device)
    if not config.smooth or FORMATS[precision].quantize_activation is None:
        return ones
    weight_span = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    input_span = ones if statistics.span is None else statistics.span.to(ones.device)
    smooth = input_span**SMOOTH_ALPHA / weight_span ** (1 - SMOOTH_ALPHA)
    usable = torch.isfinite(smooth) & (smooth > 0)
    smooth = smooth / smooth[usable].log().mean().exp() if bool(usable.any()) else ones
    # Outside this range a 16-bit D = D' / smooth would lose what it is for.
    return torch.where(usable, smooth, 1.0).clamp(1e-3, 1e3).to(weights[0].dtype).float()


@dataclass(frozen=True)
class _Seen:
    """What was seen of an input that linears share.

    rows        [S, K]  fp32
    rounded     [S, K]  what the quantized product reads of them, smoothed
    importance  [K]     the second moment of each channel, smoothed, about 1; no channel counts for nothing
    feedback    None where second moments are not known, or the format has no grid
    """

    rows: Tensor
    rounded: Tensor
    importance: Tensor
    whitening: Whitening
    feedback: Feedback | None


def _see(statistics: InputStatistics, smooth: Tensor, precision: str, shift: float) -> _Seen:
    rows = statistics.rows.to(smooth)
    smoothed = rows / smooth
    moment = smoothed.square().mean(0)
    importance = moment / moment.mean().clamp_min(1e-30) + 1e-4
    rounded, dequantize = smoothed, FORMATS[precision].dequantize_activation
    if dequantize is not None:
        qx, ascales, _ = reference.quantize(rows, smooth, rows[:0], precision, shift)
        rounded = dequantize(qx, ascales)[:, : rows.shape[1]]
    return _Seen(rows, rounded, importance, Whitening(smoothed), _feedback(statistics, smooth, precision))


def _feedback(statistics: InputStatistics, smooth: Tensor, precision: str) -> Feedback | None:
    if statistics.moment is None or FORMATS[precision].grid is None:
        return None
    try:
        return Feedback(statistics.moment, smooth)
    except torch.linalg.LinAlgError as error:
        log.info("rounded without feedback, the second moment of the input is not finite: %s", error)
        return None


@dataclass(frozen=True)
class _Fit:
    """One linear's decomposition; the fields are PackedLinear's, `error` a tensor of one value."""

    weight: tuple[Tensor, ...]
    up: Tensor
    down: Tensor
    offset: Tensor | None
    error: Tensor


def _fit(
    weight: Tensor, smooth: Tensor, precision: str, config: Config, seen: _Seen | None, shift: float
) -> tuple[_Fit, float]:
    """Decompose a weight [N, K], alternating between the branch and the rounded rest -> the best round, its error.

    Nothing waits for the GPU before the last round: its work is short, and the host is a round or two ahead.
    """
    rank, dtype = config.rank, weight.dtype
    smoothed = weight.float() * smooth
    truth = weight.float() if seen is None else seen.rows @ weight.float().t()
    scale = truth.norm()
    rest, rounded, basis = smoothed, None, None
    up, down = smoothed.new_zeros(weight.shape[0], 0, dtype=dtype), smoothed.new_zeros(0, weight.shape[1], dtype=dtype)
    fits = []
    importance, feedback = (None, None) if seen is None else (seen.importance, seen.feedback)
    # Without a branch to refit, rounding to nearest would give the same again.
    refinements = config.refine if rank else min(config.refine, 1 if feedback else 0)
    for left in range(refinements, -1, -1):
        if rank:
            missing = smoothed if rounded is None else smoothed - rounded
            if seen is not None:
                missing = seen.whitening.apply(missing)
            up32, down32, basis = factorize(missing, rank, basis)
            if seen is not None:
                down32 = seen.whitening.undo(down32)
            up, down = up32.to(dtype), (down32 / smooth).to(dtype)
            rest = torch.addmm(smoothed, up.float(), down.float() * smooth, alpha=-1)
        if feedback is not None and importance is not None and left < min(FEEDBACK_ROUNDS, refinements):
            tensors, rounded = feedback.round(precision, rest, importance)
        else:
            tensors, rounded = round_weight(precision, rest, importance)
        offset = (rounded @ smooth.reciprocal()) * shift if shift else None  # what the shift adds to the product
        if seen is None:
            wrong = (rounded - rest) / smooth
        else:
            xd = (seen.rows @ down.float().t()).to(dtype)
            wrong = torch.addmm(xd.float() @ up.float().t() - truth, seen.rounded, rounded.t())
            wrong = wrong if offset is None else wrong - offset
        fits.append(_Fit(tensors, up, down, offset, wrong.norm() / torch.where(scale > 0, scale, 1.0)))
    errors = torch.stack([fit.error for fit in fits]).tolist()
    best = min(range(len(fits)), key=errors.__getitem__)
    return fits[best], errors[best]
