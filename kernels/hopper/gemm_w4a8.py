"""The w4a8 GEMM for sm_90, in Gluon: asynchronous int8 `wgmma` with the weights unpacked in registers.

    y = (qx (q s)^T) * ascales * wscales + bias + xd up^T, then the epilogue

    qx         [M, Kp]     int8
    ascales    [M, 1]      fp32
    qweight    [N, P/2]    int8, planar (layout.py); P = Kp rounded up to 128
    subscales  [P/128, N]  int16, two groups' scales in a word; rows any multiple of 8 apart
    wscales    [N]         fp32
    xd         [M, s r]    bf16 or fp16, rows `xd.stride(0)` apart
    up         [N, r]      xd's dtype; s siblings of N/s features each read r columns of xd
    bias       [N]         any float dtype, or None
    auxiliary  [M, N]      bf16 or fp16, rows `auxiliary.stride(0)` apart: the epilogue's, or None
    y          [M, N]      bf16 or fp16

Warps have roles. One warp walks over tiles of TN features by TM tokens and has the copy engine (TMA) fill a ring of
STAGES buffers, as far ahead as they are free; all others multiply. A tile is computed transposed: weights are the left
operand, which `wgmma` takes from registers, and while one half of a step's codes is multiplied the other is expanded.
A tile has P/128 such steps, then, after the scales, one for every 32 of the rank, with `xd` and `up` in the same
buffers. TMA cuts off at the edges of M, N, K and r, so nothing here is masked but the vectors. Where r is no
multiple of 32, columns of the next sibling may come along; they meet zeros in the place of `up`.

A tile ends in two halves along its tokens: the low-rank product of one runs while the other is scaled or stored. All
that the next tile needs to know is worked out while the last product of this one runs. `auxiliary` is loaded early in a
tile's walk, into the buffer through which the result will leave.

Tiles that would leave most of the GPU idle in a last round are cut along K into parts. A part leaves its int32 sums in
`partial` and counts itself; the one that comes last adds the others' and finishes the tile. Integer sums do not depend
on the order, so the result is the same bit for bit whichever comes last.

Three things keep the tensor cores fed without touching the generated PTX, on Triton 3.6 and 3.9:
- The multiplying warps are the default partition of `warp_specialize`. A worker partition runs inside a dispatch loop,
  for which ptxas serializes every `wgmma` (C7512); the default partition is straight code.
- A buffer is handed back through a named barrier (`bar.arrive`, no waiting). Gluon's own `mbarrier.arrive` stops all
  multiplying warps twice.
- Vectors for the epilogue are loaded before the walk over K.
"""

from dataclasses import dataclass
from functools import cache

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

from ..portable.gemm import check_auxiliary, check_gemm, sibling_features
from ..portable.unpack import FOUR_8, FOUR_128, SCALED_CONSTRAINTS, SCALED_HIGH, SCALED_LOW
from ..runtime.generated import Generated
from ..runtime.launcher import Descriptor, launch, zeroed_counters
from ..runtime.target import processors
from ..runtime.tuning import choose

