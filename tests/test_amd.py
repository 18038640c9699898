"""The portable kernels on AMD's GPUs: compiled for each family with the matrix instructions that it has, and chosen by
the tables. torch must be a ROCm build before the kernels are imported, so what compiles runs in a process of its own.
"""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

ROCM = os.environ.get("PRETEND_ROCM") == "1"
if ROCM:
    torch.version.hip = "7.0"

from kernel_testing import compiled  # noqa: E402

from conftest import logged  # noqa: E402
from svdq_compile.kernels.runtime import target  # noqa: E402
from svdq_compile.lowering import launch  # noqa: E402

rocm = pytest.mark.skipif(not ROCM, reason="runs in a process of its own")
FAMILIES = ["gfx942", "gfx950", "gfx1100"]
INT8 = {"gfx942": "v_mfma_i32_32x32x16_i8", "gfx950": "v_mfma_i32_32x32x32_i8", "gfx1100": "v_wmma_i32_16x16x16_iu8"}
HALF = {"gfx942": "v_mfma_f32_32x32x8_bf16", "gfx950": "v_mfma_f32_32x32x16_bf16",
        "gfx1100": "v_wmma_f32_16x16x16_bf16"}  # fmt: skip
SHARED = {"gfx942": 65536, "gfx950": 163840, "gfx1100": 65536}  # bytes that a program may use


@compiled
def test_in_a_rocm_process():
    """None may fail or be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "rocm_build", __file__]
    run = subprocess.run(command, env=os.environ | {"PRETEND_ROCM": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout.splitlines()[-1]


def assembly(kernel, family, constants, types, warps, stages=2):
    """What the kernel becomes; nothing of a vector register is spilled and local memory suffices."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if isinstance(signature[n], str) and signature[n] != "constexpr"
    }
    lanes = 32 if family.startswith(("gfx11", "gfx12")) else 64
    program, options = ASTSource(kernel, signature, constants, even), {"num_warps": warps, "num_stages": stages}
    built = triton.compile(program, target=GPUTarget("hip", family, lanes), options=options)
    assert built.metadata.shared <= SHARED[family]
    return built.asm["amdgcn"]


def spilled(text):
    """Vector registers."""
    return int(re.search(r"vgpr_spill_count:\s*(\d+)", text)[1])


@rocm
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rocm_build_of_gemm(family, grouped):
    from svdq_compile.kernels.portable.gemm import _gemm_kernel, tile_for

    tm, tn, warps, stages = tile_for(4608, 3072, grouped, True)
    constants = {"TM": tm, "TN": tn, "GROUP": 8, "RANK": 32, "GROUPED": grouped, "BIAS": True, "OFFSET": grouped,
                 "EPILOGUE": None, "AUXILIARY": False, "GATES": False}  # fmt: skip
    types = {"qx": "*i8", "qweight": "*i8", "subscales": "*i16", "ascales": "*fp32", "wscales": "*fp32",
             "offset": "*fp32", "xd": "*bf16", "up": "*bf16", "bias": "*bf16", "y": "*bf16", "auxiliary": "*bf16",
             "extra": ()}  # fmt: skip
    text = assembly(_gemm_kernel, family, constants, types | ({"wscales": "*bf16"} if grouped else {}), warps, stages)
    assert INT8[family] in text
    assert HALF[family] in text  # the low-rank product
    assert spilled(text) <= (35 if grouped and family == "gfx1100" else 0)  # 34 and 35 before Triton 3.8


@rocm
@pytest.mark.parametrize("family", FAMILIES)
def test_rocm_build_of_a_gate(family):
    from svdq_compile.kernels.portable import gemm
    from svdq_compile.lowering import generate

    region = "gate(y, right); t0 = erf(right); t1 = add(t0, 1.0); t2 = mul(right, t1); t3 = mul(y, t2)"
    tm, tn, warps, stages = gemm.tile_for(4608, 5120, False, True)
    constants = {"TM": tm, "TN": tn, "GROUP": 8, "RANK": 32, "GROUPED": False, "BIAS": True, "OFFSET": False,
                 "EPILOGUE": generate.function(region), "AUXILIARY": False, "GATES": True}  # fmt: skip
    types = {"qx": "*i8", "qweight": "*i8", "subscales": "*i16", "ascales": "*fp32", "wscales": "*fp32",
             "offset": "*fp32", "xd": "*bf16", "up": "*bf16", "bias": "*bf16", "y": "*bf16", "auxiliary": "*bf16",
             "extra": ()}  # fmt: skip
    text = assembly(gemm._gemm_kernel, family, constants, types, warps, stages)
    assert INT8[family] in text
    assert spilled(text) == 0


