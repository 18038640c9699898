"""What a plan does as a CUDA graph, where it is at the addresses of an earlier call."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakSet, finalize, ref

import torch
from torch import Tensor, nn

log = logging.getLogger("svdq_compile.lowering")

MAX_GRAPHS = 512  # of a plan: one for each block that it runs for, and for what else changes addresses

# Whether somebody makes a graph of what is launched now. A torch without CUDA does not have it.
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)


class Repeated:
    """Kernels and operators of torch's on memory that is there, as a CUDA graph from the second time at its addresses.

    run  (tensors, stream, *addresses): starts them one by one; what it returns nobody wants, and what it makes is gone
         then. Which addresses it is given says all about its tensors.

    Called with the operands, too. A graph is made where some of them are the tensors that they were the first time, as
    packed weights are; with the last of those it goes, or when there are too many. Parameters do not count: offloading
    moves them about, and the packed tensors beside them are new ones each time.
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
            graph = self._made(operands, tensors, addresses)
        if graph is None:
            self._run(tensors, *addresses)
        else:
            graph()

    def _made(
        self, operands: tuple[Tensor, ...], tensors: tuple[Tensor, ...], addresses: tuple[int, ...]
    ) -> Callable[[], None] | None:
        """The graph, if it is time to make it and there can be one."""
        met = self._met.pop(addresses, ())
        pairs = zip(reversed(operands), reversed(met), strict=False)
        owner = next((t for t, before in pairs if before() is t and not isinstance(t, nn.Parameter)), None)
        if owner is None:
            if len(self._met) >= MAX_GRAPHS:
                self._met.clear()
            self._met[addresses] = [ref(t) for t in operands]
            return None
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.pop(next(iter(self._graphs)), None)
        stream, *others = addresses
        try:
            graph = _captured(lambda side: self._run(tensors, side, *others), stream, self._device)
        except torch.cuda.OutOfMemoryError:
            return None  # another time there may be enough
        except RuntimeError as error:
            log.info("launches stay apart, they cannot be a CUDA graph: %s", error)
            self._can = False
            return None
        self._graphs[addresses] = graph
        finalize(owner, _drop, ref(self), addresses).atexit = False
        return graph


def _drop(repeated: "ref[Repeated]", addresses: tuple[int, ...]) -> None:
    this = repeated()
    if this is not None:
        this._graphs.pop(addresses, None)


def _captured(run: Callable[[int], None], stream: int, device: torch.device) -> Callable[[], None]:
    """What starts all that `run(side)` starts, on whatever stream is current then; `stream` is the one it is meant for.

    Unlike `torch.cuda.graph` it waits for nothing and empties no cache. Raises RuntimeError where CUDA cannot capture.
    """
    from ..kernels.runtime.tuning import ALONE

    graph = torch.cuda.CUDAGraph()
    with ALONE:
        memory = _memory(device, stream)
        with torch.cuda.stream(memory.side):
            graph.capture_begin(pool=memory.pool(), capture_error_mode="thread_local")
            try:
                run(memory.side.cuda_stream)
            finally:
                graph.capture_end()
        memory.graphs.add(graph)
    return graph.replay


class _Memory:
    """What operators of torch's take in the graphs for one stream. What they make is gone at the end of each graph, and
    graphs of a stream run one after another, so all can have the same memory, workspaces of libraries too.

    side  the stream on which they are captured. Nothing runs there: a graph starts on the stream that it is launched on
    """

    def __init__(self, device: torch.device) -> None:
        self.side = torch.cuda.Stream(device, priority=-1)
        self.graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool: Any = None

    def pool(self) -> Any:
        """A new one where no graph has one: torch gives up a pool with its last graph, and takes it for none again."""
        if not self.graphs:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


@cache
def _memory(device: torch.device, stream: int) -> _Memory:
    return _Memory(device)
