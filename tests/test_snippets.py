"""Every snippet of the README and of docs/ runs as written, in order, in a fresh process for each document.

How a reader's machine is stood in for: snippets/run.py. What is not run, and why: snippets/document.py.
"""

import re
from pathlib import Path

import diffusers
import pytest

from snippets.document import EXCLUDED, RUN, SHOWN, blocks, indented_code, why_excluded
from snippets.reader import Machine, machine, reader

__all__ = ["machine", "reader"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def runs(document: Path) -> bool:
    return any(block.language in RUN and block.to_run().strip() for block in blocks(document))


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if runs(path)], ids=lambda path: path.stem)
def test_document(document: Path, machine: Machine, reader: Path) -> None:
    machine.run(document, reader)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_block_says_what_it_is(document: Path) -> None:
    strange = [f"line {b.line}: {b.language!r}" for b in blocks(document) if b.language not in RUN + SHOWN]
    assert strange == [], f"a block is {', '.join(RUN)} and runs, or {', '.join(SHOWN)}"
    assert indented_code(document) == [], "fence the code at these lines, with its language"


def test_every_exclusion_is_needed() -> None:
    lines = [line for path in DOCUMENTS for b in blocks(path) if b.language == "bash" for line in b.text.split("\n")]
    assert {start for start in EXCLUDED for line in lines if line.startswith(start)} == set(EXCLUDED)


def test_a_snippet_that_is_wrong_fails(machine: Machine, tmp_path: Path) -> None:
    """With the document and the line, so the harness looks at what it runs."""
    wrong = tmp_path / "wrong.md"
    wrong.write_text("One\n\n```python\nx = 1\n```\n\n```bash\npip install .\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError, match=r'wrong.md", line 12'):
        machine.run(wrong, tmp_path)
    wrong.write_text("```bash\nfalse\n```\n")
    with pytest.raises(AssertionError, match="non-zero exit status 1"):
        machine.run(wrong, tmp_path)
    assert why_excluded("pip install .")
    assert why_excluded("svdq inspect FILE") is None


def test_each_model_has_the_line_that_fits_its_class() -> None:
    """The README's twelve, against what diffusers says of their blocks."""
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| (by blocks|whole) \| (.+) \|$", DOCUMENTS[0].read_text(), re.MULTILINE)
    assert len(rows) == 12
    ways = {name: bool(getattr(getattr(diffusers, name), "_repeated_blocks", None)) for name, _, _ in rows}
    assert {name: way == "by blocks" for name, way, _ in rows} == ways
    lines = {name: line for name, _, line in rows}
    for name, by_blocks in ways.items():
        model = re.match("as (FLUX.1|Stable Diffusion 3)", lines[name])
        meant = (
            {"FLUX.1": "FluxTransformer2DModel", "Stable Diffusion 3": "SD3Transformer2DModel"}[model[1]]
            if model
            else name
        )
        assert ("compile_repeated_blocks" in lines[meant]) == by_blocks, name
