"""Who is ahead, the host or the GPU: a user whose GPU waits for Python is told so once, and what helps.

    host   ── block 1 ── block 2 ── block 3 ──►       the GPU is at block 1 when the host is at 3: nobody waits
    GPU       ────── block 1 ────── block 2 ──►

When the host comes to a block and the GPU has ended all that it was given before, it waits for the host.
"""

from weakref import WeakSet

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

_TOLD: WeakSet[nn.Module] = WeakSet()  # of which model it was said

GRAPHS = ("reduce-overhead", "max-autotune")  # modes of Inductor's that make CUDA graphs


class Pace:
    """Looks on while the blocks of a compiled graph are called one after another, until it knows."""

    def __init__(self, config: Config) -> None:
        self.is_known = config.mode in GRAPHS or not torch.cuda.is_available()
        self._visible = config.progress
        self._calls: dict[int, int] = {}  # of each block
        self._before: int | None = None  # the block that was called last
        self._seen = self._idle = 0

    def look(self, block: object, device: torch.device) -> None:
        """The host has come to a block, whose work is for this device's current stream."""
        before, self._before = self._before, id(block)
        calls = self._calls[id(block)] = self._calls.get(id(block), 0) + 1
        self.is_known = device.type != "cuda" or self._seen == BLOCKS or calls > WARM + BLOCKS
        # The same block again is a model that was compiled whole, and between two calls of it much may happen.
        if self.is_known or calls <= WARM or before == id(block) or torch.cuda.is_current_stream_capturing():
            return
        self._seen += 1
        self._idle += torch.cuda.current_stream(device).query()

    def tell(self, model: nn.Module | None) -> None:
        """What was found, of the model that the blocks are of, where it could be faster."""
        if model is not None and model not in _TOLD and self._seen and self._idle >= IDLE * self._seen:
            _TOLD.add(model)
            say(
                f"svdquant: {title(model)}: at this size the GPU waits for Python; CUDA graphs take less of it: "
                "svdq_compile.compile(model, mode='reduce-overhead')",
                self._visible,
            )
