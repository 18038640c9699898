"""bench/as_target.py as far as it goes without a GPU: PTX of the target, machine code for the GPU that is there."""

import re
import sys
from pathlib import Path

import pytest
import torch
from kernel_testing import builds, compile_for

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

SMALL = {"TM": 64, "TN": 64, "GROUP": 8, "RANK": 32, "GROUPED": False, "BIAS": True, "OFFSET": False,
         "EPILOGUE": None, "AUXILIARY": False, "GATES": False}  # fmt: skip
POINTERS = {"qx": "*i8", "qweight": "*i8", "subscales": "*i16", "ascales": "*fp32", "wscales": "*fp32",
            "offset": "*fp32", "xd": "*bf16", "up": "*bf16", "bias": "*bf16", "y": "*bf16", "auxiliary": "*bf16",
            "extra": ()}  # fmt: skip


@pytest.fixture
def hook(monkeypatch):
    """Triton with the harness's hook, for a GPU that is an sm_90."""
    from as_target import assemble_for
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", assemble_for(90))
    monkeypatch.setattr(knobs.compilation, "always_compile", True)


@builds
@pytest.mark.parametrize("arch", [80, 86, 89])
def test_code_is_the_targets_and_runs_here(arch, hook):
    """Instructions of the target alone, in machine code of an sm_90."""
    from svdq_compile.kernels.portable.gemm import _gemm_kernel

    built = compile_for(_gemm_kernel, arch, SMALL, 4, POINTERS)
    assert re.search(rf"^\.target sm_{arch}$", built.ptx, re.MULTILINE)
    assert all(word in built.ptx for word in ("mma.sync", "ldmatrix", "cp.async"))
    assert not re.search("wgmma|mbarrier|cp.async.bulk|setmaxnreg|griddepcontrol", built.ptx)
    assert built.machine == "sm_90a"


@builds
def test_shared_memory_is_the_targets(hook):
    """What an A100 can hold and an RTX 3090 cannot."""
    from triton.runtime.errors import OutOfResources

    from svdq_compile.kernels.portable.gemm import _gemm_kernel

    large = SMALL | {"TM": 128, "TN": 128}
    assert 101376 < compile_for(_gemm_kernel, 80, large, 8, POINTERS, stages=6).shared < 166912
    with pytest.raises(OutOfResources, match=r"Required: \d+, Hardware limit: 101376"):
        compile_for(_gemm_kernel, 86, large, 8, POINTERS, stages=6)


def test_what_it_cannot_do_is_refused(monkeypatch):
    from as_target import hold_to, main

    with pytest.raises(ValueError, match="arch is 100, expected 80, 86 or 89"):
        hold_to(100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(ValueError, match="this GPU is sm_89"):
        hold_to(80)
    for arguments in ([], ["80"], ["bench/gemm.py", "80"]):
        with pytest.raises(SystemExit, match="usage"):
            main(arguments)
