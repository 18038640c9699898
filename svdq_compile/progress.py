"""What takes long is told while it lasts, on stderr: on a terminal as one line that goes away, in a log (whatever is no
terminal) as a line now and then. What a user should keep is said as a line of its own.
"""

import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar
from weakref import ref

import torch.distributed as dist

log = logging.getLogger("svdq_compile")

EVERY = 15.0  # seconds without a line after which a log gets one: nobody should wait longer than 20 s for a sign
REFRESH = 0.5  # seconds between two looks at what is under way
_CLEAR = "\r\x1b[K"

_shown_by = 0  # the rank of torch.distributed that shows what this one does

T = TypeVar("T")


class Activity:
    """Something that takes long, as a context.

    doing       what is being done now, short, as in "Net: quantizing 3 of 57 blocks"
    opening     what a log is told at the beginning; "": nothing, only that it goes on if it takes long
    hint        what a terminal shows after `doing`
    since       when it began (time.monotonic), if that was before the context
    visible     whether to tell anything at all
    everywhere  whether each rank tells of it if it takes long, and not the first for all
    """

    def __init__(
        self,
        doing: Callable[[], str],
        visible: bool,
        *,
        opening: str = "",
        hint: str = "",
        since: float | None = None,
        everywhere: bool = False,
    ) -> None:
        self.opening, self.everywhere = opening, everywhere
        self.since = time.monotonic() if since is None else since
        self._doing, self._hint, self._visible = doing, hint, visible

    def __enter__(self) -> "Activity":
        if self._visible:
            _DISPLAY.begin(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._visible:
            _DISPLAY.end(self)

    def shown(self) -> str:
        """On a terminal."""
        return f"svdquant: {self._doing()}{self._hint}{self._seconds()}"

    def told(self) -> str:
        """In a log, after the opening."""
        return f"svdquant: {self._doing()}{self._seconds() or ', 0 s'} so far"

    def _seconds(self) -> str:
        seconds = int(time.monotonic() - self.since)
        return f", {seconds} s" if seconds else ""


def steps(items: Iterable[T], text: str, visible: bool) -> Iterator[T]:
    """The items, while it is told how many of them are done."""
    items, done = list(items), 0
    with Activity(lambda: f"{text}, {done} of {len(items)}", visible):
        for item in items:
            yield item
            done += 1


class _Display:
    """All that is under way in this process, and the thread that tells of it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # Weakly: where an interruption skips the end of an activity, it ends with the frame that it was in.
        self._activities: list[ref[Activity]] = []
        self._busy = threading.Event()
        self._thread: threading.Thread | None = None
        self._drawn = False
        self._last = -math.inf  # when the last line was said
        # When the last activity ended, and when the first began of those that follow one another closely.
        self._ended = self._busy_since = -math.inf

    def begin(self, activity: Activity) -> None:
        with self._lock:
            if not self._activities and time.monotonic() - self._ended >= EVERY:
                self._busy_since = time.monotonic()
            self._activities.append(ref(activity))
            if activity.opening:
                log.info("svdquant: %s", activity.opening)
                if not _on_terminal():
                    self.line(f"svdquant: {activity.opening}")
            self._show()
            self._busy.set()
            if self._thread is None:
                with suppress(RuntimeError):  # Python is about to end
                    self._thread = threading.Thread(target=self._go_on_telling, name="svdquant progress", daemon=True)
                    self._thread.start()

    def end(self, activity: Activity) -> None:
        with self._lock:
            self._activities = [other for other in self._activities if other() not in (None, activity)]
            self._ended = time.monotonic()
            self.clear()
            self._show()

    def line(self, text: str, everywhere: bool = False) -> None:
        """Write a whole line, unless the log has just written it to the same place."""
        with self._lock:
            self._last = time.monotonic()
            if _may_show(everywhere) and not _is_logged_there():
                self.clear()
                with suppress(OSError):  # its reader has gone
                    print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line that goes away from the terminal."""
        with self._lock:
            if self._drawn:
                self._drawn = False
                self._write(_CLEAR)

    def _show(self) -> None:
        """Tell of the newest activity, if it is time."""
        activity = next((a for other in reversed(self._activities) if (a := other()) is not None), None)
        if activity is None:
            self._busy.clear()
        elif _on_terminal() and _may_show():
            width = shutil.get_terminal_size().columns
            self._write(f"{_CLEAR}{activity.shown()[: width - 1]}")
            self._drawn = True
        elif time.monotonic() - max(self._last, self._began(activity)) >= EVERY:
            log.info(activity.told())
            self.line(activity.told(), activity.everywhere)

    def _began(self, activity: Activity) -> float:
        """A wait counts by itself: between others' work there are many short ones."""
        return activity.since if activity.everywhere else min(activity.since, self._busy_since)

    def _write(self, text: str) -> None:
        if _may_show():
            with suppress(OSError):
                sys.stderr.write(text)
                sys.stderr.flush()

    def _go_on_telling(self) -> None:
        while True:
            self._busy.wait()
            time.sleep(REFRESH)
            with self._lock:
                self._show()


_DISPLAY = _Display()
# A child has none of its parent's threads, and may find the lock held by one.
os.register_at_fork(after_in_child=_DISPLAY.__init__)  # type: ignore[misc]


def say(line: str, visible: bool) -> None:
    """Log a line, and show it on stderr if `visible`."""
    log.info(line)
    if visible:
        _DISPLAY.line(line)


def can_show() -> bool:
    """Whether there is a stderr to write to: it may be closed, its reader gone, or there was none to begin with."""
    try:
        sys.stderr.write("")
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def show_by(rank: int) -> None:
    """Let this rank of torch.distributed show what is done, for all of its group."""
    global _shown_by
    _shown_by = rank


def _may_show(everywhere: bool = False) -> bool:
    """Of several ranks of torch.distributed the first of a group does, for all: they do the same. All of them log."""
    is_one_of_many = dist.is_available() and dist.is_initialized()
    return can_show() and (everywhere or not is_one_of_many or dist.get_rank() == _shown_by)


def _on_terminal() -> bool:
    return can_show() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _is_logged_there() -> bool:
    """Whether what `log` says at level info goes to where stderr goes."""
    if not log.isEnabledFor(logging.INFO):
        return False
    logger: logging.Logger | None = log
    while logger is not None:
        if any(handler.level <= logging.INFO and _leads_to_stderr(handler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def _leads_to_stderr(handler: logging.Handler) -> bool:
    stream: Any = getattr(handler, "stream", None) or getattr(getattr(handler, "console", None), "file", None)
    if stream is sys.stderr:
        return True
    try:
        return os.path.sameopenfile(stream.fileno(), sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # not a file
        return False


def _pass_on(record: logging.LogRecord) -> bool:
    """Whether a record finds somebody to read it: where nobody has set up logging, Python writes warnings to stderr,
    and fails where there is none. It comes on a line of its own.
    """
    _DISPLAY.clear()
    return log.hasHandlers() or can_show()


log.addFilter(_pass_on)
