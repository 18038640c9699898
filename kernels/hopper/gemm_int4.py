"""The int4 (W4A4) GEMM for sm_90, in Gluon: asynchronous e4m3 `wgmma`, rescaled in fp32 after every group of 64.

    y = sum_g (qx_g q_g^T) * ascales_g * wscales_g - offset + bias + xd up^T, then the epilogue

    qx         [M, Kp]    e4m3, exact integers -8..7 or 0..15 (int8 is converted)
    ascales    [M, Kp/64] fp32, the transposed view of [Kp/64, M] with rows a multiple of 4 apart (else copied)
    words      [N, P/8]   int32, signs and magnitudes (`to_words`); P = Kp rounded up to 128
    wscales    [P/64, N]  bf16; rows any multiple of 8 apart
    xd         [M, s r]   bf16 or fp16, rows `xd.stride(0)` apart
    up         [N, r]     xd's dtype; s siblings of N/s features each read r columns of xd
    bias       [N]        any float dtype, or None
    offset     [N]        fp32, or None
    y          [M, N]     bf16 or fp16; [M, N/2] of an epilogue that gates (portable/gates.py)

Every 4-bit value is an e4m3 number, and e4m3 `wgmma` leaves its sums in fp32: no conversion, two operations for each
sum of a group instead of the three that int8 needs. A group's sum is an integer below 2^13 (64 * 7 * 15), which
Hopper's 14 bits of fp8 accumulation hold exactly; tests/gpu checks it at the extremes.

The walk is that of ring.py. Of a step's two groups, the second is multiplied while the first is rescaled. ptxas allows
no more: a sum that is read while a product is in flight must be in registers of its own until nothing is in flight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from ..formats.layout import to_words
from ..operands import Gemm
from ..portable.gates import feature, split_halves
from ..portable.gemm import check_scales, sibling_features, stored_features
from ..runtime.generated import Generated
from ..runtime.launcher import check_tensor, launch
from ..runtime.target import processors
from ..runtime.tuning import choose_tile
from ..runtime.versions import aggregate, load, store, view
from .descriptors import describe, of_both_halves, plain
from .ring import GROUP, RANK_STEP, Tiles, allocate_ring, in_rows, options

GROUP_SIZE = 64
LOW = gl.constexpr("and.b32 $0, $1, 0x87878787;")
HIGH = gl.constexpr("{ .reg .b32 t; shf.r.wrap.b32 t, $1, $1, 4; and.b32 $0, t, 0x87878787; }")
UNIT = gl.constexpr(512.0)  # a magnitude of 1 is e4m3's smallest number, 2^-9


@gluon.jit
def _e4m3(p, ASM: gl.constexpr):
    """p [TN, 64] int8, the words' bytes -> one half's codes times 2^-9, [TN, 64] e4m3."""
    return gl.inline_asm_elementwise(ASM, "=r,r", [p], dtype=gl.float8e4nv, is_pure=True, pack=4)


@aggregate
class Scales:
    """Two groups' scales for each buffer: of features [STAGES, 2, TN], of tokens [STAGES, 2, TM]."""

    features: gl.shared_memory_descriptor
    tokens: gl.shared_memory_descriptor


@gluon.jit
def _copy(ring, tiles, scales, x, w, s, a, sibling, rank, k_steps, rank_steps):
    """The copying warp: every step of every tile, into the ring."""
    slot = 0
    filled = 0
    for tile in range(gl.program_id(0), tiles.tiles_m * tiles.tiles_n, gl.num_programs(0)):
        m0, n0 = tiles.origin(tile)
        own = n0 // sibling * rank
        for i in range(k_steps + rank_steps):
            ring.await_free(slot, filled)
            if i < k_steps:
                bar = ring.full.index(slot)
                mbarrier.expect(bar, ring.TM * 136 + ring.TN * 68)
                ring.load_scales(s, 2 * i, n0, bar, scales.features.index(slot))
                load(a, [2 * i, m0], bar, scales.tokens.index(slot))
                ring.load_features(w, n0, i * 64, bar, ring.weights.index(slot))
                load(x, [m0, i * 128], bar, ring.tokens.index(slot))
            else:
                ring.load_low_rank(slot, m0, n0, own, i - k_steps)
            slot = ring.after(slot)
            filled += 1
    ring.drain(slot, filled)


