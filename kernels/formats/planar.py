"""How 4-bit codes and their scales lie for the GPU kernels: codes of one group in each 16-byte load, and the scales of
neighbouring output channels side by side.

    qweight  [N, P/2]   int8   P = Kp rounded up to 128. Of each 64 bytes, which hold 128 channels, byte j has channel j
                               in its low and 64 + j in its high nibble: one group of 64 in each half
    scales   [P/64, N]         each format's own from there, see its `Planar`

Groups that pad Kp to P have scale 0 and so add nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import nibbles

GROUP_SIZE = 64
_NO_CODE = 8  # what pads the codes; its scale is 0


@dataclass(frozen=True)
class Planar:
    """A format's tensors in the kernel order.

    pack          (*plain tensors) -> the kernel's
    unpack        (groups, *the kernel's) -> the plain ones, bit for bit; groups: of 64 input channels
    feature_dims  which dimension of each of the kernel's counts output channels, if siblings are merged
    words         sm_90 reads its codes as words (layout.py)
    dequantize    (*the kernel's) -> [N, P] fp32 at once, of which Inductor makes one kernel; None: by the plain ones
    """

    pack: Callable[..., tuple[Tensor, ...]]
    unpack: Callable[..., tuple[Tensor, ...]]
    feature_dims: tuple[int, ...] = ()
    words: bool = False
    dequantize: Callable[..., Tensor] | None = None


def pack_codes(qweight: Tensor) -> Tensor:
    """[N, Kp/2] uint8 -> [N, P/2] int8; the inverse of `unpack_codes`."""
    codes = nibbles.unpack(qweight)
    codes = F.pad(codes, (0, codes.shape[1] % (2 * GROUP_SIZE)), value=_NO_CODE)
    low, high = codes.unflatten(-1, (-1, 2, GROUP_SIZE)).unbind(-2)
    return (low | (high << 4)).flatten(-2).view(torch.int8)


def unpack_codes(planar: Tensor, groups: int) -> Tensor:
    """[N, P/2] int8 -> [N, groups * 32] uint8."""
    return nibbles.pack(codes(planar).flatten(1)[..., : GROUP_SIZE * groups])


def codes(planar: Tensor) -> Tensor:
    """[N, P/2] int8 -> [N, P/64, 64] uint8, of 0..15."""
    return nibbles.split(planar.view(torch.uint8).unflatten(-1, (-1, 1, GROUP_SIZE))).flatten(1, 2)


def by_group(scales: Tensor) -> Tensor:
    """[N, groups] -> [P/64, N]; the inverse of `by_row`."""
    return F.pad(scales, (0, scales.shape[1] % 2)).t().contiguous()


def by_row(scales: Tensor, groups: int) -> Tensor:
    """[P/64, N] -> [N, groups]."""
    return scales[:groups].t().contiguous()
