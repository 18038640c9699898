"""The demo's progress where no terminal shows it: a line as each part begins and ends, and one at least every EVERY
seconds.
"""

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

EVERY = 15.0


class Lines(Progress):
    """Takes the place of rich's display. Tasks are told of by their fields `name` and `doing`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._begun = self._last = time.monotonic()
        self._newest: TaskID | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._go_on_telling, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Set fields of a task; what it does now is told."""
        super().update(task_id, **fields)
        if "doing" in fields:
            self._newest = task_id
            self._tell(f"{fields['name']}: {fields['doing']}")

    def _tell(self, text: str) -> None:
        self._last = time.monotonic()
        minutes, seconds = divmod(int(self._last - self._begun), 60)
        self.console.print(f"{minutes}:{seconds:02} {text}", markup=False, highlight=False, soft_wrap=True)

    def _go_on_telling(self) -> None:
        while not self._stopped.wait(0.5):
            if time.monotonic() - self._last >= EVERY and self._newest is not None:
                task = self._tasks[self._newest]
                count = f"{task.completed:.0f} of {task.total:.0f} steps"
                self._tell(f"{task.fields['name']}: {task.fields['doing']}, {count}")
