"""FlashAttention-3 for sm_90, where the optional package fa3-fwd is installed: in 16 bits and, where the user allows
it, in 8 (kernels/portable/attention_codes.py).

Its operator is called past its Python interface, whose autograd takes longer than a launch.
"""

import logging
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from ..kernels.operands import Attention

log = logging.getLogger("svdq_compile.lowering")

PACKAGE = "fa3-fwd"
ARGUMENTS = frozenset(("q_descale", "k_descale", "v_descale", "softmax_scale", "is_causal", "num_splits"))
MAX_CHANNELS, MAX_CHANNELS_FP8 = 256, 128
MAX_HEADS = 65535  # a CUDA grid's second dimension


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
    d = o.q.shape[3]
    if o.v.shape[3] != d or d % 8 or d > MAX_CHANNELS:
        return f"heads of {d} and {o.v.shape[3]} channels, not both the same multiple of 8 up to {MAX_CHANNELS}"
    if not o.q.numel() or not o.k.numel():
        return "there is nothing to attend to"
    if not all(map(_is_copied_by_tma, (o.q, o.k, o.v))):
        return "heads or tokens that do not begin at multiples of 16 bytes"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.backends.cuda.enable_flash_sdp is off"
    return missing()


def _is_copied_by_tma(x: Tensor) -> bool:
    strides = (stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride % 8 == 0 and stride < 2**31 for stride in strides)


def why_not_fp8(o: Attention) -> str | None:
    """The same in 8 bits."""
    if o.arithmetic != "fp8":
        return "8 bits are not allowed"
    if o.q.shape[1] != o.k.shape[1] or o.q.shape[3] % 16 or o.q.shape[3] > MAX_CHANNELS_FP8:
        return f"grouped heads, or channels that are no multiple of 16 up to {MAX_CHANNELS_FP8}"
    if o.q.shape[0] * o.q.shape[1] > MAX_HEADS:
        return f"more than {MAX_HEADS} heads of all samples"
    reason = why_not(o)
    if reason is not None and reason == missing():
        _tell(reason)
    return reason


@cache
def _tell(reason: str) -> None:
    log.warning("svdquant: attention='fp8' has no kernel here, %s: attention is exact", reason)


def attention(o: Attention) -> Tensor:
    """y [B, H, S, D] as `operands.Attention` says."""
    return o.in_order(_forward(o.q.transpose(1, 2), o.k.transpose(1, 2), o.v.transpose(1, 2), (None,) * 3, o))


def attention_fp8(o: Attention) -> Tensor:
    """The same of e4m3 codes."""
    from ..kernels.portable.attention_codes import attention_codes

    q, k, v, *scales = attention_codes(o.q, o.k, o.v)
    return o.in_order(_forward(q, k, v, tuple(scales), o).to(o.q.dtype))  # of codes it makes bf16


def _forward(q: Tensor, k: Tensor, v: Tensor, scales: tuple, o: Attention) -> Tensor:
    """[B, S, H, D] each, and three scales [B, H] or None -> [B, H, S, D]."""
    names = ("q_descale", "k_descale", "v_descale")
    scale = q.shape[3] ** -0.5 if o.scale is None else o.scale
    y = torch.ops.fa3_fwd.fwd.default(
        q, k, v, **dict(zip(names, scales, strict=True)), softmax_scale=scale, is_causal=o.is_causal, num_splits=1
    )[0]
    return y.transpose(1, 2)
