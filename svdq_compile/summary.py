"""One line about what was quantized, printed when the first 4-bit code is compiled."""

import logging
import sys
from collections import Counter

log = logging.getLogger("svdq_compile")


class Tally:
    """Counts since the last line. Blocks that are compiled one by one are quantized one by one, but told together."""

    def __init__(self) -> None:
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

    def tell(self, visible: bool) -> None:
        """Log the line, show it on stderr if `visible`, and begin anew."""
        line = self.line()
        self._clear()
        if line:
            log.info(line)
            if visible:
                print(line, file=sys.stderr)


TALLY = Tally()
