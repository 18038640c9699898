"""Attention with q and k in 8 bits, by a kernel of our own (kernels/portable/attention_int8.py), where the user allows
it: of heads that are there, or of what makes them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.operands import empty_in_order
from .region import Part

MIN_CHANNELS, MAX_CHANNELS = 32, 256
SMALLEST_SCALE = 1e-6  # times that of q no product is lost in fp32


def why_not(
    arithmetic: str, q: Sequence[int], k: Sequence[int], v: Sequence[int], *, scale: float | None
) -> str | None:
    """Of operands [B, H, S, D] with these shapes, which may lie anywhere."""
    if arithmetic != "int8":
        return "int8 is not allowed"
    if any(d % 8 or not MIN_CHANNELS <= d <= MAX_CHANNELS for d in (q[3], v[3])):
        return f"heads of {q[3]} and {v[3]} channels, not multiples of 8 from {MIN_CHANNELS} to {MAX_CHANNELS}"
    if not (0 not in (*q, *k) and q[1] % k[1] == 0 and max(q[0], q[1]) < 2**16):
        return f"q {list(q)} and k {list(k)}: nothing, or more than a launch takes"
    if scale is not None and not SMALLEST_SCALE < scale < math.inf:
        return f"scale is {scale}, not above {SMALLEST_SCALE}"
    return None if torch.backends.cuda.flash_sdp_enabled() else "torch.backends.cuda.enable_flash_sdp is off"


def attention(
    heads: Sequence[Sequence[Part]], v: Tensor, is_causal: bool, scale: float | None, order: list[int]
) -> Tensor:
    """y [B, H, S, E] as `operands.Attention` says, of what makes q and k, some parts each, and of v [B, G, T, E]."""
    from ..kernels.portable.attention_int8 import attention_int8
    from .generate_heads import bind_heads

    xs, generated = bind_heads(heads)
    v = v if v.stride(3) == 1 else v.contiguous()
    (b, _, h, _), s = xs[0][0].shape, sum(x.shape[1] for x in xs[0])
    y = empty_in_order(v, (b, h, s, v.shape[3]), order)
    attention_int8(xs, generated, v, y, is_causal, scale)
    return y
