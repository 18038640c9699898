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
    y          [M, N]      bf16 or fp16; [M, N/2] of an epilogue that gates (portable/gates.py)

The walk is that of ring.py, over tiles of TN features by TM tokens. A tile is computed transposed: weights are the left
operand, which `wgmma` takes from registers, and while one half of a step's codes is multiplied the other is expanded.
A tile has P/128 such steps, then, after the scales, those of the low-rank product. TMA cuts off at the edges of M, N, K
and r, so nothing here is masked but the vectors.

A tile ends in two halves along its tokens: the low-rank product of one runs while the other is scaled or stored. All
that the next tile needs to know is worked out while the last product of this one runs. `auxiliary` is loaded early in a
tile's walk, into the buffer through which the result will leave.

Tiles that would leave most of the GPU idle in a last round are cut along K into parts. A part leaves its int32 sums in
`partial` and counts itself; the one that comes last adds the others' and finishes the tile. Integer sums do not depend
on the order, so the result is the same bit for bit whichever comes last.
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

from ..operands import Gemm
from ..portable.gates import feature, split_halves
from ..portable.gemm import check_auxiliary, check_gemm, sibling_features, stored_features
from ..portable.unpack import FOUR_8, FOUR_128, SCALED_CONSTRAINTS, SCALED_HIGH, SCALED_LOW
from ..runtime.generated import Generated
from ..runtime.launcher import launch, zeroed_counters
from ..runtime.rounds import share
from ..runtime.target import processors
from ..runtime.tuning import choose_tile
from ..runtime.versions import aggregate, barrier, load, store, view
from .descriptors import describe, of_both_halves, plain
from .ring import GROUP, RANK_STEP, Tiles, allocate_ring, in_rows, options


@gluon.jit
def _expand(p, s, ASM: gl.constexpr):
    """p [TN, 64] int8, s [TN, 1] int8 -> (code - 8) * s, [TN, 64] int8."""
    s = s.to(gl.int32)
    c = FOUR_128 - s * FOUR_8
    return gl.inline_asm_elementwise(ASM, SCALED_CONSTRAINTS, [p, s, c], dtype=gl.int8, is_pure=True, pack=4)


@aggregate
class Work:
    """The items of one product: its tiles, of which those from `whole` on are `parts` items each."""

    tiles: Tiles
    items: gl.tensor
    whole: gl.tensor
    parts: gl.tensor
    part_steps: gl.tensor
    k_steps: gl.tensor
    rank_steps: gl.tensor

    @gluon.jit
    def at(self, item):
        """An item's tile, first step and number of steps."""
        tile = item
        first = 0
        count = self.k_steps
        if item >= self.whole:
            cut = item - self.whole
            tile = self.whole + cut // self.parts
            first = cut % self.parts * self.part_steps
            count = gl.minimum(self.part_steps, self.k_steps - first)
        gl.assume(count > 0)
        return tile, first, count

    @gluon.jit
    def origin(self, item):
        tile, _first, _count = self.at(item)
        return self.tiles.origin(tile)


@gluon.jit
def _copy(ring, work, x, w, s, subscales, sibling, rank):
    """The copying warp: every step of every work item, into the ring."""
    slot = 0
    filled = 0
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        tile, first, count = work.at(item)
        m0, n0 = work.tiles.origin(tile)
        own = n0 // sibling * rank
        for i in range(count + work.rank_steps):
            ring.await_free(slot, filled)
            if i < count:
                step = first + i
                bar = ring.full.index(slot)
                mbarrier.expect(bar, ring.TM * 128 + ring.TN * 66)
                ring.load_scales(s, step, n0, bar, subscales.index(slot))
                ring.load_features(w, n0, step * 64, bar, ring.weights.index(slot))
                load(x, [m0, step * 128], bar, ring.tokens.index(slot))
            else:
                ring.load_low_rank(slot, m0, n0, own, i - count)
            slot = ring.after(slot)
            filled += 1
    ring.drain(slot, filled)


