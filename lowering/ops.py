"""The svdq:: operators: schema, shape function and implementation of each, in one place.

Compiled code and Inductor's caches know them by name only, so an operator whose meaning changes gets a new name.
All take inputs with any number of leading dimensions, zero rows included. The fused ones hold a region (region.py): the
same operator with what the graph did just before or after it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.formats import FORMATS, codes_of
from ..kernels.operands import Attention, Gemm, Gemv
from . import attention_of_heads as of_heads
from . import fused, heads, join, launch, sequences
from .packed import PackedLinear
from .region import GIVEN, parse
from .replay import Replayed, Sites
from .transforms import keep_from_autocast, map_over_rows

_LIBRARY = torch.library.Library("svdq", "DEF")
Quantized = tuple[Tensor, Tensor, Tensor]  # qx, ascales, xd
# By the names that Inductor has for them, without "torch.ops.".
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def _define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    compiled: Callable[..., Any] | None = None,
    layout: torch.Tag = torch.Tag.flexible_layout,
    rows: int = 0,
) -> None:
    """compiled: what Inductor's code calls instead.

    layout  flexible_layout: or Inductor would copy inputs into the strides that they had when the model was traced
    rows    how many of the operands, the first ones, are rows with any number of leading dimensions: vmap adds one
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, layout))
    replayed = Replayed(implementation)
    IMPLEMENTATIONS[f"svdq.{name}.default"] = compiled or replayed
    _LIBRARY.impl(name, replayed, "CompositeExplicitAutograd")
    torch.library.register_fake(f"svdq::{name}", fake, lib=_LIBRARY)
    keep_from_autocast(_LIBRARY, name)
    if rows:
        map_over_rows(_LIBRARY, name, rows)


def _fake_quantize(
    x: Tensor, smooth: Tensor, down: Tensor, precision: str, shift: float, rotate: bool = False
) -> Quantized:
    lead, fp8 = x.shape[:-1], launch.codes_in_fp8(x, down, precision)
    qx, ascales = codes_of(precision).empty(x, lead, smooth.shape[0], fp8)
    ascales = ascales.view(*lead, ascales.shape[-1])
    return qx, ascales, x.new_empty(*lead, down.shape[0], dtype=down.dtype)


def _fake_fused_quantize(
    operands: list[Tensor],
    smooth: Tensor,
    down: Tensor,
    precision: str,
    shift: float,
    region: str,
    rotate: bool = False,
) -> Quantized:
    return _fake_quantize(operands[0], smooth, down, precision, shift)


def _fake_gemm(*args: Any) -> Tensor:
    o = Gemm(*args)
    return o.qx.new_empty(*o.qx.shape[:-1], o.up.shape[0], dtype=o.out_dtype)


