"""Some of a sequence whose length is not known before, evenly from its first to its last, in bounded memory."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Thinned(Generic[T]):
    """Every one, every second one, every fourth one, ... of what is added, as `kept`.

    is_too_much  whether these may not all be kept; one always may
    """

    def __init__(self, is_too_much: Callable[[list[T]], bool]) -> None:
        self.kept: list[T] = []
        self._is_too_much = is_too_much
        self._every = 1
        self._seen = 0

    def add(self, make: Callable[[], T]) -> None:
        """The next one, which is made only if it is kept."""
        if self._seen % self._every == 0:
            self.kept.append(make())
            while len(self.kept) > 1 and self._is_too_much(self.kept):
                self.kept = self.kept[::2]
                self._every *= 2
        self._seen += 1
