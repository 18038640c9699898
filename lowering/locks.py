"""Locks that a forked child finds free: the thread that held one in its parent is not there to open it.

What they guard is right at every step (svdq_compile/parameter.py), so there is nothing else to put in order.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

L = TypeVar("L", bound=Any)


def free_in_child(lock: L) -> L:
    """The lock itself, which children find open."""
    open_in_child(lambda: lock)
    return lock


def open_in_child(lock: Callable[[], Any]) -> None:
    """The same of a lock that is to be looked up then; None: there is none."""
    os.register_at_fork(after_in_child=lambda: _open(lock()))


def _open(lock: Any) -> None:
    """But for one that the thread which has forked holds itself: it goes on, and opens it."""
    if lock is not None and not getattr(lock, "_is_owned", bool)():
        lock._at_fork_reinit()
