"""w4a8 and int4 activations and the low-rank product in one kernel for sm_90, in Gluon.

Formulas and tensors are those of triton_quantize.py. A program keeps [64 rows, BOXES * 64 channels] of the input in
shared memory from the one time it is read until its codes are written; a prologue replaces each box there when it
arrives. Between, it leaves its part of each row's maximum and of xd in memory and waits at the row block's counter for
the other programs of these rows. They have neighbouring ids and so start together; all of them must fit on the GPU at
once, or they would wait for ever: `can_quantize`.

    x, right  rows x_step * 8 and right_step * 8 elements apart: a multiple that the compiler sees
    down      up to rank 64 a pointer, each box comes with one of x; above, a TMA descriptor, and SLOTS buffers
    work      partial [S, M, R] and then peaks [S, M], fp32; S = programs a row block
    counters  [blocks]  int32, zero before and after: counts arrivals, then departures

EXACT says that rows and channels fill whole programs: without masks a prologue takes an eighth less instructions.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hooks import Hook
from .triton_codes import int4_codes, int8_codes, int8_scale, prologue, quotient
from .triton_launch import Descriptor, launch, processors, zeroed_counters

ROWS = gl.constexpr(64)
WARPS = gl.constexpr(4)
MAX_RANK = {"w4a8": 256, "int4": 240}  # more would not fit into registers
MAX_BLOCKS = 1024  # counters there are
# Renamed after Triton 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
# One thread counts or polls: an atomic of Triton's has every warp wait for its result, and polls disturb the loads of
# others. `inc` goes from the bound to zero, so that nobody needs to know who leaves last.
ARRIVE = gl.constexpr("""{
    .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
    @p red.release.gpu.global.inc.u32 [$1], $2; mov.u32 $0, 0;
}""")
LEAVE = gl.constexpr(ARRIVE.value.replace("release", "relaxed"))
AWAIT = gl.constexpr("""{
    .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.ne.u32 p, t, 0; @p bra done;
    again: ld.acquire.gpu.global.u32 t, [$1]; setp.ge.u32 p, t, $2; @p bra done; nanosleep.u32 40; bra again;
    done: mov.u32 $0, 0;
}""")


@gluon.jit
def _at_counter(counter, number, ASM: gl.constexpr):
    gl.inline_asm_elementwise(ASM, "=r,l,r", [counter.to(gl.int64), number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _meet(counter, programs):
    """Wait until every program of the row block is here, with all it wrote visible."""
    _barrier()
    _at_counter(counter, 2 * programs - 1, ARRIVE)
    _at_counter(counter, programs, AWAIT)
    _barrier()


@gluon.jit
def _below(index, limit, EXACT: gl.constexpr):
    if EXACT:
        return gl.full(index.shape, 1, gl.int1, index.type.layout)
    else:
        return index < limit


@gluon.jit
def _box(x, right, rm, columns, k, W, x_step, right_step, JOINED: gl.constexpr):
    """Pointers to a box of the input. Boxes do not straddle: W is a multiple of 64."""
    first, step = x + k, x_step
    if JOINED:
        first = gl.where(k < W, first, right + (k - W))
        step = gl.where(k < W, step, right_step)
    return first + rm[:, None] * (step * 8) + columns[None, :]


@gluon.jit(do_not_specialize=["M", "S"])  # a 1 stays a run-time value: Triton's constants have no methods
def _quantize_kernel(
    x, right, smooth, down, qx, ascales, xd, work, counters, extra, M, K, KP, S, W, x_step, right_step, a_row, a_group,
    shift,
    BOXES: gl.constexpr, SLOTS: gl.constexpr, R: gl.constexpr, RANK: gl.constexpr, PARTS: gl.constexpr,
    SLICE: gl.constexpr, FORMAT: gl.constexpr, UNSIGNED: gl.constexpr, EXACT: gl.constexpr, JOINED: gl.constexpr,
    HOOK: gl.constexpr,
):  # fmt: skip
    BY_ROW: gl.constexpr = FORMAT == "w4a8"  # a scale for the whole row, else one a box
    MEET: gl.constexpr = PARTS > 1 and (R > 0 or BY_ROW)
    RING: gl.constexpr = SLOTS < BOXES
    # Registers: how many rows a prologue gets at once, and whether a row's peak is held as one number or one a channel.
    PIECE: gl.constexpr = 32 if EXACT else 16
    NARROW: gl.constexpr = HOOK is not None or (RING and not EXACT) or RANK > 128
    DTYPE: gl.constexpr = x.dtype.element_ty
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, RANK, 16])
    # Few parts: each thread adds up its own columns. Many: the slices are short, and warps take parts instead.
    parted: gl.constexpr = [1, WARPS] if PARTS <= 16 else [WARPS, 1]
    lanes: gl.constexpr = [1, 32] if PARTS <= 16 or SLICE >= 128 else [2, 16] if SLICE == 64 else [8, 4]
    words: gl.constexpr = 4 if PARTS > 16 or SLICE >= 512 else 2 if SLICE == 256 else 1
    tall: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], parted, [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, words], lanes, parted, [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row: gl.constexpr = gl.SliceLayout(1, wide)
    column: gl.constexpr = gl.SliceLayout(0, wide)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    xs = gl.allocate_shared_memory(DTYPE, [BOXES, ROWS, 64], swizzled)
    ds = gl.allocate_shared_memory(DTYPE, [SLOTS, RANK, 64], swizzled)
    factors = gl.allocate_shared_memory(gl.float32, [BOXES, 64], plain)
    inverses = gl.allocate_shared_memory(gl.float32, [BOXES, 64], plain)
    full = gl.allocate_shared_memory(gl.int64, [BOXES, 1], mbarrier.MBarrierLayout())
    block = gl.program_id(0) // S
    part = gl.program_id(0) % S
    begin = block.to(gl.int64) * ROWS
    first = part * BOXES * 64
    rm = begin + gl.arange(0, ROWS, row)
    alive = _below(rm, M, EXACT)
    rc = gl.arange(0, 64, column)
    if RING:
        for i in gl.static_range(BOXES):
            mbarrier.init(full.index(i), count=1)
        fence_async_shared()
        for i in gl.static_range(SLOTS):
            mbarrier.expect(full.index(i), RANK * 128)
            _load(down, [0, first + i * 64], full.index(i), ds.index(i))
    for i in gl.static_range(BOXES):
        k = first + i * 64
        there = _below(rc + k, K, EXACT)[None, :]
        _copy(xs.index(i), _box(x, right, rm, rc, k, W, x_step, right_step, JOINED), mask=alive[:, None] & there)
        if R > 0 and not RING:
            rr = gl.arange(0, RANK, row)[:, None]
            _copy(ds.index(i), down + rr * K + (rc + k)[None, :], mask=(rr < R) & there)
        async_copy.commit_group()
    for i in gl.static_range(BOXES):
        rk = first + i * 64 + gl.arange(0, 64, line)
        factor = gl.load(smooth + rk, mask=_below(rk, K, EXACT), other=1.0)
        if BY_ROW:
            inverses.index(i).store(1.0 / factor)
        else:
            factors.index(i).store(factor)
            inverses.index(i).store(gl.div_rn(gl.full_like(factor, 1.0), factor))
    peak = gl.full([ROWS], 0.0, gl.float32, row) if NARROW else gl.full([ROWS, 64], 0.0, gl.float32, wide)
    acc = gl.full([ROWS, RANK], 0.0, gl.float32, mma)
    for i in gl.static_range(BOXES):
        k = first + i * 64
        columns = (rc + first + i * 64)[None, :]  # not rc + k: kept since the copies, that would cost registers
        async_copy.wait_group(BOXES - 1)
        if HOOK is not None:  # a thread loads what it copied itself
            for j in gl.static_range(0, ROWS, PIECE):
                piece = xs.index(i).slice(j, PIECE)
                rows = (begin + j + gl.arange(0, PIECE, row))[:, None]
                there = _below(rows, M, EXACT) & _below(columns, K, EXACT)
                piece.store(prologue(piece.load(wide), rows, columns, there, extra, HOOK))
        fence_async_shared()
        _barrier()
        async_copy.commit_group()  # of nothing: as many groups stay behind box i + 1 as did behind this one
        if RING:
            if i > 0 and i - 1 + SLOTS < BOXES:
                ahead = i - 1 + SLOTS
                mbarrier.expect(full.index(ahead), RANK * 128)
                _load(down, [0, first + ahead * 64], full.index(ahead), ds.index(ahead % SLOTS))
            mbarrier.wait(full.index(i), 0)
        if R > 0:
            acc = warpgroup_mma(xs.index(i), ds.index(i % SLOTS).permute([1, 0]), acc, is_async=True)
        v = xs.index(i).load(wide).to(gl.float32)
        inverse = inverses.index(i).load(column)[None, :]
        if not BY_ROW:
            if UNSIGNED:
                v += shift
            v = quotient(v, factors.index(i).load(column)[None, :], inverse)
            v = gl.where(alive[:, None] & _below(columns, K, EXACT), v, 0.0)
            q, scale = int4_codes(v, UNSIGNED, qx.dtype.element_ty == gl.float8e4nv)
            stored = alive if EXACT else alive & (k < KP)
            gl.store(qx + rm[:, None] * KP + columns, q, mask=stored[:, None])
            gl.store(ascales + rm * a_row + k // 64 * a_group, scale, mask=stored)
        elif NARROW:
            peak = gl.maximum(peak, gl.max(gl.abs(v * inverse), 1))
        else:
            peak = gl.maximum(peak, gl.abs(v * inverse))
        if R > 0:
            acc = warpgroup_mma_wait(0, deps=(acc,))
    size = M.to(gl.int64) * R  # of a part of xd
    peaks = work + S * size
    if BY_ROW:
        gl.store(peaks + part.to(gl.int64) * M + rm, peak if NARROW else gl.max(peak, 1), mask=alive)
    if R > 0:
        am = begin + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        ar = gl.arange(0, RANK, gl.SliceLayout(0, mma))
        gl.store(work + part * size + am[:, None] * R + ar[None, :], acc,
                 mask=_below(am, M, EXACT)[:, None] & (ar < R)[None, :])  # fmt: skip
    if MEET:
        _meet(counters + block, S)
    else:
        _barrier()
    # What other multiprocessors wrote is loaded past the L1 cache.
    if BY_ROW:
        ps = gl.arange(0, PARTS, gl.SliceLayout(1, tall))[:, None]
        tm = begin + gl.arange(0, ROWS, gl.SliceLayout(0, tall))
        some = gl.load(peaks + ps.to(gl.int64) * M + tm[None, :], mask=(ps < S) & (tm < M)[None, :], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        scale, reciprocal = int8_scale(gl.max(some, 0))
        if part == 0:
            gl.store(ascales + tm, scale, mask=tm < M)
        reciprocal = gl.convert_layout(reciprocal, row)
        for i in gl.static_range(BOXES):
            k = first + i * 64
            q = int8_codes(xs.index(i).load(wide), inverses.index(i).load(column)[None, :], reciprocal[:, None])
            stored = alive[:, None] & _below(rc + k, KP, EXACT)[None, :]
            gl.store(qx + rm[:, None] * KP + (rc + k)[None, :], q, mask=stored)
    if R > 0:  # each program adds up a slice of the row block's xd
        e = part * SLICE + gl.arange(0, SLICE, gl.SliceLayout(0, flat))
        fp = gl.arange(0, PARTS, gl.SliceLayout(1, flat))[:, None]
        start = begin * R
        inside = (e < ROWS * R) & (start + e < size)
        values = gl.load(work + start + e[None, :] + fp * size, mask=inside[None, :] & (fp < S), other=0.0,
                         cache_modifier=".cg")  # fmt: skip
        gl.store(xd + start + e, gl.sum(values, 0).to(xd.dtype.element_ty), mask=inside)
    if MEET:
        _at_counter(counters + block, 2 * S - 1, LEAVE)


def _boxes(r: int) -> tuple[int, int]:
    """Boxes of x, and buffers for those of `down`: measured best on an H100 for ranks 32 and 128.

    Above 128 more boxes would leave room for one program on a multiprocessor only; not measured.
    """
    if r <= 64:
        return 4, 4
    return (8, 2) if r <= 128 else (4, 2)


def can_quantize(x: Tensor, right: Tensor | None, down: Tensor, precision: str) -> bool:
    """Whether rows can be copied 16 bytes at a time, as the compiler sees it, and a row block's programs run at once.

    Half the multiprocessors for one row block leaves room for another stream's.
    """
    (r, k), m = down.shape, x.shape[0]
    if k % 16 or down.data_ptr() % 16 or r > MAX_RANK[precision] or m > ROWS.value * MAX_BLOCKS:
        return False
    if x.data_ptr() % 16 or x.stride(0) % 8:
        return False
    if right is not None and (x.shape[1] % 64 or right.data_ptr() % 16 or right.stride(0) % 8):
        return False
    return -(-k // (64 * _boxes(r)[0])) * 2 <= processors(x.device)


def constants(m: int, k: int, r: int, precision: str, shift: float, joined: bool, hook: Hook | None) -> tuple:
    """The kernel's compile-time parameters."""
    boxes, slots = _boxes(r)
    programs = -(-k // (64 * boxes))
    piece = max(16, triton.next_power_of_2(-(-ROWS.value * r // programs)))
    exact = m % ROWS.value == 0 and k % (64 * boxes) == 0
    return (boxes, slots, r, triton.next_power_of_2(max(r, 16)), triton.next_power_of_2(programs), piece, precision,
            bool(shift), exact, joined, None if hook is None else hook.function)  # fmt: skip


# One object: `launch` knows a layout by its identity.
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def describe_down(down: Tensor, r: int) -> Descriptor:
    return Descriptor(down, down.shape, down.stride(), (triton.next_power_of_2(r), 64), _SWIZZLED)


def quantize(x: Tensor, right: Tensor | None, smooth: Tensor, down: Tensor, precision: str, shift: float,
             prologue: Hook | None, qx: Tensor, ascales: Tensor, xd: Tensor) -> None:  # fmt: skip
    """Checked operands, `can_quantize` -> into qx, ascales and xd."""
    (r, k), (m, kp) = down.shape, qx.shape
    boxes, slots = _boxes(r)
    blocks, programs = -(-m // ROWS.value), -(-k // (64 * boxes))
    work = torch.empty(programs * m * (r + 1), device=x.device, dtype=torch.float32)
    more = x if right is None else right
    arguments = (x, more, smooth, down if slots == boxes else describe_down(down, r), qx, ascales, xd, work,
                 zeroed_counters(x.device), () if prologue is None else prologue.operands, m, k, kp, programs,
                 x.shape[1], x.stride(0) // 8, more.stride(0) // 8, *ascales.stride(), float(shift))  # fmt: skip
    launch(_quantize_kernel, (blocks * programs, 1, 1), arguments,
           constants(m, k, r, precision, shift, right is not None, prologue), num_warps=WARPS.value)  # fmt: skip
