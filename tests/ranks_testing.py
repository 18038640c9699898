"""What the tests of several ranks share: processes on this machine that talk through gloo.

results = on_ranks(2, function, tmp_path, *arguments)     # a result or the error that was raised, for each rank
"""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from svdq_compile.parameter import QuantizedWeight
from svdq_compile.ranks import checksums

LONGEST = 240  # seconds for all of it, on a busy machine


def on_ranks(size: int, function: Callable, folder: Path, *args: Any, patience: float = 30) -> list[Any]:
    """What `function(*args)` gives in each of `size` processes; None of one that ended without a word.

    patience  seconds that they wait for each other
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run, args=(rank, size, folder, patience, function, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONGEST)
        process.kill()
    results = [folder / str(rank) for rank in range(size)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in results]


def results_on_ranks(size: int, function: Callable, folder: Path, *args: Any) -> list[dict[str, Any]]:
    """The same of a function whose result has names; a rank that has none fails the test, with what it raised."""
    found = on_ranks(size, function, folder, *args)
    for rank, result in enumerate(found):
        assert isinstance(result, dict), f"rank {rank}: {result}"
    return found


def _run(rank: int, size: int, folder: Path, patience: float, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=patience)
    )
    try:
        result = function(*args)
    except Exception:
        result = traceback.format_exc()
    (folder / f"{rank}.part").write_bytes(pickle.dumps(result))
    (folder / f"{rank}.part").rename(folder / str(rank))
    os._exit(0)  # whatever else is under way: other ranks may be gone


def packs(model: nn.Module) -> dict[str, list[int]]:
    """The checksums of all that stands for each quantized weight, by name."""
    return {
        name: checksums([*own.plain_tensors().values(), own.shared.smooth, own.down])
        for name, weight in model.named_parameters()
        if isinstance(weight, QuantizedWeight)
        for own in [weight._svdq]
    }


def message(call: Callable[[], Any]) -> str:
    """The error that a call raises, as its class and text; "" if it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
