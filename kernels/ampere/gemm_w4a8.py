"""The w4a8 GEMM for NVIDIA GPUs from sm_80, in Gluon: int8 `mma.sync` with the weights unpacked in registers.

    y = (qx (q s)^T) * ascales * wscales + bias + xd up^T, then the epilogue

    qx         [M, Kp]     int8
    ascales    [M, 1]      fp32
    qweight    [N, P/2]    int8, planar (formats/planar.py); P = Kp rounded up to 128
    subscales  [P/128, N]  int16, two groups' scales in a word; rows any multiple of 8 apart
    wscales    [N]         fp32
    xd         [M, s r]    bf16 or fp16, rows `xd.stride(0)` apart
    up         [N, r]      xd's dtype; s siblings of N/s features each read r columns of xd
    bias       [N]         any float dtype, or None
    auxiliary  [M, N]      bf16 or fp16, rows `auxiliary.stride(0)` apart: the epilogue's, or None
    y          [M, N]      bf16, fp16 or fp32; [M, N/2] of an epilogue that gates (portable/gates.py)

A program computes TN features by TM tokens, transposed: weights are the left operand. A tile has P/128 steps, and then
one for every 32 of the rank, whose operands go through the same buffers. `cp.async` fills those ahead; `ldmatrix` takes
packed codes and tokens out of them to where `mma.sync` reads them, so codes are unpacked by whoever multiplies them and
never written down. Rows past the end of M and N repeat the last one and are not stored.

Tiles that would leave most of the GPU idle in a last round are cut along K into parts. A part leaves its int32 sums in
`partial` and counts itself; the one that comes last adds the others' and finishes the tile. Integer sums do not depend
on the order, so the result is the same bit for bit whichever comes last.

The result leaves in two halves along its tokens, by way of shared memory, to where a warp's lanes are neighbouring
features: there the epilogue runs, and what it reads lies as y does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..operands import Gemm
from ..portable.gates import feature, split_halves
from ..portable.gemm import check_auxiliary, check_gemm, sibling_features, stored_features
from ..portable.unpack import FOUR_8, FOUR_128, SCALED_CONSTRAINTS, SCALED_HIGH, SCALED_LOW
from ..runtime.generated import Generated
from ..runtime.launcher import launch, zeroed_counters
from ..runtime.rounds import share
from ..runtime.target import processors, shared_memory
from ..runtime.tuning import choose_tile
from ..runtime.versions import aggregate, barrier, copy, view

GROUP = 8  # token tiles in a row that use the same weights
RANK_STEP = gl.constexpr(32)  # 64 bytes a row, as wide as a step's packed weights


@gluon.jit
def _expand(p, s, ASM: gl.constexpr):
    """p [TN, 64] int8, s [TN, 1] int32 -> (code - 8) * s, [TN, 64] int8."""
    c = FOUR_128 - s * FOUR_8
    return gl.inline_asm_elementwise(ASM, SCALED_CONSTRAINTS, [p, s, c], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def _halves(acc, layout: gl.constexpr):
    """[TN, TM] -> two times [TN, TM/2]: other registers, nothing moves."""
    h: gl.constexpr = acc.shape[1] // 2
    first, second = gl.split(gl.permute(gl.reshape(acc, [acc.shape[0], 2, h]), [0, 2, 1]))
    return gl.convert_layout(first, layout, assert_trivial=True), gl.convert_layout(second, layout, assert_trivial=True)


@gluon.jit
def _origin(t, M, N, TM: gl.constexpr, TN: gl.constexpr, GROUP: gl.constexpr):
    """A tile's first token and first feature. GROUP token tiles in a row use the same weights, then from L2."""
    tiles_m = gl.cdiv(M, TM)
    width = GROUP * gl.cdiv(N, TN)
    first = t // width * GROUP
    size = gl.minimum(tiles_m - first, GROUP)
    return (first + t % width % size) * TM, t % width // size * TN


