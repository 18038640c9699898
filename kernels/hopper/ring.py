"""The ring of buffers between the two roles of a Hopper GEMM, and the order of its tiles.

One warp has the copy engine (TMA) fill the buffers, as far ahead as they are free; all others multiply. Three things
keep the tensor cores fed without touching the generated PTX, on Triton 3.6 to 3.9:

- The multiplying warps are the default partition of `warp_specialize`. A worker partition runs inside a dispatch loop,
  for which ptxas serializes every `wgmma` (C7512); the default partition is straight code.
- A buffer is handed back through a named barrier (`bar.arrive`, no waiting). Gluon's own `mbarrier.arrive` stops all
  multiplying warps twice.
- Vectors for the epilogue are loaded before the walk over K.

A tile's steps along K are followed by one for every 32 of the rank, with `xd` and `up` in the same buffers. Where the
rank is no multiple of 32, columns of the next sibling may come along; they meet zeros in the place of `up`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..portable.gates import STEP
from ..runtime.versions import aggregate, load, view

GROUP = 8  # token tiles in a row that use the same weights
RANK_STEP = gl.constexpr(32)  # 64 bytes a row, as wide as a step's packed weights
_AT_BUFFER = "$1, $2; mov.u32 $0, $1;"  # named barriers 15, 14, ...; Triton itself counts up from 0
_HAND_BACK = gl.constexpr(f"bar.arrive {_AT_BUFFER}")
_AWAIT_FREE = gl.constexpr(f"bar.sync {_AT_BUFFER}")


@gluon.jit
def _at_buffer(slot, threads, ASM: gl.constexpr):
    gl.inline_asm_elementwise(ASM, "=r,r,r", [15 - slot, threads], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def in_rows(layout):
    """Of a block [rows, columns], whose copy may go back and forth between halves."""
    return gl.NVMMASharedLayout(layout.swizzle_byte_width, layout.element_bitwidth, rank=2)


@aggregate
class Tiles:
    """The tiles of a result, TM tokens by TN features each."""

    tiles_m: gl.tensor
    tiles_n: gl.tensor
    TM: gl.constexpr
    TN: gl.constexpr
    GROUP: gl.constexpr

    @gluon.jit
    def origin(self, t):
        """Tile t's first token and first feature. GROUP token tiles in a row use the same weights, then from L2."""
        width = self.GROUP * self.tiles_n
        first = t // width * self.GROUP
        inside = t % width
        size = gl.minimum(self.tiles_m - first, self.GROUP)
        pm = first + inside % self.GROUP
        pn = inside // self.GROUP
        if size < self.GROUP:  # rarely: a division takes some 200 clocks
            pm = first + inside % size
            pn = inside // size
        return pm * self.TM, pn * self.TN


@aggregate
class Ring:
    """STAGES buffers for a step each.

    tokens   [STAGES, TM, 128 bytes], or xd [TM, 32]
    weights  [STAGES, TN, 64 bytes], or up [TN, 32]
    full     [STAGES] barriers: what has been copied
    THREADS  who meets at a buffer's named barrier: the multiplying threads and the copying warp
    GATES    whether a tile has both halves of its features (descriptors.of_both_halves)
    """

    tokens: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    xd: tma.tensor_descriptor
    up: tma.tensor_descriptor
    TM: gl.constexpr
    TN: gl.constexpr
    STAGES: gl.constexpr
    THREADS: gl.constexpr
    GATES: gl.constexpr

    @gluon.jit
    def await_full(self, slot, phase):
        mbarrier.wait(self.full.index(slot), phase)

    @gluon.jit
    def await_free(self, slot, filled):
        """Wait until every multiplying thread has handed the buffer back, if it was filled before."""
        if filled >= self.STAGES:
            _at_buffer(slot, gl.to_tensor(self.THREADS), _AWAIT_FREE)

    @gluon.jit
    def hand_back(self, slot):
        """A multiplying thread is done with a buffer."""
        _at_buffer(slot, gl.to_tensor(self.THREADS), _HAND_BACK)

    @gluon.jit
    def hand_back_before(self, slot):
        """It is done with the buffer before this one."""
        self.hand_back(gl.where(slot == 0, self.STAGES - 1, slot - 1))

    @gluon.jit
    def after(self, slot):
        return gl.where(slot == self.STAGES - 1, 0, slot + 1)

    @gluon.jit
    def next(self, slot, phase):
        """The buffer that the multiplying threads wait for next, and its phase."""
        slot += 1
        return gl.where(slot == self.STAGES, 0, slot), gl.where(slot == self.STAGES, phase ^ 1, phase)

    @gluon.jit
    def low_rank(self, slot):
        """A buffer as up's [TN, 32] and xd's [TM, 32]. xd lies in the first half of the tokens' place, which is viewed
        whole: Triton 3.8 views memory only as something of the same size.
        """
        u = view(self.weights.index(slot), self.up.dtype, [self.TN, RANK_STEP], in_rows(self.up.layout))
        whole = view(self.tokens.index(slot), self.xd.dtype, [2 * self.TM, RANK_STEP], self.xd.layout)
        return u, whole.slice(0, self.TM, 0)

    @gluon.jit
    def load_features(self, features, n0, column, bar, target):
        """Copy the rows of a tile's features."""
        if self.GATES:
            target = view(target, features.dtype, features.block_shape, features.layout)
            load(features, [n0 // (2 * STEP), 0, 0, column], bar, target)
        else:
            load(features, [n0, column], bar, target)

    @gluon.jit
    def load_scales(self, scales, row, n0, bar, target):
        """Copy the columns of a tile's features."""
        if self.GATES:
            target = view(target, scales.dtype, scales.block_shape, scales.layout)
            load(scales, [row, n0 // (2 * STEP), 0, 0], bar, target)
        else:
            load(scales, [row, n0], bar, target)

    @gluon.jit
    def load_low_rank(self, slot, m0, n0, first, step):
        """Copy a step of the low-rank product. first: the sibling's first column of xd."""
        bar = self.full.index(slot)
        u, d = self.low_rank(slot)
        mbarrier.expect(bar, (self.TM + self.TN) * 2 * RANK_STEP)
        self.load_features(self.up, n0, step * RANK_STEP, bar, u)
        load(self.xd, [m0, first + step * RANK_STEP], bar, d)

    @gluon.jit
    def drain(self, slot, filled):
        """Leave no barrier half arrived at. slot: the one that would be filled next."""
        slot = gl.where(filled < self.STAGES, 0, slot)
        for _ in range(gl.minimum(filled, self.STAGES)):
            self.await_free(slot, self.STAGES)
            slot = self.after(slot)


@gluon.jit
def allocate_ring(
    x, w, xd, up, TM: gl.constexpr, TN: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, GATES: gl.constexpr,
):  # fmt: skip
    """The ring in shared memory, its barriers ready once the caller has fenced. WARPS: how many multiply."""
    tokens = gl.allocate_shared_memory(x.dtype, [STAGES, TM, 128], x.layout)
    weights = gl.allocate_shared_memory(w.dtype, [STAGES, TN, 64], in_rows(w.layout))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    return Ring(tokens, weights, full, xd, up, TM, TN, STAGES, WARPS * 32 + 32, GATES)


def options(warps: int, programs: int) -> dict[str, int]:
    """Of the launch. programs: how many share a multiprocessor; they get as many registers as let them. The copying
    warps count as four.
    """
    registers = {"maxnreg": 65536 // (programs * 32 * (warps + 4)) // 8 * 8} if programs > 1 else {}
    return {"num_warps": warps, "launch_pdl": True, **registers}
