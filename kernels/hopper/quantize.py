"""int8 and int4 activations and the low-rank product in one kernel for sm_90, in Gluon.

Formulas and tensors are those of portable/quantize.py. A program keeps [64 rows, BOXES * 64 channels] of the input in
shared memory from the one time it is read until its codes are written; a prologue replaces it there. Between, it adds
its part of each row's maximum to those in memory and leaves its part of xd there, and waits at the row block's counters
for the other programs of these rows. They have neighbouring ids and so start together; all of them must fit on the GPU
at once, or they would wait for ever: `can_quantize`. The maxima are waited for first; while they come, the low-rank
product is stored, and while that is on its way the codes are.

    x, right  copied by TMA. No program straddles the two
    down, rest the first RANK rows of the low-rank matrix and the REST others, powers of two: 144 rows are 128 and 16.
              Up to rank 32 or 64 all that a program needs is copied at once; above, boxes of 64 channels take turns in
              SLOTS buffers
    work      [blocks, S, 64, R]  fp32, parts of xd; S = programs a row block
    counters  [blocks, 64]        int32, the rows' largest magnitudes as bits, which have the order of the numbers
              [2, blocks]         int32, arrivals and then departures
              all zero before and after

EXACT says that channels fill whole programs: without masks a prologue takes an eighth less instructions. Rows may end
anywhere, or a new number of tokens would be a new kernel: a prologue reads beside them what is the last row's, and what
comes of it is not stored.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from ..formats import codes_of
from ..operands import Quantize
from ..portable.codes import int4_codes, int8_pair, int8_scale, quotient, rotated
from ..portable.quantize import allocate_results, check_quantize
from ..portable.rounding import narrowed, widened
from ..runtime.generated import Generated
from ..runtime.launcher import COUNTERS, Descriptor, launch, zeroed_counters
from ..runtime.target import processors
from ..runtime.versions import barrier, load, view
from .descriptors import describe

ROWS = gl.constexpr(64)
WARPS = gl.constexpr(4)
MAX_RANK = {"int8": 256, "int4": 240}  # more would not fit into registers
SHORT = 2048  # channels
MAX_BLOCKS = COUNTERS // (ROWS.value + 2)
# One thread counts or polls: an atomic of Triton's has every warp wait for its result, and polls disturb the loads of
# others. Each time it is one of another warp: what it waits for, a fence until all stores are seen, the next does not.
# `inc` goes from the bound to zero, so that nobody needs to know who leaves last.
ARRIVE = gl.constexpr("""{
    .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, $3;
    @p red.release.gpu.global.inc.u32 [$1], $2; mov.u32 $0, 0;
}""")
LEAVE = gl.constexpr(ARRIVE.value.replace("release", "relaxed"))
AWAIT = gl.constexpr("""{
    .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.ne.u32 p, t, $3; @p bra done;
    again: ld.acquire.gpu.global.u32 t, [$1]; setp.ge.u32 p, t, $2; @p bra done; nanosleep.u32 40; bra again;
    done: mov.u32 $0, 0;
}""")
ZEROS = " ".join(f"st.global.v4.u32 [$3 + {i}], {{t, t, t, t}};" for i in range(0, 4 * ROWS.value, 16))
CLEAR = gl.constexpr(
    """{
    .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra done;
    atom.relaxed.gpu.global.inc.u32 t, [$1], $2; setp.ne.u32 p, t, $2; @p bra done;
    mov.u32 t, 0; ZEROS
    done: mov.u32 $0, 0;
}""".replace("ZEROS", ZEROS)
)


@gluon.jit
def _at_counter(counter, number, WARP: gl.constexpr, ASM: gl.constexpr):
    gl.inline_asm_elementwise(ASM, "=r,l,r,r", [counter.to(gl.int64), number, gl.to_tensor(32 * WARP)], dtype=gl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def _arrive(counter, programs, WARP: gl.constexpr):
    """Let the other programs of the row block see all that this one wrote."""
    barrier()
    _at_counter(counter, 2 * programs - 1, WARP, ARRIVE)


@gluon.jit
def _await(counter, programs, WARP: gl.constexpr):
    """Wait until every program of the row block has arrived."""
    _at_counter(counter, programs, WARP, AWAIT)
    barrier()


@gluon.jit
def _leave(counter, programs):
    """Nobody waits for this program any more."""
    _at_counter(counter, 2 * programs - 1, 1, LEAVE)


@gluon.jit
def _leave_peaks(counter, programs, peaks):
    """Who leaves last sets the peaks to zero again."""
    gl.inline_asm_elementwise(CLEAR, "=r,l,r,l", [counter.to(gl.int64), 2 * programs - 1, peaks.to(gl.int64)],
                              dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def _below(index, limit, EXACT: gl.constexpr):
    if EXACT:
        return gl.full(index.shape, 1, gl.int1, index.type.layout)
    else:
        return index < limit


@gluon.jit
def _load_down(down, rest, k, bar, ds, es, slot, RANK: gl.constexpr, REST: gl.constexpr):
    """Channels from k on of both pieces of `down` into a slot."""
    load(down, [0, k], bar, ds.index(slot))
    if REST > 0:
        load(rest, [RANK, k], bar, es.index(slot))


@gluon.jit
def _store_part(target, acc, first, R: gl.constexpr):
    """Columns from `first` on of a part of xd."""
    layout: gl.constexpr = acc.type.layout
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    columns = first + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))[None, :]
    gl.store(target + (rows * R + columns), acc, mask=columns < R)


@gluon.jit
def _pairs(box, inverses, DTYPE: gl.constexpr, wide: gl.constexpr, layout: gl.constexpr):
    """A box smoothed, as its even channels and its odd ones [ROWS, 32] fp32: words make one instruction a number.

    inverses  [64] of its channels
    """
    bits: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    word = view(box, gl.int32, [ROWS, 32], bits).load(layout)
    if DTYPE == gl.bfloat16:
        even = (word << 16).to(gl.float32, bitcast=True)
        odd = (word & -65536).to(gl.float32, bitcast=True)
    else:
        even = word.to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
        odd = (word >> 16).to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    of_even, of_odd = gl.split(gl.reshape(inverses.load(gl.SliceLayout(0, wide)), [32, 2]))
    even *= gl.convert_layout(of_even, columns, assert_trivial=True)[None, :]
    odd *= gl.convert_layout(of_odd, columns, assert_trivial=True)[None, :]
    return even, odd


@gluon.jit
def _largest(v):
    """v [rows, C] -> the largest magnitude of each 8 threads' columns [rows, 8]: nothing changes threads."""
    return gl.max(gl.reshape(gl.abs(v), [v.shape[0], 8, v.shape[1] // 8]), 2)


@gluon.jit
def _larger(a, b):
    """The larger one, now: LLVM would put all of it off to where the result is read, and keep every operand."""
    asm: gl.constexpr = "max.f32 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=f,f,f", [a, b], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _store_rotated(xs, factors, inverses, at: gl.constexpr, target, ascales, begin, first, M, KP, a_row, a_group,
                   PAIR: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Codes and scales of PAIR boxes, this program's channels from `at` on, rotated. A box's row is a row here."""
    column: gl.constexpr = gl.SliceLayout(0, layout)
    v = xs.slice(at, 64 * PAIR, 1).load(layout).to(gl.float32)
    factor, inverse = factors.slice(at, 64 * PAIR).load(column), inverses.slice(at, 64 * PAIR).load(column)
    v = quotient(v, factor[None, :], inverse[None, :])
    v = rotated(v.reshape([ROWS * PAIR, 64]))
    q, scale = int4_codes(v, False, target.dtype.element_ty == gl.float8e4nv)
    row = gl.arange(0, ROWS * PAIR, gl.SliceLayout(1, q.type.layout))
    channel = gl.arange(0, 64, gl.SliceLayout(0, q.type.layout))
    r, k = row // PAIR, at + row % PAIR * 64
    stored = (r < M - begin) & (first + k < KP)
    gl.store(target + ((r * KP + k)[:, None] + channel[None, :]), q, mask=stored[:, None])
    gl.store(ascales + ((begin + r).to(gl.int64) * a_row + (first + k) // 64 * a_group), scale, mask=stored)


# What depends on M is not compiled in, so that a new number of tokens is no new kernel; nor is a 1, since Triton's
# constants have no methods.
@gluon.jit(do_not_specialize=["M", "S", "a_row", "a_group"])
def _quantize_kernel(
    x, right, smooth, down, rest, qx, ascales, xd, work, counters, extra, M, K, KP, S, W, a_row, a_group, shift,
    BOXES: gl.constexpr, SLOTS: gl.constexpr, R: gl.constexpr, RANK: gl.constexpr, REST: gl.constexpr,
    PARTS: gl.constexpr, SLICE: gl.constexpr, CODES: gl.constexpr, UNSIGNED: gl.constexpr, ROTATE: gl.constexpr,
    EXACT: gl.constexpr, JOINED: gl.constexpr, PROLOGUE: gl.constexpr,
):  # fmt: skip
    BY_ROW: gl.constexpr = CODES == "int8"  # a scale for the whole row, else one a box
    MEET: gl.constexpr = PARTS > 1 and (R > 0 or BY_ROW)
    PIECE: gl.constexpr = 32  # rows that a prologue gets at once, by the registers there are
    DTYPE: gl.constexpr = x.dtype
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, RANK, 16])
    mma_rest: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, REST if REST > 0 else 16, 16])
    # Few parts: each thread adds up its own columns. Many: the slices are short, and warps take parts instead.
    parted: gl.constexpr = [1, WARPS] if PARTS <= 16 else [WARPS, 1]
    lanes: gl.constexpr = [1, 32] if PARTS <= 16 or SLICE >= 128 else [2, 16] if SLICE == 64 else [8, 4]
    run: gl.constexpr = 4 if PARTS > 16 or SLICE >= 512 else 2 if SLICE == 256 else 1
    flat: gl.constexpr = gl.BlockedLayout([1, run], lanes, parted, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])  # of 32-bit words
    row: gl.constexpr = gl.SliceLayout(1, pairs if BY_ROW else wide)
    column: gl.constexpr = gl.SliceLayout(0, pairs if BY_ROW else wide)
    peaked: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [WARPS, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    # To rotate, a thread has all channels of a box's row; four warps take two boxes.
    PAIR: gl.constexpr = 2 if BOXES % 2 == 0 else 1
    turning: gl.constexpr = gl.BlockedLayout([1, 64], [32, 1], [WARPS // PAIR, PAIR], [1, 0])
    RING: gl.constexpr = SLOTS < BOXES and R > 0
    GROUPS: gl.constexpr = 2 if BOXES % 2 == 0 else 1
    TOGETHER: gl.constexpr = BOXES // GROUPS  # boxes that are waited for together
    K_TILE: gl.constexpr = BOXES * 64
    xs = gl.allocate_shared_memory(DTYPE, [ROWS, K_TILE], x.layout)
    halves = view(xs, DTYPE, [GROUPS, ROWS, K_TILE // GROUPS], x.layout)  # a group's boxes lie together
    boxes = view(xs, DTYPE, [BOXES, ROWS, 64], x.layout)
    ds = gl.allocate_shared_memory(DTYPE, [SLOTS, RANK, 64] if RING else [1, RANK, K_TILE], down.layout)
    es = ds
    if REST > 0:
        es = gl.allocate_shared_memory(DTYPE, [SLOTS, REST, 64] if RING else [1, REST, K_TILE], down.layout)
    factors = gl.allocate_shared_memory(gl.float32, [K_TILE], plain)
    inverses = gl.allocate_shared_memory(gl.float32, [K_TILE], plain)
    full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [BOXES, 1], mbarrier.MBarrierLayout())
    part = gl.program_id(0)
    block = gl.program_id(1)
    begin = block * ROWS
    first = part * K_TILE
    for i in gl.static_range(GROUPS):
        mbarrier.init(full.index(i), count=1)
    if RING:
        for i in gl.static_range(BOXES):
            mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    gdc_wait()
    own: gl.constexpr = 0 if RING or R == 0 else (RANK + REST) * K_TILE * 2
    for i in gl.static_range(GROUPS):
        bar = full.index(i)
        at = first + i * (K_TILE // GROUPS)
        mbarrier.expect(bar, ROWS * (K_TILE // GROUPS) * 2 + (own if i == 0 else 0))
        if JOINED:  # no program straddles the two parts
            if first < W:
                load(x, [begin, at], bar, halves.index(i))
            else:
                load(right, [begin, at - W], bar, halves.index(i))
        else:
            load(x, [begin, at], bar, halves.index(i))
        if own > 0 and i == 0:
            _load_down(down, rest, first, bar, ds, es, 0, RANK, REST)
    if RING:
        for i in gl.static_range(SLOTS):
            mbarrier.expect(ready.index(i), (RANK + REST) * 128)
            _load_down(down, rest, first + i * 64, ready.index(i), ds, es, i, RANK, REST)
    rk = gl.arange(0, K_TILE, line)
    factor = gl.load(smooth + first + rk, mask=_below(rk, K - first, EXACT), other=1.0)
    if BY_ROW:
        inverses.store(1.0 / factor)
    else:
        factors.store(factor)
        inverses.store(gl.div_rn(gl.full_like(factor, 1.0), factor))
    barrier()
    r = gl.arange(0, ROWS, row)
    rc = gl.arange(0, 32 if BY_ROW else 64, column)
    alive = r < M - begin
    peak = gl.full([ROWS, 8], 0.0, gl.float32, peaked)
    upper = gl.full([32, 8], 0.0, gl.float32, peaked)
    lower = upper
    if PROLOGUE is not None:
        for i in gl.static_range(BOXES):
            columns = (first + i * 64 + gl.arange(0, 64, gl.SliceLayout(0, wide)))[None, :]
            if i % TOGETHER == 0:
                mbarrier.wait(full.index(i // TOGETHER), 0)
            for j in gl.static_range(0, ROWS, PIECE):  # a thread stores where it alone has loaded
                piece = boxes.index(i).slice(j, PIECE)
                rows = (begin.to(gl.int64) + j + gl.arange(0, PIECE, gl.SliceLayout(1, wide)))[:, None]
                there = gl.full([PIECE, 64], 1, gl.int1, wide) & _below(columns, K, EXACT)
                last = gl.minimum(rows, M.to(gl.int64) - 1)
                h = PROLOGUE(widened(piece.load(wide)), last, columns, there, extra)
                if not EXACT:
                    h = gl.where(there, h, 0.0)
                rounded, h = narrowed(h, DTYPE)
                piece.store(rounded)
                if BY_ROW:
                    inverse = inverses.slice(i * 64, 64).load(gl.SliceLayout(0, wide))[None, :]
                    larger = gl.convert_layout(_largest(h * inverse), peaked, assert_trivial=True)
                    if j == 0:
                        upper = _larger(upper, larger)
                    else:
                        lower = _larger(lower, larger)
        if BY_ROW:
            peak = gl.convert_layout(
                gl.reshape(gl.permute(gl.join(upper, lower), [2, 0, 1]), [ROWS, 8]), peaked, assert_trivial=True
            )
        fence_async_shared()
        barrier()
    target = qx + (begin.to(gl.int64) * KP + first)
    acc = gl.full([ROWS, RANK], 0.0, gl.float32, mma)
    acc_rest = gl.full([ROWS, REST if REST > 0 else 16], 0.0, gl.float32, mma_rest)
    for i in gl.static_range(BOXES):
        k = first + i * 64
        box = boxes.index(i)
        if PROLOGUE is None and i % TOGETHER == 0:
            mbarrier.wait(full.index(i // TOGETHER), 0)
        if RING:
            mbarrier.wait(ready.index(i), 0)
            acc = warpgroup_mma(box, ds.index(i % SLOTS).permute([1, 0]), acc, is_async=True)
            if REST > 0:
                acc_rest = warpgroup_mma(box, es.index(i % SLOTS).permute([1, 0]), acc_rest, is_async=True)
        elif R > 0 and i % TOGETHER == 0:
            half = halves.index(i // TOGETHER)
            acc = warpgroup_mma(
                half, ds.index(0).slice(i * 64, K_TILE // GROUPS, 1).permute([1, 0]), acc, is_async=True
            )
            if REST > 0:
                acc_rest = warpgroup_mma(
                    half, es.index(0).slice(i * 64, K_TILE // GROUPS, 1).permute([1, 0]), acc_rest, is_async=True
                )
        if BY_ROW:
            if PROLOGUE is None:
                even, odd = _pairs(box, inverses.slice(i * 64, 64), DTYPE, wide, pairs)
                larger = _largest(gl.maximum(gl.abs(even), gl.abs(odd)))
                peak = _larger(peak, gl.convert_layout(larger, peaked, assert_trivial=True))
        elif ROTATE:
            if i % PAIR == PAIR - 1:
                _store_rotated(xs, factors, inverses, (i + 1 - PAIR) * 64, target, ascales, begin, first, M, KP, a_row,
                               a_group, PAIR, turning)  # fmt: skip
        else:
            v = box.load(wide).to(gl.float32)
            if UNSIGNED:
                v += shift
            inverse = inverses.slice(i * 64, 64).load(column)[None, :]
            v = quotient(v, factors.slice(i * 64, 64).load(column)[None, :], inverse)
            v = gl.where(_below(rc, K - k, EXACT)[None, :], v, 0.0)
            q, scale = int4_codes(v, UNSIGNED, qx.dtype.element_ty == gl.float8e4nv)
            stored = alive & (k < KP)
            gl.store(target + i * 64 + (r[:, None] * KP + rc[None, :]), q, mask=stored[:, None])
            gl.store(ascales + (begin + r).to(gl.int64) * a_row + k // 64 * a_group, scale, mask=stored)
        if RING and i + SLOTS < BOXES:
            acc, acc_rest = warpgroup_mma_wait(0, deps=(acc, acc_rest))
            barrier()
            mbarrier.expect(ready.index(i + SLOTS), (RANK + REST) * 128)
            _load_down(down, rest, k + SLOTS * 64, ready.index(i + SLOTS), ds, es, i % SLOTS, RANK, REST)
    peaks = counters + begin
    here = counters + gl.num_programs(1) * ROWS + block
    there = here + gl.num_programs(1)
    sums = work + (block * S).to(gl.int64) * (ROWS * R)
    if BY_ROW:
        most = gl.convert_layout(gl.max(peak, 1), row, assert_trivial=True)
        if MEET:
            gl.atomic_max(peaks + r, most.to(gl.int32, bitcast=True), sem="relaxed")  # bits are in the numbers' order
            _arrive(here, S, 0)
    if R > 0:
        acc, acc_rest = warpgroup_mma_wait(0, deps=(acc, acc_rest))
        _store_part(sums + part * (ROWS * R), acc, 0, R)
        if REST > 0:
            _store_part(sums + part * (ROWS * R), acc_rest, RANK, R)
        if MEET:
            _arrive(there, S, 1)
    # What other multiprocessors wrote is loaded past the L1 cache.
    if BY_ROW:
        if MEET:
            _await(here, S, 2)
            most = gl.load(peaks + r, cache_modifier=".cg").to(gl.float32, bitcast=True)
        scale, reciprocal = int8_scale(most)
        if part == 0:
            gl.store(ascales + begin + r, scale, mask=alive)
        words = target.cast(gl.pointer_type(gl.int16), bitcast=True) + (r[:, None] * (KP // 2) + rc[None, :])
        for i in gl.static_range(BOXES):
            even, odd = _pairs(boxes.index(i), inverses.slice(i * 64, 64), DTYPE, wide, pairs)
            stored = alive[:, None] & _below(rc, (KP - first) // 2 - i * 32, EXACT)[None, :]
            gl.store(words + i * 32, int8_pair(even, odd, reciprocal[:, None]), mask=stored)
    if R > 0:  # each program adds up a slice of the row block's xd
        if MEET:
            _await(there, S, 3)
        else:
            barrier()
        e = part * SLICE + gl.arange(0, SLICE, gl.SliceLayout(0, flat))
        fp = gl.arange(0, PARTS, gl.SliceLayout(1, flat))[:, None]
        inside = e < ROWS * R
        values = gl.load(sums + (fp * (ROWS * R) + e[None, :]), mask=inside[None, :] & (fp < S), other=0.0,
                         cache_modifier=".cg")  # fmt: skip
        inside &= e < (M - begin) * R
        gl.store(xd + begin.to(gl.int64) * R + e, gl.sum(values, 0).to(xd.dtype.element_ty), mask=inside)
        if MEET:
            _leave(there, S)
    if MEET and BY_ROW:
        barrier()  # every warp has read the peaks
        _leave_peaks(here, S, peaks)


@dataclass(frozen=True)
class Tile:
    """What one program takes: boxes of 64 channels, and buffers for those of `down`."""

    boxes: int
    slots: int

    def group(self) -> int:
        """Channels that are waited for together."""
        return 64 * (self.boxes // 2 if self.boxes % 2 == 0 else self.boxes)

    def programs(self, k: int) -> int:
        """Of a row block."""
        return -(-k // (64 * self.boxes))


def tile_for(o: Quantize, prologue: Generated | None, right: Tensor | None) -> Tile:
    """The tile for these operands, as measured best on an H200, or within a twentieth of it.

    Wide programs leave less behind to add up, but do more before they let others go on. A program's shared memory says
    how many a multiprocessor has at once; where all of them are there at once, or most, nothing is left for the end
    that would fill a part of the GPU only.
    """
    (r, k), m = o.down.shape, o.x.shape[0]
    rank, by_block = sum(_pieces(r)), codes_of(o.precision).by_block
    gpu, wide = processors(o.x.device), -(-m // ROWS.value) * Tile(8, 2).programs(k)
    if rank > 64:
        boxes, slots = (8, 2) if rank <= 160 else (8, 1) if rank <= 192 else (4, 2)
        if k <= SHORT or (wide <= 3 * gpu and 2 * Tile(4, 2).programs(k) <= gpu):
            boxes, slots = 4, 2
    elif k <= SHORT and prologue is not None:
        boxes, slots = 2, 2
    elif rank <= 32 and not by_block and k > SHORT and 2 * gpu < wide <= 3 * gpu:
        boxes, slots = 8, 2  # three on a multiprocessor
    elif prologue is None and not by_block and (k > SHORT and wide >= gpu if rank <= 32 else m > 1024 and k > 8192):
        boxes, slots = (8, 8) if rank <= 32 else (8, 4)
    else:
        boxes, slots = 4, 4
    widest = 4 if rank > 192 else 8
    while boxes < widest and 2 * Tile(boxes, slots).programs(k) > gpu:  # `can_quantize`
        boxes, slots = 2 * boxes, 1 if rank > 160 else 2
    while right is not None and o.x.shape[1] % (64 * boxes):
        boxes //= 2
    return Tile(boxes, min(boxes, slots))


def can_quantize(o: Quantize, prologue: Generated | None, right: Tensor | None) -> bool:
    """Whether TMA can copy the rows, and a row block's programs run at once."""
    (r, k), (m, width) = o.down.shape, o.x.shape
    if k % 8 or o.down.data_ptr() % 16 or r > MAX_RANK[codes_of(o.precision).name] or m > ROWS.value * MAX_BLOCKS:
        return False
    if right is not None and width % 64:
        return False
    for part in (o.x, right):
        if part is not None and (part.data_ptr() % 16 or part.stride(0) % 8 or part.stride(0) < part.shape[1]):
            return False
    # A row block takes half of the multiprocessors at most: the rest is another stream's.
    return tile_for(o, prologue, right).programs(k) * 2 <= processors(o.x.device)


def constants(t: Tile, o: Quantize, prologue: Generated | None, right: Tensor | None) -> tuple:
    """The kernel's compile-time parameters."""
    r, k = o.down.shape
    programs = t.programs(k)
    piece = max(16, triton.next_power_of_2(-(-ROWS.value * r // programs)))
    exact = k % (64 * t.boxes) == 0
    codes = codes_of(o.precision).name
    return (t.boxes, t.slots, r, *_pieces(r), triton.next_power_of_2(programs), piece, codes, bool(o.shift), o.rotate,
            exact, right is not None, None if prologue is None else prologue.function)  # fmt: skip


def _pieces(r: int) -> tuple[int, int]:
    """Powers of two that a product's width is put together of: 96 -> 64 and 32, 144 -> 128 and 16, 128 -> 128 and 0."""
    first = 1 << max(r, 16).bit_length() - 1
    rest = triton.next_power_of_2(r - first) if r > first else 0
    return (2 * first, 0) if rest == first else (first, rest)


def describe_down(down: Tensor, t: Tile) -> tuple[Descriptor, Descriptor]:
    """Both pieces; where there is no second one, the first again."""
    first, rest = _pieces(down.shape[0])
    columns = 64 * t.boxes if t.slots == t.boxes else 64
    return describe(down, first, columns), describe(down, rest or first, columns)


def quantize(
    o: Quantize,
    prologue: Generated | None = None,
    right: Tensor | None = None,
    fp8: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As portable/quantize.py does it, for operands that `can_quantize`."""
    codes = check_quantize(o, right, fp8)
    results = allocate_results(o.x, o.smooth.shape[0], o.down.shape[0], codes, fp8)
    if o.x.shape[0] == 0:
        return results

    _launch(tile or tile_for(o, prologue, right), o, prologue, right, results)
    return results


def _launch(
    t: Tile, o: Quantize, prologue: Generated | None, right: Tensor | None, results: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, smooth, down, _, shift, _ = o
    qx, ascales, xd = results
    (r, k), (m, kp) = down.shape, qx.shape
    blocks, programs = -(-m // ROWS.value), t.programs(k)
    work = torch.empty(blocks * programs * ROWS.value * r, device=x.device, dtype=torch.float32)
    left = describe(x, ROWS.value, t.group())
    arguments = (left, left if right is None else describe(right, ROWS.value, t.group()), smooth,
                 *(describe_down(down, t) if r else (left, left)), qx, ascales, xd, work,
                 zeroed_counters(x.device, blocks * (ROWS.value + 2)), () if prologue is None else prologue.operands,
                 m, k, kp, programs, x.shape[1], *ascales.stride(), float(shift))  # fmt: skip
    parameters = constants(t, o, prologue, right)
    launch(_quantize_kernel, (programs, blocks, 1), arguments, parameters, num_warps=WARPS.value, launch_pdl=True)
