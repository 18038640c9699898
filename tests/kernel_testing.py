"""What the tests of Triton kernels share: running in the interpreter, and compiling for GPUs that are not there.

The interpreter must be chosen before Triton is imported, so its tests run in a process of their own: a file marks them
`interpreted`, names them test_interpreted_*, and calls `run_interpreted(__file__)` in one test marked `compiled`. The
interpreter multiplies fp16 but not bf16 matrices; bf16 is tested on a GPU (tests/gpu).
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, in a process of its own")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")


def builds(test):
    """Marks a test that compiles kernels for GPUs: CI runs these with every supported Triton (tests/compat.py)."""
    return pytest.mark.builds(compiled(test))


HALF = torch.float16
ROUNDING = 3e-4  # one rounding to fp16 is 2^-11 at most, about 2e-4 on average


def error(y, expected):
    """|y - expected| / |expected|, in float64."""
    return ((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def run_interpreted(file):
    """Run a file's test_interpreted_* in Triton's interpreter; none may fail or be skipped."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted", file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout.splitlines()[-1]


@dataclass(frozen=True)
class Built:
    """A kernel compiled for one target: its PTX, and registers a thread, spilled bytes and shared bytes; and the GPU
    that its machine code is for.
    """

    ptx: str
    machine: str
    registers: int
    spilled: int
    shared: int


def compile_for(kernel, capability, constants, warps, types, stages=4, source=None):
    """Compile for one target; every pointer and int divisible by 16, as they are for real models.

    types  of the parameters that are neither constants nor ints: "*bf16", "tensordesc<...>", or a tuple of these
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from svdq_compile.kernels.runtime.target import SHARED_MEMORY

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if isinstance(signature[n], str) and not signature[n].startswith(("const", "tens"))
    }
    for i, n in enumerate(
        names
    ):  # of a tuple too; its first int is a number of rows and one more (lowering/generate.py)
        if isinstance(signature[n], tuple):
            even |= {(i, j): [["tt.divisibility", 16]] for j, kind in enumerate(signature[n]) if j or kind != "i32"}
    program = (source or ASTSource)(kernel, signature, constants, even)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(program, target=GPUTarget("cuda", capability, 32), options=options)
    machine, registers, spilled = resources(built.asm["cubin"])
    assert built.metadata.shared <= SHARED_MEMORY[capability]
    return Built(built.asm["ptx"], machine, registers, spilled, built.metadata.shared)


def waits_first(ptx):
    """Whether a kernel that may start early waits for the one before it, and touches no memory until then."""
    access = re.search(r"\b(ld|st|red|atom|cp)\.\S*(global|bulk)|\bcp\.async|cp\.reduce", ptx)
    return -1 < ptx.find("griddepcontrol.wait") < access.start()


def resources(cubin):
    """The GPU of a cubin with one kernel, its registers a thread and bytes of local memory (spills)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = "".join(subprocess.check_output([tool, what, file.name], text=True) for what in ("-lelf", "-res-usage"))
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return re.search(r"\.(sm_\w+)\.cubin", text)[1], registers, stack + local
