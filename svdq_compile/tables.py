"""Tables of layers. A name is never cut: it must serve for the option `skip`."""

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.table import Column

WIDTH = 140  # of tables that no terminal shows
_BESIDE = 90  # what is left for the other columns beside long names


def names(heading: str, found: Iterable[str]) -> Column:
    """A column wide enough for these names, each on one line; on a terminal that is narrower still they are folded."""
    return Column(heading, overflow="fold", min_width=max(map(len, found), default=0))


def as_text(table: RenderableType, found: Iterable[str]) -> str:
    """What print shows of a table with a column of these names."""
    text = io.StringIO()
    Console(file=text, width=max(WIDTH, _BESIDE + max(map(len, found), default=0))).print(table)
    return text.getvalue()