@aggregate
class Sums:
    """Where the parts of a tile leave their sums, and are counted."""

    partial: gl.tensor
    counters: gl.tensor

    @gluon.jit
    def add_others(self, acc, item, work):
        """Leave this part's sums and count it; the last one of its tile adds the others'. -> sums, whether the last."""
        layout: gl.constexpr = acc.type.layout
        TN: gl.constexpr = acc.shape[0]
        TM: gl.constexpr = acc.shape[1]
        offsets = (gl.arange(0, TN, gl.SliceLayout(1, layout)) * TM)[:, None]
        offsets += gl.arange(0, TM, gl.SliceLayout(0, layout))[None, :]
        cut = item - work.whole
        own = cut % work.parts
        counter = self.counters + cut // work.parts
        first = self.partial + (cut - own).to(gl.int64) * (TN * TM)
        gl.store(first + own * (TN * TM) + offsets, acc)
        barrier()
        arrived = gl.atomic_add(counter, 1)  # acquires and releases: the others' sums are visible
        if arrived == work.parts - 1:
            for other in range(work.parts):
                if other != own:
                    acc += gl.load(first + other * (TN * TM) + offsets, cache_modifier=".cg")
            gl.store(counter, 0)  # for the next call
        return acc, arrived == work.parts - 1


