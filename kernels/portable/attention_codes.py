"""q, k and v of an attention in 8 bits, from what q, k and v are made of: no 16-bit head is written.

    q, k, v = regions(x)   each of parts, one after another along the tokens (text and image, say)

    e4m3, a scale for each head of each sample, as FlashAttention-3 multiplies them
    ->  qq [B, S, H, D], kq, vq [B, T, H, D]   float8_e4m3fn
        scales [3, B, H] of q, k, v            fp32: a value is its code times its head's scale

    int8, a scale for each token of each head, as attention_int8.py multiplies them; v is not asked for
    ->  qq [B, S, H, W], kq [B, T, G, W]       int8, W the power of two from D on; zeros behind each half
        scales [B, H, S] and [B, G, T]         fp32

    x      [B, T', H, D] bf16 or fp16, one a part
    extra  of each part x and what its region reads besides (lowering/generate_heads.py)

A scale for a token is known to the program that has the token. One that belongs to all tokens of a head cannot be known
to a kernel that reads them once. It need not: e4m3 is a format of floating point, and has its three bits of mantissa
over 15 powers of two. So a first launch, of a few microseconds, looks at SAMPLES tokens of each part, and leaves room
for values HEADROOM times as large; beyond that they saturate.

k less the mean of its samples, channel by channel: any vector that is the same for all keys moves all logits of a row
alike, which softmax does not see, and what all keys share takes no bits (SageAttention, arXiv 2410.02367).

bench/results/attention-codes.json: with this room errors are those of the largest magnitude and the whole mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from ..runtime.launcher import early_launch, launch
from ..runtime.target import launches_early, processors
from .codes import ROUND
from .early import gdc_wait
from .heads import choose, load_halves, store_halves

SAMPLES = 32
HEADROOM = tl.constexpr(256.0)
E4M3_MAX = tl.constexpr(448.0)
SMALLEST = tl.constexpr(1e-30)  # a scale, so that its reciprocal is a number


class GeneratedParts(NamedTuple):
    """Generated code for all parts, and what it reads. `part` is a number that is known when the code is compiled.

    start        (part, sample, token, extra) -> where x's first head of a token begins, and how far apart heads are
    load         (part, sample, token, extra, D) -> a tuple: what is the same for all heads of some tokens
    function     (part, x_0, x_1, that tuple, sample, token, head, extra, D) -> the halves of the value, fp32 like x's
    interleaved  whether halves are the even and the odd channels
    """

    start: JITFunction
    load: JITFunction
    function: JITFunction
    operands: tuple[Tensor | int, ...]
    interleaved: bool


@triton.jit
def _load(at, D: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """`load_halves`, with zeros where D is no power of two and WIDTH is the next one."""
    if WIDTH == D:
        return load_halves(at, D, INTERLEAVED)
    else:
        columns = tl.arange(0, WIDTH // 2)[None, :]
        there = columns < D // 2
        low, high = tl.load(at + columns, there, 0.0), tl.load(at + D // 2 + columns, there, 0.0)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _store(at, a, b, D: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    if WIDTH == D:
        store_halves(at, a, b, D, INTERLEAVED)
    else:
        columns = tl.arange(0, WIDTH // 2)[None, :]
        there = columns < D // 2
        tl.store(at + columns, a.to(at.dtype.element_ty), there)
        tl.store(at + D // 2 + columns, b.to(at.dtype.element_ty), there)


@triton.jit(do_not_specialize=["B", "H", "tokens"])
def _attention_samples_kernel(
    centres, scales, B, H, tokens, extra,
    D: tl.constexpr, WIDTH: tl.constexpr, Q: tl.constexpr, QK: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr,
    INTERLEAVED: tl.constexpr, START: tl.constexpr, LOAD: tl.constexpr, FUNCTION: tl.constexpr,
    PER_TOKEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program for a head of q, k or v; PER_TOKEN: of k, its centre alone. Parts below Q are q's, from QK on v's."""
    if EARLY:
        gdc_wait()
    own, which = tl.program_id(0), (1 if PER_TOKEN else tl.program_id(1))
    sample, head = (own // H).to(tl.int64), (own % H).to(tl.int64)
    steps = 2 * tl.arange(0, COUNT)[:, None] + 1
    total_0 = tl.zeros((1, WIDTH // 2), tl.float32)
    least_0, most_0 = total_0 + float("inf"), total_0 - float("inf")
    total_1, least_1, most_1 = total_0, least_0, most_0
    for part in tl.static_range(PARTS):
        if which == (0 if part < Q else 1 if part < QK else 2):
            token = (steps * tokens[part] // (2 * COUNT)).to(tl.int64)
            x, stride = START(part, sample, token, extra)
            held = LOAD(part, sample, token, extra, D)
            x_0, x_1 = _load(x + head * stride, D, WIDTH, INTERLEAVED)
            a, b = FUNCTION(part, x_0, x_1, held, sample, token, head, extra, D)
            least_0 = tl.minimum(least_0, tl.min(a, 0, keep_dims=True))
            least_1 = tl.minimum(least_1, tl.min(b, 0, keep_dims=True))
            most_0 = tl.maximum(most_0, tl.max(a, 0, keep_dims=True))
            most_1 = tl.maximum(most_1, tl.max(b, 0, keep_dims=True))
            total_0 += tl.sum(a, 0, keep_dims=True)
            total_1 += tl.sum(b, 0, keep_dims=True)
    part_of_a_sum = tl.where(which == 1, 1.0 / ((QK - Q) * COUNT), 0.0)
    mean_0, mean_1 = total_0 * part_of_a_sum, total_1 * part_of_a_sum
    if not PER_TOKEN:
        most = tl.maximum(tl.maximum(most_0 - mean_0, mean_0 - least_0), tl.maximum(most_1 - mean_1, mean_1 - least_1))
        scale = tl.max(most) * (HEADROOM / E4M3_MAX)
        tl.store(scales + which * B * H + own, tl.where(scale > 0, tl.maximum(scale, SMALLEST), 1.0))
    if which == 1:
        _store(centres + own.to(tl.int64) * D + tl.zeros((1, 1), tl.int32), mean_0, mean_1, D, WIDTH, INTERLEAVED)


@triton.jit
def _saturated(v):
    return tl.clamp(v, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(v):
    """[tokens, N] fp32 -> [tokens, 1]. As bits: there what is no number is the largest, which floating point skips."""
    bits = tl.abs(v).to(tl.int32, bitcast=True)
    return tl.max(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _token_scale(a, b):
    """Of halves; no number where a value is none or infinite, so that no result of it looks like one."""
    most = tl.maximum(_largest(a), _largest(b), propagate_nan=tl.PropagateNan.ALL)
    return tl.where(most < float("inf"), tl.maximum(most * (1.0 / 127.0), SMALLEST), float("nan"))


@triton.jit
def _in_int8(v, inverse):
    return (v * inverse + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit(do_not_specialize=["B", "H", "tokens", "begins", "lengths"])
def _attention_codes_kernel(
    codes, scales, centres, B, H, group, tokens, begins, lengths, extra,
    D: tl.constexpr, WIDTH: tl.constexpr, Q: tl.constexpr, QK: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, START: tl.constexpr, LOAD: tl.constexpr, FUNCTION: tl.constexpr,
    PER_TOKEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program for some heads of some tokens of a part, as in heads.py. The parts' blocks follow one another.

    codes, scales: a tensor each for q, k and, unless PER_TOKEN, v. These have H heads, and q a group for each of them.
    """
    if EARLY:
        gdc_wait()
    block = tl.program_id(0)
    for part in tl.static_range(PARTS):
        rows = B * tokens[part]
        if (block >= 0) & (block * TOKENS < rows):
            which: tl.constexpr = 0 if part < Q else 1 if part < QK else 2
            of_group = group if which == 0 else 1
            heads, count = H * of_group, HEADS * of_group
            first = tl.program_id(1).to(tl.int64) * count
            row = tl.minimum(block * TOKENS + tl.arange(0, TOKENS), rows - 1)[:, None]
            sample, token = (row // tokens[part]).to(tl.int64), (row % tokens[part]).to(tl.int64)
            own = sample * heads
            x, stride = START(part, sample, token, extra)
            held = LOAD(part, sample, token, extra, D)
            next_0, next_1 = _load(x + first * stride, D, WIDTH, INTERLEAVED)
            for i in tl.range(count):
                x_0, x_1 = next_0, next_1
                head = first + i
                following = tl.minimum(head + 1, first + count - 1)
                next_0, next_1 = _load(x + following * stride, D, WIDTH, INTERLEAVED)
                a, b = FUNCTION(part, x_0, x_1, held, sample, token, head, extra, D)
                if which == 1:
                    c_0, c_1 = _load(centres + (own + head) * D, D, WIDTH, INTERLEAVED)
                    a, b = a - c_0, b - c_1
                place = (sample * lengths[which] + begins[part] + token) * heads + head
                if PER_TOKEN:
                    scale = _token_scale(a, b)
                    tl.store(scales[which] + (own + head) * lengths[which] + begins[part] + token, scale)
                    a, b = _in_int8(a, 1.0 / scale), _in_int8(b, 1.0 / scale)
                    _store(codes[which] + place * WIDTH, a, b, WIDTH, WIDTH, INTERLEAVED and WIDTH == D)
                else:
                    inverse = 1.0 / tl.load(scales[which] + own + head)
                    a, b = _saturated(a * inverse), _saturated(b * inverse)
                    _store(codes[which] + place * D, a, b, D, WIDTH, INTERLEAVED)
        block -= tl.cdiv(rows, TOKENS)


def attention_codes(parts: Sequence[Sequence[Tensor]], generated: GeneratedParts) -> tuple[Tensor, ...]:
    """In e4m3 -> qq, kq, vq, and their scales [B, H], as above.

    parts: the x of q, of k and of v, none empty; D a power of two, or with regions that do nothing a multiple of 16
    """
    x = parts[0][0]
    b, _, h, d = x.shape
    codes = tuple(x.new_empty(b, n, h, d, dtype=torch.float8_e4m3fn) for n in _lengths(parts))
    scales = x.new_empty(3, b, h, dtype=torch.float32)
    _write(parts, generated, codes, tuple(scales.unbind()), scales)
    return *codes, *scales.unbind()


def attention_codes_int8(parts: Sequence[Sequence[Tensor]], generated: GeneratedParts) -> tuple[Tensor, ...]:
    """In int8 -> qq, kq, and their scales, as above.

    parts: the x of q and of k, none empty; D a power of two, or with regions that do nothing even
    """
    x = parts[0][0]
    b, d = x.shape[0], x.shape[3]
    width = triton.next_power_of_2(d)
    sizes = [(n, each[0].shape[2]) for n, each in zip(_lengths(parts), parts, strict=True)]
    codes = tuple(x.new_empty(b, n, h, width, dtype=torch.int8) for n, h in sizes)
    scales = tuple(x.new_empty(b, h, n, dtype=torch.float32) for n, h in sizes)
    _write(parts, generated, codes, scales, None)
    return *codes, *scales


def _lengths(parts: Sequence[Sequence[Tensor]]) -> list[int]:
    return [sum(x.shape[1] for x in xs) for xs in parts]


def _write(parts: Sequence[Sequence[Tensor]], generated: GeneratedParts, codes: tuple[Tensor, ...],
           scales: tuple[Tensor, ...], of_heads: Tensor | None) -> None:  # fmt: skip
    """of_heads: the scales in one, if they are of heads, and are to be chosen from samples."""
    every = [x for xs in parts for x in xs]
    b, _, _, d = every[0].shape
    h = parts[1][0].shape[2]
    group = every[0].shape[2] // h
    lengths = _lengths(parts)
    begins = tuple(sum(x.shape[1] for x in xs[:i]) for xs in parts for i in range(len(xs)))
    centres = every[0].new_empty(b, h, d, dtype=torch.float32)
    tokens = tuple(x.shape[1] for x in every)
    early, per_token = launches_early(every[0].device), of_heads is None
    width = triton.next_power_of_2(d)
    tile = choose(b * sum(lengths), h, width, processors(every[0].device))
    kinds = (d, width, len(parts[0]), len(parts[0]) + len(parts[1]), len(every))
    functions = (generated.interleaved, generated.start, generated.load, generated.function, per_token, early)
    launch(_attention_samples_kernel, (b * h, 1 if per_token else 3, 1),
           (centres, centres if of_heads is None else of_heads, b, h, tokens, generated.operands),
           (*kinds, SAMPLES, *functions), num_warps=8, **early_launch(early))  # fmt: skip
    blocks = sum(triton.cdiv(b * n, tile.tokens) for n in tokens)
    launch(_attention_codes_kernel, (blocks, h // tile.heads, 1),
           (codes, scales, centres, b, h, group, tokens, begins, tuple(lengths), generated.operands),
           (*kinds, tile.tokens, tile.heads, *functions), num_warps=tile.warps, **early_launch(early))  # fmt: skip
