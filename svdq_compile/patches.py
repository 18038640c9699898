"""What a convolution multiplies by its weight: of each output the patch of the input behind it, as a linear's row."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .input_statistics import evenly


def patches(
    x: Tensor,
    taps: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    most: int,
) -> Tensor:
    """x [B, C, ...] or [C, ...] -> at most so many rows [S, taps * C], evenly over samples and places; their columns
    are those of `as_matrix`.

    taps                       of the kernel, in each dimension
    stride, padding, dilation  as torch's convolutions take them
    """
    dims = len(taps)
    strides, dilations = (_each(size, dims) for size in (stride, dilation))
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    around = _padding(padding, taps, dilations)
    x = F.pad(x, around) if any(around) else x  # which copies it even where nothing is added
    for i, (size, step, between) in enumerate(zip(taps, strides, dilations, strict=True)):
        x = x.unfold(2 + i, between * (size - 1) + 1, step)[..., ::between]
    places = x.movedim(1, -1)  # [B, places..., taps..., C], a view
    chosen = evenly(places.shape[: dims + 1].numel(), most, x.device)
    return places[torch.unravel_index(chosen, places.shape[: dims + 1])].flatten(1)


def _each(size: int | Sequence[int], dims: int) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * dims if len(sizes) == 1 else sizes


def _padding(padding: int | Sequence[int] | str, taps: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """As `F.pad` takes it: of the last dimension first, before and behind."""
    if isinstance(padding, str):
        whole = [between * (size - 1) if padding == "same" else 0 for size, between in zip(taps, dilation, strict=True)]
        sides = [(size // 2, size - size // 2) for size in whole]
    else:
        sides = [(size, size) for size in _each(padding, len(taps))]
    return [size for side in reversed(sides) for size in side]
