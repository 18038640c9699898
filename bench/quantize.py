"""The w4a8 quantize kernel on this GPU, with the low-rank product, against a device copy of the same number of bytes.

    python bench/quantize.py [--out bench/results/quantize-h200.json]

Random data; int8 codes may differ from the reference by one step at rounding ties only. Medians with a cold L2.
"""

import argparse
import json
from pathlib import Path

import torch
from gemm import copy_us, describe, host_microseconds, microseconds, relative_error

from svdq_compile.kernels.triton_quantize import quantize_w4a8
from svdq_compile.lowering import reference

CASES = [
    (m, k, rank)
    for m, rank in ((4608, 32), (4608, 128), (512, 32), (4608, 0))
    for k in (3072, 12288, 15360)
    if rank == 32 or k == 3072
]
CONFIGS = [  # rows, channels, stages, programs a multiprocessor, warps
    (64, 64, 4, 4, 4), (64, 64, 4, 3, 4), (64, 64, 3, 5, 4), (64, 128, 4, 2, 4), (32, 128, 3, 4, 4), (128, 64, 3, 2, 8),
]  # fmt: skip


def measure(m: int, k: int, rank: int, config: tuple[int, ...] | None = None) -> dict:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    smooth = torch.rand(k, device="cuda") + 0.5
    down = torch.randn(rank, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    qx, ascales, xd = quantize_w4a8(x, smooth, down, config)
    expected, expected_scales, _ = reference.quantize(x, smooth, down, "w4a8", 0.0)
    steps = (qx.int() - expected.int()).abs()
    product = x.double() @ down.double().t()
    error = relative_error(xd, product) if rank else 0.0
    differing = (steps > 0).float().mean().item()
    if (
        steps.max() > 1
        or differing > 1e-4
        or not error < 4e-3
        or relative_error(ascales, expected_scales.double()) > 1e-6
    ):
        raise SystemExit(f"wrong result at {m}, {k}, {rank}: {steps.max().item()} {differing:.1e} {error:.1e}")
    nbytes = sum(t.nbytes for t in (x, smooth, down, qx, ascales, xd))
    us, us_product = microseconds(lambda: quantize_w4a8(x, smooth, down, config)), 0.0
    if rank and config is None:
        us_product = microseconds(lambda: x @ down.t())
    copy = copy_us(nbytes)
    print(f"quantize {m:5} {k:6} rank {rank:3} {config or ''!s:16} {us:7.1f} us  {1e-6 * nbytes / us:.2f} TB/s  "
          f"{copy / us:.0%} of a copy  product alone {us_product:.1f} us  differing {differing:.0e}",
          flush=True)  # fmt: skip
    return {"op": "quantize w4a8", "m": m, "k": k, "rank": rank, "us": us, "us_copy": copy, "us_product": us_product,
            "us_host": host_microseconds(lambda: quantize_w4a8(x, smooth, down, config)),
            "share_of_copy": copy / us, "rel_err": error, "share_of_codes_one_step_off": differing}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/quantize-h200.json"))
    parser.add_argument("--configs", action="store_true", help="time every tile shape instead")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.configs:
        for k, rank in ((3072, 32), (3072, 128), (12288, 32)):
            for config in CONFIGS:
                measure(4608, k, rank, config)
        return
    result = describe() | {"rows": [measure(*case) for case in CASES]}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
