"""The GEMM kernels on this GPU, against cuBLAS bf16 and fp8 row-wise and torch._int_mm in the same process.

    python bench/gemm.py [--out bench/results/gemm-h200.json] [--tiles]

Random data; every result is checked against a float64 product of the same quantized operands before it is timed. Times
are medians of many launches with a cold L2, the rank-32 branch and the bias included in ours and in no other. --tiles
times every tile shape of the w4a8 kernel instead.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import record
from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.hopper import gemm_int4 as gluon_int4
from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm
from svdq_compile.kernels.operands import Gemm
from svdq_compile.kernels.portable import gemm as triton_gemm
from svdq_compile.kernels.runtime.target import has_kernels

SHAPES = [(3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360)]  # FLUX.1: out, in
ROWS = (4608, 512)
RANK = 32
TILES = [
    gluon_gemm.Tile(*t)
    for t in (
        (256, 128, 4, 8), (256, 128, 4, 8, 1, 1), (128, 128, 3, 4, 2), (128, 128, 3, 4, 2, 1), (128, 128, 5, 8),
        (256, 64, 4, 4), (128, 64, 4, 4, 2), (64, 128, 6, 8), (64, 64, 8, 4, 2), (32, 64, 8, 4, 2), (32, 128, 6, 8),
    )
]  # fmt: skip
TRITON_CONFIGS = [
    (128, 256, 8, 3),
    (128, 128, 8, 4),
    (128, 128, 8, 3),
    (128, 64, 4, 4),
    (64, 64, 4, 4),
    (64, 128, 8, 4),
]


_flush: list[Tensor] = []


def microseconds(call: Callable[[], object], repeats: int = 40) -> float:
    """Median GPU time of one call with a cold L2. The GPU first sleeps while the host queues the call."""
    if not _flush:
        _flush.append(torch.empty(256 << 20, device="cuda", dtype=torch.uint8))
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flush[0].zero_()
        torch.cuda._sleep(400_000)
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return 1e3 * statistics.median(a.elapsed_time(b) for a, b in times)


def host_microseconds(call: Callable[[], object], repeats: int = 200) -> float:
    """What one call costs the host, nothing waited for."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e6 * spent / repeats


def relative_error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


def check(call: Callable[[], Tensor], expected: Tensor, bound: float) -> float:
    error = relative_error(call(), expected)
    if not error < bound:
        raise SystemExit(f"wrong result: error {error:.2e}, bound {bound:.0e}")
    return error


class Problem:
    """One shape: operands of a quantized linear, and what it should give."""

    def __init__(self, precision: str, m: int, n: int, k: int, rank: int = RANK, dtype: torch.dtype = torch.bfloat16):
        self.precision, self.m, self.n, self.k, self.dtype = precision, m, n, k, dtype
        random = torch.Generator("cuda").manual_seed(m + n + k)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=random)

        fmt = FORMATS[precision]
        x = normal(m, k)
        self.plain = fmt.quantize_weight(normal(n, k) * k**-0.5)
        self.weight = layout.to_kernel(precision, self.plain)
        self.up, self.xd, self.bias = normal(n, rank).to(dtype), normal(m, rank).to(dtype), normal(n).to(dtype)
        w = fmt.dequantize_weight(*self.plain).double()
        if fmt.quantize_activation is None:
            self.x = x.to(dtype)
            product = self.x.double() @ w.t()
        else:
            self.qx, self.ascales = fmt.quantize_activation(x)
            scaled = self.qx.double().unflatten(1, (self.ascales.shape[1], -1)) * self.ascales.double().unsqueeze(-1)
            product = scaled.flatten(1) @ w.t()
        self.expected = product + self.xd.double() @ self.up.double().t() + self.bias.double()

    def operands(self) -> Gemm:
        weight, bias = self.weight, self.bias
        return Gemm(self.qx, self.ascales, self.xd, weight, self.up, bias, None, self.precision, self.dtype)

    def gluon(self, tile: gluon_gemm.Tile | None = None) -> Tensor:
        return gluon_gemm.gemm(self.operands(), tile=tile)

    def prepare_fp8(self) -> None:
        """The operands as the int4 kernel reads them; a quantize kernel could write them so at no cost."""
        self.qx8, self.by_group = self.qx.half().to(torch.float8_e4m3fn), self.ascales.t().contiguous().t()
        self.words = layout.to_kernel("int4", self.weight, words=True)

    def gluon_int4(self) -> Tensor:
        given = self.operands()
        return gluon_int4.gemm(given._replace(qx=self.qx8, ascales=self.by_group, weight=self.words))

    def plain_triton(self, config: tuple | None = None) -> Tensor:
        return triton_gemm.gemm(self.operands(), config=config)


