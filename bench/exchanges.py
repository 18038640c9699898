"""What a rank does in a step of Ulysses beside sending, on one GPU: torch's fake process group sends nothing.

    python bench/exchanges.py                       # three rows, two minutes: results/exchanges-h200.json
    python bench/exchanges.py --tiny --out FILE     # a small model, to try the script on a CPU

    one GPU       no other rank
    ulysses       the first of --ranks, with its part of the tokens
    apart         likewise, with an exchange for each of q, k and v (fuse without "exchanges")

    ms            a step, the median: what the GPU has to do, or the host where it is slower
    host_ms       until the call returns, nothing waited for
    exchanges     calls of the process group in a step

of some of FLUX's blocks at their full size. What NCCL itself takes of the host and of the GPU is not in it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import step_models
import torch
import torch.distributed as dist
from step_methods import _ours
from step_times import milliseconds
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

import record
from svdq_compile.config import FUSIONS

BLOCKS = {"num_layers": 6, "num_single_layers": 12}
APART = tuple(name for name in FUSIONS if name != "exchanges")
REPEATS = 20


def measured(kind: str, model: nn.Module, call: dict[str, Any], fuse: Any) -> dict[str, Any]:
    """Compiled anew by blocks; quantized at the first call of all."""
    torch._dynamo.reset()
    options = _ours(calibration_steps=1, group="alone", fuse=fuse)
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, **options)
    for _ in range(4):  # observed, traced, recorded, replayed
        model(**call)
    times = milliseconds(lambda: model(**call), REPEATS)
    host = [1e3 * seconds_until_it_returns(lambda: model(**call)) for _ in range(REPEATS)]
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(**call)
    sent = sum(event.count for event in seen.key_averages() if event.key == "_c10d_functional::all_to_all_single")
    return {
        "kind": kind,
        "ms": statistics.median(times),
        "host_ms": statistics.median(host),
        "exchanges": sent,
        "ms_all": times,
    }


def seconds_until_it_returns(step: Callable[[], object]) -> float:
    """Of a step that begins with nothing queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=record.results("exchanges"))
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    from diffusers import ContextParallelConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = step_models.MODELS["flux"]
    with mock.patch.dict(step_models.MODELS, {"some": replace(spec, config=spec.config | BLOCKS)}):
        model = step_models.build("some", options.tiny, device)
    call = step_models.inputs("flux", options.tiny, model, device, seed=1)
    blocks = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    rows = [{"ranks": 1} | measured("one GPU", model, call, True)]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.ranks)
    with (
        mock.patch("torch.accelerator.device_count", return_value=1),
        mock.patch("torch._C._get_accelerator", return_value=device),
    ):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=options.ranks))
    for kind, fuse in (("ulysses", True), ("apart", APART)):
        rows.append({"ranks": options.ranks} | measured(kind, model, call, fuse))
        print(rows[-1], flush=True)
        record.write(options.out, [{"model": "flux", "blocks": blocks} | row for row in rows])


if __name__ == "__main__":
    main()
