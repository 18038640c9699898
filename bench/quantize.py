"""The quantize kernels on this GPU, with the low-rank product, against a device copy of the same number of bytes.

    python bench/quantize.py [--out bench/results/quantize-h200.json]

Random data; every result is checked before it is timed. Medians with a cold L2. Prologues: the tanh GELU, and a norm
with modulation whose row statistics are given. "two parts": the first 3072 channels and the others are slices of two
matrices. int4 is timed in the form that the sm_90 GEMM reads.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from gemm import copy_us, host_microseconds, microseconds, relative_error
from torch import Tensor

import record
from svdq_compile.kernels.hopper import quantize as hopper
from svdq_compile.kernels.operands import Quantize
from svdq_compile.kernels.portable import quantize as portable
from svdq_compile.kernels.runtime.generated import Generated
from svdq_compile.kernels.runtime.target import is_hopper
from svdq_compile.lowering import reference

CASES = [("w4a8", 4608, k, 32, "") for k in (3072, 12288, 15360)]
CASES += [("w4a8", 4608, 3072, rank, "") for rank in (0, 48, 96, 128, 144, 192)]
CASES += [("w4a8", 512, k, 32, "") for k in (3072, 12288, 15360)]
CASES += [("w4a8", 4608, 12288, 32, "gelu"), ("w4a8", 4608, 15360, 32, "two parts")]
CASES += [("w4a8", 4608, 3072, rank, "norm modulate") for rank in (32, 96, 128, 144, 192)]
CASES += [("int4", 4608, 3072, 32, ""), ("int4", 4608, 12288, 32, ""), ("nvfp4", 4608, 3072, 32, "")]


@triton.jit
def gelu(v, rows, columns, live, extra):
    inner = 0.7978845608028654 * (v + 0.044715 * v * v * v)
    return 0.5 * v * (1.0 + (1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner))))


@triton.jit
def modulate(v, rows, columns, live, extra):
    mean, rstd, scale, shift, m, k = extra
    r = tl.max(rows, 1)  # without the length-1 axis each thread loads a row's value once
    centred = v - tl.load(mean + r, mask=r < m - 1, other=0.0)[:, None]
    s = tl.load(scale + columns, mask=columns < k, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=columns < k, other=0.0).to(tl.float32)
    return centred * tl.load(rstd + r, mask=r < m - 1, other=0.0)[:, None] * (1.0 + s) + b


def prologue(kind: str, x: Tensor) -> tuple[Generated | None, Tensor]:
    """-> the function, and what it makes of x."""
    if kind == "gelu":
        return Generated(gelu), F.gelu(x.float(), approximate="tanh").bfloat16()
    if kind == "norm modulate":
        m, k = x.shape
        mean, rstd = x.float().mean(1), (x.float().var(1, unbiased=False) + 1e-6).rsqrt()
        scale, shift = torch.randn(2, k, device="cuda", dtype=torch.bfloat16)
        h = (x.float() - mean[:, None]) * rstd[:, None] * (1 + scale.float()) + shift.float()
        return Generated(modulate, (mean, rstd, scale, shift, m + 1, k)), h.bfloat16()
    return None, x


def split(x: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    if kind != "two parts":
        return x, None
    left, right = (
        torch.empty(len(x), 9216, device="cuda").bfloat16(),
        torch.empty(len(x), 21504, device="cuda").bfloat16(),
    )
    return left[:, 6144:].copy_(x[:, :3072]), right[:, 9216:].copy_(x[:, 3072:])


def measure(precision: str, m: int, k: int, rank: int, kind: str) -> dict:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    smooth = torch.rand(k, device="cuda") + 0.5
    down = torch.randn(rank, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    function, h = prologue(kind, x)
    left, right = split(x, kind)
    operands = Quantize(left, smooth, down, precision, 0.0)
    fp8 = precision == "int4" and is_hopper(x.device)

    def call() -> tuple[Tensor, ...]:
        one_kernel = is_hopper(x.device) and precision != "nvfp4" and hopper.can_quantize(operands, function, right)
        return (hopper if one_kernel else portable).quantize(operands, function, right, fp8)

    qx, ascales, xd = call()
    expected, scales, _ = reference.quantize(h, smooth, down, precision, 0.0)
    differing = (qx.float() != expected.float()).float().mean().item()
    error = relative_error(xd, h.double() @ down.double().t()) if rank else 0.0
    scale_error = relative_error(ascales, scales.double())
    bounds = (1e-2, 1e-3) if function else (2e-4, 1e-6)  # what a prologue makes may itself round either way
    if not (differing < bounds[0] and scale_error < bounds[1] and error < 4e-3):
        raise SystemExit(f"wrong: {precision} {m} {k} {rank} {kind}: {differing:.1e} {scale_error:.1e} {error:.1e}")
    nbytes = sum(t.nbytes for t in (x, smooth, down, qx, ascales, xd))
    us, copy = microseconds(call), copy_us(nbytes)
    op = f"quantize {precision} {kind}".strip()
    print(f"{op:34} {m:5} {k:6} rank {rank:3} {us:7.1f} us  {1e-6 * nbytes / us:.2f} TB/s  {copy / us:.0%} of a copy  "
          f"differing {differing:.0e}", flush=True)  # fmt: skip
    return {"op": op, "m": m, "k": k, "rank": rank, "us": us, "us_copy": copy, "share_of_copy": copy / us,
            "us_host": host_microseconds(call), "rel_err": error, "share_of_codes_differing": differing}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.results("quantize"))
    options = parser.parse_args()
    torch.manual_seed(0)
    record.write(options.out, [measure(*case) for case in CASES])


if __name__ == "__main__":
    main()
