"""SVDQuant: a 16-bit weight becomes 4-bit codes plus a low-rank branch (Li et al., arXiv 2411.05007).

    W diag(smooth) = R + U D'        smooth moves the outliers of the input into the weight,
                                     U D' takes them out of what is rounded,
    y = Q(R) Q(x / smooth) + U (D x) D = D' / smooth, so the branch reads the raw input

Rounding R loses Q(R) - R; the refinement rounds refit U D' to what is lost and round again. Each fit counts errors by
the inputs that were observed (whitening.py), and the output error on sampled rows decides which round is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config
from .errors import NonFiniteWeight
from .kernels import FORMATS
from .lowering import reference
from .lowering.launch import in_device_order
from .lowering.packed import PackedLinear, SharedInput
from .lowrank import factorize
from .statistics import InputStatistics
from .whitening import Whitening

# How much of an input outlier moves into the weight. 0.3 beats SmoothQuant's 0.5 here, since the branch takes what the
# weight gets: on the demo model 33.1 against 32.3 dB of velocity error in W4A8, equal in W4A4.
SMOOTH_ALPHA = 0.3


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
    rows = None if statistics.span is None else statistics.rows.to(weights[0].device, torch.float32)
    smooth = _smoothing(weights, statistics, precision, config)
    shift = shift if FORMATS[precision].unsigned else 0.0
    fits = [_fit(weight.float(), smooth, precision, config, rows, shift, weight.dtype) for weight in weights]

    down = torch.cat([fit.down for fit in fits])
    shared = SharedInput(precision, smooth, down, shift)
    quantized, start = [], 0
    for fit in fits:
        packed = PackedLinear(shared, in_device_order(precision, fit.weight), fit.up, start, fit.offset)
        quantized.append(Quantized(packed, fit.error))
        start += fit.up.shape[1]
    return quantized


def _smoothing(weights: Sequence[Tensor], statistics: InputStatistics, precision: str, config: Config) -> Tensor:
    """[K] fp32: (input span)^alpha / (weight span)^(1 - alpha), around 1; a channel with no span keeps 1."""
    ones = torch.ones(weights[0].shape[1], device=weights[0].device)
    if not config.smooth or FORMATS[precision].quantize_activation is None:
        return ones
    weight_span = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    input_span = ones if statistics.span is None else statistics.span.to(ones.device)
    smooth = input_span**SMOOTH_ALPHA / weight_span ** (1 - SMOOTH_ALPHA)
    usable = torch.isfinite(smooth) & (smooth > 0)
    smooth = smooth / smooth[usable].log().mean().exp() if bool(usable.any()) else ones
    # Outside this range a 16-bit D = D' / smooth would lose what it is for.
    return torch.where(usable, smooth, 1.0).clamp(1e-3, 1e3)


@dataclass
class _Fit:
    """One linear's decomposition; the fields are PackedLinear's."""

    weight: tuple[Tensor, ...]
    up: Tensor
    down: Tensor
    offset: Tensor | None
    error: float


def _fit(
    w: Tensor,
    smooth: Tensor,
    precision: str,
    config: Config,
    rows: Tensor | None,
    shift: float,
    dtype: torch.dtype,
) -> _Fit:
    """Decompose w [N, K] fp32, alternating between the branch and the rounded rest; keep the best round."""
    fmt = FORMATS[precision]
    rank = config.rank
    smoothed = w * smooth
    importance = None if rows is None else _importance(rows / smooth)
    whitening = Whitening(None if rows is None else rows / smooth)
    truth = w if rows is None else rows @ w.t()
    scale = float(truth.norm()) or 1.0

    best: _Fit | None = None
    lost = torch.zeros((), device=w.device)
    basis: Tensor | None = None
    up = w.new_zeros(w.shape[0], 0, dtype=dtype)
    down = w.new_zeros(0, w.shape[1], dtype=dtype)
    for _ in range(config.refine + 1 if rank else 1):
        if rank:
            up32, down32, basis = factorize(whitening.apply(smoothed - lost), rank, basis)
            up, down = up32.to(dtype), (whitening.undo(down32) / smooth).to(dtype)
        branch = up.float() @ (down.float() * smooth)
        tensors = fmt.quantize_weight(smoothed - branch, importance)
        lost = fmt.dequantize_weight(*tensors)[:, : w.shape[1]]
        fit = _Fit(tensors, up, down, _offset(lost, smooth, shift), 0.0)
        result = _run(fit, precision, smooth, shift, rows) if rows is not None else (lost + branch) / smooth
        fit.error = float((result - truth).norm()) / scale
        if best is None or fit.error < best.error:
            best = fit
    assert best is not None
    return best


def _importance(rows: Tensor) -> Tensor:
    """[K]: the second moment of each channel of the smoothed input, about 1; no channel counts for nothing."""
    moment = rows.square().mean(0)
    return moment / moment.mean().clamp_min(1e-30) + 1e-4


def _offset(lost: Tensor, smooth: Tensor, shift: float) -> Tensor | None:
    """[N]: what adding `shift` to every input channel adds to the quantized product."""
    return (lost / smooth).sum(1) * shift if shift else None


def _run(fit: _Fit, precision: str, smooth: Tensor, shift: float, rows: Tensor) -> Tensor:
    """The quantized linear's output on the sampled rows, by the operators' own reference."""
    if FORMATS[precision].quantize_activation is None:
        xd = rows @ fit.down.float().t()
        return reference.gemv(rows, xd, list(fit.weight), fit.up, None, precision, torch.float32)
    qx, ascales, xd = reference.quantize(rows, smooth, fit.down, precision, shift)
    return reference.gemm(qx, ascales, xd, list(fit.weight), fit.up, None, fit.offset, precision, torch.float32)
