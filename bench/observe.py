"""What the statistics of the FLUX.1-dev shape take, and what quantizing by them needs, against calibrating.

    python bench/observe.py [--tiny] [--output bench/results/statistics-h200.json]

Random weights, calibrated on other inputs than bench/flux_step.py times. "calibrate" quantizes a model that is on the
GPU; "statistics" one that is in CPU memory, so of the GPU it needs a group of linears at a time. Both must come to the
same bits.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step_models import build, others
from torch import nn

import record
import svdq_compile as svdq
from svdq_compile.checkpoint import checksum, contents, on_host

GIB = 2**30


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What it gives, and the seconds until the GPU is done."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, round(time.perf_counter() - start, 2)


def measure(tiny: bool, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    model = build("flux", tiny, device)
    calls = others("flux", tiny, model, device)

    def calibrate(model: nn.Module) -> None:
        for call in calls:
            model(**call)

    seen, observing = timed(lambda: svdq.observe(model, calibrate, progress=False), device)
    _, saving = timed(lambda: seen.save(folder / "statistics", progress=False), device)
    seen, loading = timed(lambda: svdq.Statistics.load(folder / "statistics", progress=False), device)
    size = round((folder / "statistics").stat().st_size / GIB, 3)
    rows: list[dict[str, Any]] = [
        {"way": "observe", "seconds": observing, "save_s": saving, "load_s": loading, "file_gib": size}
    ]
    packed = []
    for way in ("calibrate", "statistics"):
        del model
        model = build("flux", tiny, device)
        given: dict[str, Any] = {"calibrate": calibrate} if way == "calibrate" else {"statistics": seen}
        model = model if way == "calibrate" else model.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        _, seconds = timed(lambda: svdq.quantize(model, device=device, progress=False, **given), device)  # noqa: B023
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
        rows.append({"way": way, "seconds": seconds, "gpu_peak_gib": None if peak is None else round(peak, 2)})
        packed.append({name: checksum(tensor) for name, tensor in on_host(contents(model)[0].items()).items()})
    rows[-1]["same_bits"] = packed[0] == packed[1]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this script")
    parser.add_argument("--output", type=Path, default=record.results("statistics"))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = measure(options.tiny, device, Path(folder))
    record.write(options.output, rows)
    if not rows[-1]["same_bits"]:
        sys.exit("the two ways do not come to the same bits")


if __name__ == "__main__":
    main()
