"""One denoising step on one GPU and over several, by Ulysses: ours, compiled 16-bit and torchao's fp8; and ours with
its weights split (svdq_compile.parallelize), method ours-tensor, and with an adapter of rank 16 on every linear of the
blocks beside, method ours-tensor-lora, or with an exchange for each of q, k and v, method ours-without-exchanges.

    python bench/multi_gpu.py                                 # on 1 and on all GPUs: results/multi-gpu-h200.json
    python bench/multi_gpu.py --models flux --methods ours    # a part; rows of the file that it does not measure stay
    python bench/multi_gpu.py --models flux --methods ours-tensor --ranks 2 --limit 190
    python bench/multi_gpu.py --together 3                    # compile that many rows at once, time them one by one
    python bench/multi_gpu.py --killed                        # one rank ends: how long until the others do, and how

    ms           a step, the median, of the slowest rank; ms_all of the first
    gib          the most that was allocated while stepping, of the fullest rank
    comm_share   the part of a step in which some exchange between GPUs runs, waiting for the other rank included
    busy_share   the part of it in which any kernel runs; the rest waits for the host
    packs_equal  the checksums of all packs, over all ranks; null where nothing is packed
    rel_err      the output against the same weights on one GPU, run eagerly; of split ones, before they were split
    predicted_ms what the model of the cost below says, from one GPU's ms; rows of kind "predicted" are nothing else

Cost of a step over P ranks: one GPU's time, what does not depend on tokens taken out, by P; and that; and for each
attention four times (q, k, v, and back) 2 T C / P bytes, of which (P - 1) / P leave the GPU, by four exchanges; ours
sends q, k and v by one.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import gloo_parallel
import lora_step
import step_methods
import step_models
import torch
import torch.distributed as dist
import torch.multiprocessing
from step_times import milliseconds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import record
import svdq_compile as svdq
from svdq_compile.config import FUSIONS
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.ranks import checksums

MODELS = {"flux": (57, 4608, 3072), "qwen-image": (60, 4352, 3072), "wan2.1-14b-81": (40, 32760, 5120)}
TENSOR, LORA, APART = "ours-tensor", "ours-tensor-lora", "ours-without-exchanges"
SPLIT = (TENSOR, LORA)
METHODS = ("ours", "ours-graphs", "compile", "compile-graphs", "torchao-fp8", *SPLIT, APART)
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-graphs": {"mode": "reduce-overhead"},
    APART: {"fuse": tuple(name for name in FUSIONS if name != "exchanges")},
}
EXTRAPOLATED = (2, 4, 8, 16)
# Bytes a second that leave a GPU, 3/4 of what NVLink 4 has; beyond 8 GPUs by the network, one 400 Gbit/s card each.
RATE, NETWORK = 0.75 * 450e9, 0.75 * 50e9
LATENCY = 25e-6  # seconds an exchange takes whatever its size
MEMORY = 4.2e12  # bytes a second that a linear with few rows reads its weight at
FEW_ROWS = 16
# Of a method, and with CUDA graphs the same: exchanges for each attention, and bytes for each value of such a weight.
EXCHANGES = {"ours": 2, APART: 4, "compile": 4, "torchao-fp8": 4}
BYTES = {"ours": 0.56, APART: 0.56, "compile": 2.0, "torchao-fp8": 1.0}


def prepared(model: nn.Module, method: str, other: dict[str, Any]) -> None:
    """The method's own code at the next call."""
    if method in OURS:  # once observed: speed does not depend on it
        options = step_methods._ours(calibration_steps=1, **OURS[method])
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, **options)
        model(**other)
    else:
        step_methods.METHODS[method](model, [other])


