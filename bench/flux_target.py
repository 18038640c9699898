"""What the FLUX.1-dev shape loses by default and by `target_bytes`, on inputs that calibrated nothing (issue 18).

    python bench/flux_target.py [--targets 6.8,8] [--tiny]       on one H200
    python bench/flux_target.py --targets ""                     the default alone

Random weights, one denoising step, calibrated on the four steps of other inputs that bench/flux_step.py has. The first
row is `w4a8` with rank 32 throughout. A target here is of all GPU memory that the model's step leaves in use, in GiB:
`target_bytes` counts linears only, so what the first row has in use beside them is taken off before. Candidates and
effects are measured for the first target, and serve the others, which differ in the choice alone. A row has

    rel_err         of the output against 16-bit eager; other_rel_err: of another seed's inputs
    predicted       by the choice;  forms: how many linears got which format and rank
    resident_gib    between steps (on a CPU not known, there linears_gib);  peak_prepare_gib: while quantizing
    linears_gib     what target_bytes counts
    quantize_s      observing, measuring, choosing and quantizing, of it measure_s for candidates and effects
    ms              median of steps one after another
"""

import argparse
import gc
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_methods import compiled_by_us
from step_models import build, inputs, others
from step_times import milliseconds
from torch import nn

import record
import svdq_compile as svdq
from svdq_compile import budget

GIB = 2**30
SEEDS = (1, 11)  # of measured inputs; `others` has 2 to 5


class Once:
    """`budget.measured_groups` of a model, and for the same one built anew what was measured then."""

    def __init__(self, measure: Callable[..., list[Any]]) -> None:
        self.measure = measure
        self.known: dict[str, Any] = {}
        self.seconds = 0.0

    def __call__(self, model: nn.Module, tasks: list[Any], *args: Any) -> list[Any]:
        if not self.known:
            begin = time.perf_counter()
            groups = self.measure(model, tasks, *args)
            self.seconds = time.perf_counter() - begin
            # Without the weights and statistics, which would stay in memory.
            self.known = {group.task.names[0]: replace(group, task=None) for group in groups}
            return groups
        return [replace(self.known[task.names[0]], task=task) for task in tasks if task.names[0] in self.known]


def measure(options: argparse.Namespace, target: int | None, once: Once) -> dict[str, Any]:
    """One row; target: of the linears."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build("flux", options.tiny, device)
    calls = [inputs("flux", options.tiny, model, device, seed=seed) for seed in SEEDS]
    calibrating = others("flux", options.tiny, model, device)
    truths = [model(**call)[0].float() for call in calls]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin, before = time.perf_counter(), once.seconds
    report = svdq.quantize(
        model,
        precision="w4a8",
        progress=options.progress,
        target_bytes=target,
        calibrate=lambda model: [model(**call) for call in calibrating],
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    row: dict[str, Any] = {"quantize_s": round(time.perf_counter() - begin, 1)}
    row |= {"measure_s": round(once.seconds - before, 1), "linears_gib": report.bytes_after / GIB}
    row |= {"peak_prepare_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if device.type == "cuda" else None}
    row |= {
        "predicted": report.effect,
        "forms": dict(sorted(Counter(f"{r.precision} {r.rank}" for r in report).items())),
    }
    model = compiled_by_us(model)
    errors = [float((model(**c)[0].float() - t).norm() / t.norm()) for c, t in zip(calls, truths, strict=True)]
    row |= {"rel_err": round(errors[0], 5), "other_rel_err": round(errors[1], 5)}
    del truths
    times = milliseconds(lambda: model(**calls[0]), options.repeats)
    gc.collect()
    resident = torch.cuda.memory_allocated() if device.type == "cuda" else report.bytes_after
    return row | {"ms": round(statistics.median(times), 2), "resident_gib": resident / GIB}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="6.8,8", help="GiB in use between steps, comma-separated")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed")
    parser.add_argument("--progress", action="store_true", help="show how far quantizing has come")
    parser.add_argument("--tiny", action="store_true", help="a small model of the same structure, to try the script")
    parser.add_argument("--out", type=Path, default=record.results("flux-target"))
    options = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    once = budget.measured_groups = Once(budget.measured_groups)
    rows: list[dict[str, Any]] = []
    for wanted in (None, *(float(target) for target in options.targets.split(",") if target)):
        method = "default" if wanted is None else f"target {wanted:g} GiB"
        beside = rows[0]["resident_gib"] - rows[0]["linears_gib"] if rows else 0.0
        target = None if wanted is None else int((wanted - beside) * GIB)
        begin = time.perf_counter()
        row = {"model": "flux" + (" (tiny)" if options.tiny else ""), "method": method, "target_bytes": target}
        rows.append(row | measure(options, target, once))
        torch._dynamo.reset()
        gc.collect()
        rows[-1]["whole_s"] = round(time.perf_counter() - begin, 1)
        print(json.dumps(rows[-1]), flush=True)
        record.write(options.out, rows)


if __name__ == "__main__":
    main()
