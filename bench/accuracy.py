"""Output error of one linear layer with planted outliers: what smoothing and the low-rank branch are for.

    python bench/accuracy.py [--output bench/results/accuracy.json]

A few input channels are 20 to 100 times larger than the others, as in diffusion transformers, and the weight has a few
strong directions. The layer sees other inputs than the ones it was calibrated on. Five seeds; the median is compared.
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from record import RESULTS, write
from svdq_compile.config import Config
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.lowering import ops
from svdq_compile.quantizer import quantize_group

IN_FEATURES, OUT_FEATURES, TOKENS, OUTLIERS = 512, 384, 256, 8
METHODS = {
    "int4 plain": Config(precision="int4", rank=0, smooth=False, rotate=False, refine=0),
    "int4 smoothing alone": Config(precision="int4", rank=0, rotate=False, refine=0),
    "int4 low-rank alone": Config(precision="int4", smooth=False, rotate=False),
    "int4 both (SVDQuant)": Config(precision="int4", rotate=False),
    "int4 rotated as well": Config(precision="int4"),
    "w4a8 both (SVDQuant)": Config(precision="w4a8"),
}


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [N, K], and the inputs [M, K] to calibrate and to test on."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = randn(OUT_FEATURES, IN_FEATURES) / IN_FEATURES**0.5
    weight += randn(OUT_FEATURES, 16) @ randn(16, IN_FEATURES) / (4 * IN_FEATURES**0.5)
    size = torch.ones(IN_FEATURES)
    where = torch.randperm(IN_FEATURES, generator=generator)[:OUTLIERS]
    size[where] = 20 + 80 * torch.rand(OUTLIERS, generator=generator)
    weight[:, where] /= 4  # a model learns not to listen too much to channels that are always loud
    return weight, randn(TOKENS, IN_FEATURES) * size, randn(TOKENS, IN_FEATURES) * size


def output_error(config: Config, seed: int) -> float:
    """|y - x W^T| / |x W^T| of the quantized layer on inputs it has not seen."""
    weight, known, x = layer(seed)
    statistics = InputStatistics()
    statistics.observe(known)
    packed = quantize_group([weight], ["layer"], config.precision, config, statistics)[0].packed
    truth = x @ weight.t()
    return float((ops.linear(x, packed, None, torch.float32) - truth).norm() / truth.norm())


def measure(seeds: int) -> list[dict]:
    """One row a method: the median error over the seeds, and all of them."""
    rows = []
    for method, config in METHODS.items():
        errors = [output_error(config, seed) for seed in range(seeds)]
        rows.append({"method": method, "error": round(median(errors), 5), "error_all": [round(e, 5) for e in errors]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    rows = measure(args.seeds)
    for row in rows:
        print(f"{row['method']:24} {100 * row['error']:6.2f} %")
    write(args.output, rows)


if __name__ == "__main__":
    main()
