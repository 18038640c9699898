"""What is remembered of a linear's input while it is observed: spans, second moments, and a few whole rows."""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .fallback import is_out_of_memory

log = logging.getLogger("svdq_compile")

# Rows kept of each observed call, and of all calls together. A row is K values, so 512 rows of a 3072-wide input are
# 3 MiB; they stand for the input wherever an output error is measured.
ROWS_PER_CALL = 64
MAX_ROWS = 512
# Second moments are kept of blocks of neighbouring channels. 1024 take 4 KiB a channel, 7.2 GB for all inputs of FLUX's
# blocks, and its layers lose 3 to 5 % less with them than with 512. The device decides, not what is free on it, so the
# same model gets the same bits again.
MOMENT_BLOCKS = (1024, 512)
ROOMY = 64 << 30  # bytes of a device's memory from which on blocks are of the larger size
MOMENT_ROWS = 4096  # of each call: enough for as many channels, and a video has more
MOMENT_SHARE = 1 / 256  # of the memory that is free, for one more: there are some hundred inputs
MOMENT_STEP = 64  # blocks are whole groups of every format


@dataclass(frozen=True)
class Moment:
    """The second moment of an input [..., K], within blocks of its channels.

    sum   [G, B, B] fp32  the sum of x x^T over all rows, of each block of B channels; G * B >= K, 0 behind the last one
    rows  how many there were
    """

    sum: Tensor
    rows: int

    @staticmethod
    def shape(channels: int, most: int) -> tuple[int, int, int]:
        """Of the sum, for so many channels, in equal blocks of `most` or fewer."""
        blocks = -(-channels // most)
        size = -(-channels // (blocks * MOMENT_STEP)) * MOMENT_STEP
        return blocks, size, size

    @staticmethod
    def nbytes(channels: int, most: int) -> int:
        """How much one of so many channels takes."""
        return math.prod(Moment.shape(channels, most)) * 4

    @staticmethod
    def of(x: Tensor, most: int) -> "Moment":
        """Of x [M, K], in equal blocks of `most` channels or fewer."""
        blocks, size, _ = Moment.shape(x.shape[1], most)
        parts = F.pad(x.float(), (0, blocks * size - x.shape[1])).view(-1, blocks, size).transpose(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            return Moment(parts.mT @ parts, x.shape[0])

    def __add__(self, other: "Moment") -> "Moment":
        """In the smaller blocks of the two."""
        shape = min(self.sum.shape, other.sum.shape, key=lambda shape: shape[-1])
        return Moment(self.within(shape).sum + other.within(shape).sum, self.rows + other.rows)

    def within(self, shape: Sequence[int]) -> "Moment":
        """The same in other blocks of the same channels. Channels that shared no block before count as if they did not
        go together.
        """
        if self.sum.shape == torch.Size(shape):
            return self
        (blocks, size, _), own = shape, self.sum.shape[1]
        total = self.sum.new_zeros(*shape)
        for mine in range(self.sum.shape[0]):
            for place in range(mine * own // size, min(blocks, -(-(mine + 1) * own // size))):
                first, last = max(mine * own, place * size), min((mine + 1) * own, (place + 1) * size)
                here, there = (slice(first - start, last - start) for start in (mine * own, place * size))
                total[place, there, there] = self.sum[mine, here, here]
        return Moment(total, self.rows)


class InputStatistics:
    """Statistics of one tensor that one or more linears read.

    span    [K] fp32     the largest magnitude seen in each channel
    moment  the second moment of the rows, of MOMENT_ROWS of each call where there are more; None if memory was missing
    rows    [S, K]       rows sampled evenly from the calls, in the input's dtype
    calls   how many calls were observed whole, and wanted: how many shall be; the owner counts
    most_rows            the largest number that was read at once (passes/linears.rows_read); None: nothing was read
    """

    def __init__(self) -> None:
        self.span: Tensor | None = None
        self.moment: Moment | None = None
        self.calls = self.wanted = 0
        self.most_rows: float | None = None
        self._rows: list[Tensor] = []

    def observe(self, x: Tensor, rows: float = math.inf) -> None:
        """Add an input, x [..., K], of which a linear reads `rows` at once. A meta tensor shows nothing else."""
        x = x.detach().reshape(-1, x.shape[-1])
        if x.shape[0] == 0:
            return
        self.most_rows = max(rows, self.most_rows or 0)
        if x.is_meta:
            return
        span = x.abs().amax(0).float()
        if not bool(span.isfinite().all()):
            x = self._finite(x)
            if x.shape[0] == 0:
                return
            span = x.abs().amax(0).float()
        if self.span is not None:
            span = torch.maximum(self.span, span)
        self._add_moment(x)
        self._rows.append(x[evenly(x.shape[0], ROWS_PER_CALL, x.device)])
        self.span = span  # last: where there is a span there are rows, however far an observation came
        self._thin_out()

    def _thin_out(self) -> None:
        if sum(r.shape[0] for r in self._rows) > 2 * MAX_ROWS:
            self._rows = [self.rows]

    @property
    def kept(self) -> Tensor:
        """All rows that are kept, up to twice MAX_ROWS."""
        return torch.cat(self._rows)

    @property
    def rows(self) -> Tensor:
        """At most MAX_ROWS rows, evenly over all that were kept."""
        return thinned(self.kept, MAX_ROWS)

    def thinned(self, most: int) -> Tensor:
        """At most so many of `rows`, evenly."""
        return thinned(self.rows, most)

    @classmethod
    def of(
        cls, spans: Sequence[Tensor], rows: Sequence[Tensor], most_rows: float | None, moment: Moment | None = None
    ) -> "InputStatistics":
        """Of an input that several have observed, each a part of its rows. moment: of all of them."""
        whole = cls()
        whole.most_rows = most_rows
        if spans:
            whole._rows, whole.span = list(rows), torch.stack(list(spans)).amax(0)
            whole.moment = moment
            whole._thin_out()
        return whole

    def part(self, own: int, size: int) -> "InputStatistics":
        """What each of `size` processes that all know this is to say, so that `of` what they say, in their order, is
        this.
        """
        if self.span is None:
            return self
        moment = self.moment
        if moment is not None and own > 0:
            moment = Moment(moment.sum.new_zeros(()).expand_as(moment.sum), 0)
        rows = self.rows
        mine = rows[own * len(rows) // size : (own + 1) * len(rows) // size]
        return self.of([self.span], [mine], self.most_rows, moment)

    def _add_moment(self, x: Tensor) -> None:
        """A layer is quantized without it too, if less well; so it must not take what the model's own calls need."""
        if self._rows and self.moment is None:
            return
        try:
            moment = Moment.of(thinned(x, MOMENT_ROWS), self._moment_block(x))
            self.moment = moment if self.moment is None else self.moment + moment
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.moment = None
            _tell_of_memory()

    def _moment_block(self, x: Tensor) -> int:
        """The most channels of a block. Raises OutOfMemoryError."""
        if self.moment is not None:
            return self.moment.sum.shape[-1]
        most = MOMENT_BLOCKS[0 if _whole_memory(x.device) >= ROOMY else -1]
        if Moment.nbytes(x.shape[1], most) <= MOMENT_SHARE * _free_memory(x.device):
            return most
        raise torch.OutOfMemoryError

    def _finite(self, x: Tensor) -> Tensor:
        """The rows that hold numbers. One NaN would go into every statistic, and from there into every weight."""
        kept = x[x.isfinite().all(1)]
        log.warning(
            "svdquant: %d of %d rows of an observed input hold NaN or Inf and are left out; the model or its input is "
            "not right in 16-bit already",
            x.shape[0] - kept.shape[0],
            x.shape[0],
        )
        return kept


@cache
def _tell_of_memory() -> None:
    log.warning("svdquant: no memory for second moments of observed inputs; the layers that read them lose a bit more")


def _whole_memory(device: torch.device) -> int:
    """Bytes that a GPU has; of another device those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_memory(device: torch.device) -> float:
    """Bytes on a GPU that nobody holds; of other devices that is not known."""
    if device.type != "cuda":
        return math.inf
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def thinned(rows: Tensor, most: int) -> Tensor:
    """At most so many rows, evenly from the first to the last."""
    return rows if rows.shape[0] <= most else rows[evenly(rows.shape[0], most, rows.device)]


def evenly(rows: int, most: int, device: torch.device) -> Tensor:
    """The numbers of `most` rows or fewer, evenly from the first to the last, a half to the even one. In integers:
    float32 has not every number from 2^24 on, and devices divide it differently.
    """
    count = min(most, rows)
    steps = max(count - 1, 1)
    places = torch.arange(count, device=device) * (rows - 1)
    whole = places // steps
    return whole + (2 * (places % steps) + whole % 2 > steps)
