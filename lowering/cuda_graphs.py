"""What a plan does as a CUDA graph, where it is at the addresses of an earlier call."""

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .locks import free_in_child

log = logging.getLogger("svdq_compile.lowering")

MAX_GRAPHS = 512  # of a plan: one for each block that it runs for, and for what else changes addresses
_LOCK = free_in_child(threading.Lock())

# Whether somebody makes a graph of what is launched now. A torch without CUDA does not have it.
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)


class Repeated:
    """Kernels and operators of torch's on memory that is there, as a CUDA graph from the second time at its addresses.

    run  (tensors, stream, *addresses): starts them one by one; what it returns nobody wants, and what it makes is gone
         then. Which addresses it is given says all about its tensors.
    """

    def __init__(self, run: Callable[..., None], device: torch.device) -> None:
        self._run, self._device = run, device
        self._graphs: dict[tuple[int, ...], Callable[[], None]] = {}
        self._met: set[tuple[int, ...]] = set()  # once
        self._can = True

    def __call__(self, tensors: tuple[Tensor, ...], *addresses: int) -> None:
        graph = self._graphs.get(addresses)
        if graph is None and addresses in self._met and self._can and not is_capturing():
            graph = self._capture(tensors, addresses)
        if graph is not None and not is_capturing():
            graph()
            return
        if len(self._met) >= MAX_GRAPHS:
            self._met.clear()
        if len(self._graphs) < MAX_GRAPHS:
            self._met.add(addresses)
        self._run(tensors, *addresses)

    def _capture(self, tensors: tuple[Tensor, ...], addresses: tuple[int, ...]) -> Callable[[], None] | None:
        self._met.discard(addresses)
        stream, *others = addresses
        try:
            graph = _captured(lambda side: self._run(tensors, side, *others), stream, self._device)
        except RuntimeError as error:
            log.info("launches stay apart, they cannot be a CUDA graph: %s", error)
            self._can = False
            return None
        self._graphs[addresses] = graph
        return graph


def _captured(run: Callable[[int], None], stream: int, device: torch.device) -> Callable[[], None]:
    """What starts all that `run(side)` starts on a stream of its own, for this stream.

    Unlike `torch.cuda.graph` it waits for nothing and empties no cache. Raises RuntimeError where CUDA cannot capture.
    """
    graph = torch.cuda.CUDAGraph()
    with _LOCK, torch.cuda.stream(_side(device)):  # one at a time: they share the side
        graph.capture_begin(pool=_pool(device, stream), capture_error_mode="thread_local")
        try:
            run(torch.cuda.current_stream(device).cuda_stream)
        finally:
            graph.capture_end()
    return graph.replay


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Which nothing runs on: what is captured starts on the stream that its graph is launched on."""
    return torch.cuda.Stream(device, priority=-1)


@cache
def _pool(device: torch.device, stream: int) -> Any:
    """Of the memory that operators of torch's take in graphs for this stream. What they make is gone at the end of each
    graph, and those of a stream run one after another, so all can have the same.
    """
    return torch.cuda.graph_pool_handle()
