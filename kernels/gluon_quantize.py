"""w4a8 and int4 activations and the low-rank product in one kernel for sm_90, in Gluon.

Formulas and tensors are those of triton_quantize.py.

A program keeps [64 rows, BOXES * 64 channels] of the input in shared memory from the one time it is read until its
codes are written; a prologue replaces each box there as it arrives. Between, it leaves its part of each row's maximum
and of xd in memory and waits at the row block's counter for the other programs of these rows. They have neighbouring
ids and so start together; all of them must fit on the GPU at once, or they would wait for ever: `can_quantize`. `down`
passes through SLOTS boxes.

    x, right  rows x_step * 8 and right_step * 8 elements apart: a multiple that the compiler sees
    work      partial [S, M, R] and then peaks [S, M], fp32; S = programs a row block
    cells     M R, and first_peak S M R: here, since Triton makes a constant without methods of an argument of 1
    counters  [blocks]  int32, zero before and after: counts arrivals, then departures

Copies are `cp.async`: TMA was no faster on an H100, and its two descriptors cost the host about 18 us a call.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .hooks import Hook
from .triton_launch import launch, processors, zeroed_counters
from .triton_quantize import int4_codes, int8_codes, int8_scale, prologue, quotient

ROWS = gl.constexpr(64)
WARPS = gl.constexpr(4)
MAX_RANK = 128
MAX_BLOCKS = 1024  # counters there are
# Renamed after Triton 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_copy = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def _meet(counter, programs):
    """Wait until every program of the row block is here, with all it wrote visible."""
    _barrier()
    gl.atomic_add(counter, 1, sem="release")
    while gl.atomic_add(counter, 0, sem="acquire") < programs:
        pass
    _barrier()


@gluon.jit
def _at(x, right, rm, rc, k, W, x_step, right_step, JOINED: gl.constexpr):
    """Where a box of the input is. Boxes do not straddle: W is a multiple of 64."""
    first, step = x + k, x_step
    if JOINED:
        first = gl.where(k < W, first, right + (k - W))
        step = gl.where(k < W, step, right_step)
    return first + rm[:, None] * (step * 8) + rc[None, :]


@gluon.jit(do_not_specialize=["M", "S", "cells", "first_peak"])  # a 1 stays a run-time value
def _quantize_kernel(
    x, right, smooth, down, qx, ascales, xd, work, counters, extra, M, K, KP, R, S, W, x_step, right_step, a_row,
    a_group, cells, first_peak, shift,
    BOXES: gl.constexpr, SLOTS: gl.constexpr, RANK: gl.constexpr, PARTS: gl.constexpr, SLICE: gl.constexpr,
    FORMAT: gl.constexpr, UNSIGNED: gl.constexpr, JOINED: gl.constexpr, HOOK: gl.constexpr,
):  # fmt: skip
    BY_ROW: gl.constexpr = FORMAT == "w4a8"  # a scale for the whole row, else one a box
    MEET: gl.constexpr = PARTS > 1 and (RANK > 0 or BY_ROW)
    PIECE: gl.constexpr = 32 if RANK <= 64 else 16
    RR: gl.constexpr = RANK if RANK > 0 else 16
    POWER: gl.constexpr = 64 * (4 if BOXES <= 4 else 8)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, RR, 16])
    # Few parts: each thread adds up its own columns. Many: the slices are short, and warps take parts instead.
    parted: gl.constexpr = [1, WARPS] if PARTS <= 16 else [WARPS, 1]
    lanes: gl.constexpr = [1, 32] if PARTS <= 16 or SLICE >= 128 else [2, 16] if SLICE == 64 else [8, 4]
    tall: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], parted, [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 4], lanes, parted, [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row: gl.constexpr = gl.SliceLayout(1, wide)
    column: gl.constexpr = gl.SliceLayout(0, wide)
    xs = gl.allocate_shared_memory(x.dtype.element_ty, [BOXES, ROWS, 64], swizzled)
    ds = gl.allocate_shared_memory(x.dtype.element_ty, [SLOTS, RR, 64], swizzled)
    factors = gl.allocate_shared_memory(gl.float32, [POWER], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    inverses = gl.allocate_shared_memory(gl.float32, [POWER], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    block = gl.program_id(0) // S
    part = gl.program_id(0) % S
    begin = block.to(gl.int64) * ROWS
    rm = begin + gl.arange(0, ROWS, row)
    live = (rm < M)[:, None]
    rc = gl.arange(0, 64, column)
    rr = gl.arange(0, RR, row)
    d_at = down + rr[:, None] * K + rc[None, :]
    d_live = (rr < R)[:, None]
    first = part * BOXES * 64
    for i in gl.static_range(BOXES):
        k = first + i * 64
        at = _at(x, right, rm, rc, k, W, x_step, right_step, JOINED)
        _copy(xs.index(i), at, mask=live & (rc + k < K)[None, :])
        if RANK > 0 and i < SLOTS:
            _copy(ds.index(i), d_at + k, mask=d_live & (rc + k < K)[None, :])
        async_copy.commit_group()
    rk = first + gl.arange(0, POWER, gl.BlockedLayout([1], [32], [WARPS], [0]))
    factor = gl.load(smooth + rk, mask=rk < K, other=1.0)
    if BY_ROW:
        inverses.store(1.0 / factor)
    else:
        factors.store(factor)
        inverses.store(gl.div_rn(gl.full_like(factor, 1.0), factor))
    peak = gl.full([ROWS], 0.0, gl.float32, row)
    acc = gl.full([ROWS, RR], 0.0, gl.float32, mma)
    for i in gl.static_range(BOXES):
        k = first + i * 64
        columns = (rc + first + i * 64)[None, :]  # not rc + k: kept since the copies, that would cost registers
        inside = live & (columns < K)
        # One group a box of x, and one a step of this loop, which may hold a box of `down`.
        async_copy.wait_group(BOXES - 1 if i < SLOTS else SLOTS - 2)
        if HOOK is not None:  # a thread loads what it copied itself
            for j in gl.static_range(0, ROWS, PIECE):
                part_of_box = xs.index(i).slice(j, PIECE)
                rows = (begin + j + gl.arange(0, PIECE, row))[:, None]
                h = prologue(part_of_box.load(wide), rows, columns, (rows < M) & (columns < K), extra, HOOK)
                part_of_box.store(h)
        fence_async_shared()
        _barrier()
        if RANK > 0 and i > 0 and i - 1 + SLOTS < BOXES:
            ahead = k + (SLOTS - 1) * 64
            _copy(ds.index((i - 1) % SLOTS), d_at + ahead, mask=d_live & (rc + ahead < K)[None, :])
        async_copy.commit_group()
        if RANK > 0:
            acc = warpgroup_mma(xs.index(i), ds.index(i % SLOTS).permute([1, 0]), acc, is_async=True)
        v = xs.index(i).load(wide).to(gl.float32)
        inverse = inverses.slice(i * 64, 64).load(column)[None, :]
        if BY_ROW:
            peak = gl.maximum(peak, gl.max(gl.abs(v * inverse), 1))  # each box: 32 values a thread less to hold
        else:
            if UNSIGNED:
                v += shift
            v = gl.where(inside, quotient(v, factors.slice(i * 64, 64).load(column)[None, :], inverse), 0.0)
            q, scale = int4_codes(v, UNSIGNED, qx.dtype.element_ty == gl.float8e4nv)
            gl.store(qx + rm[:, None] * KP + columns, q, mask=live & (k < KP))
            gl.store(ascales + rm * a_row + k // 64 * a_group, scale, mask=(rm < M) & (k < KP))
        if RANK > 0:
            acc = warpgroup_mma_wait(0, deps=(acc,))
    peaks = work + first_peak
    if BY_ROW:
        gl.store(peaks + part.to(gl.int64) * M + rm, peak, mask=rm < M)
    if RANK > 0:
        am = begin + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        ar = gl.arange(0, RR, gl.SliceLayout(0, mma))
        at = work + (part.to(gl.int64) * M + am)[:, None] * R + ar[None, :]
        gl.store(at, acc, mask=(am < M)[:, None] & (ar < R)[None, :])
    if MEET:
        _meet(counters + block, S)
    else:
        _barrier()
    if BY_ROW:
        # Past the L1 cache: other multiprocessors wrote these.
        ps = gl.arange(0, PARTS, gl.SliceLayout(1, tall))
        tm = begin + gl.arange(0, ROWS, gl.SliceLayout(0, tall))
        some = gl.load(peaks + ps.to(gl.int64)[:, None] * M + tm[None, :], mask=(ps < S)[:, None] & (tm < M)[None, :],
                       other=0.0, cache_modifier=".cg")  # fmt: skip
        scale, reciprocal = int8_scale(gl.max(some, 0))
        if part == 0:
            gl.store(ascales + tm, scale, mask=tm < M)
        reciprocal = gl.convert_layout(reciprocal, row)
        for i in gl.static_range(BOXES):
            k = first + i * 64
            inverse = inverses.slice(i * 64, 64).load(column)
            q = int8_codes(xs.index(i).load(wide), inverse[None, :], reciprocal[:, None])
            gl.store(qx + rm[:, None] * KP + (rc + k)[None, :], q, mask=live & (rc + k < KP)[None, :])
    if RANK > 0:  # each program adds up a slice of the row block's xd
        e = part * SLICE + gl.arange(0, SLICE, gl.SliceLayout(0, flat))
        fp = gl.arange(0, PARTS, gl.SliceLayout(1, flat))
        start = begin * R
        inside = (e < ROWS * R) & (start + e < cells)
        values = gl.load(work + start + e[None, :] + fp.to(gl.int64)[:, None] * M * R,
                         mask=inside[None, :] & (fp < S)[:, None], other=0.0, cache_modifier=".cg")  # fmt: skip
        gl.store(xd + start + e, gl.sum(values, 0).to(xd.dtype.element_ty), mask=inside)
    if MEET and gl.atomic_add(counters + block, 1, sem="relaxed") == 2 * S - 1:
        gl.store(counters + block, 0)


def _boxes(r: int) -> tuple[int, int]:
    """Boxes of x, and of `down`, that a program holds: measured best on an H100 for ranks 32 and 128."""
    return (4, 4) if r <= 64 else (8, 2)


def can_quantize(x: Tensor, right: Tensor | None, down: Tensor) -> bool:
    """Whether rows can be copied 16 bytes at a time, as the compiler sees it, and a row block's programs run at once.

    Half the multiprocessors for one row block leaves room for another stream's.
    """
    (r, k), m = down.shape, x.shape[0]
    if k % 16 or down.data_ptr() % 16 or r > MAX_RANK or m > ROWS.value * MAX_BLOCKS:
        return False
    if x.data_ptr() % 16 or x.stride(0) % 8:
        return False
    if right is not None and (x.shape[1] % 64 or right.data_ptr() % 16 or right.stride(0) % 8):
        return False
    return -(-k // (64 * _boxes(r)[0])) * 2 <= processors(x.device)


def quantize(x: Tensor, right: Tensor | None, smooth: Tensor, down: Tensor, precision: str, shift: float,
             prologue: Hook | None, qx: Tensor, ascales: Tensor, xd: Tensor) -> None:  # fmt: skip
    """Checked operands, `can_quantize` -> into qx, ascales and xd."""
    (r, k), (m, kp) = down.shape, qx.shape
    boxes, slots = _boxes(r)
    blocks, programs = -(-m // ROWS.value), -(-kp // (64 * boxes))
    rank = triton.next_power_of_2(r) if r else 0
    piece = max(16, triton.next_power_of_2(-(-ROWS.value * r // programs)))
    work = torch.empty(programs * m * (r + 1), device=x.device, dtype=torch.float32)
    more = x if right is None else right
    hook, extra = (None, ()) if prologue is None else (prologue.function, prologue.operands)
    arguments = (x, more, smooth, down, qx, ascales, xd, work, zeroed_counters(x.device), extra, m, k, kp, r, programs,
                 x.shape[1], x.stride(0) // 8, more.stride(0) // 8, *ascales.stride(), m * r, programs * m * r,
                 float(shift))  # fmt: skip
    constants = (boxes, slots, rank, triton.next_power_of_2(programs), piece, precision, bool(shift),
                 right is not None, hook)  # fmt: skip
    launch(_quantize_kernel, (blocks * programs, 1, 1), arguments, constants, num_warps=WARPS.value)
