"""What can be done to an input of int4 before it is rounded, by the layers' output errors: the demo model's linears,
fitted on a user's calibration, measured on inputs that calibrated nothing. On the CPU, some minutes.

    python bench/transforms.py [--output bench/results/transforms.json]

    minus8     activations have the codes -8..7; all others but the first have too
    rotateN    Hadamard's rotation in blocks of N channels
    permute    channels sorted by span, so that those of a group are alike; in every linear, as if that were free
    center     each channel's mean is taken out first
    clip       a scale covers nine tenths of a group's span
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import quality
import torch
from rich.progress import track
from torch import Tensor

from record import RESULTS, environment
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.input_transform import EXPONENTS, smoothing
from svdq_compile.kernels.formats import groups
from svdq_compile.lowering.launch import round_weight
from svdq_compile.lowrank import factorize
from svdq_compile.quantize_model import _observed
from svdq_compile.whitening import Whitening

VARIANTS: dict[str, dict[str, Any]] = {
    "fifteen codes": {"least": 7},
    "minus8": {},
    "rotate64": {"block": 64},
    "rotate128": {"block": 128},
    "rotate256": {"block": 256},
    "rotate64, center": {"block": 64, "center": True},
    "rotate64, clip": {"block": 64, "clip": 0.9},
    "center": {"center": True},
    "clip": {"clip": 0.9},
    "permute": {"permute": True},
}


def rotated(x: Tensor, block: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return (x.unflatten(-1, (-1, block)) @ h).flatten(-2) / block**0.5


def rounded(x: Tensor, least: int, clip: float) -> Tensor:
    """Activations as int4 holds them; least: minus the lowest code."""
    g = groups.split(x, 64)
    if least == 7:
        scale = groups.span(g) / 7
    else:
        most, low = g.amax(-1, keepdim=True), g.amin(-1, keepdim=True)
        scale = torch.where(most > -low, -most, -low) / 8
    scale = torch.where(scale != 0, scale * clip, 1.0)
    return ((g / scale).round().clamp(-least, 7) * scale).flatten(-2)[:, : x.shape[1]]


def error(
    w: Tensor, smooth: Tensor, known: InputStatistics, x: Tensor,
    least: int = 8, block: int = 0, clip: float = 1.0, center: bool = False, permute: bool = False,
) -> float:  # fmt: skip
    """Of the outputs w x, by a branch of rank 32 that is refitted once."""
    rows = known.rows.float()
    middle = rows.mean(0) if center else torch.zeros(w.shape[1])
    order = (rows / smooth).abs().amax(0).argsort() if permute else torch.arange(w.shape[1])

    def transform(t: Tensor) -> Tensor:
        return rotated(t[:, order], block) if block else t[:, order]

    whole, fitting = transform(w * smooth), transform(rows / smooth)
    whitening = Whitening(fitting)
    importance = fitting.square().mean(0)
    importance = importance / importance.mean() + 1e-4
    lost, basis = whole, None
    for _ in range(2):
        up, down, basis = factorize(whitening.apply(lost), 32, basis)
        branch = up @ whitening.undo(down)
        coded = round_weight("int4", whole - branch, importance)[1]
        lost = whole - coded
    y = (
        rounded(transform((x - middle) / smooth), least, clip) @ coded.t()
        + transform((middle / smooth)[None]) @ coded.t()
    )
    truth = x @ w.t()
    return float((y + transform(x / smooth) @ branch.t() - truth).norm() / truth.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "transforms.json")
    args = parser.parse_args()
    todo = quality.job(256, quality.STEPS, "cpu")
    pipe = quality.demo.load_pipeline("cpu")
    tasks = _observed(
        pipe.transformer, lambda _: pipe(todo.calibration, num_inference_steps=8, seed=900), visible=False
    )
    shown = quality.layer_inputs(pipe, todo)
    layers = []
    for task in track([task for task in tasks if not task.has_few_rows], "layers"):
        weights = [weight.detach().float() for weight in task.weights]
        smooth = smoothing(weights, task.statistics.span, *EXPONENTS[0])
        for name, weight in zip(task.names, weights, strict=True):
            x = shown[name].float()
            errors = {v: round(error(weight, smooth, task.statistics, x, **VARIANTS[v]), 5) for v in VARIANTS}
            layers.append({"layer": name, "errors": errors})
    first = next(iter(VARIANTS))
    rows = []
    for variant in VARIANTS:
        ratios = [row["errors"][variant] / row["errors"][first] for row in layers]
        better = sum(ratio < 1 for ratio in ratios)
        rows.append({"variant": variant, "ratio": round(median(ratios), 3), "better": better, "layers": len(ratios)})
        print(rows[-1])
    args.output.write_text(json.dumps(environment() | {"rows": rows, "layers": layers}, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
