"""Two 4-bit codes in a byte: along the last axis, the even element in the low nibble, the odd one in the high nibble.

codes  [..., K]    uint8, 0..15, K even
bytes  [..., K/2]  uint8
"""

from torch import Tensor, stack, uint8


def pack(codes: Tensor) -> Tensor:
    """[..., K] codes of 0..15 -> [..., K/2] bytes; the inverse of `unpack`."""
    codes = codes.to(uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """[..., K/2] bytes -> [..., K] codes of 0..15; the inverse of `pack`."""
    return stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
