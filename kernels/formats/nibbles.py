"""Two 4-bit codes in a byte: along the last axis, the even element in the low nibble, the odd one in the high nibble.

codes  [..., K]    uint8, 0..15, K even
bytes  [..., K/2]  uint8
"""

from torch import Tensor, arange, uint8


def pack(codes: Tensor) -> Tensor:
    """[..., K] codes of 0..15 -> [..., K/2] bytes; the inverse of `unpack`."""
    codes = codes.to(uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """[..., K/2] bytes -> [..., K] codes of 0..15; the inverse of `pack`."""
    return split(packed.unsqueeze(-2)).mT.flatten(-2)


def split(packed: Tensor) -> Tensor:
    """[..., 1, J] bytes -> [..., 2, J], the low nibbles and the high ones. The shift is broadcast: Inductor makes one
    kernel of that and what follows, while it stores what is stacked.
    """
    shift = arange(0, 8, 4, dtype=uint8, device=packed.device).unsqueeze(-1)
    return (packed >> shift) & 0xF
