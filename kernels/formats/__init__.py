"""How weights and activations are held in few bits: packing and reference arithmetic in plain torch, a format a file.

`FORMATS` is the whole list. A format's reference is the oracle: every faster kernel is tested against it.
"""

from .format import Format
from .int4 import INT4
from .nvfp4 import NVFP4
from .w4a8 import W4A8
from .w4a16 import W4A16

FORMATS: dict[str, Format] = {f.name: f for f in (W4A8, INT4, NVFP4, W4A16)}

__all__ = ["FORMATS", "Format"]
