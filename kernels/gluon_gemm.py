"""The w4a8 GEMM for sm_90, in Gluon: asynchronous int8 `wgmma` with the weights unpacked in registers.

    y = (qx (q s)^T) * ascales * wscales + bias + xd up^T

    qx         [M, Kp]     int8
    ascales    [M, 1]      fp32
    qweight    [N, P/2]    int8, planar (layout.py); P = Kp rounded up to 128
    subscales  [P/128, N]  int16, two groups' scales in a word
    wscales    [N]         fp32
    xd         [M, r]      bf16 or fp16, rows `xd.stride(0)` apart
    up         [N, r]      xd's dtype
    bias       [N]         any float dtype, or None
    y          [M, N]      bf16 or fp16

One program walks over tiles of TN features by TM tokens, computed transposed: weights are the left operand, which
`wgmma` takes from registers. A step of the walk is one of STAGES buffers, filled by the copy engine (TMA) STAGES - 1
steps ahead and across tiles; a tile is P/128 integer steps, then, after the scales, a step for every 32 of the rank,
which finds `xd` and `up` in the same buffers. One half's codes are expanded while the other half's are multiplied.
TMA cuts off at the edges of M, N, K and r, so nothing here is masked but the vectors.

Only Gluon's public operations; no warp specialization, which ptxas serializes (C7512). Tried on Triton 3.6 and 3.9.
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

from .triton_gemm import check_gemm
from .triton_launch import Descriptor, launch, processors
from .triton_unpack import FOUR_8, FOUR_128, SCALED_CONSTRAINTS, SCALED_HIGH, SCALED_LOW

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
    size = gl.minimum(tiles_m - first, GROUP)
    inside = t % width
    return first + inside % size, inside // size


@gluon.jit
def _fill(x, w, s, xd, up, xs, ws, ss, full, pm, pn, step, k_steps, slot, live, TM: gl.constexpr, TN: gl.constexpr):
    """Start the copies of one step into its buffer; they arrive at full[slot]."""
    bar = full.index(slot)
    if step < k_steps:
        mbarrier.expect(bar, TM * 128 + TN * 66, pred=live)
        _load(s, [step, pn * TN], bar, ss.index(slot), pred=live)
        _load(w, [pn * TN, step * 64], bar, ws.index(slot), pred=live)
        _load(x, [pm * TM, step * 128], bar, xs.index(slot), pred=live)
    else:
        r = (step - k_steps) * RANK_STEP
        mbarrier.expect(bar, (TM + TN) * 2 * RANK_STEP, pred=live)
        _load(up, [pn * TN, r], bar, _view(ws.index(slot), up.dtype, [TN, RANK_STEP], up.layout), pred=live)
        _load(xd, [pm * TM, r], bar, _view(xs.index(slot), xd.dtype, [TM, RANK_STEP], xd.layout), pred=live)


@gluon.jit
def _after(pm, pn, step, tile, steps, tiles_m, tiles_n, GROUP: gl.constexpr):
    """The step that follows, in the next tile where this one ends."""
    step += 1
    if step >= steps:
        step = 0
        tile += gl.num_programs(0)
        pm, pn = _tile_of(gl.minimum(tile, tiles_m * tiles_n - 1), tiles_m, tiles_n, GROUP)
    return pm, pn, step, tile


@gluon.jit
def _expand(p, s, ASM: gl.constexpr):
    """p [TN, 64] int8, s [TN, 1] int8 -> (code - 8) * s, [TN, 64] int8."""
    s = s.to(gl.int32)
    c = FOUR_128 - s * FOUR_8
    return gl.inline_asm_elementwise(ASM, SCALED_CONSTRAINTS, [p, s, c], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _gemm_kernel(
    x, w, s, xd, up, y, ascales, wscales, bias, M, N, k_steps, rank_steps,
    TM: gl.constexpr, TN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, BIAS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    INSTRUCTION: gl.constexpr = TM if TM < 128 else 128
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, INSTRUCTION, 32])
    real: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, INSTRUCTION, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, whole, 4)
    bytewise: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=2)
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, TM, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES, TN, 64], w.layout)
    ss = gl.allocate_shared_memory(gl.int16, [STAGES, 1, TN], s.layout)
    ys = gl.allocate_shared_memory(y.dtype, [TM, TN], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    tiles_m = gl.cdiv(M, TM)
    tiles_n = gl.cdiv(N, TN)
    tiles = tiles_m * tiles_n
    steps = k_steps + rank_steps
    tile = gl.program_id(0)
    pm, pn = _tile_of(tile, tiles_m, tiles_n, GROUP)
    step = tile * 0
    for i in gl.static_range(STAGES - 1):
        _fill(x, w, s, xd, up, xs, ws, ss, full, pm, pn, step, k_steps, i, tile < tiles, TM, TN)
        pm, pn, step, tile = _after(pm, pn, step, tile, steps, tiles_m, tiles_n, GROUP)
    slot = 0
    phase = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        cm, cn = _tile_of(t, tiles_m, tiles_n, GROUP)
        acc = gl.full([TN, TM], 0, gl.int32, whole)
        for _ in range(k_steps):
            mbarrier.wait(full.index(slot), phase)
            p = ws.index(slot).load(left)
            scales = _view(ss.index(slot), gl.int8, [TN, 2], bytewise)
            even = scales.slice(0, 1, 1).load(left)
            odd = scales.slice(1, 1, 1).load(left)
            xt = xs.index(slot)
            low = _expand(p, even, SCALED_LOW)
            acc = warpgroup_mma(low, xt.slice(0, 64, 1).permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            _barrier()  # every warp is done with the step before this one: its buffer is free
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            _fill(x, w, s, xd, up, xs, ws, ss, full, pm, pn, step, k_steps, free, tile < tiles, TM, TN)
            pm, pn, step, tile = _after(pm, pn, step, tile, steps, tiles_m, tiles_n, GROUP)
            high = _expand(p, odd, SCALED_HIGH)
            acc = warpgroup_mma(high, xt.slice(64, 64, 1).permute([1, 0]), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            slot += 1
            phase = gl.where(slot == STAGES, phase ^ 1, phase)
            slot = gl.where(slot == STAGES, 0, slot)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        rm = cm * TM + gl.arange(0, TM, gl.SliceLayout(0, real))
        rn = cn * TN + gl.arange(0, TN, gl.SliceLayout(1, real))
        a = gl.load(ascales + rm, mask=rm < M, other=0.0)
        b = gl.load(wscales + rn, mask=rn < N, other=0.0)
        out = gl.convert_layout(acc, real, assert_trivial=True).to(gl.float32) * a[None, :] * b[:, None]
        if BIAS:
            out += gl.load(bias + rn, mask=rn < N, other=0.0).to(gl.float32)[:, None]
        for _ in range(rank_steps):
            mbarrier.wait(full.index(slot), phase)
            u = _view(ws.index(slot), up.dtype, [TN, RANK_STEP], up.layout)
            d = _view(xs.index(slot), xd.dtype, [TM, RANK_STEP], xd.layout)
            out = warpgroup_mma(u, d.permute([1, 0]), out, is_async=True)
            _barrier()
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            _fill(x, w, s, xd, up, xs, ws, ss, full, pm, pn, step, k_steps, free, tile < tiles, TM, TN)
            pm, pn, step, tile = _after(pm, pn, step, tile, steps, tiles_m, tiles_n, GROUP)
            out = warpgroup_mma_wait(0, deps=(out,))
            slot += 1
            phase = gl.where(slot == STAGES, phase ^ 1, phase)
            slot = gl.where(slot == STAGES, 0, slot)
        tma.store_wait(0)
        ys.permute([1, 0]).store(out.to(y.dtype))
        fence_async_shared()
        _store(y, [cm * TM, cn * TN], ys)
    tma.store_wait(0)


@dataclass(frozen=True)
class Tile:
    """One shape of the kernel: tokens, features, buffers, and how many programs share a multiprocessor."""

    tm: int
    tn: int
    stages: int
    warps: int
    programs: int = 1
    group: int = 8


def can_gemm(qx: Tensor, xd: Tensor, up: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether TMA can read and write these: 16-byte rows and addresses, and a 16-bit result no wider than a buffer."""
    n, r = up.shape
    if out_dtype not in (torch.bfloat16, torch.float16) or n % 8 or r % 8 or qx.data_ptr() % 16:
        return False
    return not r or (xd.stride(0) % 8 == 0 and xd.data_ptr() % 16 == 0 and up.data_ptr() % 16 == 0)


