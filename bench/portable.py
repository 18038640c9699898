"""The kernels of GPUs older than sm_90, in their form for sm_80 and sm_89, run on an sm_90 (bench/as_target.py).

    python bench/portable.py [--out bench/results/portable-h200.json] [--targets 80 89]

Each target has a process of its own. "w4a8" is our GEMM with its rank-32 branch and bias; beside it, held to the same
target, the plain int8 and the plain bf16 GEMM of plain_gemm.py, of each the fastest of several tiles; "w4a8 plain" is
kernels/portable/gemm.py. A row's "tried" has the microseconds of every tile, "none" where the target cannot run it.
Random data; every result is checked against float64 before it is timed; medians with a cold L2. The other kernels are
compared with a copy of as many bytes. Ratios are of rates: above 1 ours is faster.

What holds here between kernels of one target need not hold on that target: see as_target.py.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import torch
from as_target import hold_to
from torch import Tensor

import record

FLUX = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)]  # out, in
FEW = [(512, 9216, 3072), (512, 3072, 12288), (128, 3072, 3072), (16, 3072, 3072)]
OURS = [
    (128, 256, 3, 2, 4), (128, 256, 3, 2, 4, 1), (128, 256, 4, 2, 4), (128, 256, 2, 2, 4), (128, 256, 3, 1, 8),
    (256, 128, 2, 4, 2), (256, 128, 3, 4, 2), (256, 128, 2, 2, 4), (128, 128, 2, 2, 2), (128, 128, 3, 2, 2),
    (128, 128, 3, 2, 2, 1), (128, 128, 2, 1, 4), (64, 256, 2, 1, 4), (64, 256, 3, 1, 4), (64, 128, 3, 1, 4),
    (64, 128, 4, 2, 2), (64, 64, 4, 2, 2), (64, 64, 4, 1, 4), (32, 128, 5, 1, 4), (32, 64, 6, 1, 4), (16, 128, 6, 1, 4),
    (16, 64, 6, 1, 4),
]  # fmt: skip
PLAIN = [(128, 128, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4)]  # of kernels/portable/gemm.py
WORKERS = 14


class Case:
    """One shape, and every kernel that multiplies it: (kind, tile) -> its result."""

    def __init__(self, m: int, n: int, k: int) -> None:
        import gemm

        self.m, self.n, self.k = m, n, k
        self.problem = gemm.Problem("w4a8", m, n, k)
        random = torch.Generator("cuda").manual_seed(n)
        self.a16 = torch.randn(m, k, device="cuda", generator=random).bfloat16()
        self.b16 = (torch.randn(n, k, device="cuda", generator=random) * k**-0.5).bfloat16()
        self.a8, self.b8 = ((t * 40 / t.std()).round().clamp(-127, 127).to(torch.int8) for t in (self.a16, self.b16))

    def run(self, kind: str, tile: tuple) -> Tensor:
        import plain_gemm

        from svdq_compile.kernels.ampere import gemm_w4a8

        if kind == "w4a8":
            return gemm_w4a8.gemm(self.problem.operands(), tile=gemm_w4a8.Tile(*tile))
        if kind == "w4a8 plain":
            return self.problem.plain_triton(tile)
        a, b = (self.a8, self.b8) if kind == "int8" else (self.a16, self.b16)
        return plain_gemm.plain_gemm(a, b, plain_gemm.Tile(*tile))

    def expected(self, kind: str) -> Tensor:
        if kind.startswith("w4a8"):
            return self.problem.expected
        a, b = (self.a8, self.b8) if kind == "int8" else (self.a16, self.b16)
        return a.double() @ b.double().t()


def kinds() -> dict[str, list[tuple]]:
    import plain_gemm

    return {"int8": plain_gemm.INT8, "bf16": plain_gemm.BF16, "w4a8 plain": PLAIN, "w4a8": OURS}


def compile_one(job: tuple[str, tuple]) -> tuple[tuple[str, tuple], str | None]:
    """In a worker: put a kernel into the target's cache without running it. -> why it cannot be compiled."""
    import plain_gemm

    from svdq_compile.kernels.ampere import gemm_w4a8
    from svdq_compile.kernels.portable import gemm as portable_gemm
    from svdq_compile.kernels.runtime.tuning import failed_to_compile

    def compile_only(kernel: Any, grid: tuple, arguments: tuple, constants: tuple, **options: int) -> None:
        kernel.warmup(*arguments, *constants, grid=grid, **options)

    for module in (plain_gemm, gemm_w4a8, portable_gemm):
        module.launch = compile_only  # type: ignore[attr-defined]
    try:
        small_case().run(*job)
    except Exception as error:
        if not failed_to_compile(error):
            raise
        return job, type(error).__name__
    return job, None


@cache
def small_case() -> Case:
    return Case(256, 512, 1024)


def compile_all(arch: int) -> dict[tuple[str, tuple], str | None]:
    """Every tile of every kind, by several processes at once. -> why one cannot be compiled, None if it can."""
    jobs = [(kind, tuple(tile)) for kind, tiles in kinds().items() for tile in tiles]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, initializer=hold_to, initargs=(arch,)) as pool:
        return dict(pool.map(compile_one, jobs))


