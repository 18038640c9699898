"""This process's GPU, taken for an older one: kernels are compiled for that one, and run on this.

    python bench/as_target.py 80 -m pytest -q tests/gpu/test_kernels_gpu.py
    python bench/as_target.py 89 bench/gemm.py --out gemm-89.json

Triton compiles for sm_80, 86 or 89, to the last line of PTX: `mma.sync`, `ldmatrix`, `cp.async`, no more shared memory
than that GPU has. Only the last step differs: ptxas assembles the PTX for the GPU that is there, which has all these
instructions too. It is what the driver does with the PTX of an old program on a new GPU. Everybody who asks torch is
told the older capability, so tables choose the kernels, and Inductor the code, of that GPU.

What this shows: that the code for those GPUs computes right on a real one, and how its parts compare with one another.
What it does not show: its speed there. Their tensor cores, caches, clocks and schedulers are others, and ptxas makes
other machine code for them. Libraries (cuBLAS, cuDNN) go on as on the GPU that is there.
"""

import os
import runpy
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from svdq_compile.kernels.runtime import target


def assemble_for(real: int) -> Any:
    """Triton's hook into its stages: PTX is made for the target, and assembled for the GPU that is there, sm_`real`."""

    def hook(backend: Any = None, stages: Any = None, options: Any = None, *rest: Any) -> tuple[str, str] | None:
        if stages is None:  # asked for what its caches should know of this
            return f"assembled for {real}", str(real)

        def make_cubin(ptx: str, metadata: dict) -> bytes:
            room = target.SHARED_MEMORY[backend.target.arch]
            if metadata["shared"] > room:
                raise OutOfResources(metadata["shared"], room, "shared memory")
            return backend.make_cubin(ptx, metadata, options, real)

        stages["cubin"] = make_cubin
        return None

    return hook


def hold_to(arch: int) -> None:
    """From now on this process compiles for sm_`arch`, 80, 86 or 89. No kernel may have run before."""
    if arch not in (80, 86, 89):
        raise ValueError(f"arch is {arch}, expected 80, 86 or 89: newer ones have instructions that an sm_90 lacks")
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        raise ValueError(f"this GPU is sm_{major}{minor}: PTX for sm_{arch} is tried on an sm_90")
    knobs.runtime.add_stages_inspection_hook = assemble_for(10 * major + minor)
    knobs.cache.dir = str(cache_folder(arch))
    os.environ["SVDQ_CACHE"] = str(cache_folder(arch) / "svdq")  # what was measured belongs to this target
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder(arch) / "inductor")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # its other processes would not know
    active = driver.active
    active.get_current_target = lambda: GPUTarget("cuda", arch, 32)
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    target.capability.cache_clear()


@cache
def cache_folder(arch: int) -> Path:
    """Of one process, or of those that it starts: AS_TARGET_CACHE."""
    parent = os.environ.setdefault("AS_TARGET_CACHE", tempfile.mkdtemp(prefix="svdq-as-target-"))
    return Path(parent) / str(arch)


def main(arguments: list[str]) -> None:
    """Run a script, or a module after -m, with the rest of the arguments, as on an sm_`arguments[0]`."""
    if len(arguments) < 2 or not arguments[0].isdigit():
        raise SystemExit("usage: as_target.py 80|86|89 (script.py | -m module) [arguments]")
    arch, *command = arguments
    hold_to(int(arch))
    if command[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(command[0]).parent)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
