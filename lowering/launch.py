"""Pick, for each svdq:: operator call, the kernel that can run it, or the reference.

    quantize  all three     triton_quantize   any CUDA GPU from sm_80, 16-bit x
    gemm      w4a8          gluon_gemm        sm_90, 16-bit result, out features a multiple of 8
    gemm      int4          gluon_int4        sm_90, likewise
    gemm      w4a8, int4    triton_gemm       the rest
    gemm      nvfp4         triton_nvfp4      sm_100, sm_120
    row_moments             triton_moments    any CUDA GPU from sm_80, 16-bit x
    gemv      w4a16         triton_gemv       up to 64 rows; above, a 16-bit copy of the weight and a library product
    heads                   triton_heads      any CUDA GPU from sm_80, 16-bit, D a power of two
    everything else         reference         CPU, other GPUs, fp32 models

Weights come in the kernel order (formats/layout.py), into which a packed linear is brought once. The plain order is
taken too, and is reordered in every call.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.formats import FORMATS, layout
from . import reference

if TYPE_CHECKING:
    from ..kernels.portable import heads as triton_heads
    from ..kernels.runtime.generated import Hook

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU that Triton can compile for; (0, 0) elsewhere."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return 0, 0
    if not torch.cuda.is_available():  # fake tensors know devices that are not there
        return 0, 0
    return torch.cuda.get_device_capability(device)


def has_kernels(device: torch.device) -> bool:
    """Whether weights on this device should lie in the kernel order."""
    return _capability(device) >= (8, 0)


def in_device_order(precision: str, weight: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A weight as its device's kernels read it; where there are none it stays as it is, since any order is right."""
    device = weight[0].device
    if not has_kernels(device):
        return weight
    return layout.to_kernel(precision, weight, words=_gluon_works(device))


