"""What a user is told while a model is quantized, a line each: that it is watched, what was quantized (when the first
4-bit code is compiled), and that it wants to be compiled.
"""

import logging
import sys
from collections import Counter
from contextlib import suppress

from torch import nn

log = logging.getLogger("svdq_compile")


class Tally:
    """Counts since the last line. Blocks that are compiled one by one are quantized one by one, but told together."""

    def __init__(self) -> None:
        self._is_watching = False
        self._clear()

    def _clear(self) -> None:
        self._precisions: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._before = self._after = 0

    def quantized(self, precision: str, before: int, after: int) -> None:
        """A layer of `before` bytes now takes `after`."""
        self._precisions[precision] += 1
        self._before += before
        self._after += after

    def left(self, reason: str, nbytes: int) -> None:
        """A layer stays 16-bit."""
        self._reasons[f"{reason} ({nbytes / 2**20:.1f} MiB)" if nbytes > 2**26 else reason] += 1

    def line(self) -> str:
        """The sentence, or '' if nothing happened."""
        if not self._precisions and not self._reasons:
            return ""
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self._precisions.items()))
        text = f"svdquant: {sum(self._precisions.values())} linears quantized ({kinds or 'none'}), "
        text += f"{self._before / 2**20:.1f} -> {self._after / 2**20:.1f} MiB"
        if self._reasons:
            why = "; ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
            text += f"; {sum(self._reasons.values())} left in 16-bit: {why}"
        return text

    def watching(self, calls: int, visible: bool) -> None:
        """Once for all graphs that are watched until something is quantized: that it takes some calls."""
        if not self._is_watching:
            self._is_watching = True
            count = f"{calls} calls" if calls > 1 else "this call"
            say(
                f"svdquant: watching in 16-bit what the layers read; after {count} (option calibration_steps) they are "
                "quantized",
                visible,
            )

    def tell(self, visible: bool) -> None:
        """Say the line, and begin anew."""
        line = self.line()
        self._clear()
        if line:
            self._is_watching = False
            say(line, visible)


TALLY = Tally()


def tell_to_compile(model: nn.Module, visible: bool) -> None:
    """What is left to do with a quantized model, unless it or a part of it was compiled already."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        say('svdquant: quantized; now compile it, for speed: model.compile(backend="svdquant")', visible)


def say(line: str, visible: bool) -> None:
    """Log a line, and show it on stderr if `visible`."""
    log.info(line)
    if visible and can_show():
        with suppress(OSError):  # its reader has gone
            print(line, file=sys.stderr, flush=True)


def can_show() -> bool:
    """Whether there is a stderr to write to: it may be closed, its reader gone, or there was none to begin with."""
    try:
        sys.stderr.write("")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


# Where nobody has set up logging, Python writes warnings to stderr, and fails where there is none.
log.addFilter(lambda record: log.hasHandlers() or can_show())