@aggregate
class Vectors:
    """What a tile is scaled by. bias: any pointer where BIAS is False."""

    ascales: gl.tensor
    wscales: gl.tensor
    bias: gl.tensor
    M: gl.tensor
    N: gl.tensor
    BIAS: gl.constexpr
    GATES: gl.constexpr

    @gluon.jit
    def load(self, m0, n0, TM: gl.constexpr, TN: gl.constexpr, line: gl.constexpr, rows: gl.constexpr):
        """A tile's ascales [TM], wscales and bias [TN]."""
        tokens = m0 + gl.arange(0, TM, line)
        a = gl.load(self.ascales + tokens, mask=tokens < self.M, other=0.0)
        features = n0 + gl.arange(0, TN, rows)
        live = features < self.N
        if self.GATES:
            features = feature(features, self.N // 2)
        b = gl.load(self.wscales + features, mask=live, other=0.0)
        shift = b
        if self.BIAS:
            shift = gl.load(self.bias + features, mask=live, other=0.0)
        return a, b, shift

    @gluon.jit
    def apply(self, acc, a, b, shift):
        out = acc.to(gl.float32) * a[None, :] * b[:, None]
        if self.BIAS:
            out += shift.to(gl.float32)[:, None]
        return out


@gluon.jit
def _halves(acc, layout: gl.constexpr):
    """[TN, TM] -> two times [TN, TM/2]: other registers, nothing moves."""
    h: gl.constexpr = acc.shape[1] // 2
    first, second = gl.split(gl.permute(gl.reshape(acc, [acc.shape[0], 2, h]), [0, 2, 1]))
    return gl.convert_layout(first, layout, assert_trivial=True), gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def _rank_step(ring, slot):
    """What a step of the low-rank product multiplies: up [TN, 32], and xd^T [32, TM/2] for each half."""
    h: gl.constexpr = ring.TM // 2
    u, d = ring.low_rank(slot)
    return u, d.slice(0, h, 0).permute([1, 0]), d.slice(h, h, 0).permute([1, 0])


@aggregate
class Result:
    """y on its way out, and an auxiliary input on its way in, through the same two halves [TM/2, TN].

    Of an epilogue that gates they are [TM/2, TN/2].
    """

    y: tma.tensor_descriptor
    auxiliary: tma.tensor_descriptor
    halves: gl.shared_memory_descriptor
    loaded: gl.shared_memory_descriptor
    M: gl.tensor
    N: gl.tensor

    @gluon.jit
    def load_auxiliary(self, m0, n0, TM: gl.constexpr, TN: gl.constexpr):
        mbarrier.expect(self.loaded, TM * TN * 2)
        for h in gl.static_range(2):
            target = view(self.halves.index(h), self.auxiliary.dtype, [TM // 2, TN], self.auxiliary.layout)
            load(self.auxiliary, [m0 + h * (TM // 2), n0], self.loaded, target)

    @gluon.jit
    def finish(
        self, h, out, m0, n0, extra, EPILOGUE: gl.constexpr, AUXILIARY: gl.constexpr, GATES: gl.constexpr,
    ):  # fmt: skip
        """Half a tile, from token m0 on, through the epilogue and on its way to y."""
        right = out
        N = self.N
        if GATES:
            out, right = split_halves(out)
            n0 = n0 // 2
            N = N // 2
        layout: gl.constexpr = out.type.layout
        half = self.halves.index(h)
        if EPILOGUE is not None:
            features = (n0 + gl.arange(0, out.shape[0], gl.SliceLayout(1, layout)))[:, None]
            tokens = (m0 + gl.arange(0, out.shape[1], gl.SliceLayout(0, layout)))[None, :]
            live = (features < N) & (tokens < self.M)
            if GATES:
                out = EPILOGUE(out, right, features, tokens, live, extra)
            elif AUXILIARY:
                t = view(half, self.auxiliary.dtype, half.shape, self.auxiliary.layout).permute([1, 0]).load(layout)
                out = EPILOGUE(out, t.to(gl.float32), features, tokens, live, extra)
            else:
                out = EPILOGUE(out, features, tokens, live, extra)
        half.permute([1, 0]).store(out.to(self.y.dtype))
        fence_async_shared()
        store(self.y, [m0, n0], half)


@gluon.jit
def _multiply(
    ring, work, subscales, line_scales, vectors, sums, result, extra,
    LOW_RANK: gl.constexpr, EPILOGUE: gl.constexpr, AUXILIARY: gl.constexpr, GATES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The multiplying warps: each work item's sums, and the finished tiles. line_scales: a tile's ascales."""
    TM: gl.constexpr = ring.TM
    TN: gl.constexpr = ring.TN
    HALF: gl.constexpr = TM // 2
    codes: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TM if TM < 128 else 128, 32])
    real: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    rows: gl.constexpr = gl.SliceLayout(1, real)
    columns: gl.constexpr = gl.SliceLayout(0, real)
    left: gl.constexpr = gl.DotOperandLayout(0, codes, 4)
    bytewise: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=2)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = 0
    phase = 0
    auxiliary_phase = 0
    m0, n0 = work.origin(gl.program_id(0))
    a, b, shift = vectors.load(m0, n0, TM, TN, line, rows)
    for item in range(gl.program_id(0), work.items, gl.num_programs(0)):
        # Not carried along like m0 and n0: Triton loses a carried value that is only the bound of an inner loop.
        _tile, _first, count = work.at(item)
        acc = gl.full([TN, TM], 0, gl.int32, codes)
        for i in range(count):
            ring.await_full(slot, phase)
            p = ring.weights.index(slot).load(left)
            scales = view(subscales.index(slot), gl.int8, [TN, 2], bytewise)
            even = scales.slice(0, 1, 1).load(left)
            odd = scales.slice(1, 1, 1).load(left)
            xt = ring.tokens.index(slot)
            low = _expand(p, even, SCALED_LOW)
            acc = warpgroup_mma(low, xt.slice(0, 64, 1).permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if i > 0:  # the step before this one is multiplied
                ring.hand_back_before(slot)
            high = _expand(p, odd, SCALED_HIGH)
            acc = warpgroup_mma(high, xt.slice(64, 64, 1).permute([1, 0]), acc, is_async=True)
            if AUXILIARY and i == gl.minimum(1, count - 1):  # the tile before this one has left by now
                tma.store_wait(0)
                result.load_auxiliary(m0, n0, TM, TN)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            slot, phase = ring.next(slot, phase)
        # While the last product runs: this tile's ascales to where the columns are, and all about the next tile.
        line_scales.store(a)
        a0 = line_scales.slice(0, HALF, 0).load(columns)
        this_m0 = m0
        this_n0 = n0
        this_b = b
        this_shift = shift
        m0, n0 = work.origin(gl.minimum(item + gl.num_programs(0), work.items - 1))
        a, b, shift = vectors.load(m0, n0, TM, TN, line, rows)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        ring.hand_back_before(slot)
        finished = item < work.whole
        if item >= work.whole:
            acc, finished = sums.add_others(acc, item, work)
        acc0, acc1 = _halves(acc, real)
        out0 = vectors.apply(acc0, a0, this_b, this_shift)
        if LOW_RANK:
            ring.await_full(slot, phase)
            u, d0, d1 = _rank_step(ring, slot)
            out0 = warpgroup_mma(u, d0, out0, is_async=True)
        out1 = vectors.apply(acc1, line_scales.slice(HALF, HALF, 0).load(columns), this_b, this_shift)
        if LOW_RANK:
            out1 = warpgroup_mma(u, d1, out1, is_async=True)
            for _ in range(1, work.rank_steps):
                out0, out1 = warpgroup_mma_wait(0, deps=(out0, out1))
                ring.hand_back(slot)
                slot, phase = ring.next(slot, phase)
                ring.await_full(slot, phase)
                u, d0, d1 = _rank_step(ring, slot)
                out0 = warpgroup_mma(u, d0, out0, is_async=True)
                out1 = warpgroup_mma(u, d1, out1, is_async=True)
            out0 = warpgroup_mma_wait(1, deps=(out0,))
        if AUXILIARY:
            mbarrier.wait(result.loaded, auxiliary_phase)
            auxiliary_phase ^= 1
        else:
            tma.store_wait(0)
        if finished:
            result.finish(0, out0, this_m0, this_n0, extra, EPILOGUE, AUXILIARY, GATES)
        if LOW_RANK:
            out1 = warpgroup_mma_wait(0, deps=(out1,))
            ring.hand_back(slot)
            slot, phase = ring.next(slot, phase)
        if finished:
            result.finish(1, out1, this_m0 + HALF, this_n0, extra, EPILOGUE, AUXILIARY, GATES)
    tma.store_wait(0)


# Sizes stay run-time values: Triton would make each 1 a constant, and compile anew for each that 16 divides.
@gluon.jit(do_not_specialize=["M", "N", "sibling", "rank", "whole", "parts", "part_steps", "k_steps", "rank_steps"])
def _gemm_kernel(
    x, w, s, xd, up, y, auxiliary, ascales, wscales, bias, partial, counters, extra, M, N, sibling, rank, whole,
    parts, part_steps, k_steps, rank_steps,
    TM: gl.constexpr, TN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, LOW_RANK: gl.constexpr,
    BIAS: gl.constexpr, EPILOGUE: gl.constexpr, AUXILIARY: gl.constexpr, GATES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    ring = allocate_ring(x, w, xd, up, TM, TN, STAGES, WARPS, GATES)
    subscales = gl.allocate_shared_memory(gl.int16, [STAGES, 1, TN], in_rows(s.layout))
    line_scales = gl.allocate_shared_memory(gl.float32, [TM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    halves = gl.allocate_shared_memory(y.dtype, [2, TM // 2, TN // 2 if GATES else TN], y.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if AUXILIARY:
        mbarrier.init(loaded, count=1)
    fence_async_shared()
    gdc_wait()
    tiles = Tiles(gl.cdiv(M, TM), gl.cdiv(N, TN), TM, TN, GROUP)
    items = whole + (tiles.tiles_m * tiles.tiles_n - whole) * parts
    work = Work(tiles, items, whole, parts, part_steps, k_steps, rank_steps)
    vectors = Vectors(ascales, wscales, bias, M, N, BIAS, GATES)
    sums = Sums(partial, counters)
    result = Result(y, auxiliary, halves, loaded, M, N)
    gl.warp_specialize(
        [
            (_multiply, (ring, work, subscales, line_scales, vectors, sums, result, extra, LOW_RANK, EPILOGUE,
                         AUXILIARY, GATES, WARPS)),
            (_copy, (ring, work, x, w, s, subscales, sibling, rank)),
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


def why_not(o: Gemm) -> str | None:
    """Why TMA cannot read or write these, None if it can: 16-byte rows and addresses, a result as wide as a buffer."""
    n, r = o.up.shape
    if o.out_dtype not in (torch.bfloat16, torch.float16):
        return f"its result is {o.out_dtype}, not 16 bits"
    if n % 8 or r % 8 or o.qx.data_ptr() % 16:
        return f"{n} features, rank {r} or an address that is no multiple of 16 bytes"
    if r and (o.xd.stride(0) % 8 or o.xd.data_ptr() % 16 or o.up.data_ptr() % 16):
        return "low-rank operands whose rows are no multiple of 16 bytes"
    return None


def candidates(m: int) -> tuple[Tile, ...]:
    """Tiles worth trying for m tokens, best guess first. Half a GPU of small tiles beats tiles cut along K."""
    if m <= 32:
        return (Tile(32, 64, 8, 4, 2), Tile(32, 128, 6, 8))
    if m <= 64:
        return (Tile(64, 64, 8, 4, 2), Tile(64, 128, 6, 8))
    if m <= 1024:
        return (Tile(128, 128, 3, 4, 2, 1), Tile(64, 64, 8, 4, 2), Tile(128, 64, 4, 4, 2))
    return (Tile(256, 128, 4, 8), Tile(128, 128, 3, 4, 2, 1))


def gemm(o: Gemm, epilogue: Generated | None = None, tile: Tile | None = None) -> Tensor:
    """w4a8 without an offset, operands as above that `why_not` takes -> y [M, N]."""
    qx = o.qx
    m, n, _ = check_gemm(o)
    sibling = sibling_features(o.xd, o.up, m)
    gates = epilogue is not None and epilogue.gates
    y = qx.new_empty(m, stored_features(n, sibling, gates), dtype=o.out_dtype)
    if m == 0 or n == 0:
        return y

    if epilogue is not None and epilogue.auxiliary is not None:
        check_auxiliary(epilogue.auxiliary, m, n, qx.device)
        if epilogue.auxiliary.stride(0) % 8 or epilogue.auxiliary.stride(0) < n or epilogue.auxiliary.data_ptr() % 16:
            raise ValueError("auxiliary must have rows whose addresses are multiples of 16 bytes, its strides are "
                             f"{epilogue.auxiliary.stride()}, its address "
                             f"{epilogue.auxiliary.data_ptr():#x}")  # fmt: skip

    def run(t: Tile) -> None:
        _launch(o, sibling, y, epilogue, t)

    if tile is None:
        tile = choose_tile("gluon_gemm", m, (n, y.shape[1], qx.shape[1]), candidates(m), run, qx.device)
    run(tile)
    return y


def _launch(o: Gemm, sibling: int, y: Tensor, epilogue: Generated | None, t: Tile) -> None:
    m, (n, r) = y.shape[0], o.up.shape
    qx, xd, up, (qweight, subscales, wscales) = o.qx, o.xd, o.up, o.weight
    k_steps = subscales.shape[0]
    if not r:  # the descriptors must exist; no step will use them
        xd, up = qx.view(torch.bfloat16), qweight.view(torch.bfloat16)
    function, extra, auxiliary, gates = epilogue or (None, (), None, False)
    features = of_both_halves if gates else lambda descriptor, dim: descriptor
    result = (t.tm // 2, t.tn // 2 if gates else t.tn)
    tiles = -(-m // t.tm) * -(-n // t.tn)
    rounds = share(tiles, k_steps, t.programs * processors(qx.device), t.parts)
    counters = zeroed_counters(qx.device, tiles - rounds.whole)
    partial = counters
    if rounds.parts > 1:
        partial = qx.new_empty(rounds.programs * t.tm * t.tn, dtype=torch.int32)
    arguments = (
        describe(qx, t.tm, 128),
        features(describe(qweight, t.tn, 64), 0),
        features(describe(subscales, 1, t.tn, plain(16)), 1),
        describe(xd, t.tm, RANK_STEP.value),
        features(describe(up, t.tn, RANK_STEP.value), 0),
        describe(y, *result),
        describe(y if auxiliary is None else auxiliary, *result),
        o.ascales,
        wscales,
        wscales if o.bias is None else o.bias,
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
    constants = (t.tm, t.tn, t.stages, GROUP, r > 0, o.bias is not None, function, auxiliary is not None, gates,
                 t.warps)  # fmt: skip
    launch(_gemm_kernel, (rounds.programs, 1, 1), arguments, constants, **options(t.warps, t.programs))
