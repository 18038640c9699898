"""The fenced blocks of a Markdown document, and which of their lines are not run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

RUN = ("python", "bash")
SHOWN = ("text", "console")  # drawings, and what a program printed

# Shell commands that no snippet test runs, by their beginning, with the reason.
EXCLUDED = {
    "hf download": "needs the network",
    "pip install": "would change the environment of the tests; tools/try_wheel.py installs the package",
    "make": "each target is a run of its own; `make test` is what runs this",
    "python bench/": "measures on a GPU; tests/test_bench.py tries the scripts",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: the language after its fence, the number of its first line, its text."""

    language: str
    line: int
    text: str

    def to_run(self) -> str:
        """The text without the lines that are excluded; these become empty, so that numbers stay."""
        if self.language != "bash":
            return self.text
        return "\n".join("" if why_excluded(line) else line for line in self.text.split("\n"))


def why_excluded(line: str) -> str | None:
    """The reason for which a shell line is not run."""
    return next((reason for start, reason in EXCLUDED.items() if line.startswith(start)), None)


def blocks(document: Path) -> Iterator[Block]:
    """All fenced blocks, in order. Raises ValueError for a fence that is not closed."""
    language, start, lines = None, 0, []
    for number, line in enumerate(document.read_text(encoding="utf-8").split("\n"), 1):
        fence = re.match(r"\s*```(.*)", line)
        if fence and language is None:
            language, start, lines = fence[1].strip(), number + 1, []
        elif fence:
            yield Block(language or "", start, "\n".join(lines))
            language = None
        elif language is not None:
            lines.append(line)
    if language is not None:
        raise ValueError(f"{document.name}:{start}: this block is not closed")


def indented_code(document: Path) -> list[int]:
    """Lines at which a block of code begins by its indentation alone, which has no language."""
    text = re.sub(
        r"(?ms)^```.*?^```$", lambda fenced: "\n" * fenced[0].count("\n"), document.read_text(encoding="utf-8")
    )
    lines = text.split("\n")
    return [
        number
        for number, (before, line) in enumerate(pairwise(lines), 2)
        if not before.strip() and line.startswith("    ") and line.strip()
    ]
