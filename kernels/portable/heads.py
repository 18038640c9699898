"""A fused region over attention heads: norm and rotation of q or k, read once and written once.

    y = region(x)

    x      [B, T, H, D]  bf16 or fp16; stride 1 along D, other strides free
    y      [B, T, H, D]  x's dtype, likewise: some of the tokens of something longer, say
    extra  what the region reads besides x (lowering/generate_heads.py)

D is a power of two. A program takes some heads of some tokens. It holds a value in two halves, the even and the odd
channels, so that rotating a pair moves nothing; loads and stores join them and are 16 bytes wide. Regions that rotate
halves instead (INTERLEAVED false) hold the lower and the upper channels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from ..runtime.launcher import early_launch, launch
from ..runtime.target import launches_early, processors
from .early import gdc_wait

MAX_CHANNELS = 256


class Tile(NamedTuple):
    """What one program takes, and its warps."""

    tokens: int
    heads: int
    warps: int


class GeneratedHeads(NamedTuple):
    """Generated code, and what it reads besides x.

    load      (sample, token, extra, D) -> a tuple: what is the same for all heads of some tokens, loaded once
    function  (x_0, x_1, that tuple, sample, token, head, extra, D) -> the halves of y, fp32 like those of x
    """

    load: JITFunction
    function: JITFunction
    operands: tuple[Tensor | int, ...]


@triton.jit
def load_halves(at, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """D values at each of `at` [tokens, 1] -> two halves [tokens, D / 2] in fp32."""
    if INTERLEAVED:
        v = tl.load(at + tl.arange(0, D)[None, :]).to(tl.float32)
        return tl.split(tl.reshape(v, (v.shape[0], D // 2, 2)))
    else:
        at = at + tl.arange(0, D // 2)[None, :]
        low, high = tl.load(at), tl.load(at + D // 2)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def store_halves(at, a, b, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        v = tl.reshape(tl.join(a, b), (a.shape[0], D)).to(at.dtype.element_ty)
        tl.store(at + tl.arange(0, D)[None, :], v)
    else:
        at = at + tl.arange(0, D // 2)[None, :]
        tl.store(at, a.to(at.dtype.element_ty))
        tl.store(at + D // 2, b.to(at.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "T"])  # a new number of tokens is no new kernel
def _heads_kernel(
    x, y, rows, T, x_sample, x_token, x_head, y_sample, y_token, y_head, extra,
    D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, INTERLEAVED: tl.constexpr,
    LOAD: tl.constexpr, FUNCTION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
    # Past the end the last row is computed and stored again: no masks.
    row = tl.minimum(tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), rows - 1)[:, None]
    sample, token = (row // T).to(tl.int64), (row % T).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * HEADS
    x += sample * x_sample + token * x_token
    y += sample * y_sample + token * y_token
    held = LOAD(sample, token, extra, D)
    next_0, next_1 = load_halves(x + first * x_head, D, INTERLEAVED)
    for i in tl.range(HEADS):
        x_0, x_1 = next_0, next_1
        head = first + i
        next_0, next_1 = load_halves(x + tl.minimum(head + 1, first + HEADS - 1) * x_head, D, INTERLEAVED)
        a, b = FUNCTION(x_0, x_1, held, sample, token, head, extra, D)
        store_halves(y + head * y_head, a, b, D, INTERLEAVED)


def choose(rows: int, heads: int, channels: int, multiprocessors: int) -> Tile:
    """Many heads read the tables once, but eight programs a multiprocessor keep its memory busy.

    4608 x 24 x 128 on an H100, which copies it in 24.3 us: 28.0 with 12 heads a program, 28.7 with 2, 32.1 with 24.
    """
    tokens = max(1, 1024 // channels)
    blocks = triton.cdiv(rows, tokens)
    divisors = [n for n in range(1, min(heads, 12) + 1) if heads % n == 0]
    enough = [n for n in divisors if blocks * (heads // n) >= 8 * multiprocessors]
    return Tile(tokens, max(enough, default=1), 4)


def run(x: Tensor, y: Tensor, functions: GeneratedHeads, interleaved: bool = True, tile: Tile | None = None) -> None:
    """y = region(x), both [B, T, H, D]."""
    if x.dtype not in (torch.bfloat16, torch.float16) or y.dtype != x.dtype or y.device != x.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, y {y.dtype} on {y.device}, expected one 16-bit type and device")
    if x.ndim != 4 or y.shape != x.shape or (y.numel() and y.stride(3) != 1):
        raise ValueError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}, strides {y.stride()}, expected one "
                         "[B, T, H, D] with neighbouring channels")  # fmt: skip
    if x.shape[3] & (x.shape[3] - 1) or not 8 <= x.shape[3] <= MAX_CHANNELS:
        raise ValueError(f"D is {x.shape[3]}, expected a power of two from 8 to {MAX_CHANNELS}")
    if x.numel() == 0:
        return
    if x.stride(3) != 1:
        x = x.contiguous()
    samples, tokens, heads, channels = x.shape
    rows = samples * tokens
    tile = tile or choose(rows, heads, channels, processors(x.device))
    arguments = (x, y, rows, tokens, *x.stride()[:3], *y.stride()[:3], functions.operands)
    early = launches_early(x.device)
    constants = (channels, tile.tokens, tile.heads, interleaved, functions.load, functions.function, early)
    launch(_heads_kernel, (triton.cdiv(rows, tile.tokens), heads // tile.heads, 1), arguments, constants,
           num_warps=tile.warps, **early_launch(early))  # fmt: skip
