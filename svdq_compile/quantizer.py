"""SVDQuant: a 16-bit weight becomes 4-bit codes plus a low-rank branch (Li et al., arXiv 2411.05007).

    T'(W) = R + U D'                    T' moves the outliers of the input into the weight, or spreads them
                                        (input_transform.py); U D' takes them out of what is rounded,
    y = Q(R) Q(T(x)) + U (D x)          D is D' with T' undone, so the branch reads the raw input

Rounding R loses Q(R) - R; the refinement rounds refit U D' to what is lost and round again, in the last of them with
each channel's error corrected by the next ones (feedback.py). Each fit counts errors by the inputs that were observed
(whitening.py), and the output error on sampled rows decides which round is kept.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config
from .errors import NonFiniteWeight
from .feedback import Feedback
from .input_statistics import InputStatistics
from .input_transform import Transform, choose
from .kernels.formats import FORMATS
from .lowering import reference
from .lowering.launch import in_device_order, round_weight
from .lowering.packed import PackedLinear, SharedInput
from .lowrank import factorize
from .whitening import Whitening

log = logging.getLogger("svdq_compile")

# Raised with whatever changes the bits that come out: what an earlier version has begun is not gone on with.
NUMERICS = 2
# Refinement rounds, the last ones, that round with feedback; they take longer. The first brings most.
FEEDBACK_ROUNDS = 2
# What a trial of a transform takes at most: rows, half of which are fitted, and outputs of each linear.
TRIAL_ROWS, TRIAL_OUTPUTS = 256, 512
MIN_ROWS = 64  # fewer show nothing of other inputs


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
    loss = _trial(weights, statistics, precision, config)
    transform = choose(weights, statistics.span, precision, config, shift, loss)
    seen = None
    if statistics.span is not None:
        rows = statistics.rows.to(transform.smooth)
        seen = _see(rows, rows, transform, precision, _feedback(statistics, transform, precision))
    fits = [_fit(weight, transform, precision, config.rank, config.refine, seen) for weight in weights]

    down = torch.cat([fit.down for fit, _ in fits])
    shared = SharedInput(precision, transform.smooth, down, transform.shift, transform.rotate)
    quantized, start = [], 0
    for fit, error in fits:
        packed = PackedLinear(shared, in_device_order(precision, fit.weight), fit.up, start, fit.offset)
        quantized.append(Quantized(packed, error))
        start += fit.up.shape[1]
    return quantized


def _trial(
    weights: Sequence[Tensor], statistics: InputStatistics, precision: str, config: Config
) -> Callable[[Transform], float] | None:
    """The loss of a transform of the input: a quick fit to some of the rows that were observed, measured on others.

    None where too little was observed, or activations have 8 bits: there none was better than the first; and without
    options that leave a choice.
    """
    codes = FORMATS[precision].codes
    if statistics.span is None or codes is None or not codes.by_block or not (config.smooth or config.rotate):
        return None
    rows = statistics.thinned(TRIAL_ROWS).to(weights[0].device).float()
    if rows.shape[0] < MIN_ROWS:
        return None
    fitting, measuring = rows[::2], rows[1::2]
    some = [weight[:: -(-weight.shape[0] // TRIAL_OUTPUTS)].float() for weight in weights]
    sizes = [(measuring @ weight.t()).norm() for weight in some]
    weight = torch.cat([w / torch.where(size > 0, size, 1.0) for w, size in zip(some, sizes, strict=True)])

    def loss(transform: Transform) -> float:
        return _fit(weight, transform, precision, config.rank, 1, _see(fitting, measuring, transform, precision, None))[
            1
        ]

    return loss


@dataclass(frozen=True)
class _Seen:
    """What was seen of an input that linears share.

    rows        [S, K]  fp32
    rounded     [S, K]  what the quantized product reads of them, transformed
    importance  [K]     the second moment of each channel, transformed, about 1; no channel counts for nothing
    feedback    None where second moments are not known, or the format has no grid
    """

    rows: Tensor
    rounded: Tensor
    importance: Tensor
    whitening: Whitening
    feedback: Feedback | None


def _see(fitting: Tensor, measuring: Tensor, transform: Transform, precision: str, feedback: Feedback | None) -> _Seen:
    """Of rows [S, K] fp32 that the branch is fitted to, and of those that errors are measured on."""
    transformed = transform.input(fitting)
    moment = transformed.square().mean(0)
    importance = moment / moment.mean().clamp_min(1e-30) + 1e-4
    rounded, dequantize = transform.input(measuring), FORMATS[precision].dequantize_activation
    if dequantize is not None:
        qx, ascales, _ = reference.quantize(
            measuring, transform.smooth, measuring[:0], precision, transform.shift, transform.rotate
        )
        rounded = dequantize(qx, ascales)[:, : measuring.shape[1]]
    return _Seen(measuring, rounded, importance, Whitening(transformed), feedback)


def _feedback(statistics: InputStatistics, transform: Transform, precision: str) -> Feedback | None:
    if statistics.moment is None or FORMATS[precision].grid is None:
        return None
    try:
        return Feedback(statistics.moment, transform.smooth)
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
    weight: Tensor, transform: Transform, precision: str, rank: int, refine: int, seen: _Seen | None
) -> tuple[_Fit, float]:
    """Decompose a weight [N, K], alternating between the branch and the rounded rest -> the best round, its error.

    Nothing waits for the GPU before the last round: its work is short, and the host is a round or two ahead.
    """
    dtype, shift = weight.dtype, transform.shift
    whole = transform.weight(weight.float())
    truth = weight.float() if seen is None else seen.rows @ weight.float().t()
    scale = truth.norm()
    rest, rounded, basis = whole, None, None
    up, down = whole.new_zeros(weight.shape[0], 0, dtype=dtype), whole.new_zeros(0, weight.shape[1], dtype=dtype)
    fits = []
    importance, feedback = (None, None) if seen is None else (seen.importance, seen.feedback)
    # Without a branch to refit, rounding to nearest would give the same again.
    refinements = refine if rank else min(refine, 1 if feedback else 0)
    for left in range(refinements, -1, -1):
        if rank:
            missing = whole if rounded is None else whole - rounded
            if seen is not None:
                missing = seen.whitening.apply(missing)
            up32, down32, basis = factorize(missing, rank, basis)
            if seen is not None:
                down32 = seen.whitening.undo(down32)
            up, down = up32.to(dtype), transform.undo(down32).to(dtype)
            rest = torch.addmm(whole, up.float(), transform.weight(down.float()), alpha=-1)
        if feedback is not None and importance is not None and left < min(FEEDBACK_ROUNDS, refinements):
            tensors, rounded = feedback.round(precision, rest, importance)
        else:
            tensors, rounded = round_weight(precision, rest, importance)
        # What the shift adds to the product.
        offset = (rounded @ transform.smooth.reciprocal()) * shift if shift else None
        if seen is None:
            wrong = transform.undo(rounded - rest)
        else:
            xd = (seen.rows @ down.float().t()).to(dtype)
            wrong = torch.addmm(xd.float() @ up.float().t() - truth, seen.rounded, rounded.t())
            wrong = wrong if offset is None else wrong - offset
        fits.append(_Fit(tensors, up, down, offset, wrong.norm() / torch.where(scale > 0, scale, 1.0)))
    errors = torch.stack([fit.error for fit in fits]).tolist()
    best = min(range(len(fits)), key=errors.__getitem__)
    return fits[best], errors[best]