def _fake_fused_gemm(*args: Any) -> Tensor:
    *plain, _operands, region = args
    y = _fake_gemm(*plain)
    return y.new_empty(*y.shape[:-1], y.shape[-1] // len(GIVEN[parse(region).kind]))


def _fake_row_moments(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(3))


def _fake_gemv(*args: Any) -> Tensor:
    o = Gemv(*args)
    return o.x.new_empty(*o.x.shape[:-1], o.weight[0].shape[0], dtype=o.out_dtype)


_define(
    "quantize(Tensor x, Tensor smooth, Tensor down, str precision, float shift, bool rotate=False)"
    " -> (Tensor qx, Tensor ascales, Tensor xd)",
    launch.quantize,
    _fake_quantize,
    rows=1,
)
_define(
    "gemm(Tensor qx, Tensor ascales, Tensor xd, Tensor[] weight, Tensor up, Tensor? bias, Tensor? offset,"
    " str precision, ScalarType out_dtype) -> Tensor",
    launch.gemm,
    _fake_gemm,
    rows=3,
)
_define(
    "gemv(Tensor x, Tensor? xd, Tensor[] weight, Tensor? up, Tensor? bias, str precision, ScalarType out_dtype)"
    " -> Tensor",
    launch.gemv,
    _fake_gemv,
    rows=2,
)

_define(
    "fused_quantize(Tensor[] operands, Tensor smooth, Tensor down, str precision, float shift, str region,"
    " bool rotate=False) -> (Tensor qx, Tensor ascales, Tensor xd)",
    fused.quantize,
    _fake_fused_quantize,
)
_define(
    "fused_gemm(Tensor qx, Tensor ascales, Tensor xd, Tensor[] weight, Tensor up, Tensor? bias, Tensor? offset,"
    " str precision, ScalarType out_dtype, Tensor[] operands, str region) -> Tensor",
    fused.gemm,
    _fake_fused_gemm,
)
_define(
    "row_moments(Tensor x) -> (Tensor variance, Tensor mean, Tensor square)",
    launch.row_moments,
    _fake_row_moments,
)
_define(
    "head_region(Tensor[] operands, str region, bool heads_first=False) -> Tensor",
    heads.head_region,
    heads.empty_result,
)
_define(
    "attention(Tensor q, Tensor k, Tensor v, bool is_causal, float? scale, int[] order,"
    ' str arithmetic="exact") -> Tensor',
    launch.attention,
    lambda *operands: Attention(*operands).empty_result(),
    layout=torch.Tag.needs_fixed_stride_order,  # torch's kernels want the channels of a head side by side
)
_define(
    "attention_of_heads(Tensor[] operands, int[] reads, str region, int[] counts, bool is_causal, float? scale,"
    " int[] order, str arithmetic) -> Tensor",
    of_heads.attention_of_heads,
    of_heads.empty_result,
)
_define("joined(Tensor[] parts, int dim) -> Tensor", torch.cat, join.empty_result, join.joined)
_define(
    "sequence(Tensor[] tensors, SymInt[] sizes, str program) -> Tensor[]",
    partial(sequences.run, operators=sequences.namespace(IMPLEMENTATIONS)),  # of those above
    sequences.run,
)

# Whose result, in compiled code, may be an operand's memory: nothing else may be written there once it has been read.
BORROWING = frozenset({"svdq.joined.default"})

quantize = torch.ops.svdq.quantize.default
fused_quantize = torch.ops.svdq.fused_quantize.default
gemm = torch.ops.svdq.gemm.default
fused_gemm = torch.ops.svdq.fused_gemm.default
gemv = torch.ops.svdq.gemv.default
head_region = torch.ops.svdq.head_region.default
row_moments = torch.ops.svdq.row_moments.default
joined = torch.ops.svdq.joined.default
attention = torch.ops.svdq.attention.default
attention_of_heads = torch.ops.svdq.attention_of_heads.default
sequence = torch.ops.svdq.sequence.default


def sites(name: str) -> Callable[..., Callable[..., Any]]:
    """One place in Inductor's code that calls the operator `name`, "svdq.gemm.default" say: `sites(name)(*sizes)` is
    what it calls where the symbols that the operands depend on have these values.
    """
    found = IMPLEMENTATIONS[name]
    return Sites(found).of if isinstance(found, Replayed) else lambda *sizes: found


def site(name: str) -> Callable[..., Any]:
    """`sites(name)()`, as code calls it that Inductor has kept since an earlier version."""
    return sites(name)()


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """A whole quantized linear, run eagerly: x [..., K] -> [..., N]."""
    weight = list(packed.weight)
    if FORMATS[packed.precision].quantize_activation is None:
        xd = torch.nn.functional.linear(x, packed.down.to(x.dtype)) if packed.rank else None
        return gemv(x, xd, weight, packed.up if packed.rank else None, bias, packed.precision, out_dtype)
    shared = packed.shared
    qx, ascales, xd = quantize(x, shared.smooth, shared.down, packed.precision, shared.shift, shared.rotate)
    own = xd[..., packed.rank_start : packed.rank_start + packed.rank]
    return gemm(qx, ascales, own, weight, packed.up, bias, packed.offset, packed.precision, out_dtype)