RANK_STEP = gl.constexpr(32)  # 64 bytes a row, as wide as a step's packed weights
# Renamed after Triton 3.6.
_view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _tile_of(t, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Grouped order: GROUP token tiles in a row use the same weights, which then come from L2."""
    width = GROUP * tiles_n
    first = t // width * GROUP
    inside = t % width
    size = gl.minimum(tiles_m - first, GROUP)
    pm = first + inside % GROUP
    pn = inside // GROUP
    if size < GROUP:  # rarely: a division takes some 200 clocks
        pm = first + inside % size
        pn = inside // size
    return pm, pn


@gluon.jit
def _expand(p, s, ASM: gl.constexpr):
    """p [TN, 64] int8, s [TN, 1] int8 -> (code - 8) * s, [TN, 64] int8."""
    s = s.to(gl.int32)
    c = FOUR_128 - s * FOUR_8
    return gl.inline_asm_elementwise(ASM, SCALED_CONSTRAINTS, [p, s, c], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _hand_back(slot, THREADS: gl.constexpr):
    """A multiplying thread is done with a buffer. Named barriers 15, 14, ...; Triton itself counts up from 0."""
    gl.inline_asm_elementwise(
        "bar.arrive $1, $2; mov.u32 $0, $1;", "=r,r,r", [15 - slot, gl.to_tensor(THREADS)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _await_free(slot, THREADS: gl.constexpr):
    """Wait until every multiplying thread has handed the buffer back."""
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; mov.u32 $0, $1;", "=r,r,r", [15 - slot, gl.to_tensor(THREADS)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _rank_tokens(xs, slot, xd, TM: gl.constexpr):
    """xd's [TM, 32] in a buffer's first half: Triton 3.8 views memory only as something of the same size."""
    return _view(xs.index(slot), xd.dtype, [2 * TM, RANK_STEP], xd.layout).slice(0, TM, 0)


@gluon.jit
def _work(item, whole, parts, part_steps, k_steps):
    """Work item -> its tile, first step and number of steps. The tiles from `whole` on are `parts` items each."""
    tile = item
    first = 0
    count = k_steps
    if item >= whole:
        cut = item - whole
        tile = whole + cut // parts
        first = cut % parts * part_steps
        count = gl.minimum(part_steps, k_steps - first)
    gl.assume(count > 0)
    return tile, first, count


@gluon.jit
def _copy(
    x, w, s, xd, up, xs, ws, ss, full, sibling, rank, tiles_m, tiles_n, items, whole, parts, part_steps, k_steps,
    rank_steps,
    TM: gl.constexpr, TN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, THREADS: gl.constexpr,
):  # fmt: skip
    """The copying warp: every step of every work item, into the ring."""
    slot = 0
    filled = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, first, count = _work(item, whole, parts, part_steps, k_steps)
        pm, pn = _tile_of(tile, tiles_m, tiles_n, GROUP)
        own = pn * TN // sibling * rank
        for i in range(count + rank_steps):
            if filled >= STAGES:
                _await_free(slot, THREADS)
            bar = full.index(slot)
            if i < count:
                step = first + i
                mbarrier.expect(bar, TM * 128 + TN * 66)
                _load(s, [step, pn * TN], bar, ss.index(slot))
                _load(w, [pn * TN, step * 64], bar, ws.index(slot))
                _load(x, [pm * TM, step * 128], bar, xs.index(slot))
            else:
                r = (i - count) * RANK_STEP
                mbarrier.expect(bar, (TM + TN) * 2 * RANK_STEP)
                _load(up, [pn * TN, r], bar, _view(ws.index(slot), up.dtype, [TN, RANK_STEP], up.layout))
                _load(xd, [pm * TM, own + r], bar, _rank_tokens(xs, slot, xd, TM))
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            filled += 1
    slot = gl.where(filled < STAGES, 0, slot)
    for _ in range(gl.minimum(filled, STAGES)):  # leave no barrier half arrived at
        _await_free(slot, THREADS)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    slot += 1
    return gl.where(slot == STAGES, 0, slot), gl.where(slot == STAGES, phase ^ 1, phase)


@gluon.jit
def _add_other_parts(acc, partial, counters, item, whole, parts, offsets, TILE: gl.constexpr):
    """Leave this part's sums and count it; the last one of its tile adds the others'. -> sums, whether the last."""
    cut = item - whole
    own = cut % parts
    first = partial + (cut - own).to(gl.int64) * TILE
    gl.store(first + own * TILE + offsets, acc)
    _barrier()
    arrived = gl.atomic_add(counters + cut // parts, 1)  # acquires and releases: the others' sums are visible
    if arrived == parts - 1:
        for other in range(parts):
            if other != own:
                acc += gl.load(first + other * TILE + offsets, cache_modifier=".cg")
        gl.store(counters + cut // parts, 0)  # for the next call
    return acc, arrived == parts - 1


@gluon.jit
def _vectors(
    ascales, wscales, bias, m0, n0, M, N,
    TM: gl.constexpr, TN: gl.constexpr, BIAS: gl.constexpr, line: gl.constexpr, rows: gl.constexpr,
):  # fmt: skip
    """A tile's ascales [TM], wscales and bias [TN]."""
    tokens = m0 + gl.arange(0, TM, line)
    a = gl.load(ascales + tokens, mask=tokens < M, other=0.0)
    features = n0 + gl.arange(0, TN, rows)
    b = gl.load(wscales + features, mask=features < N, other=0.0)
    shift = b
    if BIAS:
        shift = gl.load(bias + features, mask=features < N, other=0.0)
    return a, b, shift


@gluon.jit
def _halves(acc, layout: gl.constexpr):
    """[TN, TM] -> two times [TN, TM/2]: other registers, nothing moves."""
    h: gl.constexpr = acc.shape[1] // 2
    first, second = gl.split(gl.permute(gl.reshape(acc, [acc.shape[0], 2, h]), [0, 2, 1]))
    return gl.convert_layout(first, layout, assert_trivial=True), gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def _scaled(acc, a, b, shift, BIAS: gl.constexpr):
    out = acc.to(gl.float32) * a[None, :] * b[:, None]
    if BIAS:
        out += shift.to(gl.float32)[:, None]
    return out


@gluon.jit
def _rank_step(xs, ws, xd, up, slot, TM: gl.constexpr, TN: gl.constexpr):
    """What a step of the low-rank product multiplies: up [TN, 32], and xd^T [32, TM/2] for each half."""
    h: gl.constexpr = TM // 2
    u = _view(ws.index(slot), up.dtype, [TN, RANK_STEP], up.layout)
    d = _rank_tokens(xs, slot, xd, TM)
    return u, d.slice(0, h, 0).permute([1, 0]), d.slice(h, h, 0).permute([1, 0])


@gluon.jit
def _finish(out, y, auxiliary, ys, m0, n0, M, N, extra, EPILOGUE: gl.constexpr, AUXILIARY: gl.constexpr):
    """Half a tile through the epilogue and on its way to y."""
    layout: gl.constexpr = out.type.layout
    if EPILOGUE is not None:
        features = (n0 + gl.arange(0, out.shape[0], gl.SliceLayout(1, layout)))[:, None]
        tokens = (m0 + gl.arange(0, out.shape[1], gl.SliceLayout(0, layout)))[None, :]
        live = (features < N) & (tokens < M)
        if AUXILIARY:
            t = _view(ys, auxiliary.dtype, ys.shape, auxiliary.layout).permute([1, 0]).load(layout).to(gl.float32)
            out = EPILOGUE(out, t, features, tokens, live, extra)
        else:
            out = EPILOGUE(out, features, tokens, live, extra)
    ys.permute([1, 0]).store(out.to(y.dtype))
    fence_async_shared()
    _store(y, [m0, n0], ys)


@gluon.jit
def _multiply(
    y, auxiliary, xs, ws, ss, as_, ys, full, loaded, xd, up, ascales, wscales, bias, partial, counters, extra, M, N,
    tiles_m, tiles_n, items, whole, parts, part_steps, k_steps, rank_steps,
    TM: gl.constexpr, TN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, LOW_RANK: gl.constexpr,
    BIAS: gl.constexpr, EPILOGUE: gl.constexpr, AUXILIARY: gl.constexpr, WARPS: gl.constexpr, THREADS: gl.constexpr,
):  # fmt: skip
    """The multiplying warps: each work item's sums, and the finished tiles."""
    HALF: gl.constexpr = TM // 2
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TM if TM < 128 else 128, 32])
    real: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    rows: gl.constexpr = gl.SliceLayout(1, real)
    columns: gl.constexpr = gl.SliceLayout(0, real)
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 4)
    bytewise: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=2)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = 0
    phase = 0
    auxiliary_phase = 0
    tile, _first, _count = _work(gl.program_id(0), whole, parts, part_steps, k_steps)
    pm, pn = _tile_of(tile, tiles_m, tiles_n, GROUP)
    a, b, shift = _vectors(ascales, wscales, bias, pm * TM, pn * TN, M, N, TM, TN, BIAS, line, rows)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        # Not carried along like pm and pn: Triton loses a carried value that is only the bound of an inner loop.
        _tile, _first, count = _work(item, whole, parts, part_steps, k_steps)
        m0 = pm * TM
        n0 = pn * TN
        acc = gl.full([TN, TM], 0, gl.int32, sums)
        for i in range(count):
            mbarrier.wait(full.index(slot), phase)
            p = ws.index(slot).load(left)
            scales = _view(ss.index(slot), gl.int8, [TN, 2], bytewise)
            even = scales.slice(0, 1, 1).load(left)
            odd = scales.slice(1, 1, 1).load(left)
            xt = xs.index(slot)
            low = _expand(p, even, SCALED_LOW)
            acc = warpgroup_mma(low, xt.slice(0, 64, 1).permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if i > 0:  # the step before this one is multiplied
                _hand_back(gl.where(slot == 0, STAGES - 1, slot - 1), THREADS)
            high = _expand(p, odd, SCALED_HIGH)
            acc = warpgroup_mma(high, xt.slice(64, 64, 1).permute([1, 0]), acc, is_async=True)
            if AUXILIARY and i == gl.minimum(1, count - 1):  # the tile before this one has left by now
                tma.store_wait(0)
                mbarrier.expect(loaded, TM * TN * 2)
                for h in gl.static_range(2):
                    target = _view(ys.index(h), auxiliary.dtype, [HALF, TN], auxiliary.layout)
                    _load(auxiliary, [m0 + h * HALF, n0], loaded, target)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            slot, phase = _next(slot, phase, STAGES)
        # While the last product runs: this tile's ascales to where the columns are, and all about the next tile.
        as_.store(a)
        a0 = as_.slice(0, HALF, 0).load(columns)
        this_b = b
        this_shift = shift
        following = gl.minimum(item + gl.num_programs(0), items - 1)
        tile, _first, _count = _work(following, whole, parts, part_steps, k_steps)
        pm, pn = _tile_of(tile, tiles_m, tiles_n, GROUP)
        a, b, shift = _vectors(ascales, wscales, bias, pm * TM, pn * TN, M, N, TM, TN, BIAS, line, rows)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _hand_back(gl.where(slot == 0, STAGES - 1, slot - 1), THREADS)
        finished = item < whole
        if item >= whole:
            offsets = (gl.arange(0, TN, gl.SliceLayout(1, sums)) * TM)[:, None]
            offsets += gl.arange(0, TM, gl.SliceLayout(0, sums))[None, :]
            acc, finished = _add_other_parts(acc, partial, counters, item, whole, parts, offsets, TN * TM)
        acc0, acc1 = _halves(acc, real)
        out0 = _scaled(acc0, a0, this_b, this_shift, BIAS)
        if LOW_RANK:
            mbarrier.wait(full.index(slot), phase)
            u, d0, d1 = _rank_step(xs, ws, xd, up, slot, TM, TN)
            out0 = warpgroup_mma(u, d0, out0, is_async=True)
        out1 = _scaled(acc1, as_.slice(HALF, HALF, 0).load(columns), this_b, this_shift, BIAS)
        if LOW_RANK:
            out1 = warpgroup_mma(u, d1, out1, is_async=True)
            for _ in range(1, rank_steps):
                out0, out1 = warpgroup_mma_wait(0, deps=(out0, out1))
                _hand_back(slot, THREADS)
                slot, phase = _next(slot, phase, STAGES)
                mbarrier.wait(full.index(slot), phase)
                u, d0, d1 = _rank_step(xs, ws, xd, up, slot, TM, TN)
                out0 = warpgroup_mma(u, d0, out0, is_async=True)
                out1 = warpgroup_mma(u, d1, out1, is_async=True)
            out0 = warpgroup_mma_wait(1, deps=(out0,))
        if AUXILIARY:
            mbarrier.wait(loaded, auxiliary_phase)
            auxiliary_phase ^= 1
        else:
            tma.store_wait(0)
        if finished:
            _finish(out0, y, auxiliary, ys.index(0), m0, n0, M, N, extra, EPILOGUE, AUXILIARY)
        if LOW_RANK:
            out1 = warpgroup_mma_wait(0, deps=(out1,))
            _hand_back(slot, THREADS)
            slot, phase = _next(slot, phase, STAGES)
        if finished:
            _finish(out1, y, auxiliary, ys.index(1), m0 + HALF, n0, M, N, extra, EPILOGUE, AUXILIARY)
    tma.store_wait(0)


# Sizes stay run-time values: Triton would make each 1 a constant, and compile anew for each that 16 divides.
@gluon.jit(do_not_specialize=["M", "N", "sibling", "rank", "whole", "parts", "part_steps", "k_steps", "rank_steps"])
def _gemm_kernel(
    x, w, s, xd, up, y, auxiliary, ascales, wscales, bias, partial, counters, extra, M, N, sibling, rank, whole,
    parts, part_steps, k_steps, rank_steps,
    TM: gl.constexpr, TN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, LOW_RANK: gl.constexpr,
    BIAS: gl.constexpr, EPILOGUE: gl.constexpr, AUXILIARY: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, TM, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES, TN, 64], w.layout)
    ss = gl.allocate_shared_memory(gl.int16, [STAGES, 1, TN], s.layout)
    as_ = gl.allocate_shared_memory(gl.float32, [TM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ys = gl.allocate_shared_memory(y.dtype, [2, TM // 2, TN], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if AUXILIARY:
        mbarrier.init(loaded, count=1)
    fence_async_shared()
    gdc_wait()
    THREADS: gl.constexpr = WARPS * 32 + 32  # who meets at a buffer's named barrier
    tiles_m = gl.cdiv(M, TM)
    tiles_n = gl.cdiv(N, TN)
    items = whole + (tiles_m * tiles_n - whole) * parts
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    y, auxiliary, xs, ws, ss, as_, ys, full, loaded, xd, up, ascales, wscales, bias, partial,
                    counters, extra, M, N, tiles_m, tiles_n, items, whole, parts, part_steps, k_steps, rank_steps,
                    TM, TN, STAGES, GROUP, LOW_RANK, BIAS, EPILOGUE, AUXILIARY, WARPS, THREADS,
                ),
            ),
            (
                _copy,
                (
                    x, w, s, xd, up, xs, ws, ss, full, sibling, rank, tiles_m, tiles_n, items, whole, parts,
                    part_steps, k_steps, rank_steps, TM, TN, STAGES, GROUP, THREADS,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """One shape of the kernel: tokens, features, buffers, multiplying warps, programs that share a multiprocessor, and
    into how many parts along K a tile of the last round may be cut.
    """

    tm: int
    tn: int
    stages: int
    warps: int
    programs: int = 1
    parts: int = 4


GROUP = 8  # token tiles in a row that use the same weights
MIN_STEPS = 4  # of a part: fewer would not repay the exchange of its sums


def why_not(qx: Tensor, xd: Tensor, up: Tensor, out_dtype: torch.dtype) -> str | None:
    """Why TMA cannot read or write these, None if it can: 16-byte rows and addresses, a result as wide as a buffer."""
    n, r = up.shape
    if out_dtype not in (torch.bfloat16, torch.float16):
        return f"its result is {out_dtype}, not 16 bits"
    if n % 8 or r % 8 or qx.data_ptr() % 16:
        return f"{n} features, rank {r} or an address that is no multiple of 16 bytes"
    if r and (xd.stride(0) % 8 or xd.data_ptr() % 16 or up.data_ptr() % 16):
        return "low-rank operands whose rows are no multiple of 16 bytes"
    return None


def candidates(m: int, n: int) -> tuple[Tile, ...]:
    """Tiles worth trying for m tokens by n features, best guess first."""
    if m <= 32:
        return (Tile(32, 64, 8, 4, 2), Tile(32, 128, 6, 8))
    if m <= 64:
        return (Tile(64, 64, 8, 4, 2), Tile(64, 128, 6, 8))
    if m <= 128:
        return (Tile(128, 64, 4, 4, 2), Tile(128, 128, 5, 8))
    if m <= 1024:
        return (Tile(128, 128, 5, 8), Tile(256, 128, 4, 8), Tile(128, 128, 3, 4, 2))
    return (Tile(256, 128, 4, 8), Tile(128, 128, 3, 4, 2, 1))


@dataclass(frozen=True)
class Rounds:
    """How the tiles of one product go over the programs: `whole` of them at once each, the others in `parts` each."""

    programs: int
    whole: int
    parts: int
    part_steps: int


@cache
def share(tiles: int, k_steps: int, programs: int, max_parts: int) -> Rounds:
    """Cut the tiles of the last round where that fills programs that would have none."""
    left = tiles % programs
    parts = min(programs // left, max_parts, k_steps // MIN_STEPS) if left else 1
    if parts < 2:
        return Rounds(min(tiles, programs), tiles, 1, k_steps)
    part_steps = -(-k_steps // parts)
    parts = -(-k_steps // part_steps)
    return Rounds(min(tiles - left + left * parts, programs), tiles - left, parts, part_steps)


@cache
def _layout(dtype: torch.dtype, rows: int, columns: int) -> gl.NVMMASharedLayout:
    if dtype == torch.int16:  # sub-scales are read back bytewise: plain order, no swizzle
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)
    names = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16,
             torch.float16: gl.float16}  # fmt: skip
    return gl.NVMMASharedLayout.get_default_for([rows, columns], names[dtype])


def _describe(tensor: Tensor, rows: int, columns: int) -> Descriptor:
    """What TMA copies by blocks of [rows, columns]."""
    return Descriptor(tensor, tensor.shape, tensor.stride(), (rows, columns), _layout(tensor.dtype, rows, columns))


def gemm(qx: Tensor, ascales: Tensor, xd: Tensor, weight: tuple[Tensor, ...], up: Tensor, bias: Tensor | None,
         out_dtype: torch.dtype, epilogue: Generated | None = None, tile: Tile | None = None) -> Tensor:  # fmt: skip
    """w4a8, tensors as above, `can_gemm` -> y [M, N]."""
    m, n, _ = check_gemm("w4a8", qx, ascales, weight, up, bias, None)
    sibling = sibling_features(xd, up, m)
    y = qx.new_empty(m, n, dtype=out_dtype)
    if m == 0 or n == 0:
        return y

    if epilogue is not None and epilogue.auxiliary is not None:
        auxiliary = epilogue.auxiliary
        check_auxiliary(auxiliary, m, n, qx.device)
        if auxiliary.stride(0) % 8 or auxiliary.stride(0) < n or auxiliary.data_ptr() % 16:
            raise ValueError("auxiliary must have rows whose addresses are multiples of 16 bytes, its strides are "
                             f"{auxiliary.stride()}, its address {auxiliary.data_ptr():#x}")  # fmt: skip

    def run(t: Tile) -> None:
        _launch(qx, ascales, xd, weight, up, sibling, bias, y, epilogue, t)

    if tile is None:
        shape = (1 << (m - 1).bit_length(), n, qx.shape[1])
        tile = choose("gluon_gemm", shape, candidates(m, n), run, qx.device)
    run(tile)
    return y


def _launch(qx, ascales, xd, weight, up, sibling, bias, y, epilogue, t: Tile) -> None:
    (m, n), r = y.shape, up.shape[1]
    qweight, subscales, wscales = weight
    k_steps = subscales.shape[0]
    if not r:  # the descriptors must exist; no step will use them
        xd = up = qx.view(torch.bfloat16)
    function, extra, auxiliary = epilogue or (None, (), None)
    tiles = -(-m // t.tm) * -(-n // t.tn)
    rounds = share(tiles, k_steps, t.programs * processors(qx.device), t.parts)
    counters = zeroed_counters(qx.device, tiles - rounds.whole)
    partial = counters
    if rounds.parts > 1:
        partial = qx.new_empty(rounds.programs * t.tm * t.tn, dtype=torch.int32)
    arguments = (
        _describe(qx, t.tm, 128),
        _describe(qweight, t.tn, 64),
        _describe(subscales, 1, t.tn),
        _describe(xd, t.tm, RANK_STEP.value),
        _describe(up, t.tn, RANK_STEP.value),
        _describe(y, t.tm // 2, t.tn),
        _describe(y if auxiliary is None else auxiliary, t.tm // 2, t.tn),
        ascales,
        wscales,
        wscales if bias is None else bias,
        partial,
        counters,
        extra,
        m,
        n,
        sibling,
        r,
        rounds.whole,
        rounds.parts,
        rounds.part_steps,
        k_steps,
        -(-r // RANK_STEP.value),
    )
    constants = (t.tm, t.tn, t.stages, GROUP, r > 0, bias is not None, function, auxiliary is not None, t.warps)
    options = {"num_warps": t.warps, "launch_pdl": True}
    if t.programs > 1:  # as many registers as let the programs share a multiprocessor; the copying warps count as four
        options["maxnreg"] = 65536 // (t.programs * 32 * (t.warps + 4)) // 8 * 8
    launch(_gemm_kernel, (rounds.programs, 1, 1), arguments, constants, **options)