@gluon.jit
def _multiply(
    ring, tiles, scales, y, ys, bias, offset, extra, M, N, k_steps, rank_steps,
    BIAS: gl.constexpr, OFFSET: gl.constexpr, EPILOGUE: gl.constexpr, GATES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The multiplying warps: each tile's sums, and what is stored."""
    TM: gl.constexpr = ring.TM
    TN: gl.constexpr = ring.TN
    eight: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TM, 32])
    real: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, eight, 4)
    rows: gl.constexpr = gl.SliceLayout(1, eight)
    columns: gl.constexpr = gl.SliceLayout(0, eight)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    zero = gl.full([TN, TM], 0, gl.float32, eight)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles.tiles_m * tiles.tiles_n, gl.num_programs(0)):
        m0, n0 = tiles.origin(tile)
        acc = zero
        for _ in range(k_steps):
            ring.await_full(slot, phase)
            p = ring.weights.index(slot).load(left)
            xt = ring.tokens.index(slot)
            even = warpgroup_mma(_e4m3(p, LOW), xt.slice(0, 64, 1).permute([1, 0]), zero, use_acc=False, is_async=True)
            odd = warpgroup_mma(_e4m3(p, HIGH), xt.slice(64, 64, 1).permute([1, 0]), zero, use_acc=False, is_async=True)
            s = view(scales.features.index(slot), gl.bfloat16, [2 * TN], flat)
            a = view(scales.tokens.index(slot), gl.float32, [2 * TM], flat)
            even = warpgroup_mma_wait(1, deps=(even,))
            scale = s.slice(0, TN, 0).load(rows).to(gl.float32) * UNIT
            acc += even * scale[:, None] * a.slice(0, TM, 0).load(columns)[None, :]
            odd = warpgroup_mma_wait(0, deps=(odd,))
            scale = s.slice(TN, TN, 0).load(rows).to(gl.float32) * UNIT
            acc += odd * scale[:, None] * a.slice(TM, TM, 0).load(columns)[None, :]
            ring.hand_back(slot)
            slot, phase = ring.next(slot, phase)
        out = gl.convert_layout(acc, real, assert_trivial=True)
        rn = n0 + gl.arange(0, TN, gl.SliceLayout(1, real))
        live = rn < N
        if GATES:
            rn = feature(rn, N // 2)
        if OFFSET:
            out -= gl.load(offset + rn, mask=live, other=0.0)[:, None]
        if BIAS:
            out += gl.load(bias + rn, mask=live, other=0.0).to(gl.float32)[:, None]
        for _ in range(rank_steps):
            ring.await_full(slot, phase)
            u, d = ring.low_rank(slot)
            out = warpgroup_mma(u, d.permute([1, 0]), out, is_async=True)
            out = warpgroup_mma_wait(0, deps=(out,))
            ring.hand_back(slot)
            slot, phase = ring.next(slot, phase)
        if GATES:
            n0 = n0 // 2
            y_left, y_right = split_halves(out)
            rn = n0 + gl.arange(0, TN // 2, gl.SliceLayout(1, y_left.type.layout))
            rm = m0 + gl.arange(0, TM, gl.SliceLayout(0, y_left.type.layout))
            live = (rn < N // 2)[:, None] & (rm < M)[None, :]
            out = EPILOGUE(y_left, y_right, rn[:, None], rm[None, :], live, extra)
        elif EPILOGUE is not None:
            rm = m0 + gl.arange(0, TM, gl.SliceLayout(0, real))
            out = EPILOGUE(out, rn[:, None], rm[None, :], (rn < N)[:, None] & (rm < M)[None, :], extra)
        tma.store_wait(0)
        ys.permute([1, 0]).store(out.to(y.dtype))
        fence_async_shared()
        store(y, [m0, n0], ys)
    tma.store_wait(0)


# Sizes stay run-time values: Triton would make each 1 a constant, and compile anew for each that 16 divides.
@gluon.jit(do_not_specialize=["M", "N", "sibling", "rank", "k_steps", "rank_steps"])
def _int4_kernel(
    x, w, s, a, xd, up, y, bias, offset, extra, M, N, sibling, rank, k_steps, rank_steps,
    TM: gl.constexpr, TN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    OFFSET: gl.constexpr, EPILOGUE: gl.constexpr, GATES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    ring = allocate_ring(x, w, xd, up, TM, TN, STAGES, WARPS, GATES)
    of_features = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2, TN], in_rows(s.layout))
    of_tokens = gl.allocate_shared_memory(gl.float32, [STAGES, 2, TM], a.layout)
    ys = gl.allocate_shared_memory(y.dtype, [TM, TN // 2 if GATES else TN], y.layout)
    fence_async_shared()
    gdc_wait()
    scales = Scales(of_features, of_tokens)
    tiles = Tiles(gl.cdiv(M, TM), gl.cdiv(N, TN), TM, TN, GROUP)
    gl.warp_specialize(
        [
            (_multiply, (ring, tiles, scales, y, ys, bias, offset, extra, M, N, k_steps, rank_steps, BIAS, OFFSET,
                         EPILOGUE, GATES, WARPS)),
            (_copy, (ring, tiles, scales, x, w, s, a, sibling, rank, k_steps, rank_steps)),
        ],
        [1],
        [24],
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """One shape of the kernel: tokens (at most 128), features, buffers, multiplying warps, and programs that share a
    multiprocessor.
    """

    tm: int
    tn: int
    stages: int
    warps: int = 8
    programs: int = 1


def candidates(m: int) -> tuple[Tile, ...]:
    """Tiles worth trying for m tokens, best guess first. A product is as wide as the tile has tokens; 128 is what two
    products' registers allow. Two programs that share a multiprocessor may multiply while the other rescales.
    """
    if m <= 32:
        return (Tile(32, 128, 8),)
    if m <= 64:
        return (Tile(64, 128, 8),)
    return Tile(128, 128, 6), Tile(128, 64, 4, 4, 2)


def _by_group(ascales: Tensor) -> Tensor:
    """[M, groups] -> [groups, M] as TMA reads it: rows a multiple of 16 bytes apart."""
    t = ascales.t()
    if t.stride(1) == 1 and t.stride(0) % 4 == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0:
        return t
    padded = ascales.new_empty(t.shape[0], -(-t.shape[1] // 4) * 4)[:, : t.shape[1]]
    return padded.copy_(t)


def _check(o: Gemm) -> tuple[int, int]:
    """Raise unless the tensors are what the module says; -> M, N."""
    qx, ascales, weight = o.qx, o.ascales, o.weight
    (m, kp), n = qx.shape, o.up.shape[0]
    if kp % GROUP_SIZE:
        raise ValueError(f"qx has {kp} columns, not whole groups of {GROUP_SIZE}")
    steps = -(-kp // 128)
    check_tensor("qx", qx, qx.device, torch.float8_e4m3fn, (m, kp))
    if ascales.dtype != torch.float32 or ascales.shape != (m, kp // GROUP_SIZE) or ascales.device != qx.device:
        raise ValueError(f"ascales is {ascales.dtype} {tuple(ascales.shape)} on {ascales.device}, "
                         f"expected fp32 {(m, kp // GROUP_SIZE)} on {qx.device}")  # fmt: skip
    check_tensor("qweight", weight[0], qx.device, torch.int32, (n, steps * 16))
    check_scales("wscales", weight[1], qx.device, torch.bfloat16, (2 * steps, n))
    if o.bias is not None:
        check_tensor("bias", o.bias, qx.device, o.bias.dtype, (n,))
    if o.offset is not None:
        check_tensor("offset", o.offset, qx.device, torch.float32, (n,))
    return m, n


def gemm(o: Gemm, epilogue: Generated | None = None, tile: Tile | None = None) -> Tensor:
    """int4, operands as above that `gemm_w4a8.why_not` takes, qweight in words or planar -> y [M, N]."""
    if epilogue is not None and epilogue.auxiliary is not None:
        raise ValueError("int4 loads no auxiliary input in tiles: let the epilogue load it")
    if o.qx.dtype == torch.int8:
        o = o._replace(qx=o.qx.half().to(torch.float8_e4m3fn))
    if o.weight[0].dtype == torch.int8:
        o = o._replace(weight=(to_words(o.weight[0]), o.weight[1]))
    m, n = _check(o)
    sibling = sibling_features(o.xd, o.up, m)
    gates = epilogue is not None and epilogue.gates
    y = torch.empty(m, stored_features(n, sibling, gates), dtype=o.out_dtype, device=o.qx.device)
    if m == 0 or n == 0:
        return y
    by_group = _by_group(o.ascales)

    def run(t: Tile) -> None:
        _launch(o, by_group, sibling, y, epilogue, t)

    if tile is None:
        tile = choose_tile("gluon_int4", m, (n, y.shape[1], o.qx.shape[1]), candidates(m), run, o.qx.device)
    run(tile)
    return y


def _launch(o: Gemm, by_group: Tensor, sibling: int, y: Tensor, epilogue: Generated | None, t: Tile) -> None:
    m, (n, r) = y.shape[0], o.up.shape
    qx, xd, up, (words, wscales) = o.qx, o.xd, o.up, o.weight
    if not r:  # the descriptors must exist; no step will use them
        xd, up = qx.view(torch.bfloat16), words.view(torch.bfloat16)
    function, extra, _, gates = epilogue or (None, (), None, False)
    features = of_both_halves if gates else lambda descriptor, dim: descriptor
    arguments = (
        describe(qx, t.tm, 128),
        features(describe(words.view(torch.int8), t.tn, 64), 0),
        features(describe(wscales, 2, t.tn, plain(16)), 1),
        describe(by_group, 2, t.tm, plain(32)),
        describe(xd, t.tm, RANK_STEP.value),
        features(describe(up, t.tn, RANK_STEP.value), 0),
        describe(y, t.tm, t.tn // 2 if gates else t.tn),
        wscales if o.bias is None else o.bias,
        by_group if o.offset is None else o.offset,
        extra,
        m,
        n,
        sibling,
        r,
        wscales.shape[0] // 2,
        -(-r // RANK_STEP.value),
    )
    constants = (t.tm, t.tn, t.stages, GROUP, o.bias is not None, o.offset is not None, function, gates, t.warps)
    programs = min(-(-m // t.tm) * -(-n // t.tn), t.programs * processors(qx.device))
    launch(_int4_kernel, (programs, 1, 1), arguments, constants, **options(t.warps, t.programs))
