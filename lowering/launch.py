"""The svdq:: operators on the fastest kernel that can run them: a table each (kernel_table.py), and what calls it.

Weights come in the kernel order (formats/layout.py), into which a packed linear is brought once. The plain order is
taken too, and is reordered in every call. docs/kernels.md shows the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.formats import FORMATS, codes_of, layout
from ..kernels.operands import Attention, Gemm, Gemv, Quantize, as_lines
from ..kernels.runtime.target import BLACKWELL, HOPPER, NVIDIA, PORTABLE, has_kernels, is_hopper
from . import attention_int8, flash3, reference
from .kernel_table import REFERENCE, Kernel, Table, takes_all
from .region import PLAIN, Part

if TYPE_CHECKING:
    from ..kernels.portable import heads as portable_heads
    from ..kernels.runtime.generated import Generated

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _with_codes(*names: str) -> tuple[str, ...]:
    """The formats whose activations are held in these codes."""
    return tuple(f.name for f in FORMATS.values() if f.codes is not None and f.codes.name in names)


def on_device(device: torch.device) -> AbstractContextManager:
    """Kernels are started on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ** quantize **


def _codes_why_not(o: Quantize) -> str | None:
    if o.x.dtype in _SIXTEEN_BIT and o.x.dtype == o.down.dtype:
        return None
    return f"x is {o.x.dtype}, down {o.down.dtype}: not one 16-bit type"


def _quantize_why_not(o: Quantize) -> str | None:
    from ..kernels.portable.quantize import MAX_RANK

    rank = o.down.shape[0]
    fits = rank % 16 == 0 and rank <= MAX_RANK
    return _codes_why_not(o) or (None if fits else f"rank {rank} is not a multiple of 16 up to {MAX_RANK}")


def _in_fp8(precision: str, device: torch.device) -> bool:
    """Whether kernels give codes as a Hopper GEMM multiplies them: e4m3, scales that lie block by block."""
    return codes_of(precision).in_fp8 and is_hopper(device)


def _hopper_quantize(o: Quantize, prologue: Generated | None, right: Tensor | None) -> tuple[Tensor, ...]:
    from ..kernels.hopper import quantize

    if not quantize.can_quantize(o, prologue, right):
        return _portable_quantize(o, prologue, right)
    return quantize.quantize(o, prologue, right, _in_fp8(o.precision, o.x.device))


def _portable_quantize(o: Quantize, prologue: Generated | None, right: Tensor | None) -> tuple[Tensor, ...]:
    from ..kernels.portable import quantize

    return quantize.quantize(o, prologue, right, _in_fp8(o.precision, o.x.device))


def _portable_codes(o: Quantize, prologue: None, right: None) -> tuple[Tensor, ...]:
    """The codes by the kernel, the low-rank product by a library."""
    qx, ascales, _ = _portable_quantize(o._replace(x=o.x.contiguous(), down=o.down[:0]), None, None)
    return qx, ascales, F.linear(o.x, o.down)


def _reference_quantize(o: Quantize, prologue: None, right: None) -> tuple[Tensor, ...]:
    return reference.quantize(*o)


_CODES, _HOPPER_CODES = _with_codes("int8", "int4", "fp4"), _with_codes("int8", "int4")
QUANTIZE = Table(
    "quantize",
    [
        Kernel("hopper_quantize", HOPPER, _HOPPER_CODES, "hopper.quantize", _quantize_why_not, _hopper_quantize),
        Kernel("portable_quantize", PORTABLE, _CODES, "portable.quantize", _quantize_why_not, _portable_quantize),
        Kernel("portable_codes", PORTABLE, _CODES, "portable.quantize", _codes_why_not, _portable_codes, fuses=False),
    ],
    _reference_quantize,
)


def takes_prologue(operands: Quantize) -> bool:
    """Whether `quantize` can run a generated prologue."""
    return QUANTIZE.choose(operands).fuses


