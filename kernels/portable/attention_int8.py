"""Attention with q and k in int8, on every GPU: plain Triton, int8 tensor cores for the first product.

    p = softmax(scale * q k^T)     q, k = codes times a scale for each token of each head (attention_codes.py)
    y = p v                        p rounded to v's type, sums in fp32

    q   [B, S, H, W]  int8, W a power of two      scales [B, H, S]  fp32
    k   [B, T, G, W]  int8                        scales [B, G, T]  fp32
    v   [B, G, T, E]  bf16 or fp16; stride 1 along E, other strides free
    y   [B, H, S, E]  v's dtype, any strides

Each head of k and v serves H / G of q's. Causal: the s-th row of q reads the first s + 1 of k and v, S = T.

A program has some rows of a head and goes along the keys, as FlashAttention does. Only the last keys are asked whether
they are there: the loop over the others has no masks. Scores are the products of codes, times the keys' scales. What
else all scores of a row are multiplied by is positive, so it can wait for the exponent, as half of a multiply-add.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launcher import launch
from ..runtime.target import amd_architecture, shared_memory
from ..runtime.tuning import choose_tile
from .attention_codes import GeneratedParts, attention_codes_int8

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """What one program takes of q, and of k in a step; its warps, and the steps whose copies are under way."""

    rows: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _attend(
    acc, total, most, q, q_scale, k, v, k_scales, start, row, T, k_token, v_token,
    KEYS: tl.constexpr, W: tl.constexpr, E: tl.constexpr, EW: tl.constexpr, LAST: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One step along the keys, from `start` on. LAST: some may not be there, or not be meant for a row."""
    token = start + tl.arange(0, KEYS)
    wide, channel = token.to(tl.int64)[:, None], tl.arange(0, EW)[None, :]
    k += wide * k_token + tl.arange(0, W)[None, :]
    v += wide * v_token + channel
    if LAST:
        there = token < T
        codes = tl.load(k, there[:, None], 0)
        scale = tl.load(k_scales + token, there, 0.0)
        values = tl.load(v, there[:, None] & (channel < E), 0.0)
    else:
        codes = tl.load(k)
        scale = tl.load(k_scales + token)
        values = tl.load(v) if E == EW else tl.load(v, channel < E, 0.0)
    scores = tl.dot(q, tl.trans(codes), out_dtype=tl.int32).to(tl.float32) * scale[None, :]
    if LAST:
        meant = there[None, :] & (token[None, :] <= row[:, None]) if CAUSAL else there[None, :]
        scores = tl.where(meant, scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1))
    p = tl.exp2(tl.fma(scores, q_scale[:, None], (higher * -q_scale)[:, None]))
    less = tl.exp2((most - higher) * q_scale)
    acc = tl.dot(p.to(values.dtype), values, acc * less[:, None])
    return acc, total * less + tl.sum(p, 1), higher


@triton.jit(do_not_specialize=["S", "T"])  # a new number of tokens is no new kernel
def _attention_int8_kernel(
    q, k, v, y, q_scales, k_scales, S, T, H, G, factor, v_sample, v_head, v_token, y_sample, y_head, y_token, y_channel,
    ROWS: tl.constexpr, KEYS: tl.constexpr, W: tl.constexpr, E: tl.constexpr, EW: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    shared = head // (H // G)
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    there = row < S
    wide = row.to(tl.int64)
    q += ((sample * S + wide) * H + head)[:, None] * W + tl.arange(0, W)[None, :]
    codes = tl.load(q, there[:, None], 0)
    q_scale = tl.load(q_scales + (sample * H + head) * S + row, there, 1.0) * factor
    k += (sample * T * G + shared) * W
    k_scales += (sample * G + shared) * T
    v += sample * v_sample + shared.to(tl.int64) * v_head

    acc = tl.zeros((ROWS, EW), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    end = min(T, first + ROWS) if CAUSAL else T
    whole = (min(T, first + 1) if CAUSAL else T) // KEYS * KEYS
    for start in tl.range(0, whole, KEYS):
        acc, total, most = _attend(
            acc, total, most, codes, q_scale, k, v, k_scales, start, row, T, G * W, v_token,
            KEYS, W, E, EW, False, CAUSAL,
        )  # fmt: skip
    for start in tl.range(whole, end, KEYS, num_stages=1):
        acc, total, most = _attend(
            acc, total, most, codes, q_scale, k, v, k_scales, start, row, T, G * W, v_token,
            KEYS, W, E, EW, True, CAUSAL,
        )  # fmt: skip

    channel = tl.arange(0, EW)[None, :]
    y += sample * y_sample + head.to(tl.int64) * y_head + wide[:, None] * y_token + channel.to(tl.int64) * y_channel
    tl.store(y, (acc / total[:, None]).to(y.dtype.element_ty), there[:, None] & (channel < E))


def tiles(channels: int, room: int, amd: str) -> tuple[Tile, ...]:
    """To be measured, the best guess first: none that spills registers. channels: of q or v, the wider one's power of
    two; room: bytes of shared memory; amd: the architecture of an AMD GPU.
    """
    if amd.startswith("gfx9"):
        return (Tile(64, 32, 4, 2),) if channels > 128 else (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2))
    if amd:
        return (Tile(32, 16, 8, 1),) if channels > 128 else (Tile(64, 32, 8, 1), Tile(128, 16, 8, 1))
    multiplies_from_shared_memory = room > 200_000  # wgmma and what came after it
    if channels > 128:
        return (Tile(64, 32, 8, 2), Tile(64, 32, 4, 2))[: 1 + multiplies_from_shared_memory]
    if channels > 64:
        more = Tile(64, 128, 4, 2) if multiplies_from_shared_memory else Tile(64, 64, 4, 2)
        return Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), more
    return Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)


def attention_int8(qk: Sequence[Sequence[Tensor]], generated: GeneratedParts, v: Tensor, y: Tensor, is_causal: bool,
                   scale: float | None, tile: Tile | None = None) -> None:  # fmt: skip
    """Into y, shapes as above. qk: the x of q's parts and of k's, of which `generated` makes q and k [B, S, H, D].

    scale: above zero; None: D ** -0.5
    """
    d, e = qk[0][0].shape[3], v.shape[3]
    q, k, q_scales, k_scales = attention_codes_int8(qk, generated)
    (b, s, h, w), (t, g) = q.shape, k.shape[1:3]
    factor = (d**-0.5 if scale is None else scale) * LOG2_E
    ew = triton.next_power_of_2(e)

    def run(tile: Tile) -> None:
        launch(_attention_int8_kernel, (triton.cdiv(s, tile.rows), h, b),
               (q, k, v, y, q_scales, k_scales, s, t, h, g, factor, *v.stride()[:3], *y.stride()),
               (tile.rows, tile.keys, w, e, ew, is_causal), num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip

    if tile is None:
        candidates = tiles(max(w, ew), shared_memory(v.device), amd_architecture(v.device))
        layer = (b, h, g, d, e, str(v.dtype), is_causal, s == t)
        tile = choose_tile("attention_int8", s, layer, candidates, run, v.device, limited=False)
    run(tile)
