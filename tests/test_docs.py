"""That the documents are complete where the sources can say so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("svdq_compile", "passes", "lowering", "kernels", "bench", "tests", "examples", "tools")
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]


def switches() -> set[str]:
    """What the code reads of the environment under our own name."""
    files = (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    return set(re.findall(r"[\"'](SVDQ_[A-Z_]+)", "\n".join(path.read_text(encoding="utf-8") for path in files)))


def test_every_switch_is_in_the_one_table() -> None:
    table = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8").split("\n## ")[1]
    assert table.startswith("Every switch")
    told = set(re.findall(r"^\| `(SVDQ_[A-Z_]+)", table, re.MULTILINE))
    assert {"SVDQ_DUMP", "SVDQ_KERNELS"} <= told  # the pattern finds them
    assert told == switches()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/extending.md", "docs/debugging.md"])
def test_files_that_are_named_exist(document: str) -> None:
    """`passes/measure_rows.py` and the like, which a renaming would leave behind."""
    named = set(
        re.findall(
            r"`((?:passes|lowering|kernels|svdq_compile|tests|bench|tools)/[\w/]+\.py)", (ROOT / document).read_text()
        )
    )
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
