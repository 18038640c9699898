"""One denoising step of a transformer with random weights: our backend, 16-bit, and the peers, in one run.

    python bench/flux_step.py --model flux --methods eager,compile,ours --out bench/results/flux-step-h200.json
    python bench/flux_step.py --model flux --methods ours --profile ours    also where the time of a step goes
    python bench/flux_step.py --table [docs/performance.md]                 the results as tables, into a document

Each method has a process of its own with empty compile caches, and a second one that finds them full; with --together
there is no second one, and first_step_s is what it took beside the others (processes_at_once). The rows of an
earlier call for the same model and methods are replaced in the file. A row has
    ms              median of steps one after another, the GPU's time between events; ms_all: each of them
    x               by method, how many times as long its step took in the same call ("run")
    first_step_s    from the 16-bit model in memory until the first step in the method's own form is done: quantizing,
                    compiling, and for ours also the 16-bit steps that it observes, of other inputs than are timed;
                    warm_process_s: again, caches full; loaded_process_s: so too, and instead of quantizing, what the
                    first process saved is loaded
    prepare_s       the part of it before the method's own step
    resident_gib    GPU memory between steps;  peak_gib: within them;  peak_prepare_gib: until the first is done
    rel_err         of the output against 16-bit eager with the same weights, in the same process
    host_ms         until the call returns, nothing waited for;  kernels: launched by a step
or else "error".
"""

import argparse
import contextlib
import datetime
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import step_profile
import step_table
import torch
from step_methods import METHODS, loaded
from step_models import MODELS, build, inputs, others
from step_times import milliseconds

import record
import svdq_compile as svdq

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SVDQ_CACHE")
GIB = 2**30


class Measurement:
    """One method on one model, in this process. `row` is written after each phase, so a late failure loses little."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_grad_enabled(False)
        torch._dynamo.config.recompile_limit = 64  # blocks of many sizes (SDXL) and peers that compile each block anew
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.repeats = MODELS[options.model].repeats if self.on_gpu else 3
        self.row: dict[str, Any] = {}
        begin = time.perf_counter()
        self.model = build(options.model, options.tiny, self.device)
        self.call = inputs(options.model, options.tiny, self.model, self.device)
        self.others = others(options.model, options.tiny, self.model, self.device)
        self.synchronize()
        self.say(f"built in {time.perf_counter() - begin:.1f} s")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, text: str) -> None:
        print(f"  {self.options.methods:14} {text}", flush=True)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def put(self, **values: Any) -> None:
        self.row |= values
        self.options.child.write_text(json.dumps(self.row))
        self.say(", ".join(f"{k} {v}" for k, v in values.items() if k not in ("ms_all", "profile")))

    def step(self) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return self.model(**self.call)[0]

    def measure(self) -> None:
        reference = self.step().float()
        profiling = self.options.methods in (self.options.profile or "").split(",")
        blocks = self.before_compiling() if profiling else {}
        saved = self.options.saved
        self.first_step(loaded(saved) if saved and saved.exists() else METHODS[self.options.methods])
        if self.options.first_only:
            return
        output = self.step().float()
        error = float((output - reference).norm() / reference.norm())
        self.put(rel_err=round(error, 5) if output.isfinite().all() else "not finite")
        del output, reference
        if self.options.turn:
            wait_for_turn(self.options.turn)
        self.times()
        if self.on_gpu:
            self.kernels(blocks if profiling else None)
        if saved:
            svdq.save(self.model, saved, progress=False)

    def before_compiling(self) -> dict:
        """What a profile needs to know of the model, found by hooks that a compiled model would not run."""
        self.work = step_profile.work(self.model, self.call)
        return step_profile.first_blocks(self.model, self.call)

    def first_step(self, method: Callable) -> None:
        gc.collect()
        self.synchronize()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        self.model = method(self.model, self.others)
        self.synchronize()
        prepared = time.perf_counter() - begin
        self.step()
        self.synchronize()
        seconds = time.perf_counter() - begin
        self.put(first_step_s=round(seconds, 2), prepare_s=round(prepared, 2))
        if self.on_gpu:
            self.put(peak_prepare_gib=round(torch.cuda.max_memory_allocated() / GIB, 2))

    def times(self) -> None:
        for _ in range(2):
            self.step()
        self.synchronize()
        host = []
        for _ in range(5):
            begin = time.perf_counter()
            self.step()
            host.append(1e3 * (time.perf_counter() - begin))
            self.synchronize()
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            resident = torch.cuda.memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        times = milliseconds(self.step, self.repeats) if self.on_gpu else host
        self.put(
            ms=round(statistics.median(times), 3),
            ms_all=[round(t, 3) for t in times],
            host_ms=round(statistics.median(host), 3) if self.on_gpu else None,
            resident_gib=round(resident, 3) if self.on_gpu else None,
            peak_gib=round(torch.cuda.max_memory_allocated() / GIB, 3) if self.on_gpu else None,
            kernels=None,
        )

    def kernels(self, blocks: dict | None) -> None:
        events = step_profile.kernels(self.step)
        self.put(kernels=step_profile.launches(events))
        if blocks is None:
            return
        found = step_profile.summary(events, self.work)
        self.put(profile=found)
        try:
            found["block_kernels"] = step_profile.block_launches(blocks)
        except Exception as failure:
            found["block_kernels_error"] = repr(failure)[:300]
        self.put(profile=found)
        step_profile.show(found)


def wait_for_turn(turn: Path) -> None:
    """Say that this process is ready to be timed, and wait until no other one is."""
    gc.collect()
    torch.cuda.empty_cache()
    ready(turn).touch()
    while not turn.exists():
        time.sleep(0.05)


def ready(turn: Path) -> Path:
    return turn.with_suffix(".ready")


def child(options: argparse.Namespace) -> None:
    """Measure one method; the row goes to the file that the parent named."""
    measurement = None
    try:
        measurement = Measurement(options)
        measurement.measure()
    except Exception as failure:
        row = measurement.row if measurement else {}
        options.child.write_text(json.dumps(row | {"error": f"{type(failure).__name__}: {failure}"[:300]}))
        raise


def run_child(
    options: argparse.Namespace,
    method: str,
    caches: Path,
    first_only: bool,
    saved: Path | None = None,
    turn: Path | None = None,
) -> dict[str, Any]:
    """Start a process for one method and wait for its row; it and all it started end at the limit."""
    limit = min(options.limit, options.total - time.perf_counter())
    if limit <= 0:
        return {"error": "no time left"}
    target = caches / "row.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--model", options.model, "--methods", method, "--child", str(target)]
    command += ["--tiny"] if options.tiny else []
    command += ["--first-only"] if first_only else []
    command += ["--saved", str(saved)] if saved else []
    command += ["--turn", str(turn)] if turn else []
    command += ["--profile", options.profile] if options.profile else []
    environment = os.environ | {name: str(caches / name) for name in CACHES}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    problem = None
    try:
        code = process.wait(limit)
        problem = f"the process ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        problem = f"stopped after the limit of {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    row = json.loads(target.read_text()) if target.exists() else {}
    return ({"error": problem} if problem else {}) | row  # a row with an error of its own keeps that one


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a method, in the order named, all of one run."""
    run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    model = options.model + (" (tiny)" if options.tiny else "")
    methods = options.methods.split(",")
    for method, row in (together if options.together else one_by_one)(options, model, methods):
        call = {"model": model, "methods": options.methods, "run": run, "device": record.environment()["device"]}
        yield {"method": method} | call | row