@gluon.jit
def _features(n0, N, TN: gl.constexpr, layout: gl.constexpr, GATES: gl.constexpr):
    """The features that a tile's rows are; past the end the last one."""
    rows = gl.minimum(n0 + gl.arange(0, TN, layout), N - 1)
    return feature(rows, N // 2) if GATES else rows


@gluon.jit
def _add_others(acc, partial, counter, own, parts):
    """Leave this part's sums and count it; the last one of its tile adds the others'. -> sums, whether the last."""
    layout: gl.constexpr = acc.type.layout
    TN: gl.constexpr = acc.shape[0]
    TM: gl.constexpr = acc.shape[1]
    offsets = (gl.arange(0, TN, gl.SliceLayout(1, layout)) * TM)[:, None]
    offsets += gl.arange(0, TM, gl.SliceLayout(0, layout))[None, :]
    gl.store(partial + own * (TN * TM) + offsets, acc)
    barrier()
    arrived = gl.atomic_add(counter, 1)  # acquires and releases: the others' sums are visible
    if arrived == parts - 1:
        for other in range(parts):
            if other != own:
                acc += gl.load(partial + other * (TN * TM) + offsets, cache_modifier=".cg")
        gl.store(counter, 0)  # for the next call
    return acc, arrived == parts - 1


@aggregate
class Buffers:
    """STAGES buffers for a step each: tokens [TM, 128 bytes] or xd [TM, 32]; weights [TN, 64 bytes] or up [TN, 32];
    scales [TN]. Eight rows' 16 bytes, as `ldmatrix` reads them, are in different banks.
    """

    tokens: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    wide: gl.constexpr
    layout: gl.constexpr

    @gluon.jit
    def up(self, slot):
        weights = self.weights.index(slot)
        return view(weights, self.wide, [weights.shape[0], RANK_STEP], self.layout)

    @gluon.jit
    def xd(self, slot):
        """In the first half of the tokens' place, which is viewed whole: Triton 3.8 knows no other view."""
        tokens = self.tokens.index(slot)
        whole = view(tokens, self.wide, [2 * tokens.shape[0], RANK_STEP], self.layout)
        return whole.slice(0, tokens.shape[0], 0)


@aggregate
class Codes:
    """Where this program's codes are: of tokens [TM, 1], of weights [TN, 64], and these's scales [TN]."""

    x: gl.tensor
    x_k: gl.tensor
    p: gl.tensor
    s: gl.tensor
    s_live: gl.tensor
    s_stride: gl.tensor
    KP: gl.tensor

    @gluon.jit
    def copy(self, buffers, slot, step):
        k = step * 128 + self.x_k
        k = gl.where(k < self.KP, k, k - 64)  # past the end any value will do: its scale is 0
        copy(buffers.tokens.index(slot), self.x + k[None, :])
        copy(buffers.weights.index(slot), self.p + step * 64)
        copy(buffers.scales.index(slot), self.s + step * self.s_stride, mask=self.s_live)


@aggregate
class LowRank:
    """Where its rows of xd [TM, 1] and up [TN, 1] are."""

    xd: gl.tensor
    up: gl.tensor
    columns: gl.tensor
    rank: gl.tensor

    @gluon.jit
    def copy(self, buffers, slot, step):
        r = step * RANK_STEP + self.columns
        live = (r < self.rank)[None, :]  # zeros elsewhere
        copy(buffers.up(slot), self.up + r[None, :], mask=live)
        copy(buffers.xd(slot), self.xd + r[None, :], mask=live)


# Sizes stay run-time values: Triton would make each 1 a constant, and compile anew for each that 16 divides.
@gluon.jit(
    do_not_specialize=[
        "M",
        "N",
        "KP",
        "rank",
        "sibling",
        "xd_stride",
        "auxiliary_stride",
        "scales_stride",
        "whole",
        "parts",
        "part_steps",
    ]
)
def _gemm_kernel(
    qx, ascales, qweight, subscales, wscales, xd, up, bias, y, auxiliary, partial, counters, extra, M, N, KP, rank,
    sibling, xd_stride, auxiliary_stride, scales_stride, whole, parts, part_steps,
    TM: gl.constexpr, TN: gl.constexpr, STAGES: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr,
    GROUP: gl.constexpr, LOW_RANK: gl.constexpr, BIAS: gl.constexpr, EPILOGUE: gl.constexpr, AUXILIARY: gl.constexpr,
    GATES: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = WARPS_N * WARPS_M
    HALF: gl.constexpr = TM // 2
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_N, WARPS_M], [16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 4)
    right: gl.constexpr = gl.DotOperandLayout(1, sums, 4)
    wide_left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    wide_right: gl.constexpr = gl.DotOperandLayout(1, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, sums)
    columns: gl.constexpr = gl.SliceLayout(0, sums)
    by_128: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    by_64: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0])
    by_32: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    STORED: gl.constexpr = TN // 2 if GATES else TN
    LANES: gl.constexpr = STORED // 8 if STORED < 256 else 32
    out_layout: gl.constexpr = gl.BlockedLayout([8, 1], [LANES, 32 // LANES], [1, WARPS], [0, 1])
    # Multiples of 8, said so that copies of 16 bytes are seen to be whole.
    N = N // 8 * 8
    KP = KP // 64 * 64
    rank = rank // 8 * 8
    xd_stride = xd_stride // 8 * 8
    auxiliary_stride = auxiliary_stride // 8 * 8

    buffers = Buffers(
        gl.allocate_shared_memory(gl.int8, [STAGES, TM, 128], gl.SwizzledSharedLayout(16, 1, 8, [1, 0])),
        gl.allocate_shared_memory(gl.int8, [STAGES, TN, 64], gl.SwizzledSharedLayout(16, 2, 4, [1, 0])),
        gl.allocate_shared_memory(gl.int16, [STAGES, TN], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        xd.dtype.element_ty,
        gl.SwizzledSharedLayout(8, 2, 4, [1, 0]),
    )
    steps = gl.cdiv(KP, 128)
    item = gl.program_id(0)
    cut = item - whole
    place = item
    first = 0
    last = steps
    if cut >= 0:
        place = whole + cut // parts
        first = cut % parts * part_steps
        last = gl.minimum(first + part_steps, steps)
    m0, n0 = _origin(place, M, N, TM, TN, GROUP)
    x_m = gl.minimum(m0 + gl.arange(0, TM, gl.SliceLayout(1, by_128)), M - 1).to(gl.int64)[:, None]
    p_n = _features(n0, N, TN, gl.SliceLayout(1, by_64), GATES).to(gl.int64)[:, None]
    s_n = n0 + gl.arange(0, TN, line)
    s_live = s_n < N
    if GATES:
        s_n = feature(s_n, N // 2)
    codes = Codes(
        qx + x_m * KP,
        gl.arange(0, 128, gl.SliceLayout(0, by_128)),
        qweight + p_n * (steps * 64) + gl.arange(0, 64, gl.SliceLayout(0, by_64))[None, :],
        subscales + s_n,
        s_live,
        scales_stride // 8 * 8,
        KP,
    )
    for i in gl.static_range(STAGES - 1):
        if first + i < last:
            codes.copy(buffers, i, first + i)
        async_copy.commit_group()
    acc = gl.full([TN, TM], 0, gl.int32, sums)
    slot = 0
    for step in range(first, last):
        async_copy.wait_group(STAGES - 2)
        if step + STAGES - 1 < last:
            codes.copy(buffers, gl.where(slot == 0, STAGES - 1, slot - 1), step + STAGES - 1)
        async_copy.commit_group()
        pair = buffers.scales.index(slot).load(gl.SliceLayout(1, left)).to(gl.int32)[:, None]
        p = buffers.weights.index(slot).load(left)
        x = buffers.tokens.index(slot)
        low = _expand(p, pair & 0xFF, SCALED_LOW)
        acc = mma_v2(low, x.slice(0, 64, 1).permute([1, 0]).load(right), acc)
        high = _expand(p, pair >> 8, SCALED_HIGH)
        acc = mma_v2(high, x.slice(64, 64, 1).permute([1, 0]).load(right), acc)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)

    async_copy.wait_group(0)
    finished = True
    if cut >= 0:
        own = cut % parts
        acc, finished = _add_others(
            acc, partial + (cut - own).to(gl.int64) * (TN * TM), counters + cut // parts, own, parts
        )
    if finished:
        if LOW_RANK:
            d_m = gl.minimum(m0 + gl.arange(0, TM, gl.SliceLayout(1, by_32)), M - 1).to(gl.int64)[:, None]
            u_n = _features(n0, N, TN, gl.SliceLayout(1, by_32), GATES).to(gl.int64)[:, None]
            own = n0 // sibling * rank
            columns_32 = gl.arange(0, RANK_STEP, gl.SliceLayout(0, by_32))
            low_rank = LowRank(xd + d_m * xd_stride + own, up + u_n * rank, columns_32, rank)
            barrier()  # all buffers are free
            low_rank.copy(buffers, 0, 0)
            async_copy.commit_group()
        rn = _features(n0, N, TN, rows, GATES)
        b = gl.load(wscales + rn)[:, None]
        rm = m0 + gl.arange(0, HALF, columns)
        acc0, acc1 = _halves(acc, sums)
        out0 = acc0.to(gl.float32) * gl.load(ascales + gl.minimum(rm, M - 1))[None, :] * b
        out1 = acc1.to(gl.float32) * gl.load(ascales + gl.minimum(rm + HALF, M - 1))[None, :] * b
        if BIAS:
            shift = gl.load(bias + rn).to(gl.float32)[:, None]
            out0 += shift
            out1 += shift
        if LOW_RANK:
            for step in range(gl.cdiv(rank, RANK_STEP)):
                async_copy.wait_group(0)
                barrier()
                u = buffers.up(step % 2).load(wide_left)
                d = buffers.xd(step % 2)
                low_rank.copy(buffers, (step + 1) % 2, step + 1)
                async_copy.commit_group()
                out0 = mma_v2(u, d.slice(0, HALF, 0).permute([1, 0]).load(wide_right), out0)
                out1 = mma_v2(u, d.slice(HALF, HALF, 0).permute([1, 0]).load(wide_right), out1)
        async_copy.wait_group(0)

        if GATES:
            n0 = n0 // 2
            N = N // 2
        features = (n0 + gl.arange(0, STORED, gl.SliceLayout(1, out_layout)))[:, None]
        for h in gl.static_range(2):
            tokens = (m0 + h * HALF + gl.arange(0, HALF, gl.SliceLayout(0, out_layout)))[None, :]
            live = (features < N) & (tokens < M)
            out = out0 if h == 0 else out1
            if GATES:
                y_left, y_right = split_halves(out)
                y_left, y_right = gl.convert_layout(y_left, out_layout), gl.convert_layout(y_right, out_layout)
                out = EPILOGUE(y_left, y_right, features, tokens, live, extra)
            else:
                out = gl.convert_layout(out, out_layout)
                if AUXILIARY:
                    at = auxiliary + tokens.to(gl.int64) * auxiliary_stride + features
                    t = gl.load(at, mask=live, other=0.0).to(gl.float32)
                    out = EPILOGUE(out, t, features, tokens, live, extra)
                elif EPILOGUE is not None:
                    out = EPILOGUE(out, features, tokens, live, extra)
            gl.store(y + tokens.to(gl.int64) * N + features, out.to(y.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class Tile:
    """One shape of the kernel: tokens, features, buffers, warps along each, and into how many parts along K a tile of
    the last round may be cut.
    """

    tm: int
    tn: int
    stages: int
    warps_m: int
    warps_n: int
    parts: int = 4

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    def shared(self) -> int:
        """Bytes: of the buffers, or of half a result in fp32, which takes their place."""
        return max(self.stages * (self.tm * 128 + self.tn * 66), self.tm * self.tn * 2)

    def programs(self, room: int) -> int:
        """That share a multiprocessor, whose programs may have `room` bytes each; a thread has up to 255 registers."""
        return max(1, min(room // self.shared(), 8 // self.warps))


def why_not(o: Gemm) -> str | None:
    """Why copies of 16 bytes cannot read these, None if they can."""
    n, r = o.up.shape
    if n % 8 or r % 8 or any(t.data_ptr() % 16 for t in (o.qx, *o.weight)):
        return f"{n} features, rank {r} or an address that is no multiple of 16 bytes"
    if r and (o.xd.stride(0) % 8 or o.xd.data_ptr() % 16 or o.up.data_ptr() % 16):
        return "low-rank operands whose rows are no multiple of 16 bytes"
    return None


def candidates(m: int, room: int) -> tuple[Tile, ...]:
    """Tiles worth trying for m tokens where a program may have `room` bytes of shared memory, best guess first."""
    tiles: tuple[Tile, ...]
    if m <= 16:
        tiles = Tile(16, 128, 6, 1, 4), Tile(16, 64, 6, 1, 4)
    elif m <= 32:
        tiles = Tile(32, 64, 6, 1, 4), Tile(32, 128, 5, 1, 4)
    elif m <= 64:
        tiles = Tile(64, 64, 4, 2, 2), Tile(64, 128, 4, 1, 4)
    elif m <= 1024:
        tiles = Tile(128, 128, 2, 1, 4), Tile(128, 128, 3, 2, 2), Tile(64, 64, 4, 1, 4)
    else:
        tiles = Tile(128, 128, 2, 1, 4), Tile(128, 128, 3, 2, 2, 1), Tile(128, 128, 2, 2, 2)
    return tuple(t for t in tiles if t.shared() <= room)


def gemm(o: Gemm, epilogue: Generated | None = None, tile: Tile | None = None) -> Tensor:
    """w4a8 without an offset, operands as above that `why_not` takes -> y [M, N]."""
    qx = o.qx
    m, n, _ = check_gemm(o)
    sibling = sibling_features(o.xd, o.up, m)
    gates = epilogue is not None and epilogue.gates
    y = qx.new_empty(m, stored_features(n, sibling, gates), dtype=o.out_dtype)
    if m == 0 or n == 0:
        return y
    auxiliary = None if epilogue is None else epilogue.auxiliary
    if auxiliary is not None:
        check_auxiliary(auxiliary, m, n, qx.device)
        if auxiliary.stride(0) % 8 or auxiliary.data_ptr() % 16:
            raise ValueError("auxiliary must have rows whose addresses are multiples of 16 bytes, its strides are "
                             f"{auxiliary.stride()}, its address {auxiliary.data_ptr():#x}")  # fmt: skip
    room = shared_memory(qx.device)

    def run(t: Tile) -> None:
        _launch(o, sibling, y, epilogue, t, t.programs(room) * processors(qx.device))

    if tile is None:
        layer = (n, y.shape[1], qx.shape[1])
        tile = choose_tile("ampere_gemm", m, layer, candidates(m, room), run, qx.device)
    run(tile)
    return y


def _launch(o: Gemm, sibling: int, y: Tensor, epilogue: Generated | None, t: Tile, programs: int) -> None:
    m, (n, r) = y.shape[0], o.up.shape
    if sibling < n and sibling % t.tn:
        raise ValueError(f"a tile of {t.tn} features would belong to two of the siblings of {sibling} features")
    qx, (qweight, subscales, wscales) = o.qx, o.weight
    function, extra, auxiliary, gates = epilogue or (None, (), None, False)
    tiles = -(-m // t.tm) * -(-n // t.tn)
    rounds = share(tiles, subscales.shape[0], programs, t.parts)
    counters = zeroed_counters(qx.device, tiles - rounds.whole)
    partial = counters
    if rounds.parts > 1:
        partial = qx.new_empty((tiles - rounds.whole) * rounds.parts * t.tm * t.tn, dtype=torch.int32)
    arguments = (
        qx, o.ascales, qweight, subscales, wscales, o.xd, o.up, wscales if o.bias is None else o.bias, y,
        y if auxiliary is None else auxiliary, partial, counters, extra, m, n, qx.shape[1], r, sibling,
        o.xd.stride(0), n if auxiliary is None else auxiliary.stride(0), subscales.stride(0),
        rounds.whole, rounds.parts, rounds.part_steps,
    )  # fmt: skip
    constants = (t.tm, t.tn, t.stages, t.warps_m, t.warps_n, GROUP, r > 0, o.bias is not None, function,
                 auxiliary is not None, gates)  # fmt: skip
    launch(_gemm_kernel, (rounds.items(tiles), 1, 1), arguments, constants, num_warps=t.warps)