@cache
def _gluon_works(device: torch.device) -> bool:
    """Gluon is experimental: a release may lack what kernels/hopper/gemm_w4a8.py needs."""
    if _capability(device) != (9, 0):
        return False
    try:
        from ..kernels.hopper import gemm_w4a8 as gluon_gemm  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def round_weight(precision: str, w: Tensor, importance: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """A weight [N, K] fp32 in the format's tensors, in the plain order, and [N, K] fp32 that they stand for."""
    if has_kernels(w.device):
        from ..kernels.portable import round_weight as triton_round

        if precision in triton_round.PRECISIONS:
            with torch.cuda.device(w.device):
                return triton_round.round_weight(precision, w, importance)
    tensors = FORMATS[precision].quantize_weight(w, importance)
    return tensors, FORMATS[precision].dequantize_weight(*tensors)[:, : w.shape[1]]


def _rows(t: Tensor) -> Tensor:
    """[..., C] -> [rows, C], a view wherever the leading dimensions are evenly spaced."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _neighbours(t: Tensor) -> Tensor:
    """`_rows`, with the columns of a row side by side."""
    rows = _rows(t)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def takes_prologue(x: Tensor, down: Tensor) -> bool:
    """Whether `quantize` can run a generated prologue."""
    return _has_quantize(x, down) and _rank_fits(down.shape[0])


def _rank_fits(rank: int) -> bool:
    from ..kernels.portable import quantize as triton_quantize

    return rank % 16 == 0 and rank <= triton_quantize.MAX_RANK


def _has_quantize(x: Tensor, down: Tensor) -> bool:
    return x.dtype in _SIXTEEN_BIT and x.dtype == down.dtype and has_kernels(x.device)


def int4_in_fp8(x: Tensor, down: Tensor, precision: str) -> bool:
    """Whether `quantize` gives int4 codes as gluon_int4 multiplies them: e4m3, with scales that lie group by group."""
    return precision == "int4" and _has_quantize(x, down) and _gluon_works(x.device)


def quantize(
    x: Tensor,
    smooth: Tensor,
    down: Tensor,
    precision: str,
    shift: float,
    prologue: Hook | None = None,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.quantize` on the fastest kernel that can; a prologue and a second part of x if `takes_prologue`."""
    if not _has_quantize(x, down):
        return reference.quantize(x, smooth, down, precision, shift)
    from ..kernels.portable import quantize as triton_quantize

    rows, rank = _neighbours(x), down.shape[0]
    right = None if right is None else _neighbours(right)
    fp8 = int4_in_fp8(x, down, precision)
    with torch.cuda.device(x.device):
        if _rank_fits(rank):
            qx, ascales, xd = triton_quantize.quantize(
                rows, smooth, down.contiguous(), precision, shift, prologue, right, fp8
            )
        else:
            rows = rows.contiguous()
            qx, ascales, _ = triton_quantize.quantize(rows, smooth, down[:0], precision, shift, fp8=fp8)
            xd = F.linear(rows, down)
    lead = x.shape[:-1]
    return qx.view(*lead, qx.shape[1]), ascales.view(*lead, ascales.shape[1]), xd.view(*lead, rank)


@cache
def _nvfp4_works(device: torch.device) -> bool:
    """Whether this GPU and this Triton have 4-bit floating-point products."""
    if _capability(device) < (10, 0):
        return False
    from ..kernels.portable import gemm_nvfp4 as triton_nvfp4

    try:
        triton_nvfp4.compute_target(device.index)
    except RuntimeError:
        return False
    return True


def takes_epilogue(qx: Tensor, up: Tensor, offset: Tensor | None, precision: str) -> bool:
    """Whether `gemm` has a kernel here, which can run a generated epilogue."""
    if not has_kernels(qx.device) or (up.shape[1] and up.dtype not in _SIXTEEN_BIT):
        return False
    return precision != "nvfp4" or (offset is None and _nvfp4_works(qx.device))


def _integers(qx: Tensor) -> Tensor:
    """Codes as every other GEMM takes them."""
    return qx.to(torch.bfloat16).to(torch.int8) if qx.dtype == torch.float8_e4m3fn else qx


def gemm(
    qx: Tensor,
    ascales: Tensor,
    xd: Tensor,
    weight: list[Tensor],
    up: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    precision: str,
    out_dtype: torch.dtype,
    epilogue: Hook | None = None,
) -> Tensor:
    """`reference.gemm` on the fastest kernel that can; weight in either order; an epilogue if `takes_epilogue`."""
    if not takes_epilogue(qx, up, offset, precision):
        qx = _integers(qx)
        plain = layout.to_plain(precision, tuple(weight), qx.shape[-1])
        return reference.gemm(qx, ascales, xd, list(plain), up, bias, offset, precision, out_dtype)
    from ..kernels.portable import gemm as triton_gemm
    from ..kernels.portable import gemm_nvfp4 as triton_nvfp4

    packed = tuple(weight) if precision == "int4" else layout.to_kernel(precision, tuple(weight))
    lead = qx.shape[:-1]
    qx, ascales, xd, up = _rows(qx), _rows(ascales), _rows(xd), up.contiguous()
    with torch.cuda.device(qx.device):
        if precision == "nvfp4":
            y = triton_nvfp4.gemm(qx, ascales, xd, packed, up, bias, out_dtype, epilogue)
            return y.view(*lead, y.shape[1])
        if precision in ("w4a8", "int4") and _gluon_works(qx.device):
            from ..kernels.hopper import gemm_int4 as gluon_int4
            from ..kernels.hopper import gemm_w4a8 as gluon_gemm

            if gluon_gemm.can_gemm(qx, xd, up, out_dtype):
                if precision == "int4":
                    words = layout.to_kernel(precision, packed, words=True)
                    y = gluon_int4.gemm(qx, ascales, xd, words, up, bias, offset, out_dtype, epilogue)
                    return y.view(*lead, y.shape[1])
                if offset is None:
                    y = gluon_gemm.gemm(qx, ascales, xd, packed, up, bias, out_dtype, epilogue)
                    return y.view(*lead, y.shape[1])
        packed = layout.to_kernel(precision, packed)
        qx, ascales = _integers(qx), ascales.contiguous()
        y = triton_gemm.gemm(precision, qx, ascales, xd, packed, up, bias, offset, out_dtype, epilogue)
    return y.view(*lead, y.shape[1])


def takes_heads(x: Tensor) -> bool:
    """Whether `heads` has a kernel here."""
    return x.dtype in _SIXTEEN_BIT and has_kernels(x.device)


def heads(x: Tensor, y: Tensor, region: triton_heads.Region, interleaved: bool) -> None:
    """A region over attention heads, x -> y, if `takes_heads`."""
    from ..kernels.portable import heads as triton_heads

    with torch.cuda.device(x.device):
        triton_heads.run(x, y, region, interleaved)


def gemv(
    x: Tensor,
    xd: Tensor | None,
    weight: list[Tensor],
    up: Tensor | None,
    bias: Tensor | None,
    precision: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """`reference.gemv` on the fastest kernel that can; weight in either order."""
    k = x.shape[-1]
    if x.dtype not in _SIXTEEN_BIT or not has_kernels(x.device) or (up is not None and up.dtype != x.dtype):
        plain = layout.to_plain(precision, tuple(weight), k)
        return reference.gemv(x, xd, list(plain), up, bias, precision, out_dtype)
    from ..kernels.portable import gemv as triton_gemv

    rows = _rows(x).contiguous()
    low_rank = None if xd is None else _rows(xd)
    if rows.shape[0] <= triton_gemv.MAX_ROWS:
        packed = layout.to_kernel(precision, tuple(weight))
        with torch.cuda.device(x.device):
            y = triton_gemv.gemv(rows, low_rank, packed, None if up is None else up.contiguous(), bias, out_dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
    plain = layout.to_plain(precision, tuple(weight), k)
    w = FORMATS[precision].dequantize_weight(*plain)[:, :k].to(x.dtype)
    if low_rank is not None and up is not None:
        rows, w = torch.cat((rows, low_rank), 1), torch.cat((w, up), 1)
    y = F.linear(rows, w, None if bias is None else bias.to(x.dtype)).to(out_dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def row_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.row_moments` on the fastest kernel that can."""
    if x.dtype not in _SIXTEEN_BIT or not has_kernels(x.device):
        return reference.row_moments(x)
    from ..kernels.portable import row_moments as triton_moments

    rows, lead = _neighbours(x), x.shape[:-1]
    with torch.cuda.device(x.device):
        variance, mean, square = triton_moments.row_moments(rows)
    return variance.view(*lead, 1), mean.view(*lead, 1), square.view(*lead, 1)