@rocm
@pytest.mark.parametrize(("codes", "rotate"), [("int8", False), ("int4", False), ("int4", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_rocm_build_of_quantize(family, codes, rotate):
    import triton.language as tl

    from svdq_compile.kernels.portable.quantize import _codes_kernel, _measure_kernel

    types = {"x": "*i16", "right": "*i16", "smooth": "*fp32", "down": "*bf16", "qx": "*i8", "ascales": "*fp32",
             "peaks": "*fp32", "partial": "*fp32", "counters": "*i32", "xd": "*bf16", "shift": "fp32",
             "extra": ()}  # fmt: skip
    common = {"DTYPE": tl.bfloat16, "JOINED": False, "PROLOGUE": None}
    constants = common | {"TM": 64, "TK": 64, "RANK": 32, "CODES": codes, "UNSIGNED": False, "ROTATE": rotate}
    text = assembly(_measure_kernel, family, constants, types, 8 if rotate else 4, 4)
    assert HALF[family] in text
    assert spilled(text) <= (3 if family == "gfx1100" else 0)  # three by Triton 3.8 there
    if codes == "int8":
        for tm, tk in ((8, 1024), (128, 64)):  # of long rows and of 320 channels
            assert spilled(assembly(_codes_kernel, family, common | {"TM": tm, "TK": tk, "PARTS": 16}, types, 4)) == 0


@rocm
@pytest.mark.parametrize("family", FAMILIES)
def test_rocm_build_of_moments_heads_and_gemv(family):
    from svdq_compile.kernels.portable.gemv import _gemv_kernel
    from svdq_compile.kernels.portable.heads import _heads_kernel
    from svdq_compile.kernels.portable.row_moments import _moments_kernel

    types = {"x": "*bf16", "variance": "*fp32", "mean": "*fp32", "square": "*fp32"}
    text = assembly(_moments_kernel, family, {"ROWS": 1, "TK": 4096, "EARLY": False}, types, 4)
    assert spilled(text) == 0
    constants = {"D": 128, "TOKENS": 8, "HEADS": 12, "INTERLEAVED": True, "LOAD": no_tables, "FUNCTION": halved,
                 "EARLY": False}  # fmt: skip
    assert spilled(assembly(_heads_kernel, family, constants, {"x": "*bf16", "y": "*bf16", "extra": ()}, 4)) == 0
    constants = {"TM": 8, "WARPS": 4, "WORDS": 6, "WHOLE": True, "ONCE": True, "RANK_STEPS": 1, "BIAS": True,
                 "EPILOGUE": None, "EARLY": False}  # fmt: skip
    types = {"x": "*bf16", "qweight": "*i8", "pairs": "*i32", "xd": "*bf16", "up": "*bf16", "bias": "*bf16",
             "y": "*bf16", "extra": ()}  # fmt: skip
    assert "global_load" in assembly(_gemv_kernel, family, constants, types, 4, 1)


@rocm
@pytest.mark.parametrize(("channels", "is_causal"), [(128, False), (256, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_rocm_build_of_attention_int8(family, channels, is_causal):
    from svdq_compile.kernels.portable.attention_int8 import _attention_int8_kernel, tiles

    types = {"q": "*i8", "k": "*i8", "v": "*bf16", "y": "*bf16", "q_scales": "*fp32", "k_scales": "*fp32",
             "factor": "fp32"}  # fmt: skip
    for rows, keys, warps, stages in tiles(channels, 0, family):
        constants = {"ROWS": rows, "KEYS": keys, "W": channels, "E": channels, "EW": channels, "CAUSAL": is_causal,
                     "y_channel": 1}  # fmt: skip
        text = assembly(_attention_int8_kernel, family, constants, types, warps, stages)
        assert INT8[family] in text
        assert HALF[family] in text
        assert spilled(text) == 0


@rocm
@pytest.mark.parametrize("family", FAMILIES)
def test_rocm_build_of_attention_codes_in_int8(family, tmp_path, monkeypatch):
    from svdq_compile.kernels.portable import attention_codes as ac
    from svdq_compile.lowering.generate_heads import _module_of_parts
    from svdq_compile.lowering.region import PLAIN

    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    module = _module_of_parts((PLAIN, PLAIN))
    common = {"D": 128, "WIDTH": 128, "Q": 1, "QK": 2, "PARTS": 2, "INTERLEAVED": True, "START": module.start,
              "LOAD": module.load, "FUNCTION": module.fused, "PER_TOKEN": True, "EARLY": False}  # fmt: skip
    types = {"codes": ("*i8",) * 2, "scales": ("*fp32",) * 2, "centres": "*fp32", "tokens": ("i32",) * 2,
             "begins": ("i32",) * 2, "lengths": ("i32",) * 2, "extra": ("*bf16", "i32", "i32", "i32") * 2}  # fmt: skip
    text = assembly(ac._attention_codes_kernel, family, common | {"TOKENS": 8, "HEADS": 12, "group": 1}, types, 4)
    assert spilled(text) == 0
    types |= {"scales": "*fp32"}
    assert spilled(assembly(ac._attention_samples_kernel, family, common | {"COUNT": ac.SAMPLES}, types, 8)) == 0


@rocm
@pytest.mark.parametrize("rounding", ["subscales", "scales", "zeros"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rocm_build_of_round_weight(family, rounding):
    from svdq_compile.kernels.portable.round_weight import GROUPS, _round_kernel

    types = {"w": "*fp32", "importance": "*fp32", "spans": "*fp32", "codes": "*u8", "zeros": "*bf16",
             "rounded": "*fp32", "scales": "*i8" if rounding == "subscales" else "*bf16"}  # fmt: skip
    assert spilled(assembly(_round_kernel, family, {"ROUNDING": rounding, "TG": GROUPS}, types, 4)) == 0


@rocm
@pytest.mark.parametrize("grid", ["subscales", "zeros"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rocm_build_of_round_columns(family, grid):
    from svdq_compile.kernels.portable.round_columns import CHANNELS, ROWS, _round_columns_kernel

    names = ("target", "wanted", "weights", "scale", "zero", "rounded", "lost")
    constants = {"GRID": grid, "C": CHANNELS, "TN": ROWS}
    assert spilled(assembly(_round_columns_kernel, family, constants, dict.fromkeys(names, "*fp32"), 4)) == 0


if ROCM:
    import triton

    @triton.jit
    def no_tables(sample, token, extra, D):
        return ()

    @triton.jit
    def halved(x_0, x_1, held, sample, token, head, extra, D):
        return x_0 * 0.5, x_1 * 0.5


# ** which kernel a GPU gets **


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU of some kind."""

    def make(hip=None, **properties):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: properties["name"])
        capability = properties.get("major", 9), properties.get("minor", 4)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda", 0)

    caches = target.capability, target.amd_architecture, target._warn_of
    for cached in caches:
        cached.cache_clear()
    yield make
    for cached in caches:
        cached.cache_clear()


def rows_for(table, device):
    return [row.name for row in table.rows if row.target.includes(device)]


@compiled
@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx950", "gfx1100", "gfx1201"])
def test_amd_gets_the_portable_kernels(name, gpu):
    device = gpu(hip="7.0", name="AMD", gcnArchName=name)
    assert target.has_kernels(device)
    assert not target.launches_early(device)
    assert rows_for(launch.GEMM, device) == ["portable_gemm", "reference"]
    assert rows_for(launch.QUANTIZE, device) == ["portable_quantize", "portable_codes", "reference"]
    assert {"flash", "efficient", "attention_int8", "reference"} <= set(rows_for(launch.ATTENTION, device))


@compiled
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hip": "7.0", "name": "AMD Radeon VII", "gcnArchName": "gfx906:sramecc-"}, r"AMD Radeon VII \(gfx906\)"),
        ({"name": "Tesla T4", "major": 7, "minor": 5}, r"Tesla T4 \(sm_75\)"),
    ],
)
def test_other_gpus_get_the_reference_and_one_sentence(given, words, gpu):
    device = gpu(**given)
    with logged("svdq_compile.kernels") as records:
        for _ in range(3):
            assert not target.has_kernels(device)
            assert rows_for(launch.GEMM, device) == ["reference"]
    (said,) = [record.getMessage() for record in records]
    assert re.match(f"no kernels for {words}: quantized layers run as plain torch, slowly", said)


@compiled
def test_several_gpus_in_one_machine(gpu, monkeypatch):
    """Each is asked for itself."""
    gpu(name="several")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 6), (9, 0), (12, 0)][device.index])
    ampere, hopper, blackwell = (torch.device("cuda", i) for i in range(3))
    assert rows_for(launch.GEMM, ampere) == ["ampere_gemm_w4a8", "portable_gemm", "cublas_int8", "reference"]
    assert rows_for(launch.GEMM, hopper)[:2] == ["hopper_gemm_w4a8", "hopper_gemm_int4"]
    assert "portable_gemm_nvfp4" in rows_for(launch.GEMM, blackwell)
    assert (target.shared_memory(ampere), target.shared_memory(hopper)) == (101376, 232448)
