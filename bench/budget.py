"""What choosing formats and ranks by a target gains over one format and rank for all linears, on the demo model.

    python bench/budget.py --layers [--sizes 1]                           errors alone, some minutes on a CPU
    python bench/budget.py [--pictures 256] [--formats w4a8,int4] [--sizes 1,1.15,1.3,1.6]

"uniform" is a format at rank 32 throughout; "target" has `target_bytes` of so many times its bytes. All is measured on
prompts and seeds that calibrated nothing, as by quality.py. Errors are relative:

    predicted       of the model's output, by the choice itself       output_error   the same, measured on other calls
    latent_error    of the final latents                              layer_error    the median of the linears' outputs

`gain_db` is the paired difference of PSNR to "uniform" of the same format. Intervals are 95 % over pictures.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import quality
import torch
from quality import Job, demo, draw, interval, layer_errors, layer_inputs, psnr
from rich.progress import track
from torch import Tensor, nn

import svdq_compile as svdq
from record import RESULTS, environment

RANK, CALLS = 32, 4
OF_LAYERS = {"pictures": 4, "steps": 4, "refine": 1}  # what a CPU has time for


def quantized(todo: Job, precision: str, **options: Any) -> tuple[Any, Any, float]:
    """A pipeline, not compiled, the report, and the seconds that observing, choosing and quantizing took."""
    pipe = demo.load_pipeline(todo.device)
    options = {"precision": precision, "rank": RANK, "error_budget": 1.0, "progress": False} | options

    def calibrate(_: nn.Module) -> None:
        seed = quality.FIRST_SEED - 100
        pipe(todo.calibration, num_inference_steps=demo.CALIBRATION_STEPS, seed=seed, output_type="latent")

    start = time.perf_counter()
    report = svdq.quantize(pipe.transformer, svdq.Config(**options), calibrate=calibrate)
    return pipe, report, time.perf_counter() - start


def other_calls(pipe: Any, todo: Job) -> list[tuple[dict[str, Any], Tensor]]:
    """Arguments and outputs of CALLS calls of the 16-bit model, spread over a drawing that calibrated nothing."""
    seen: list[tuple[dict[str, Any], Tensor]] = []
    hook = pipe.transformer.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs, output[0].float())), with_kwargs=True
    )
    prompts = todo.shown[: quality.LAYER_PICTURES]
    pipe(prompts, num_inference_steps=todo.steps, seed=quality.FIRST_SEED, output_type="latent")
    hook.remove()
    return [seen[(2 * i + 1) * len(seen) // (2 * CALLS)] for i in range(CALLS)]


def output_error(model: nn.Module, calls: Sequence[tuple[dict[str, Any], Tensor]]) -> float:
    """Relative, the mean square over calls."""
    outputs = [(model(**kwargs)[0].float(), truth) for kwargs, truth in calls]
    return float(torch.stack([((y - t).norm() / t.norm()) ** 2 for y, t in outputs]).mean().sqrt())


def measure(
    todo: Job, formats: Sequence[str], sizes: Sequence[float], refine: int, with_pictures: bool
) -> list[dict[str, Any]]:
    stock = demo.load_pipeline(todo.device)
    truth = draw(stock, todo)
    pictures = stock.decode(truth, "pt") if with_pictures else None
    inputs, calls = layer_inputs(stock, todo), other_calls(stock, todo)
    weights = {name: m.weight.detach() for name, m in stock.transformer.named_modules() if isinstance(m, nn.Linear)}
    rows: list[dict[str, Any]] = []
    uniform: dict[str, tuple[int, Tensor | None]] = {}  # by format: bytes of linears, decibels
    quantizable: set[str] = set()
    for precision, size in track([(f, s) for f in formats for s in (None, *sizes)], "quantizing and drawing"):
        target = {} if size is None else {"target_bytes": int(size * uniform[precision][0])}
        pipe, report, seconds = quantized(todo, precision, refine=refine, **target)
        latents = draw(pipe, todo)
        errors = layer_errors(pipe.transformer, weights, inputs)
        quantizable |= errors.keys()
        forms = Counter(f"{row.precision} {row.rank}" for row in report)
        row = {
            "model": "emoji-dit",
            "format": precision,
            "recipe": "uniform" if size is None else "target",
            "size": size,
            "refine": refine,
            "linear_bytes": report.bytes_after,
            "bytes": demo.weight_bytes(pipe.transformer),
            "predicted": None if report.effect is None else round(report.effect, 5),
            "output_error": round(output_error(pipe.transformer, calls), 5),
            "latent_error": round(float((latents - truth).norm() / truth.norm()), 5),
            "layer_error": round(median(errors.get(name, 0.0) for name in quantizable), 5),
            "seconds": round(seconds, 1),
            "forms": dict(sorted(forms.items())),
        }
        decibels = None if pictures is None else psnr(stock.decode(latents, "pt"), pictures)
        if decibels is not None:
            row |= {"pictures": len(decibels), "psnr_db": round(float(decibels.mean()), 3)}
            row |= {"ci95_db": round(interval(decibels), 3)}
        if size is None:
            uniform[precision] = report.bytes_after, decibels
        elif decibels is not None:
            gain = decibels - uniform[precision][1]
            row |= {"gain_db": round(float(gain.mean()), 3), "gain_ci95_db": round(interval(gain), 3)}
        rows.append(row)
        print(row, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", action="store_true", help=f"no pictures, and little: {OF_LAYERS}")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--steps", type=int, default=quality.STEPS)
    parser.add_argument("--formats", default="w4a8,int4")
    parser.add_argument("--sizes", default="1,1.15,1.3,1.6")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    amount = {"pictures": args.pictures, "steps": args.steps, "refine": svdq.Config.refine}
    amount |= OF_LAYERS if args.layers else {}
    todo = quality.job(amount["pictures"], amount["steps"], device)
    sizes = [float(size) for size in args.sizes.split(",")]
    with torch.no_grad():
        rows = measure(todo, args.formats.split(","), sizes, amount["refine"], with_pictures=not args.layers)
    output = args.output or RESULTS / ("budget-layers.json" if args.layers else "budget.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