def measured(name: str, method: str, tiny: bool, turn: Path | None) -> dict[str, Any]:
    """In each rank. turn: where it says that it is ready to be timed, and is told that no other row is."""
    rank, size, device = dist.get_rank(), dist.get_world_size(), _device()
    model = step_models.build(name, tiny, device)
    call, other = (step_models.inputs(name, tiny, model, device, seed=seed) for seed in (1, 2))
    begun = time.perf_counter()
    single: torch.Tensor | None = None
    if method in SPLIT:
        single, sums = _split(model, call, other, adapted=method == LORA)
    elif size > 1:
        from diffusers import ContextParallelConfig

        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
        model(**other)  # diffusers' hooks look up arguments then, which Dynamo cannot
    serial = 0.0 if method in SPLIT else _serial_seconds(model, method, other)
    if method not in SPLIT:
        prepared(model, method, other)

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return model(**call)[0]

    step()
    first = time.perf_counter() - begun
    for _ in range(2):  # a CUDA graph is made in the second step
        step()
    _wait_for(turn)
    _reset_peak()
    dist.barrier()
    times = milliseconds(step, 2 if tiny else step_models.MODELS[name].repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    share, busy = _shares(step)
    output = step().float()
    if single is None:
        single, sums = _on_one(model, call), _sums(model)
    error = float((output - single).norm() / single.norm())
    found: list[Any] = [None] * size
    dist.all_gather_object(found, (statistics.median(times), peak, error, sums))
    slowest, gib, worst, all_sums = zip(*found, strict=True)
    return {
        "model": name,
        "ranks": size,
        "kind": _kind(method, size),
        "method": method,
        "ms": max(slowest),
        "ms_all": times,
        "gib": max(gib),
        "comm_share": share,
        "busy_share": busy,
        "packs_equal": all(own == all_sums[rank] for own in all_sums) if sums else None,
        "rel_err": max(worst),
        "serial_ms": 1e3 * serial,
        "first_step_s": first,
    }


def _split(
    model: nn.Module, call: dict[str, Any], other: dict[str, Any], adapted: bool
) -> tuple[torch.Tensor, list[list[int]]]:
    """Quantized by all ranks, and of it each its part, to be compiled. Returns what the whole gives, and its packs.

    adapted  with an adapter, the same on both
    """
    svdq.quantize(model, calibrate=lambda model: model(**other), precision="w4a8", progress=False)
    sums, adapter = _sums(model), lora_step.adapter(model, lora_step.linears(model), seed=1) if adapted else {}
    if adapted:
        model.load_lora_adapter(dict(adapter))
    single = model(**call)[0].float()
    if adapted:
        model.unload_lora()
    mesh = init_device_mesh(_device().type, (dist.get_world_size(),))
    svdq.parallelize(model, mesh, progress=False)
    if adapted:
        model.load_lora_adapter(dict(adapter))
        model.requires_grad_(False)
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, **step_methods._ours())
    return single, sums


def _sums(model: nn.Module) -> list[list[int]]:
    packs = [w._svdq for w in model.parameters() if isinstance(w, QuantizedWeight)]
    return [checksums([*p.plain_tensors().values(), p.shared.smooth, p.down]) for p in packs]


def _kind(method: str, ranks: int) -> str:
    return "one GPU" if ranks == 1 else "tensor" if method in SPLIT else "ulysses"


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _serial_seconds(model: nn.Module, method: str, call: dict[str, Any]) -> float:
    """What every rank does alike: linears with few rows read their weights."""
    rows = step_methods._linear_rows(model, call)
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    each = BYTES[method.removesuffix("-graphs")]
    return sum(sizes[name] for name, count in rows.items() if count <= FEW_ROWS) * each / MEMORY


def _wait_for(turn: Path | None) -> None:
    if turn is not None:
        _ready(turn, dist.get_rank()).touch()
        while not turn.exists():
            time.sleep(0.05)


def _ready(turn: Path, rank: int) -> Path:
    return turn.with_suffix(f".{rank}")


def _shares(step: Callable[[], object]) -> tuple[float | None, float | None]:
    """Of one step, from the first kernel's beginning to the last one's end: NCCL's kernels, and where any runs."""
    if not torch.cuda.is_available() or dist.get_world_size() == 1:
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [
        e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    ]
    spans = sorted((e.time_range.start, e.time_range.end, e.name.startswith("ncclDevKernel")) for e in events)
    whole, busy, until = max(end for _, end, _ in spans) - spans[0][0], 0.0, spans[0][0]
    for start, end, _ in spans:
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    return sum(end - start for start, end, exchanges in spans if exchanges) / whole, busy / whole


def _on_one(model: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """The output without compiled code and without the other ranks."""
    for module in model.modules():
        module._compiled_call_impl = None
        if getattr(getattr(module, "processor", None), "_parallel_config", None) is not None:
            module.processor._parallel_config = None
    if dist.get_world_size() > 1:
        from diffusers.hooks.context_parallel import remove_context_parallel

        remove_context_parallel(model, model._cp_plan)
    return model(**call)[0].float()


def killed(name: str, tiny: bool) -> None:
    """In each rank: the last one ends without a word after its first step."""
    model = step_models.build(name, tiny, _device())
    model.compile_repeated_blocks(fullgraph=True, **step_methods._ours(calibration_steps=2))
    model(**step_models.inputs(name, tiny, model, _device(), seed=dist.get_rank()))
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)  # with another code, what has started the processes would end them all
    begun = time.monotonic()
    try:
        model(**step_models.inputs(name, tiny, model, _device(), seed=dist.get_rank()))
    except Exception as error:
        print(f"rank {dist.get_rank()} ended after {time.monotonic() - begun:.1f} s: {error}", flush=True)
    os._exit(0)


