"""svdq::attention_of_heads: attention and what makes its q, k and v out of linears' results, in one operator.

    y = attention_of_heads([q, w, k, v], [0, 1, 2, 1, 3], "heads(x, a0: D); ... | heads(x, a0: D); ... | heads(x)",
                           [1, 1], False, None, order, "fp8")

The text has the parts of q, of k and of v one after another (heads.py); `counts` says how many are q's and how many are
k's. `reads` has the operands of all, as places in the list of tensors: what q and k share is there once, since a tensor
that is two operands keeps a call from being replayed. What follows is svdq::attention's.

In one, because who attends decides what heads should be: 16 bits, or codes and scales, which nobody should have to make
in a pass of their own over 16 bits. So the rows are whole ways, and are measured with all that they cost.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.operands import empty_in_order
from ..kernels.runtime.target import HOPPER, PORTABLE
from . import attention_int8, flash3, heads, launch
from .kernel_table import Kernel, Table, takes_all
from .region import IN_THE_MIDDLE, INTERLEAVED, PLAIN, Part


class OfHeads(NamedTuple):
    """first: the first part's tensor; parts: of q, of k and of v; the rest as in operands.Attention."""

    first: Tensor
    parts: tuple[list[Part], list[Part], list[Part]]
    is_causal: bool
    scale: float | None
    order: list[int]
    arithmetic: str

    def shapes(self) -> list[tuple[int, ...]]:
        """Of q, k and v, [B, H, S, D]."""
        blocks = [[values["x"].shape for _, values in each] for each in self.parts]
        return [(each[0][0], each[0][2], sum(shape[1] for shape in each), each[0][3]) for each in blocks]


def _why_not_codes(o: OfHeads) -> str | None:
    q, k, _ = o.shapes()
    if any(values["x"].dtype not in (torch.bfloat16, torch.float16) for each in o.parts for _, values in each):
        return "heads that are not of 16 bits"
    if o.is_causal and q[2] != k[2]:
        return "is_causal may begin at another corner where q and k differ in length"
    used = {step.operation for each in o.parts for region, _ in each for step in region.steps}
    return "rotations of two kinds" if used & IN_THE_MIDDLE and used & INTERLEAVED else None


def _why_not_fp8(o: OfHeads) -> str | None:
    return _why_not_codes(o) or flash3.why_not_fp8(o.arithmetic, *o.shapes())


def _why_not_int8(o: OfHeads) -> str | None:
    return _why_not_codes(o) or attention_int8.why_not(o.arithmetic, *o.shapes(), scale=o.scale)


def _fp8(o: OfHeads) -> Tensor:
    return flash3.attention_fp8(o.parts, o.is_causal, o.scale, o.order)


def _int8(o: OfHeads) -> Tensor:
    q, k, v = o.parts
    return attention_int8.attention((q, k), _whole(v).transpose(1, 2), o.is_causal, o.scale, o.order)


def _exact(o: OfHeads) -> Tensor:
    q, k, v = (_whole(each).transpose(1, 2) for each in o.parts)
    return launch.attention(q, k, v, o.is_causal, o.scale, o.order)


def _whole(parts: list[Part]) -> Tensor:
    if all(region == PLAIN for region, _ in parts):
        xs = [values["x"] for _, values in parts]
        return xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    return heads.run(parts)


def _shape_class(o: OfHeads) -> tuple:
    q, _, v = o.shapes()
    counts = tuple(map(len, o.parts))
    return str(o.first.dtype), o.is_causal, *launch.size_class(q, v), counts, tuple(o.order)


ATTENTION_OF_HEADS = Table(
    "attention_of_heads",
    [
        Kernel("exact_heads", PORTABLE, (), None, takes_all, _exact, fuses=False),
        Kernel("flash3_fp8_heads", HOPPER, (), "portable.attention_codes", _why_not_fp8, _fp8, fuses=False),
        Kernel("attention_int8_heads", PORTABLE, (), "portable.attention_int8", _why_not_int8, _int8, fuses=False),
    ],
    _exact,
    _shape_class,
)


def attention_of_heads(
    operands: list[Tensor],
    reads: list[int],
    region: str,
    counts: list[int],
    is_causal: bool,
    scale: float | None,
    order: list[int],
    arithmetic: str,
) -> Tensor:
    """By the way that was fastest, its result in this order."""
    o = record(operands, reads, region, counts, is_causal, scale, order, arithmetic)
    with launch.on_device(o.first.device):
        return ATTENTION_OF_HEADS.run(o)


def empty_result(operands: list[Tensor], *more: Any) -> Tensor:
    """A tensor for the result; also the operator's shape function."""
    o = record(operands, *more)
    q, _, v = o.shapes()
    return empty_in_order(o.first, (*q[:3], v[3]), o.order)


def record(operands: list[Tensor], reads: list[int], region: str, counts: list[int], *more: Any) -> OfHeads:
    """The operator's arguments, put in order."""
    parts = heads.with_values([operands[i] for i in reads], region)
    q, k = counts
    return OfHeads(parts[0][1]["x"], (parts[:q], parts[q : q + k], parts[q + k :]), *more)
