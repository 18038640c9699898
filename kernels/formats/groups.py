"""Groups along the reduction axis: every format scales 16 or 64 neighbouring input channels together."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(features: int, group_size: int) -> int:
    """`features` rounded up to whole groups."""
    return -(-features // group_size) * group_size


def split(x: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., K/group, group], zero-padded to whole groups: a zero adds nothing to a product or a span."""
    missing = padded(x.shape[-1], group_size) - x.shape[-1]
    if missing:
        x = F.pad(x, (0, missing))
    return x.unflatten(-1, (-1, group_size))


def span(groups: Tensor) -> Tensor:
    """The largest magnitude in each group: [..., G, group] -> [..., G, 1]."""
    return groups.abs().amax(-1, keepdim=True)


def best_of(
    groups: Tensor,
    candidates: Iterable[Tensor],
    reconstruct: Callable[[Tensor, Tensor], Tensor],
    importance: Tensor | None,
) -> Tensor:
    """Choose for each group the scale that loses least.

    groups      [N, G, group]  fp32, the values to represent
    candidates  scales [N, G, 1], tried in order; the earlier one wins a tie
    reconstruct (groups, scale) -> what the format would give back, same shape as groups
    importance  [G, group] or None: how much a squared error in each input channel costs (the activations' second
    moment)
    """
    best, best_loss = None, None
    for scale in candidates:
        error = (reconstruct(groups, scale) - groups).square_()
        if importance is not None:
            error *= importance
        loss = error.sum(-1, keepdim=True)
        if best is None or best_loss is None:
            best, best_loss = scale, loss
        else:
            better = loss < best_loss
            best = torch.where(better, scale, best)
            best_loss = torch.where(better, loss, best_loss)
    if best is None:
        raise ValueError("best_of needs at least one candidate scale")
    return best
