"""The w4a16 GEMV kernel on this GPU, low rank and bias included, against a device copy of the same number of bytes.

    python bench/gemv.py [--out bench/results/gemv-h200.json] [--splits]

Random data; every result is checked against a float64 product before it is timed. Medians with a cold L2. The bytes are
what must move: packed weights, up, x and the result. --splits times other ways to divide K instead.
"""

import argparse
from pathlib import Path

import torch
from gemm import RANK, check, copy_us, host_microseconds, microseconds
from torch import Tensor

import record
from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemv
from svdq_compile.kernels.portable.gemv import Split, gemv

BOUND = 4e-3  # bf16 rounds to 1.7e-3
SHAPES = [(18432, 3072), (12288, 3072), (9216, 3072), (3072, 3072), (9216, 1536), (14592, 2432), (3072, 12288)]
ROWS = (1, 2, 4, 8, 16)
SPLITS = [Split(*s) for s in ((1, 6), (2, 3), (2, 6), (4, 3), (4, 4), (4, 6), (8, 3))]


class Problem:
    """Random operands of one shape, and what the kernel should give."""

    def __init__(self, m: int, n: int, k: int):
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=random)

        random = torch.Generator("cuda").manual_seed(m + n + k)
        fmt = FORMATS["w4a16"]
        plain = fmt.quantize_weight(normal(n, k) * k**-0.5)
        self.m, self.n, self.k = m, n, k
        self.weight = layout.to_kernel("w4a16", plain)
        self.x, self.xd, self.up, self.bias = (t.bfloat16() for t in (normal(m, k), normal(m, RANK), normal(n, RANK),
                                                                       normal(n)))  # fmt: skip
        w = fmt.dequantize_weight(*plain)[:, :k].double()
        self.expected = self.x.double() @ w.t() + self.xd.double() @ self.up.double().t() + self.bias.double()
        self.nbytes = sum(t.nbytes for t in (*self.weight, self.up, self.x)) + 2 * m * n

    def __call__(self, split: Split | None = None) -> Tensor:
        return gemv(Gemv(self.x, self.xd, self.weight, self.up, self.bias, "w4a16", torch.bfloat16), split=split)


def measure(m: int, n: int, k: int) -> dict:
    problem = Problem(m, n, k)
    error = check(problem, problem.expected, BOUND)
    us, copy = microseconds(problem), copy_us(problem.nbytes)
    print(f"gemv w4a16 {m:3} {n:6} {k:6} {us:7.2f} us  {copy / us:.0%} of a copy  err {error:.1e}", flush=True)
    return {"op": "gemv w4a16", "m": m, "n": n, "k": k, "rank": RANK, "us": us, "us_copy": copy,
            "share_of_copy": copy / us, "us_host": host_microseconds(problem), "rel_err": error}  # fmt: skip


def compare_splits() -> None:
    """Microseconds of every split, best first."""
    for m, n, k in ((1, 18432, 3072), (1, 9216, 3072), (1, 3072, 3072), (1, 3072, 12288), (16, 18432, 3072)):
        problem = Problem(m, n, k)
        times = []
        for split in SPLITS:
            check(lambda p=problem, s=split: p(s), problem.expected, BOUND)
            times.append((microseconds(lambda p=problem, s=split: p(s), 20), split))
        times.sort(key=lambda pair: pair[0])
        best = "  ".join(f"{us:.1f} {split.warps}x{split.words}" for us, split in times)
        print(f"{m:3} {n:6} {k:6}: {best}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--splits", action="store_true")
    options = parser.parse_args()
    if options.splits:
        compare_splits()
    else:
        rows = [measure(m, n, k) for n, k in SHAPES for m in ROWS]
        if options.out:
            record.write(options.out, rows)