def _process(rank: int, size: int, folder: Path, make: Any, arguments: tuple) -> None:
    torch.set_grad_enabled(False)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=size, timeout=timedelta(minutes=2))
    with nullcontext() if torch.cuda.is_available() else gloo_parallel.on_a_cpu():
        result = make(*arguments)
    if rank == 0:
        (folder / "row").write_text(json.dumps(result))
    dist.barrier()
    if torch.cuda.is_available():
        sys.stdout.flush()
        os._exit(0)  # destroying waits for ever for NCCL's communicators while CUDA graphs hold them, in 16 bits too
    dist.destroy_process_group()


def on_ranks(size: int, make: Any, *arguments: Any, limit: float) -> Any:
    """What the first of `size` processes gives. Raises what one of them raises, TimeoutError after `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.spawn(
            _process, (size, Path(folder), make, arguments), nprocs=size, join=False
        )
        ends = time.monotonic() + limit
        while not processes.join(timeout=1):
            if time.monotonic() > ends:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"not done after {limit:.0f} s")
        row = Path(folder) / "row"
        return json.loads(row.read_text()) if row.exists() else None


def predicted_ms(name: str, ranks: int, one: dict[str, Any]) -> float:
    """From one GPU's row."""
    attentions, tokens, channels = MODELS[name]
    leaving = 2 * tokens * channels / ranks * (ranks - 1) / ranks
    sending = attentions * (
        EXCHANGES[one["method"].removesuffix("-graphs")] * LATENCY + 4 * leaving / (RATE if ranks <= 8 else NETWORK)
    )
    return (one["ms"] - one["serial_ms"]) / ranks + one["serial_ms"] + (1e3 * sending if ranks > 1 else 0.0)


def with_predictions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured rows with what was to be expected, and what is to be expected of more ranks than were there."""
    kept = [row for row in rows if row["kind"] != "predicted"]
    for one in [row for row in kept if row["ranks"] == 1 and "ms" in row]:
        same = [row for row in kept if (row["model"], row["method"]) == (one["model"], one["method"])]
        for row in same:
            row["predicted_ms"] = predicted_ms(one["model"], row["ranks"], one)
        for ranks in EXTRAPOLATED:
            if ranks not in {row["ranks"] for row in same}:
                ms = predicted_ms(one["model"], ranks, one)
                common = {"model": one["model"], "ranks": ranks, "kind": "predicted", "method": one["method"]}
                kept.append(common | {"predicted_ms": ms})
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = max(torch.cuda.device_count(), 1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, default=sorted({1, gpus}))
    parser.add_argument("--limit", type=float, default=150, help="seconds for each row, waiting for its turn included")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="make N rows ready at once")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script on a CPU")
    parser.add_argument("--killed", action="store_true")
    parser.add_argument("--out", type=Path, default=record.results("multi-gpu"))
    options = parser.parse_args()
    if options.killed:
        begun = time.monotonic()
        try:
            on_ranks(gpus if gpus > 1 else 2, killed, options.models[0], options.tiny, limit=options.limit)
        except Exception as error:
            print(f"all ended {time.monotonic() - begun:.0f} s after the beginning: {error}")
        return
    asked = [
        (name, method, ranks)
        for name in options.models
        for method in options.methods
        for ranks in options.ranks
        if method not in SPLIT or ranks > 1
    ]
    for row in rows_together(asked, options.together, options.tiny, options.limit):
        rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        same = [r for r in rows if all(r[key] == row[key] for key in ("model", "ranks", "kind", "method"))]
        rows = with_predictions([*(r for r in rows if r not in same), row])
        print(row, flush=True)
        record.write(options.out, rows)


def rows_together(
    asked: list[tuple[str, str, int]], together: int, tiny: bool, limit: float
) -> Iterator[dict[str, Any]]:
    """As many at once as `together` says are made ready; then each is timed while the others of them wait."""
    for start in range(0, len(asked), together):
        some = asked[start : start + together]
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(some)) as pool:
            turns = [Path(folder) / str(i) for i in range(len(some))]
            futures = [pool.submit(row_of, *row, tiny, turn, limit) for row, turn in zip(some, turns, strict=True)]
            for future, turn, (_, _, ranks) in zip(futures, turns, some, strict=True):
                while not (future.done() or all(_ready(turn, rank).exists() for rank in range(ranks))):
                    time.sleep(0.05)
            for future, turn in zip(futures, turns, strict=True):
                turn.touch()
                yield future.result()


def row_of(name: str, method: str, ranks: int, tiny: bool, turn: Path, limit: float) -> dict[str, Any]:
    """By processes of its own."""
    try:
        return on_ranks(ranks, measured, name, method, tiny, turn, limit=limit)
    except Exception as error:  # the next row may do: torchao is not everywhere
        common = {"model": name, "ranks": ranks, "kind": _kind(method, ranks), "method": method}
        return common | {"error": str(error).strip().splitlines()[-1]}


if __name__ == "__main__":
    main()
