"""FlashAttention-3 for sm_90, where the optional package fa3-fwd is installed: in 16 bits and, where the user allows
it, in 8 (kernels/portable/attention_codes.py).

Its operator is called past its Python interface, whose autograd takes longer than a launch.
"""

import logging
import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from ..kernels.operands import Attention
from .region import Part

log = logging.getLogger("svdq_compile.lowering")

PACKAGE = "fa3-fwd"
ARGUMENTS = frozenset(("q_descale", "k_descale", "v_descale", "softmax_scale", "is_causal", "num_splits"))
MAX_CHANNELS, MAX_CHANNELS_FP8 = 256, 128


@cache
def missing() -> str | None:
    """Why it cannot be had; None if it can."""
    try:
        import_module("fa3_fwd._C")
        arguments = {argument.name for argument in torch.ops.fa3_fwd.fwd.default._schema.arguments}
    except Exception as error:  # another torch, CUDA or C library: whatever a binary's loading gives rise to
        if isinstance(error, ModuleNotFoundError) and error.name in ("fa3_fwd", "fa3_fwd._C"):
            return f"{PACKAGE} is not installed (pip install {PACKAGE})"
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"{PACKAGE} cannot be loaded ({type(error).__name__}: {first_line:.120})"
    return None if arguments >= ARGUMENTS else f"{PACKAGE} is of another version: pip install {PACKAGE}==0.0.3"


def why_not(o: Attention) -> str | None:
    """Of 16-bit operands."""
    reason = _shapes_why_not(*(x.shape for x in (o.q, o.k, o.v)))
    if reason is None and not all(map(_is_copied_by_tma, (o.q, o.k, o.v))):
        return "heads or tokens that do not begin at multiples of 16 bytes"
    return reason or _absent()


def _shapes_why_not(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> str | None:
    """Of operands [B, H, S, D]."""
    d = q[3]
    if v[3] != d or d % 8 or d > MAX_CHANNELS:
        return f"heads of {d} and {v[3]} channels, not both the same multiple of 8 up to {MAX_CHANNELS}"
    return None if math.prod(q) and math.prod(k) else "there is nothing to attend to"


def _is_copied_by_tma(x: Tensor) -> bool:
    strides = (stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride % 8 == 0 and stride < 2**31 for stride in strides)


def _absent() -> str | None:
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.backends.cuda.enable_flash_sdp is off"
    return missing()


def why_not_fp8(arithmetic: str, q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> str | None:
    """The same in 8 bits, of operands with these shapes, which may lie anywhere."""
    if arithmetic != "fp8":
        return "8 bits are not allowed"
    if q[1] != k[1] or q[3] % 16 or q[3] > MAX_CHANNELS_FP8:
        return f"grouped heads, or channels that are no multiple of 16 up to {MAX_CHANNELS_FP8}"
    reason = _shapes_why_not(q, k, v) or _absent()
    if reason is not None and reason == missing():
        _tell(reason)
    return reason


@cache
def _tell(reason: str) -> None:
    log.warning("svdquant: attention='fp8' has no kernel here, %s: attention is exact", reason)


def attention(o: Attention) -> Tensor:
    """y [B, H, S, D] as `operands.Attention` says."""
    return o.in_order(_forward(o, (None,) * 3))


def attention_fp8(heads: Sequence[Sequence[Part]], is_causal: bool, scale: float | None, order: list[int]) -> Tensor:
    """The same of e4m3 codes, of what makes q, k and v: some parts each, not all of them empty."""
    from ..kernels.portable.attention_codes import attention_codes
    from .generate_heads import bind_heads

    xs, generated = bind_heads(heads)
    *codes, q_scale, k_scale, v_scale = attention_codes(xs, generated)
    q, k, v = (code.transpose(1, 2) for code in codes)
    o = Attention(q, k, v, is_causal, scale, order)
    return o.in_order(_forward(o, (q_scale, k_scale, v_scale)).to(xs[0][0].dtype))  # of codes it makes bf16


def _forward(o: Attention, scales: tuple) -> Tensor:
    """Of 16-bit operands, or of codes with their scales [B, H] -> [B, H, S, D]."""
    names = ("q_descale", "k_descale", "v_descale")
    y = torch.ops.fa3_fwd.fwd.default(
        *(x.transpose(1, 2) for x in (o.q, o.k, o.v)),
        **dict(zip(names, scales, strict=True)),
        softmax_scale=o.q.shape[3] ** -0.5 if o.scale is None else o.scale,
        is_causal=o.is_causal,
        num_splits=1,
    )[0]
    return y.transpose(1, 2)
