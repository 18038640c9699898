"""A step at one size after another, as people use a model: compiled by blocks with torch's defaults, where sizes become
dynamic at the second one. 16-bit and ours are in one process and are timed in turn.

    python bench/sizes.py [--static] [--out bench/results/sizes-h200.json]

Ours is quantized before it is compiled, calibrated at the first size on inputs that are not measured. A row has
    ms         median of steps one after another, the GPU's time between events
    host_ms    median time until the call returns, nothing waited for
    first_s    the first call at that size, quantizing not among it
    rel_err    of the output against 16-bit eager on the same inputs
    equal      whether a later step gives the same bits as the second one
    activations_gib   what a step needs of the GPU's memory beside weights and inputs
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from step_models import build, inputs, others
from step_times import milliseconds
from torch import nn

import record
import svdq_compile as svdq
from svdq_compile.backend import svdquant  # by the function, so that it works where only the sources are

SIZES = {
    "1024x1024": {"height": 64, "width": 64, "text": 512, "batch": 1},
    "768x1360, batch 2": {"height": 48, "width": 85, "text": 256, "batch": 2},
    "512x512": {"height": 32, "width": 32, "text": 512, "batch": 1},
    "1536x1024": {"height": 96, "width": 64, "text": 128, "batch": 1},
    "1000x1000": {"height": 62, "width": 62, "text": 512, "batch": 1},
}
TINY = {"8x8": {}, "8x12": {"width": 12}, "4x4": {"height": 4, "width": 4}, "12x8": {"height": 12, "text": 8}}
REPEATS = 15


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Any) -> float:
    """Until it returns; the GPU is idle before."""
    synchronize()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Method:
    """A compiled model, and what was measured of it at one size."""

    def __init__(self, name: str, model: nn.Module, dynamic: bool | None, **options: Any) -> None:
        self.name, self.model = name, model
        self.model.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, **options)

    def step(self, call: dict) -> torch.Tensor:
        return self.model(**call)[0]

    def first(self, call: dict) -> dict[str, Any]:
        """The first call, and some more, which record what they do."""
        begin = time.perf_counter()
        self.step(call)
        synchronize()
        row = {"first_s": round(time.perf_counter() - begin, 2)}
        self.early = self.step(call).clone()
        for _ in range(4):
            self.step(call)
        synchronize()
        return row

    def times(self, call: dict, reference: torch.Tensor) -> dict[str, Any]:
        all_ms = milliseconds(lambda: self.step(call), REPEATS)
        host = [1e3 * seconds(lambda: self.step(call)) for _ in range(REPEATS)]
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        late = self.step(call)
        synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if torch.cuda.is_available() else None
        error = float((late.float() - reference).norm() / reference.norm())
        return {
            "ms": round(statistics.median(all_ms), 3),
            "host_ms": round(statistics.median(host), 3),
            "rel_err": round(error, 5),
            "equal": torch.equal(late, self.early),
            "activations_gib": None if peak is None else round(peak, 3),
            "ms_all": [round(t, 3) for t in all_ms],
            "host_ms_all": [round(t, 3) for t in host],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="dynamic=False: code for each size")
    parser.add_argument("--tiny", action="store_true", help="a small model of the same structure, to try the script")
    parser.add_argument("--out", type=Path, default=record.results("sizes"))
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64  # two models of one class in a process
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build("flux", options.tiny, device)
    sizes = TINY if options.tiny else SIZES
    calls = {name: inputs("flux", options.tiny, model, device, size) for name, size in sizes.items()}
    references = {name: model(**call)[0].float() for name, call in calls.items()}
    first = next(iter(sizes.values()))
    calibrating = others("flux", options.tiny, model, device, first)
    ours = copy.deepcopy(model)
    took = seconds(lambda: svdq.quantize(ours, calibrate=lambda m: [m(**call) for call in calibrating], progress=False))
    print(f"quantized in {took:.1f} s", flush=True)
    dynamic = False if options.static else None
    methods = [
        Method("compile", model, dynamic),
        Method("ours", ours, dynamic, backend=svdquant, options={"progress": False, "fallback": False}),
    ]
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        firsts = [method.first(call) for method in methods]
        for method, begun in zip(methods, firsts, strict=True):
            row = {"model": "flux", "size": name, "dynamic": dynamic, "method": method.name} | begun
            rows.append(row | method.times(call, references[name]))
            print({k: v for k, v in rows[-1].items() if not k.endswith("_all")}, flush=True)
        sixteen, four = rows[-2:]
        rows[-1]["x"] = round(sixteen["ms"] / four["ms"], 4)
        print(f"  {name}: {rows[-1]['x']} x, host {four['host_ms'] / sixteen['host_ms']:.2f} of 16-bit's", flush=True)
        record.write(options.out, rows)
    print(json.dumps({r["size"]: r.get("x") for r in rows if "x" in r}))


if __name__ == "__main__":
    main()