def library_times(m: int, n: int, k: int) -> dict[str, float]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    x8, w8 = x.to(torch.float8_e4m3fn), (w * 16).to(torch.float8_e4m3fn)
    a, b = torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")
    xi, wi = (torch.randint(-127, 128, t.shape, device="cuda", dtype=torch.int8) for t in (x, w))

    def fp8() -> Tensor:
        return torch._scaled_mm(x8, w8.t(), a, b, out_dtype=torch.bfloat16, use_fast_accum=True)

    return {
        "us_bf16": microseconds(lambda: x @ w.t()),
        "us_fp8_rowwise": microseconds(fp8),
        "us_int_mm": microseconds(lambda: torch._int_mm(xi, wi.t())),
    }


def row(op: str, m: int, n: int, k: int, us: float, host: float, error: float,
        library: dict[str, float]) -> dict:  # fmt: skip
    line = {"op": op, "m": m, "n": n, "k": k, "rank": RANK, "us": us, **library, "rel_err": error}
    line["ratio_vs_bf16"] = library["us_bf16"] / us
    line["ratio_vs_fp8"] = library["us_fp8_rowwise"] / us
    line["us_host"] = host
    line["tflops"] = 2e-6 * m * n * k / us
    print(f"{op:14} {m:5} {n:6} {k:6} {us:8.1f} us {line['tflops']:6.0f} T/s   bf16 x{line['ratio_vs_bf16']:.2f}"
          f"   fp8 x{line['ratio_vs_fp8']:.2f}   err {error:.1e}   host {host:.0f} us", flush=True)  # fmt: skip
    return line


def copy_us(nbytes: int) -> float:
    """A device copy that reads and writes nbytes together."""
    source = torch.empty(nbytes // 2, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    return microseconds(lambda: target.copy_(source))


def gemm_rows() -> list[dict]:
    lines = []
    for m in ROWS:
        for n, k in SHAPES:
            library = library_times(m, n, k)
            problem = Problem("w4a8", m, n, k)
            for op, call in (("w4a8", problem.gluon), ("w4a8 triton", problem.plain_triton)):
                error = check(call, problem.expected, 4e-3)  # bf16 rounds to 1.7e-3
                lines.append(row(op, m, n, k, microseconds(call), host_microseconds(call), error, library))
            problem = Problem("int4", m, n, k)
            problem.prepare_fp8()
            for op, call in (("int4", problem.gluon_int4), ("int4 triton", problem.plain_triton)):
                error = check(call, problem.expected, 4e-3)
                lines.append(row(op, m, n, k, microseconds(call), host_microseconds(call), error, library))
    return lines


def compare(title: str, problem: Problem, call: Callable[[tuple], Tensor], choices: list) -> None:
    """Time one kernel in several shapes, best first; a shape that the compiler refuses is printed."""
    times = []
    for choice in choices:
        try:
            check(lambda c=choice: call(c), problem.expected, 4e-3)
            times.append((microseconds(lambda c=choice: call(c), repeats=20), choice))
        except Exception as failure:
            print("failed", title, choice, repr(failure)[:200], flush=True)
    times.sort(key=lambda pair: pair[0])
    best = "   ".join(f"{us:.1f} {choice}" for us, choice in times[:6])
    print(f"{title} {problem.m} {problem.n} {problem.k}: {best}".replace("Tile", ""), flush=True)


def compare_tiles() -> None:
    for m in (4608, 512, 77, 16):
        for n, k in SHAPES:
            problem = Problem("w4a8", m, n, k)
            compare("w4a8", problem, problem.gluon, TILES)
            if (n, k) == (3072, 3072):
                compare("w4a8 triton", problem, problem.plain_triton, TRITON_CONFIGS)
                problem = Problem("int4", m, n, k)
                compare("int4 triton", problem, problem.plain_triton, TRITON_CONFIGS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.results("gemm"))
    parser.add_argument("--tiles", action="store_true", help="time every tile shape instead")
    options = parser.parse_args()
    torch.manual_seed(0)
    if not has_kernels(torch.device("cuda", 0)):
        raise SystemExit("no kernels for this GPU")
    if options.tiles:
        compare_tiles()
        return
    record.write(options.out, gemm_rows())


if __name__ == "__main__":
    main()
