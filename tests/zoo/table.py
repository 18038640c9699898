"""Write docs/models.md from what the sweeps found: python -m tests.zoo.table"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/zoo.json"
PAGE = ROOT / "docs/models.md"

HEAD = """# Models

Written by `make zoo`: every denoiser class of diffusers {diffusers} and some models beyond it (`tests/zoo/`), in small
configurations with random weights, which are the worst case for rounding. torch {torch}, {device}, {date}.

- whole, by blocks: `torch.compile` of the model, and of each of its repeated blocks (`compile_repeated_blocks` where
  the class names them, else the elements of its lists). ok: every layer and the output are within their bounds, in
  `w4a8` and `int4`, no call compiled more graphs than Dynamo needs for the model with any backend, none at the second
  call, the memory of the 16-bit weights is given back, and both ways quantize the same layers.
- in 4 bits: of the linears' weights. Embedders weigh more here than in a published size, for which
  `svdq doctor CLASS` says it.
- graphs: how many parts Dynamo makes of the model, whole and by blocks.
- error: of the output in `w4a8` against 16 bits, whole and by blocks.

| model | class | whole | by blocks | in 4 bits | graphs | error | |
|---|---|---|---|---|---|---|---|
"""


def page(found: dict[str, Any]) -> str:
    """The document for what a file of the sweep holds."""
    return HEAD.format(**found) + "".join(_row(row) for row in sorted(found["classes"], key=lambda row: row["class"]))


def _row(row: dict[str, Any]) -> str:
    share = f"{row['pct_4bit']} %" if "pct_4bit" in row else ""
    graphs = " / ".join(map(str, row.get("graphs", ())))
    error = " / ".join(f"{error:.3f}" for error in row.get("rel_err", ()))
    cells = [row["name"], f"`{row['class']}`", row["whole"], row["regional"], share, graphs, error, row["note"]]
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    print(f"wrote {PAGE}")
