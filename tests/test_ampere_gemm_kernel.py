"""The w4a8 product for NVIDIA GPUs from sm_80: what it compiles to on each of them, its tiles, bad input. Its numbers
are checked on a GPU (tests/gpu), and as the code of older GPUs with bench/as_target.py.
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
                 "GROUP": 8, "LOW_RANK": True, "BIAS": True, "EPILOGUE": epilogue, "AUXILIARY": auxiliary,
                 "GATES": False}  # fmt: skip
    types = POINTERS | {"extra": extra}
    return compile_for(_gemm_kernel, capability, constants, tile.warps, types, source=GluonASTSource)


def tiles(capability, rows):
    from svdq_compile.kernels.ampere.gemm_w4a8 import candidates

    return candidates(rows, SHARED_MEMORY[capability])


@builds
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_codes_go_from_shared_memory_to_the_tensor_cores(capability):
    """int8 products; operands copied 16 bytes at a time while others are multiplied, and loaded by ldmatrix; nothing
    stored to shared memory before the result. All 255 registers are taken, and some of the stack outside the loop: most
    for sm_120, where Triton 3.7 and 3.8 keep 42 registers there.
    """
    tile = tiles(capability, 4608)[0]
    kernel = built(capability, tile)
    walk = kernel.ptx[
        : re.search(r"\b(st|ld|atom)\.global", kernel.ptx).start()
    ]  # what comes after it reads and writes
    assert len(re.findall(r"mma\.sync\.aligned\.m16n8k32\.row\.col\S*\.s32\.s8\.s8\.s32", walk)) == 128
    assert set(re.findall(r"cp\.async\.c\w\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", walk)) == {"0x10"}
    assert f"cp.async.wait_group \t{tile.stages - 2}" in walk
    assert "ldmatrix" in walk
    assert not re.search(r"[ls][dt]\.shared|wgmma|mbarrier", walk)
    assert kernel.spilled <= 168


@builds
@pytest.mark.parametrize("rows", ROWS)
def test_an_epilogue_and_an_auxiliary_input(rows):
    """It takes as much shared memory as it says, and reads the other input 16 bytes at a time."""
    tile = tiles(89, rows)[0]
    kernel = built(89, tile, gated_residual, ("*bf16", "fp32"), auxiliary=True)
    assert kernel.shared <= tile.shared() + 1024
    assert "ld.global.v4.b32" in kernel.ptx
    assert kernel.spilled <= 128


@builds
def test_an_epilogue_alone():
    assert built(89, tiles(89, 4608)[0], gelu).spilled <= 64


@compiled
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_gpu_has_tiles_for_all_rows(capability):
    """They fit, and no two candidates are one."""
    for rows in (1, 16, 17, 32, 64, 100, 512, 1024, 4608, 100_000):
        some = tiles(capability, rows)
        assert some
        assert len(set(some)) == len(some)
        assert all(tile.shared() <= SHARED_MEMORY[capability] for tile in some)
        assert all(1 <= tile.programs(SHARED_MEMORY[capability]) <= 2 for tile in some)


# ** bad input **


def operands(**changes):
    fmt = FORMATS["w4a8"]
    qx, ascales = fmt.quantize_activation(torch.randn(4, 128))
    weight = layout.to_kernel("w4a8", fmt.quantize_weight(torch.randn(8, 128)))
    given = {"qx": qx, "ascales": ascales, "xd": torch.randn(4, 16).to(HALF), "weight": weight,
             "up": torch.randn(8, 16).to(HALF), "bias": None, "offset": None}  # fmt: skip
    return Gemm(**given | changes, precision="w4a8", out_dtype=HALF)


@compiled
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"qx": torch.zeros(4, 128, dtype=torch.int32)}, "qx is torch.int32"),
        ({"xd": torch.zeros(4, 8, dtype=HALF)}, "up has shape"),
        ({"up": torch.zeros(8, 16, dtype=HALF, device="meta")}, "up is on meta"),
        ({"bias": torch.ones(7)}, "bias has shape"),
    ],
)
def test_the_launcher_says_what_is_wrong(changes, complaint):
    from svdq_compile.kernels.ampere.gemm_w4a8 import gemm

    with pytest.raises((TypeError, ValueError), match=complaint):
        gemm(operands(**changes))


@compiled
def test_what_16_byte_copies_cannot_read_goes_elsewhere():
    from svdq_compile.kernels.ampere.gemm_w4a8 import gemm, why_not
    from svdq_compile.kernels.runtime.generated import Generated

    wide, shifted = torch.zeros(4, 40, dtype=HALF), torch.zeros(4 * 128 + 1, dtype=torch.int8)[1:].view(4, 128)
    assert why_not(operands()) is None
    assert why_not(operands(xd=wide[:, 16:32])) is None
    assert "multiple of 16 bytes" in why_not(operands(xd=wide[:, 4:20]))
    assert "multiple of 16 bytes" in why_not(operands(qx=shifted))
    assert "rank 12" in why_not(operands(up=torch.zeros(8, 12, dtype=HALF)))
    with pytest.raises(ValueError, match="auxiliary must have rows whose addresses are multiples of 16 bytes"):
        gemm(operands(), Generated(gated_residual, (), torch.zeros(4, 12, dtype=HALF)[:, :8]))


@compiled
def test_tables_prefer_it_to_plain_triton():
    from svdq_compile.lowering import launch

    names = [row.name for row in launch.GEMM.rows if "w4a8" in row.formats]
    assert names.index("hopper_gemm_w4a8") < names.index("ampere_gemm_w4a8") < names.index("portable_gemm")


@builds
@pytest.mark.parametrize("rows", [1, 16, 32, 64, 65, 512, 1024, 1025, 100_000])
def test_a_tile_belongs_to_one_sibling(rows):
    from svdq_compile.kernels.ampere.gemm_w4a8 import candidates

    assert all(tile.tn <= layout.SIBLING_STEP for tile in candidates(rows, SHARED_MEMORY[80]))
