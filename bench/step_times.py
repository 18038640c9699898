"""How long steps take: one after another without waiting, as a denoising loop runs them; and the GPU's part alone."""

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


def gpu_milliseconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Of each step the GPU's time, its kernels queued by the host while the GPU sleeps: a slow host does not count.

    On a CPU nothing.
    """
    if not torch.cuda.is_available():
        return []
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    cycles = int(2 * (time.perf_counter() - begin) * 2e9)  # of at most 2 GHz
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times
