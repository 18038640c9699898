"""The site of the documents, built by `make docs` from the repository's root, so that links are those of the files.

A link to a file or heading that is not there fails the build. Links to other sites are not followed.
"""

from sphinx.application import Sphinx

project = "svdq-compile"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*", "examples/*/README.md"]
html_theme = "furo"
html_title = "svdq-compile"
myst_heading_anchors = 3


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _as_written)


def _as_written(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are tables of names and what they mean, in plain text, not reStructuredText."""
    lines[:] = ["::", "", *(f"   {line}" for line in lines), ""]
