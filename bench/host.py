"""What a call of an operator costs the host, from the operator down to the launch of its kernel.

    python bench/host.py [--out bench/results/host-h200.json]

    operator  through torch.ops, as compiled code calls it
    lowering  the function behind it: which kernel, views of the operands
    launcher  of that kernel: checks, outputs, arguments
    launch    of a kernel alone, its arguments given
    triton    the same through Triton's own launch of a compiled kernel

Nothing is waited for: a round queues fewer launches than the driver takes before it makes the host wait. The best of
several rounds, since whatever else the machine does only adds.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import record
from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm
from svdq_compile.kernels.hopper import quantize as gluon_quantize
from svdq_compile.kernels.operands import Gemm, Gemv, Quantize
from svdq_compile.kernels.portable import gemv as triton_gemv
from svdq_compile.kernels.runtime import launcher
from svdq_compile.lowering import launch, ops

RANK = 32
CASES = [("quantize", 4608, 0, 3072), ("quantize", 512, 0, 15360)]
CASES += [("gemm", m, n, k) for m in (4608, 512) for n, k in ((3072, 3072), (12288, 3072), (3072, 15360))]
CASES += [("gemv", 1, 18432, 3072)]
CALLS, ROUNDS = 200, 7


def host_microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e6 * min(times) / calls


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def calls_of(op: str, m: int, n: int, k: int) -> tuple[list[Callable[[], object]], object]:
    """The operator, its lowering and its launcher on the same operands, and the module that launches."""
    given: tuple
    x = normal(1, m, k)
    if op == "quantize":
        smooth, down = torch.rand(k, device="cuda") + 0.5, normal(RANK, k)
        given = x, smooth, down, "w4a8", 0.0
        flat = x.flatten(0, 1)
        return [
            lambda: ops.quantize(*given),
            lambda: launch.quantize(*given),
            lambda: gluon_quantize.quantize(Quantize(flat, smooth, down, "w4a8", 0.0)),
        ], gluon_quantize
    up, xd, bias = normal(n, RANK), normal(1, m, RANK), normal(n)
    if op == "gemv":
        weight = layout.to_kernel("w4a16", FORMATS["w4a16"].quantize_weight(normal(n, k).float()))
        given = x, xd, list(weight), up, bias, "w4a16", torch.bfloat16
        flat, low = x.flatten(0, 1), xd.flatten(0, 1)
        return [
            lambda: ops.gemv(*given),
            lambda: launch.gemv(*given),
            lambda: triton_gemv.gemv(Gemv(flat, low, weight, up, bias, "w4a16", torch.bfloat16)),
        ], triton_gemv
    weight = layout.to_kernel("w4a8", FORMATS["w4a8"].quantize_weight(normal(n, k).float()))
    qx, ascales = FORMATS["w4a8"].quantize_activation(x.float())
    given = qx, ascales, xd, list(weight), up, bias, None, "w4a8", torch.bfloat16
    flat, scales, low = (t.flatten(0, 1) for t in (qx, ascales, xd))
    return [
        lambda: ops.gemm(*given),
        lambda: launch.gemm(*given),
        lambda: gluon_gemm.gemm(Gemm(flat, scales, low, weight, up, bias, None, "w4a8", torch.bfloat16)),
    ], gluon_gemm


def kernel_calls(module: object, call: Callable[[], object]) -> list[Callable[[], object]]:
    """The one launch that a call makes, as it is made and through Triton."""
    seen: list[tuple] = []
    original = module.launch  # type: ignore[attr-defined]
    module.launch = lambda *a, **options: seen.append((a, options)) or original(*a, **options)  # type: ignore
    try:
        call()
    finally:
        module.launch = original  # type: ignore[attr-defined]
    ((given, options),) = seen
    kernel, grid, arguments, constants = given
    described = [launcher._described(a) for a in arguments]
    compiled = kernel[grid](*described, *constants, **options)
    return [lambda: launcher.launch(*given, **options), lambda: compiled[grid](*arguments, *constants)]


def measure(op: str, m: int, n: int, k: int) -> dict:
    calls, module = calls_of(op, m, n, k)
    calls[0]()  # chooses the configuration
    calls += kernel_calls(module, calls[0])
    times = dict(
        zip(("operator", "lowering", "launcher", "launch", "triton"), map(host_microseconds, calls), strict=True)
    )
    print(f"{op:9} {m:5} {n:6} {k:6} " + " ".join(f"{us:9.1f}" for us in times.values()), flush=True)
    return {"op": op, "m": m, "n": n, "k": k} | {f"us_{part}": us for part, us in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.results("host"))
    options = parser.parse_args()
    torch.manual_seed(0)
    print("                                operator  lowering  launcher    launch    triton   us", flush=True)
    record.write(options.out, [measure(*case) for case in CASES])


if __name__ == "__main__":
    main()
