"""How close pictures are to others, and how sure a mean is."""

import torch.nn.functional as F
from torch import Tensor


def psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """[n, 3, H, W] in 0..1 -> [n] dB; equal pictures have 120."""
    return -10 * (pictures - truth).square().mean((1, 2, 3)).clamp_min(1e-12).log10()


def ssim(pictures: Tensor, truth: Tensor, window: int = 8) -> Tensor:
    """[n, 3, H, W] in 0..1 -> [n], over uniform windows, smaller ones where the picture is."""

    window = min(window, *truth.shape[2:])

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, window, 1)

    a, b = mean(pictures), mean(truth)
    spread = mean(pictures.square()) - a.square() + mean(truth.square()) - b.square()
    together = mean(pictures * truth) - a * b
    value = (2 * a * b + 1e-4) * (2 * together + 9e-4) / ((a.square() + b.square() + 1e-4) * (spread + 9e-4))
    return value.mean((1, 2, 3))


def interval(values: Tensor) -> float:
    """Half the 95 % interval of a mean; NaN of a single value, which says nothing."""
    return float(1.96 * values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, of the difference itself where nothing was expected."""
    size = expected.float().norm()
    return float((actual.float() - expected.float()).norm() / (size if size > 0 else 1.0))