def choose_tile(m: int, n: int, device: torch.device) -> Tile:
    """For m tokens by n features: within 10 % of the fastest of bench/gemm.py --tiles on an H200."""
    if m <= 32:
        return Tile(32, 64, 8, 4, 2)
    if m <= 64:
        return Tile(64, 64, 8, 4, 2)
    if m <= 128:
        return Tile(128, 128, 5, 8) if n > 8192 else Tile(128, 64, 4, 4, 2)
    if -(-m // 256) * -(-n // 128) < 2 * processors(device):
        return Tile(256, 64, 4, 4)
    return Tile(256, 128, 4, 8)


@cache
def _layout(dtype: torch.dtype, rows: int, columns: int) -> gl.NVMMASharedLayout:
    if dtype == torch.int16:  # sub-scales are read back bytewise: plain order, no swizzle
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)
    names = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
    return gl.NVMMASharedLayout.get_default_for([rows, columns], names[dtype])


def _describe(tensor: Tensor, rows: int, columns: int) -> Descriptor:
    """What TMA copies by blocks of [rows, columns]."""
    return Descriptor(tensor, tensor.shape, tensor.stride(), (rows, columns), _layout(tensor.dtype, rows, columns))


def gemm(qx: Tensor, ascales: Tensor, xd: Tensor, weight: tuple[Tensor, ...], up: Tensor, bias: Tensor | None,
         out_dtype: torch.dtype, tile: Tile | None = None) -> Tensor:  # fmt: skip
    """w4a8, tensors as above, `can_gemm` -> y [M, N]."""
    m, n, _ = check_gemm("w4a8", qx, ascales, xd, weight, up, bias, None)
    y = qx.new_empty(m, n, dtype=out_dtype)
    if m == 0 or n == 0:
        return y
    qweight, subscales, wscales = weight
    t = tile or choose_tile(m, n, qx.device)
    r = up.shape[1]
    if not r:  # the descriptors must exist; no step will use them
        xd = up = qx.view(torch.bfloat16)
    tiles = -(-m // t.tm) * -(-n // t.tn)
    arguments = (
        _describe(qx, t.tm, 128),
        _describe(qweight, t.tn, 64),
        _describe(subscales, 1, t.tn),
        _describe(xd, t.tm, RANK_STEP.value),
        _describe(up, t.tn, RANK_STEP.value),
        _describe(y, t.tm, t.tn),
        ascales,
        wscales,
        wscales if bias is None else bias,
        m,
        n,
        subscales.shape[0],
        -(-r // RANK_STEP.value),
    )
    constants = (t.tm, t.tn, t.stages, t.group, bias is not None, t.warps)
    launch(
        _gemm_kernel, (min(tiles, t.programs * processors(qx.device)), 1, 1), arguments, constants, num_warps=t.warps
    )
    return y
