"""How weights and activations are held in few bits: packing and reference arithmetic in plain torch, a format a file.

`FORMATS` is the whole list. A format's reference is the oracle: every faster kernel is tested against it.
"""

from .format import Codes, Format, Grid
from .int4 import INT4
from .nvfp4 import NVFP4
from .rotation import BLOCK
from .w4a8 import W4A8
from .w4a16 import W4A16
from .w8a8 import W8A8

FORMATS: dict[str, Format] = {f.name: f for f in (W4A8, INT4, NVFP4, W4A16, W8A8)}
AUTO = W4A8.name  # of Config(precision="auto")
FEW_ROWS = W4A16.name  # of a linear with so few rows that rounding its input would gain no time
EIGHT_BITS = W8A8.name  # of what 4 bits would harm


def codes_of(precision: str) -> Codes:
    """How a format holds activations. Raises ValueError for one that leaves them 16-bit."""
    codes = FORMATS[precision].codes
    if codes is None:
        known = ", ".join(f.name for f in FORMATS.values() if f.codes is not None)
        raise ValueError(f"{precision} has no quantized activations, use one of {known}, or svdq::gemv")
    return codes


def can_rotate(precision: str, k: int) -> bool:
    """Whether an input of so many channels may be rotated before it is rounded."""
    codes = FORMATS[precision].codes
    return codes is not None and codes.rotates and k % BLOCK == 0


def check_rotation(precision: str, k: int, shift: float) -> None:
    """Raises ValueError where an input is not rotated."""
    if shift or not can_rotate(precision, k):
        raise ValueError(f"{precision} does not rotate an input of {k} channels and shift {shift}")


__all__ = [
    "AUTO",
    "EIGHT_BITS",
    "FEW_ROWS",
    "FORMATS",
    "Codes",
    "Format",
    "Grid",
    "can_rotate",
    "check_rotation",
    "codes_of",
]
