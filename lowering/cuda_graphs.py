"""What a plan does as a CUDA graph, where it is at the addresses of an earlier call."""

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import finalize, ref

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

    Called with the operands, too. A graph is made where one of them is the tensor that it was the first time, a weight;
    with that one it goes.
    """

    def __init__(self, run: Callable[..., None], device: torch.device) -> None:
        self._run, self._device = run, device
        self._graphs: dict[tuple[int, ...], Callable[[], None]] = {}
        self._met: dict[tuple[int, ...], list[ref[Tensor]]] = {}  # once, and the operands then
        self._can = True

    def __call__(self, operands: tuple[Tensor, ...], tensors: tuple[Tensor, ...], *addresses: int) -> None:
        graph = self._graphs.get(addresses)
        if is_capturing() or not self._can:
            graph = None
        elif graph is None:
            graph = self._captured(operands, tensors, addresses)
        if graph is None:
            self._run(tensors, *addresses)
        else:
            graph()

    def _captured(
        self, operands: tuple[Tensor, ...], tensors: tuple[Tensor, ...], addresses: tuple[int, ...]
    ) -> Callable[[], None] | None:
        """The graph, if it is time to make it and there can be one."""
        met = self._met.pop(addresses, ())
        owner = next((t for t, before in zip(operands, met, strict=False) if before() is t), None)
        if owner is None:
            if len(self._met) >= MAX_GRAPHS:
                self._met.clear()
            self._met[addresses] = [ref(t) for t in operands]
            return None
        if len(self._graphs) >= MAX_GRAPHS:
            return None
        stream, *others = addresses
        try:
            graph = _captured(lambda side: self._run(tensors, side, *others), stream, self._device)
        except RuntimeError as error:
            log.info("launches stay apart, they cannot be a CUDA graph: %s", error)
            self._can = False
            return None
        self._graphs[addresses] = graph
        finalize(owner, self._graphs.pop, addresses, None).atexit = False
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
