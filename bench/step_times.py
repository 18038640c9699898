"""How long steps take: one after another without waiting, as a denoising loop runs them."""

import itertools
import time
from collections.abc import Callable

import torch


def milliseconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Of each of `repeats` steps: the GPU's time between events, after one more that fills the queue; on a CPU, the
    clock's.
    """
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - begin))
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    step()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