def times(case: Case, kind: str, tiles: Sequence[tuple], failed: dict) -> tuple[dict[str, float | None], float]:
    """Microseconds by tile, None for one that cannot be compiled or is wrong, and the largest error of the others."""
    import gemm

    expected = case.expected(kind)
    tried: dict[str, float | None] = {}
    worst = 0.0
    for tile in map(tuple, tiles):
        tried[str(tile)] = None
        if failed[kind, tile] is None:
            error = gemm.relative_error(case.run(kind, tile), expected)
            if error < 4e-3:  # bf16 rounds to 1.7e-3
                worst = max(worst, error)
                tried[str(tile)] = gemm.microseconds(partial(case.run, kind, tile), repeats=15)
            else:
                print(f"WRONG {kind} {tile} at {case.m} {case.n} {case.k}: error {error:.1e}", flush=True)
    return tried, worst


def gemm_rows(arch: int, failed: dict) -> Iterator[dict]:
    for m, n, k in [(4608, n, k) for n, k in FLUX] + FEW:
        case = Case(m, n, k)
        best: dict[str, float] = {}
        lines = []
        for kind, tiles in kinds().items():
            if kind.startswith("w4a8"):
                tiles = [t for t in tiles if (t[0] >= 128) == (m > 1024) or (t[0] <= 128 and 64 < m <= 1024)]
            tried, error = times(case, kind, tiles, failed)
            best[kind], tile = min(((us, tile) for tile, us in tried.items() if us is not None), default=(inf, ""))
            lines.append({"op": kind, "target": f"sm_{arch}", "m": m, "n": n, "k": k,
                          "rank": 32 if kind.startswith("w4a8") else 0, "us": best[kind], "tile": tile,
                          "rel_err": error, "tried": tried})  # fmt: skip
        for line in lines:
            line["ratio_vs_int8"] = best["int8"] / line["us"]
            line["ratio_vs_bf16"] = best["bf16"] / line["us"]
            line["tflops"] = 2e-6 * m * n * k / line["us"]
            print(f"{arch} {line['op']:10} {m:5} {n:6} {k:6} {line['us']:8.1f} us {line['tflops']:6.0f} T/s   "
                  f"int8 x{line['ratio_vs_int8']:.2f}   bf16 x{line['ratio_vs_bf16']:.2f}   {line['tile']}   "
                  f"err {line['rel_err']:.1e}", flush=True)  # fmt: skip
        yield from lines


def other_rows(arch: int) -> list[dict]:
    """quantize, moments, heads and gemv, against a copy."""
    import gemv
    import quantize

    rows = [quantize.measure("w4a8", 4608, k, 32, kind) for k, kind in
            ((3072, ""), (12288, ""), (15360, ""), (12288, "gelu"), (3072, "norm modulate"))]  # fmt: skip
    rows += [quantize.measure("int4", 4608, 3072, 32, "")]
    rows += [gemv.measure(m, n, k) for n, k in ((18432, 3072), (3072, 12288)) for m in (1, 16)]
    rows += [moments_row(4608, 3072), heads_row(4608, 24, 128)]
    return [line | {"target": f"sm_{arch}", "ratio_vs_int8": None, "ratio_vs_bf16": None} for line in rows]


def against_copy(op: str, call: Callable[[], Any], nbytes: int, error: float, **sizes: int) -> dict:
    import gemm

    us, copy = gemm.microseconds(call), gemm.copy_us(nbytes)
    print(f"{op:34} {us:7.1f} us  {copy / us:.0%} of a copy", flush=True)
    return {"op": op, **sizes, "us": us, "us_copy": copy, "share_of_copy": copy / us, "rel_err": error}


def moments_row(m: int, k: int) -> dict:
    import gemm

    from svdq_compile.kernels.portable.row_moments import row_moments

    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    error = gemm.relative_error(row_moments(x)[0], x.double().var(1, unbiased=False))
    if not error < 1e-5:
        raise SystemExit(f"wrong moments: {error:.1e}")
    return against_copy("row_moments", lambda: row_moments(x), x.nbytes + 12 * m, error, m=m, k=k, rank=0)


NORM = ("heads(x, a0: D); t0 = mul(x, x); t1 = row_mean(t0); t2 = add(t1, 1e-06); t3 = rsqrt(t2); t4 = mul(x, t3); "
        "t5 = mul(t4, a0)")  # fmt: skip


def heads_row(tokens: int, heads: int, channels: int) -> dict:
    import gemm

    from svdq_compile.lowering import ops

    x = torch.randn(1, tokens, heads, channels, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(channels, device="cuda", dtype=torch.bfloat16)

    def call() -> Tensor:
        return ops.head_region([x, weight], NORM)

    d = x.double()
    expected = d * (d.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    error = gemm.relative_error(call().view_as(expected), expected)
    if not error < 4e-3:
        raise SystemExit(f"wrong heads: {error:.1e}")
    return against_copy("head_region norm", call, 2 * x.nbytes, error, m=tokens, n=heads, k=channels, rank=0)


def measure(arch: int, out: Path) -> None:
    """In a process that is held to one target."""
    hold_to(arch)
    torch.manual_seed(0)
    failed = compile_all(arch)
    for job, why in failed.items():
        if why is not None:
            print(f"sm_{arch} cannot run {job}: {why}", flush=True)
    rows = []
    for row in chain(other_rows(arch), gemm_rows(arch, failed)):
        rows.append(row)
        out.write_text(json.dumps(rows))  # what is there so far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.results("portable"))
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 89], choices=[80, 86, 89])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return measure(options.targets[0], options.child)
    rows, status = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.targets:
            path = Path(folder) / f"{arch}.json"
            command = [sys.executable, __file__, "--targets", str(arch), "--child", str(path)]
            status = subprocess.run(command).returncode or status
            rows += json.loads(path.read_text()) if path.exists() else []
            record.write(options.out, rows)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
