"""Tables of layers. A name is never cut: it must serve for the option `skip`."""

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.table import Column

WIDTH = 140  # of tables that no terminal shows
_BESIDE = 90  # what is left for the other columns beside long names


def names(heading: str, found: Iterable[str], width: int) -> Column:
    """A column for these names in a table of a console of this width: each on one line, or folded on a terminal that is
    too narrow for it.
    """
    return Column(heading, overflow="fold", min_width=min(_longest(found), max(width - _BESIDE, width // 4)))


def width_for(found: Iterable[str]) -> int:
    """Of a table, with a column of these names, that no terminal shows."""
    return max(WIDTH, _BESIDE + _longest(found))


def as_text(table: RenderableType, found: Iterable[str] = ()) -> str:
    """What print shows of a table with a column of these names."""
    text = io.StringIO()
    Console(file=text, width=width_for(found)).print(table)
    return text.getvalue()


def _longest(found: Iterable[str]) -> int:
    return max(map(len, found), default=0)