def one_by_one(options: argparse.Namespace, model: str, methods: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in methods:
        print(f"{model}, {method}", flush=True)
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            saved = Path(folder) / "model.svdq.safetensors" if options.load and method.startswith("ours") else None
            row = run_child(options, method, Path(folder), options.first_only, saved)
            row["warm_process_s"] = row["loaded_process_s"] = None
            if options.warm and "error" not in row:
                again = run_child(options, method, Path(folder), first_only=True)
                row["warm_process_s"] = again.get("first_step_s")
            if saved and saved.exists():
                again = run_child(options, method, Path(folder), first_only=True, saved=saved)
                row["loaded_process_s"] = again.get("first_step_s")
        print(f"  {method:14} took {time.perf_counter() - begin:.0f} s in all  {row.get('error', '')}", flush=True)
        yield method, row


def together(options: argparse.Namespace, model: str, methods: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Some processes compile at once, which makes each slower; their steps are timed when all have done so, in turn."""
    print(f"{model}, {options.methods}, {options.together} at once", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(len(methods)) as pool:
        turns = {method: Path(folder) / method / "turn" for method in methods}
        waiting, futures = list(methods), {}

        def is_ready(method: str) -> bool:
            return method in futures and (futures[method].done() or ready(turns[method]).exists())

        while not all(is_ready(method) for method in methods):
            if waiting and sum(not is_ready(method) for method in futures) < options.together:
                method = waiting.pop(0)
                turn = turns[method]
                turn.parent.mkdir()
                futures[method] = pool.submit(run_child, options, method, turn.parent, False, None, turn)
            time.sleep(0.1)
        for method, future in futures.items():
            turns[method].touch()
            row = future.result()
            print(f"  {method:14} {row.get('error', '')}", flush=True)
            row |= {"warm_process_s": None, "loaded_process_s": None, "processes_at_once": options.together}
            yield method, row


def merge(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the file, drop earlier runs' for the same model and methods, and compare the rows of its own run."""
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    known = [r for r in known if (r["model"], r["methods"]) != (row["model"], row["methods"]) or r["run"] == row["run"]]
    known.append(row)
    timed = [r for r in known if r["run"] == row["run"] and r["model"] == row["model"] and "ms" in r]
    for r in timed:
        r["x"] = {other["method"]: round(other["ms"] / r["ms"], 4) for other in timed}
    record.write(path, known)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=MODELS)
    parser.add_argument("--methods", default="eager,compile,ours", help="comma-separated, in this order")
    parser.add_argument("--out", type=Path, default=record.results("flux-step"))
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="for each process")
    parser.add_argument("--total", type=float, default=float("inf"), metavar="SECONDS", help="for all processes")
    parser.add_argument("--no-warm", dest="warm", action="store_false", help="no second process with full caches")
    parser.add_argument("--load", action="store_true", help="save ours, and load it in another process")
    parser.add_argument("--together", type=int, default=0, metavar="N", help="compile N at once, then time one by one")
    parser.add_argument("--profile", metavar="METHODS", help="also profile a step of these of the methods")
    parser.add_argument("--tiny", action="store_true", help="a small model of the same structure, to try the script")
    parser.add_argument("--first-only", action="store_true", help="no more than the first step")
    parser.add_argument("--table", nargs="?", type=Path, const=Path("-"), metavar="FILE",
                        help="print the tables of --out, or put them into a document, between its markers")  # fmt: skip
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--saved", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = set(options.methods.split(",")) - set(METHODS)
    if unknown:
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if options.table:
        step_table.main(options.out, options.table)
    elif options.child:
        child(options)
    else:
        options.total += time.perf_counter()
        for row in rows(options):
            merge(options.out, row)


if __name__ == "__main__":
    main()
