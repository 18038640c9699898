"""What adapters cost a quantized model: the time of a step with and without, and switching one for another.

    python bench/lora_step.py --model flux --out bench/results/lora-h200.json

Compiled by repeated blocks, `precision="w4a8"`, random weights; an adapter is rank 16 on every linear, in bfloat16. The
output with each adapter is checked against PEFT's own products beside the quantized linears. The file has
    ms, ms_all      a step without an adapter, with one, without again, and with one loaded for hotswapping
    gpu_ms          the GPU's part of it: where the host is the slower of the two, ms says nothing of adapters
    slower          with / without - 1, of each of the two
    seconds         of each event, waiting for the GPU included; step_s: of the first step after it, compiling included;
                    again: the second time that the same event comes; new_graphs: compiled in it
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_models import CALIBRATING, MODELS, build, inputs, others
from step_times import gpu_milliseconds, milliseconds
from torch import Tensor, fx, nn

import record
from svdq_compile import passes
from svdq_compile.backend import svdquant

RANK = 16
OPTIONS = {"precision": "w4a8", "calibration_steps": CALIBRATING, "progress": False}
REPEATS = 20
WARM_UP = 8  # a call's third repetition is the first that is replayed, and a GPU that was idle is faster for a while


class Run:
    """A model compiled in 4 bits, and what was measured of it."""

    def __init__(self, name: str, tiny: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build(name, tiny, self.device)
        self.call = inputs(name, tiny, self.model, self.device)
        self.graphs = 0
        self.rows: list[dict[str, Any]] = []
        self.model.compile_repeated_blocks(backend=self.backend, fullgraph=True, dynamic=False)
        for call in others(name, tiny, self.model, self.device):
            self.model(**call)
        for _ in range(2):
            self.output()

    def backend(self, gm: fx.GraphModule, example_inputs: list) -> Callable:
        self.graphs += 1
        return svdquant(gm, example_inputs, options=OPTIONS)

    def output(self) -> Tensor:
        y = self.model(**self.call)[0].float()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return y

    def measure(self, title: str) -> None:
        for _ in range(WARM_UP):
            self.output()
        step = partial(self.model, **self.call)
        values: dict[str, Any] = {}
        for name, times in (("ms", milliseconds(step, REPEATS)), ("gpu_ms", gpu_milliseconds(step, REPEATS))):
            if times:
                values |= {name: round(statistics.median(times), 3), f"{name}_all": [round(t, 3) for t in times]}
        self.put(title, **values)

    def event(self, title: str, do: Callable[[], object]) -> Tensor:
        graphs, begin = self.graphs, time.perf_counter()
        do()
        self.model.requires_grad_(False)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        done = time.perf_counter()
        y = self.output()
        step = time.perf_counter() - done
        self.put(title, seconds=round(done - begin, 4), step_s=round(step, 4), new_graphs=self.graphs - graphs)
        return y

    def put(self, title: str, **values: Any) -> None:
        self.rows.append({"event": title} | values)
        print(title, {k: v for k, v in values.items() if not k.endswith("_all")}, flush=True)


def linears(model: nn.Module) -> list[str]:
    """Every linear of the repeated blocks, by name."""
    blocks = [n for n, m in model.named_modules() if type(m).__name__ in model._repeated_blocks]
    inside = tuple(f"{name}." for name in blocks)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)]


def adapter(model: nn.Module, targets: list[str], seed: int) -> dict[str, Tensor]:
    """A file's content: random, about a tenth of the base's output."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in targets:
        linear = model.get_submodule(name)
        k, n = linear.in_features, linear.out_features
        down, up = torch.randn(RANK, k, generator=generator), torch.randn(n, RANK, generator=generator)
        state[f"transformer.{name}.lora_A.weight"] = (down * k**-0.5).bfloat16()
        state[f"transformer.{name}.lora_B.weight"] = (up * 0.1 * RANK**-0.5).bfloat16()
    return state


def beside(run: Run) -> Tensor:
    """The output with PEFT's products beside the quantized linears, compiled anew."""
    folding, passes.fold_adapters = passes.fold_adapters, lambda gm: 0
    torch._dynamo.reset()
    try:
        return run.output()
    finally:
        passes.fold_adapters = folding
        torch._dynamo.reset()


def error(y: Tensor, expected: Tensor) -> float:
    return round(float((y - expected).norm() / expected.norm()), 6)


def measure(name: str, tiny: bool) -> list[dict[str, Any]]:
    run = Run(name, tiny)
    model = run.model
    targets = linears(model)
    first, second = (adapter(model, targets, seed) for seed in (1, 2))
    plain = run.output()
    run.measure("a step without an adapter")
    y = run.event("load an adapter", lambda: model.load_lora_adapter(dict(first), adapter_name="first"))
    run.measure("a step with an adapter")
    run.event("load another", lambda: model.load_lora_adapter(dict(second), adapter_name="second"))
    for again in ("", ", again"):
        run.event(f"switch to the second{again}", lambda: model.set_adapters("second"))
        run.event(f"switch to the first{again}", lambda: model.set_adapters("first"))
    expected = beside(run)
    run.put("folded against beside", rel_err=error(y, expected), adapter_moves=error(y, plain))
    model.delete_adapters(["first", "second"])
    run.output()
    run.measure("a step without an adapter, again")

    model.enable_lora_hotswap(target_rank=RANK)
    run.event("load for hotswapping", lambda: model.load_lora_adapter(dict(first), adapter_name="swapped"))
    run.measure("a step with a hotswappable adapter")
    for again in ("", ", again"):
        run.event(
            f"hotswap the second{again}",
            lambda: model.load_lora_adapter(dict(second), adapter_name="swapped", hotswap=True),
        )
        swap = run.event(
            f"hotswap the first{again}",
            lambda: model.load_lora_adapter(dict(first), adapter_name="swapped", hotswap=True),
        )
    run.put("hotswapped against folded", rel_err=error(swap, y))
    return run.rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The ratios first: of steps as they come, and of the GPU's work in them."""
    ratios = {}
    for kind in ("ms", "gpu_ms"):
        ms = {row["event"]: row[kind] for row in rows if kind in row}
        if ms:
            without = statistics.mean(v for k, v in ms.items() if "without" in k)
            ratios[f"slower_{kind}"] = round(ms["a step with an adapter"] / without - 1, 4)
            ratios[f"slower_hotswappable_{kind}"] = round(ms["a step with a hotswappable adapter"] / without - 1, 4)
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=MODELS)
    parser.add_argument("--tiny", action="store_true", help="a small model of the same structure, to try the script")
    parser.add_argument("--out", type=Path, default=record.results("lora"))
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = measure(arguments.model, arguments.tiny)
    told = record.environment() | {"model": arguments.model, "rank": RANK, "options": OPTIONS} | summary(rows)
    arguments.out.write_text(json.dumps(told | {"events": rows}, indent=1) + "\n")
    print(json.dumps(summary(rows)), f"wrote {arguments.out}")
