"""The w4a8 product for NVIDIA GPUs from sm_80: what it compiles to on each of them, its tiles, bad input. Its numbers are
checked on a GPU (tests/gpu), and as the code of older GPUs with bench/as_target.py.
"""

import re

import pytest
import torch
import triton
import triton.language as tl
from kernel_testing import HALF, builds, compile_for, compiled

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemm
from svdq_compile.kernels.runtime.target import SHARED_MEMORY

POINTERS = {"qx": "*i8", "qweight": "*i8", "subscales": "*i16", "ascales": "*fp32", "wscales": "*fp32", "xd": "*bf16",
            "up": "*bf16", "bias": "*bf16", "y": "*bf16", "auxiliary": "*bf16", "partial": "*i32", "counters": "*i32",
            "extra": ()}  # fmt: skip
ROWS = (4608, 512, 64, 32, 16)


@triton.jit
def gated_residual(out, auxiliary, features, tokens, live, extra):
    gate, factor = extra
    return out * tl.load(gate + features, mask=live, other=0.0).to(tl.float32) * factor + auxiliary


@triton.jit
def gelu(out, features, tokens, live, extra):
    return out / (1.0 + tl.exp(-1.5957691216 * out * (1.0 + 0.044715 * out * out)))


def built(capability, tile, epilogue=None, extra=(), auxiliary=False):
    from triton.experimental.gluon._runtime import GluonASTSource

    from svdq_compile.kernels.ampere.gemm_w4a8 import _gemm_kernel

    constants = {"TM": tile.tm, "TN": tile.tn, "STAGES": tile.stages, "WARPS_M": tile.warps_m, "WARPS_N": tile.warps_n,
                 "GROUP": 8, "LOW_RANK": True, "BIAS": True, "EPILOGUE": epilogue, "AUXILIARY": auxiliary}  # fmt: skip
    types = POINTERS | {"extra": extra}
    return compile_for(_gemm_kernel, capability, constants, tile.warps, types, source=GluonASTSource)


def tiles(capability, rows):
    from svdq_compile.kernels.ampere.gemm_w4a8 import candidates

    return candidates(rows, SHARED_MEMORY[capability])


@builds
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_codes_go_from_shared_memory_to_the_tensor_cores(capability):
    """int8 products; all operands copied 16 bytes at a time while others are multiplied, and loaded by ldmatrix; nothing
    stored to shared memory before the result; nothing spilled.
    """
    tile = tiles(capability, 4608)[0]
    kernel = built(capability, tile)
    walk = kernel.ptx[: kernel.ptx.index("ld.global")]  # scales are loaded after it
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k32\.row\.col\S*\.s32\.s8\.s8\.s32", walk)) == 128
    assert set(re.findall(r"cp\.async\.c\w\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", walk)) == {"0x10"}
    assert f"cp.async.wait_group \t{tile.stages - 2}" in walk
    assert "ldmatrix" in walk
    assert not re.search(r"[ls][dt]\.shared|wgmma|mbarrier", walk)
    assert kernel.spilled == 0
    assert kernel.registers <= 255


@builds
@pytest.mark.parametrize("capability", [80, 89])
@pytest.mark.parametrize("rows", ROWS)
def test_every_tile_compiles(capability, rows):
    """What it says of its shared memory is what it takes, and with an epilogue and an auxiliary input it spills nothing."""
    for tile in tiles(capability, rows):
        kernel = built(capability, tile, gated_residual, ("*bf16", "fp32"), auxiliary=True)
        assert kernel.shared <= tile.shared() + 2048
        assert kernel.spilled <= 16
        assert built(capability, tile, gelu).spilled == 0
