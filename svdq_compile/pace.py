"""Who is ahead, the host or the GPU: a user whose GPU waits for Python is told so once, and what helps.

    host   ── block 1 ── block 2 ── block 3 ──►       the GPU is at block 1 when the host is at 3: nobody waits
    GPU       ────── block 1 ────── block 2 ──►

When the host comes to a block and the GPU has ended the one before already, it waits for the host.
"""

from typing import Any

import torch
from torch import nn

from .config import Config
from .progress import say
from .summary import title

# Calls of a block before it counts: the first ones compile, choose kernels and make CUDA graphs.
WARM = 4
BLOCKS = 64  # are looked at
# Of them, if the GPU has waited for so many. Some wait for what lies between two calls of the model.
IDLE = 0.9

GRAPHS = ("reduce-overhead", "max-autotune")  # modes of Inductor's that make CUDA graphs


class Pace:
    """Looks on while the blocks of a compiled graph are called one after another, until it knows."""

    def __init__(self, config: Config) -> None:
        self.is_known = config.mode in GRAPHS or not torch.cuda.is_available()
        self._visible = config.progress
        self._calls: dict[int, int] = {}  # of each block
        self._before: tuple[int, Any] | None = None  # the last one that was called, and what the GPU comes to behind it
        self._seen = self._idle = 0

    def begins(self, block: object) -> None:
        """The host has come to a block."""
        before, self._before = self._before, None
        # The same again is a model that was compiled whole, and between two calls of it much may happen.
        if before is not None and before[0] != id(block) and not torch.cuda.is_current_stream_capturing():
            self._seen += 1
            self._idle += before[1].query()

    def ends(self, block: object, device: torch.device) -> None:
        """The host has started all of a block's work, on this device's current stream."""
        calls = self._calls[id(block)] = self._calls.get(id(block), 0) + 1
        self.is_known = device.type != "cuda" or self._seen == BLOCKS or calls > WARM + BLOCKS
        if not self.is_known and calls > WARM and not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._before = id(block), event

    def tell(self, model: nn.Module | None) -> None:
        """What was found, of the model that the blocks are of, where it could be faster."""
        if self._idle >= IDLE * max(self._seen, 1):
            say(
                f"svdquant: {title(model)}: at this size the GPU waits for Python; CUDA graphs take less of it: "
                "svdq_compile.compile(model, mode='reduce-overhead')",
                self._visible,
            )
