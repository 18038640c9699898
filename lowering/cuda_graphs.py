"""A few launches as a CUDA graph, captured while everything else goes on."""

import threading
from collections.abc import Callable
from functools import cache

import torch

from .locks import free_in_child

_LOCK = free_in_child(threading.Lock())
# Whether somebody makes a graph of what is launched now. A torch without CUDA does not have it.
is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)


def captured(launch: Callable[[int], None], device: torch.device) -> Callable[[], None]:
    """What starts again, on the current stream, all that `launch(stream)` starts; it may allocate nothing.

    Unlike `torch.cuda.graph` it waits for nothing and empties no cache. Raises RuntimeError where CUDA cannot capture.
    """
    graph = torch.cuda.CUDAGraph()
    with _LOCK, torch.cuda.stream(_stream(device)):  # one at a time: they share the stream
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            launch(torch.cuda.current_stream(device).cuda_stream)
        finally:
            graph.capture_end()
    return graph.replay


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Which nothing runs on: what is captured starts on the stream that its graph is launched on."""
    return torch.cuda.Stream(device, priority=-1)
