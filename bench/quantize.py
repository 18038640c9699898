"""The quantize kernels on this GPU, with the low-rank product, against a device copy of the same number of bytes.

    python bench/quantize.py [--out bench/results/quantize-h100.json]

Random data; every result is checked before it is timed. Medians with a cold L2.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from gemm import copy_us, host_microseconds, microseconds, relative_error

import record
from svdq_compile.kernels.triton_quantize import RowPrologue, quantize
from svdq_compile.lowering import reference

CASES = [("w4a8", 4608, k, 32) for k in (3072, 12288, 15360)]
CASES += [("w4a8", 4608, 3072, rank) for rank in (0, 96, 128)] + [("w4a8", 512, k, 32) for k in (3072, 12288, 15360)]
CASES += [("int4", 4608, 3072, 32), ("nvfp4", 4608, 3072, 32)]


@triton.jit
def modulate(v, mean, variance, rows, columns, live, extra):
    """Layer norm without weights, then one scale and shift a channel."""
    scale, shift = extra
    s = tl.load(scale + columns, mask=live, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=live, other=0.0).to(tl.float32)
    return (v - mean) * tl.rsqrt(variance + 1e-6) * (1.0 + s) + b


def measure(precision: str, m: int, k: int, rank: int, normalized: bool = False) -> dict:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    smooth = torch.rand(k, device="cuda") + 0.5
    down = torch.randn(rank, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    prologue, h = None, x
    if normalized:
        scale, shift = torch.randn(2, k, device="cuda", dtype=torch.bfloat16)
        prologue = RowPrologue(modulate, (scale, shift))
        h = (F.layer_norm(x.float(), (k,), eps=1e-6) * (1 + scale.float()) + shift.float()).bfloat16()

    def call() -> tuple[torch.Tensor, ...]:
        return quantize(x, smooth, down, precision, 0.0, prologue)

    qx, ascales, xd = call()
    expected, scales, _ = reference.quantize(h, smooth, down, precision, 0.0)
    differing = (qx != expected).float().mean().item()
    error = relative_error(xd, h.double() @ down.double().t()) if rank else 0.0
    scale_error = relative_error(ascales, scales.double())
    bounds = (1e-2, 1e-3) if normalized else (2e-4, 1e-6)  # a normalized value itself may round either way
    if not (differing < bounds[0] and scale_error < bounds[1] and error < 4e-3):
        raise SystemExit(f"wrong: {precision} {m} {k} {rank}: {differing:.1e} {scale_error:.1e} {error:.1e}")
    nbytes = sum(t.nbytes for t in (x, smooth, down, qx, ascales, xd))
    us, copy = microseconds(call), copy_us(nbytes)
    op = f"quantize {precision}" + (" layernorm modulate" if normalized else "")
    print(f"{op:34} {m:5} {k:6} rank {rank:3} {us:7.1f} us  {1e-6 * nbytes / us:.2f} TB/s  {copy / us:.0%} of a copy  "
          f"differing {differing:.0e}", flush=True)  # fmt: skip
    return {"op": op, "m": m, "k": k, "rank": rank, "us": us, "us_copy": copy, "share_of_copy": copy / us,
            "us_host": host_microseconds(call), "rel_err": error, "share_of_codes_differing": differing}  # fmt: skip


def main() -> None:
    card = "h200" if "H200" in torch.cuda.get_device_name() else "h100"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(f"bench/results/quantize-{card}.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(*case) for case in CASES]
    record.write(options.out, [*rows, measure("w4a8", 4608, 3072, 32, normalized=True)])


if __name__ == "__main__":
    main()