def codes_in_fp8(x: Tensor, down: Tensor, precision: str) -> bool:
    """Whether `quantize` runs a kernel here, and that one gives e4m3 codes."""
    operands = Quantize(x, None, down, precision, 0.0)
    return _in_fp8(precision, x.device) and QUANTIZE.choose(operands).name != REFERENCE


def quantize(
    x: Tensor,
    smooth: Tensor,
    down: Tensor,
    precision: str,
    shift: float,
    rotate: bool = False,
    prologue: Generated | None = None,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.quantize` on the fastest kernel that can; a prologue and a second part of x if `takes_prologue`."""
    right = None if right is None else as_lines(right)
    with on_device(x.device):
        results = QUANTIZE.run(Quantize(x, smooth, down, precision, shift, rotate).rows(), prologue, right)
    qx, ascales, xd = (t.view(*x.shape[:-1], t.shape[1]) for t in results)
    return qx, ascales, xd


# ** gemm **


def _gemm_why_not(o: Gemm) -> str | None:
    if o.precision == "int4" and o.weight[1].dtype != torch.bfloat16:
        return f"its scales are {o.weight[1].dtype}"  # of a file from elsewhere
    return f"the low-rank branch is {o.up.dtype}" if o.up.shape[1] and o.up.dtype not in _SIXTEEN_BIT else None


def _hopper_why_not(o: Gemm) -> str | None:
    from ..kernels.hopper import gemm_w4a8

    return _gemm_why_not(o) or gemm_w4a8.why_not(o)


def _ampere_why_not(o: Gemm) -> str | None:
    from ..kernels.ampere import gemm_w4a8

    return _gemm_why_not(o) or _no_offset(o) or gemm_w4a8.why_not(o)


def _no_offset(o: Gemm) -> str | None:
    return None if o.offset is None else "its input has a shift"


def _nvfp4_why_not(o: Gemm) -> str | None:
    from ..kernels.portable import gemm_nvfp4

    above = "the scale above its scales is not one number" if o.weight[2].dim() else None
    return _gemm_why_not(o) or _no_offset(o) or above or gemm_nvfp4.why_not(o.qx.device)


def _hopper_w4a8(o: Gemm, epilogue: Generated | None) -> Tensor:
    from ..kernels.hopper import gemm_w4a8

    return gemm_w4a8.gemm(o._replace(weight=layout.to_kernel(o.precision, o.weight)), epilogue)


def _hopper_int4(o: Gemm, epilogue: Generated | None) -> Tensor:
    from ..kernels.hopper import gemm_int4

    return gemm_int4.gemm(o._replace(weight=layout.to_kernel(o.precision, o.weight, words=True)), epilogue)


def _ampere_w4a8(o: Gemm, epilogue: Generated | None) -> Tensor:
    from ..kernels.ampere import gemm_w4a8

    weight = layout.to_kernel(o.precision, o.weight)
    return gemm_w4a8.gemm(o._replace(ascales=o.ascales.contiguous(), weight=weight), epilogue)


def _portable_gemm(o: Gemm, epilogue: Generated | None) -> Tensor:
    from ..kernels.portable import gemm

    weight = layout.to_kernel(o.precision, o.weight)
    return gemm.gemm(o._replace(qx=_integers(o.qx), ascales=o.ascales.contiguous(), weight=weight), epilogue)


def _portable_nvfp4(o: Gemm, epilogue: Generated | None) -> Tensor:
    from ..kernels.portable import gemm_nvfp4

    return gemm_nvfp4.gemm(o, epilogue)


def _int8_why_not(o: Gemm) -> str | None:
    (n, k), rows = o.weight[0].shape, o.qx.shape[0]
    if rows <= 16 or n % 8 or k % 8:
        return f"{rows} rows, {n} features, {k} channels: cuBLAS takes more than 16 rows, and multiples of 8"
    return _no_offset(o)


def _cublas_int8(o: Gemm, epilogue: None) -> Tensor:
    """The integer product by a library, what follows by torch."""
    qweight, wscales = o.weight
    y = torch._int_mm(o.qx.contiguous(), qweight.t()) * o.ascales * wscales
    y = y + reference.low_rank(o.xd, o.up)
    return (y if o.bias is None else y + o.bias.float()).to(o.out_dtype)


def _reference_gemm(o: Gemm, epilogue: None) -> Tensor:
    qx = _integers(o.qx)
    plain = layout.to_plain(o.precision, tuple(o.weight), qx.shape[-1])
    return reference.gemm(*o._replace(qx=qx, weight=list(plain)))


def _integers(qx: Tensor) -> Tensor:
    """Codes as every other GEMM takes them."""
    return qx.to(torch.bfloat16).to(torch.int8) if qx.dtype == torch.float8_e4m3fn else qx


GEMM = Table(
    "gemm",
    [
        Kernel(
            "hopper_gemm_w4a8",
            HOPPER,
            ("w4a8",),
            "hopper.gemm_w4a8",
            lambda o: _hopper_why_not(o) or _no_offset(o),
            _hopper_w4a8,
        ),
        Kernel("hopper_gemm_int4", HOPPER, ("int4",), "hopper.gemm_int4", _hopper_why_not, _hopper_int4),
        Kernel("ampere_gemm_w4a8", NVIDIA, ("w4a8",), "ampere.gemm_w4a8", _ampere_why_not, _ampere_w4a8),
        Kernel("portable_gemm", PORTABLE, ("w4a8", "int4"), "portable.gemm", _gemm_why_not, _portable_gemm),
        Kernel("portable_gemm_nvfp4", BLACKWELL, ("nvfp4",), "portable.gemm_nvfp4", _nvfp4_why_not, _portable_nvfp4),
        Kernel("cublas_int8", NVIDIA, ("w8a8",), None, _int8_why_not, _cublas_int8, fuses=False),
    ],
    _reference_gemm,
)


def fuses(precision: str) -> bool:
    """Whether some kernel for a format's products runs generated epilogues."""
    return any(row.fuses and (not row.formats or precision in row.formats) for row in GEMM.rows)


def takes_epilogue(operands: Gemm) -> bool:
    """Whether `gemm` has a kernel here, which can run a generated epilogue."""
    return GEMM.choose(operands.rows()).fuses


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
    epilogue: Generated | None = None,
) -> Tensor:
    """`reference.gemm` on the fastest kernel that can; weight in either order; an epilogue if `takes_epilogue`."""
    rows = Gemm(qx, ascales, xd, weight, up, bias, offset, precision, out_dtype).rows()
    with on_device(qx.device):
        y = GEMM.run(rows, epilogue)
    return y.view(*qx.shape[:-1], y.shape[1])


# ** gemv **


def _expanded_why_not(o: Gemv) -> str | None:
    if o.x.dtype in _SIXTEEN_BIT and (o.up is None or o.up.dtype == o.x.dtype):
        return None
    return f"x is {o.x.dtype}, not 16 bits like its low-rank branch"


def _gemv_why_not(o: Gemv) -> str | None:
    from ..kernels.portable.gemv import MAX_ROWS

    rows = o.x.shape[:-1].numel()
    if o.weight[1].dtype != torch.bfloat16:
        return f"its scales are {o.weight[1].dtype}"
    return _expanded_why_not(o) or (f"{rows} rows, more than {MAX_ROWS}" if rows > MAX_ROWS else None)


def _portable_gemv(o: Gemv) -> Tensor:
    from ..kernels.portable import gemv

    return gemv.gemv(o._replace(weight=layout.to_kernel(o.precision, o.weight)))


def _expanded_gemv(o: Gemv) -> Tensor:
    """A 16-bit copy of the weight, and a library's product."""
    k = o.x.shape[-1]
    rows = o.x
    w = layout.dequantize(o.precision, tuple(o.weight), k).to(rows.dtype)
    if o.xd is not None and o.up is not None:
        rows, w = torch.cat((rows, o.xd), 1), torch.cat((w, o.up), 1)
    return F.linear(rows, w, None if o.bias is None else o.bias.to(rows.dtype)).to(o.out_dtype)


def _reference_gemv(o: Gemv) -> Tensor:
    return reference.gemv(*o._replace(weight=list(layout.to_plain(o.precision, tuple(o.weight), o.x.shape[-1]))))


GEMV = Table(
    "gemv",
    [
        Kernel("portable_gemv", PORTABLE, ("w4a16",), "portable.gemv", _gemv_why_not, _portable_gemv),
        Kernel("expanded_gemv", PORTABLE, (), None, _expanded_why_not, _expanded_gemv),
    ],
    _reference_gemv,
)


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
    with on_device(x.device):
        y = GEMV.run(Gemv(x, xd, weight, up, bias, precision, out_dtype).rows())
    return y.view(*x.shape[:-1], y.shape[-1])


# ** row_moments, heads **


def _moments_why_not(x: Tensor) -> str | None:
    from ..kernels.portable.row_moments import MAX_COLUMNS

    if x.dtype in _SIXTEEN_BIT and 0 < x.shape[-1] <= MAX_COLUMNS:
        return None
    return f"x is {x.dtype} {tuple(x.shape)}, not 16 bits with up to {MAX_COLUMNS} columns"


def _portable_moments(x: Tensor) -> tuple[Tensor, ...]:
    from ..kernels.portable import row_moments

    return row_moments.row_moments(x)


ROW_MOMENTS = Table(
    "row_moments",
    [Kernel("portable_row_moments", PORTABLE, (), "portable.row_moments", _moments_why_not, _portable_moments)],
    reference.row_moments,
)


def row_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.row_moments` on the fastest kernel that can."""
    with on_device(x.device):
        variance, mean, square = ROW_MOMENTS.run(as_lines(x))
    shape = (*x.shape[:-1], 1)
    return variance.view(shape), mean.view(shape), square.view(shape)


def takes_channels(channels: object) -> bool:
    """Whether the kernel can have so many channels a head."""
    return type(channels) is int and 8 <= channels <= 256 and channels & (channels - 1) == 0


def _heads_why_not(x: Tensor) -> str | None:
    if x.dtype in _SIXTEEN_BIT and takes_channels(x.shape[3]):
        return None
    return f"x is {x.dtype} with {x.shape[3]} channels, not 16 bits with a power of two from 8 to 256"


def _portable_heads(x: Tensor, functions: portable_heads.GeneratedHeads, y: Tensor, interleaved: bool) -> None:
    from ..kernels.portable import heads

    heads.run(x, y, functions, interleaved)


def _no_heads(x: Tensor, functions: Any, y: Tensor, interleaved: bool) -> None:
    raise AssertionError("a region without a kernel is evaluated in torch")


HEADS = Table(
    "head_region",
    [Kernel("portable_heads", PORTABLE, (), "portable.heads", _heads_why_not, _portable_heads)],
    _no_heads,
)


def takes_heads(x: Tensor) -> bool:
    """Whether `heads` has a kernel here."""
    return HEADS.choose(x).fuses


def heads(x: Tensor, y: Tensor, functions: portable_heads.GeneratedHeads, interleaved: bool) -> None:
    """A region over attention heads, x -> y, if `takes_heads`. Raises NoKernel if none is left that compiles it."""
    with on_device(x.device):
        HEADS.run(x, functions, y, interleaved)


# ** attention **


def _attention_why_not(o: Attention) -> str | None:
    if o.q.dtype not in _SIXTEEN_BIT:
        return f"q is {o.q.dtype}, not 16 bits"
    if o.is_causal and o.q.shape[2] != o.k.shape[2]:
        return "is_causal may begin at another corner where q and k differ in length"
    return None


def _int8_attention_why_not(o: Attention) -> str | None:
    shapes = (o.q.shape, o.k.shape, o.v.shape)
    return _attention_why_not(o) or attention_int8.why_not(o.arithmetic, *shapes, scale=o.scale)


def _attention_class(o: Attention) -> tuple:
    """`size_class`, and how the dimensions lie in memory."""
    orders = (sorted(range(4), key=lambda dim: (x.shape[dim] > 1, -x.stride(dim))) for x in (o.q, o.k, o.v))
    return str(o.q.dtype), o.is_causal, *size_class(o.q.shape, o.v.shape), *map(tuple, (*orders, o.order))


def size_class(q: Sequence[int], v: Sequence[int]) -> tuple[int, ...]:
    """Of [B, H, S, D] each: batch and lengths up to the next power of two, all else as it is."""
    (b, h, s, d), (_, g, t, e) = q, v
    return h, g, d, e, *(1 << (n - 1).bit_length() for n in (b, s, t))


def _reference_attention(o: Attention) -> Tensor:
    return o.in_order(reference.attention(o.q, o.k, o.v, o.is_causal, o.scale))


def _as_heads(o: Attention) -> list[list[Part]]:
    return [[(PLAIN, {"x": x.transpose(1, 2)})] for x in (o.q, o.k, o.v)]


_CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
TORCHS_ATTENTIONS = frozenset({_CUDNN, _FLASH, _EFFICIENT})


def _torchs_kernel(
    name: str, why_not: Callable[[Attention], str | None], operator: Callable[..., Any], *between: Any
) -> Kernel:
    """One of torch's attentions, an exact one. between: what it takes between v and is_causal, here no mask and no
    dropout.
    """

    def torchs_answer(o: Attention) -> str | None:
        """torch knows of sizes, strides, GPUs, and what the user has switched off."""
        ask = getattr(torch.backends.cuda, f"can_use_{name}_attention")
        grouped = o.q.shape[1] != o.k.shape[1]
        can = ask(torch.backends.cuda.SDPAParams(o.q, o.k, o.v, None, 0.0, o.is_causal, grouped))
        return None if can else f"torch.backends.cuda.{ask.__name__} refuses"

    def run(o: Attention) -> Tensor:
        return o.in_order(operator(o.q, o.k, o.v, *between, o.is_causal, scale=o.scale)[0])

    return Kernel(name, PORTABLE, (), None, lambda o: why_not(o) or torchs_answer(o), run, fuses=False)


ATTENTION = Table(
    "attention",
    [
        _torchs_kernel("cudnn", _attention_why_not, _CUDNN, None, False, 0.0),
        Kernel(
            "flash3",
            HOPPER,
            (),
            None,
            lambda o: _attention_why_not(o) or flash3.why_not(o),
            flash3.attention,
            fuses=False,
        ),
        Kernel(
            "flash3_fp8",
            HOPPER,
            (),
            "portable.attention_codes",
            lambda o: _attention_why_not(o) or flash3.why_not_fp8(o.arithmetic, o.q.shape, o.k.shape, o.v.shape),
            lambda o: flash3.attention_fp8(_as_heads(o), o.is_causal, o.scale, o.order),
            fuses=False,
        ),
        _torchs_kernel("flash", _attention_why_not, _FLASH, 0.0),
        _torchs_kernel("efficient", takes_all, _EFFICIENT, None, False, 0.0),
        Kernel(
            "attention_int8",
            PORTABLE,
            (),
            "portable.attention_int8",
            _int8_attention_why_not,
            lambda o: attention_int8.attention(_as_heads(o)[:2], o.v, o.is_causal, o.scale, o.order),
            fuses=False,
        ),
    ],
    _reference_attention,
    _attention_class,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    order: list[int],
    arithmetic: str = "exact",
) -> Tensor:
    """`reference.attention` on the kernel that was fastest, its result in this order (operands.Attention)."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))  # as the kernels want a head's channels
    with on_device(q.device):
        return ATTENTION.run(Attention(q, k, v, is_causal, scale, order, arithmetic))


# ** round_weight **


class Rounding(NamedTuple):
    """A weight [N, K] fp32, and how much an error in each of its K columns counts, or None."""

    w: Tensor
    precision: str
    importance: Tensor | None


def _portable_round(o: Rounding) -> Any:
    from ..kernels.portable import round_weight

    return round_weight.round_weight(o.precision, o.w, o.importance)


def _reference_round(o: Rounding) -> Any:
    tensors = FORMATS[o.precision].quantize_weight(o.w, o.importance)
    return tensors, FORMATS[o.precision].dequantize_weight(*tensors)[:, : o.w.shape[1]]


ROUND_WEIGHT = Table(
    "round_weight",
    [
        Kernel(
            "portable_round_weight",
            PORTABLE,
            tuple(f.name for f in FORMATS.values() if f.rounding is not None),
            "portable.round_weight",
            takes_all,
            _portable_round,
        )
    ],
    _reference_round,
)


def round_weight(precision: str, w: Tensor, importance: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """A weight [N, K] fp32 in the format's tensors, in the plain order, and [N, K] fp32 that they stand for."""
    with on_device(w.device):
        return ROUND_WEIGHT.run(Rounding(w, precision, importance))


# ** round_columns **


class Columns(NamedTuple):
    """Channels of a weight that are rounded one after another: kernels/portable/round_columns.py has the shapes."""

    target: Tensor
    wanted: Tensor
    weights: Tensor
    steps: tuple[Tensor, ...]
    precision: str


def _portable_columns(o: Columns) -> Any:
    from ..kernels.portable import round_columns

    return round_columns.round_columns(o.precision, o.target, o.wanted, o.weights, *o.steps)


def _reference_columns(o: Columns) -> Any:
    grid = FORMATS[o.precision].grid
    assert grid is not None
    rounded, lost = torch.empty_like(o.wanted), torch.empty_like(o.wanted)
    for k in range(o.wanted.shape[1]):
        wanted = torch.baddbmm(o.wanted[:, k : k + 1], o.weights[:, None, :k, k], lost[:, :k]).squeeze(1)
        rounded[:, k] = grid.nearest(wanted, *(step[:, k] for step in o.steps))
        lost[:, k] = o.target[:, k] - rounded[:, k]
    return rounded, lost


ROUND_COLUMNS = Table(
    "round_columns",
    [
        Kernel(
            "portable_round_columns",
            PORTABLE,
            tuple(f.name for f in FORMATS.values() if f.grid is not None),
            "portable.round_columns",
            takes_all,
            _portable_columns,
        )
    ],
    _reference_columns,
)


def round_columns(
    precision: str, target: Tensor, wanted: Tensor, weights: Tensor, steps: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Channels of a weight on their format's grid, each corrected by the errors of those before it, and what was lost:
    all [G, C, N] fp32, C at most 64. steps: of Format.grid, for each entry.
    """
    with on_device(target.device):
        return ROUND_COLUMNS.run(Columns(target, wanted, weights, steps, precision))


def kernels_for(precision: str, device: torch.device) -> str:
    """What a format's linears run on a device, in words."""
    return ", ".join(f"{table.operator} by {table.preferred(device, precision)}" for table in _tables(precision))


def has_kernels_for(precision: str, device: torch.device) -> bool:
    """Whether a format's products run as fast as a device can; on a CPU, where all are the reference's, they do."""
    table = _tables(precision)[-1]
    return device.type == "cpu" or table.preferred(device, precision) != REFERENCE


def _tables(precision: str) -> tuple[Table, ...]:
    return (GEMV,) if FORMATS[precision].codes is None else (QUANTIZE, GEMM)


def in_device_order(
    precision: str, weight: tuple[Tensor, ...], device: torch.device | None = None
) -> tuple[Tensor, ...]:
    """A weight as the kernels of a device read it, by default of its own; where there are none it stays as it is, since
    any order is right.
    """
    device = device or weight[0].device
    return layout.to_kernel(precision, weight, words=is_hopper(device)) if has_kernels(device) else weight
