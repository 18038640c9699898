"""Write docs/models.md from what the sweeps and bench/real_sizes.py found: python -m tests.zoo.table"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"
PAGE = ROOT / "docs/models.md"

HEAD = """# Models

Written by `make zoo`: every denoiser class of diffusers {diffusers} and some models beyond it (`tests/zoo/`), in small
configurations with random weights, which are the worst case for rounding. torch {torch}, {device}, {date}.

- whole, by blocks: `torch.compile` of the model, and of each of its repeated blocks (`compile_repeated_blocks` where
  the class names them, else the elements of its lists). ok: every layer and the output are within their bounds, in
  `w4a8` and `int4`; each graph is compiled once more in 4 bits and once more for another size, at most, and beyond that
  no call compiles more than Dynamo needs for the model with any backend; the memory of the 16-bit weights is given
  back; both ways quantize the same layers.
- in 4 bits: of the weights that products and convolutions read. Embedders weigh more here than in a published size, for
  which `svdq doctor CLASS` says it.
- graphs: how many parts Dynamo makes of the model, whole and by blocks.
- error: of the output in `w4a8` against 16 bits, whole and by blocks; on the {gpu} ({gpu_torch}, {gpu_date}) through
  Inductor and the real kernels. In brackets: 16-bit `torch.compile` itself is off by so much there, and the error is
  held against it.

| model | class | whole | by blocks | in 4 bits | graphs | error | on the GPU | |
|---|---|---|---|---|---|---|---|---|
"""

SIZES = """
## At their real size

Published configurations, random weights, by blocks, `w4a8` ({command}; {device}, torch {torch}, {date}): GiB of GPU
memory in 16 bits, as `svdq doctor` predicts it in 4 bits, and as it was then; the output's error against 16 bits. What
doctor does not count are workspaces of cuBLAS and split-K, some 40 to 70 MiB, and that linears which read one row a
sample are stored in `w4a16`.

| model | class | 16 bits | predicted | measured | linears in 4 bits | error |
|---|---|---|---|---|---|---|
"""


def page(found: dict[str, Any], gpu: dict[str, Any], sizes: dict[str, Any]) -> str:
    """The document for what two sweeps, on a CPU and on a GPU, and bench/real_sizes.py have found."""
    on_gpu = {row["name"]: row for row in gpu["classes"]}
    head = HEAD.format(**found, gpu=gpu["device"], gpu_torch=gpu["torch"], gpu_date=gpu["date"])
    rows = sorted(found["classes"], key=lambda row: row["class"])
    models = "".join(_row(row, on_gpu.get(row["name"], {})) for row in rows)
    return head + models + SIZES.format(**sizes) + "".join(map(_size, sizes["rows"]))


def _row(row: dict[str, Any], on_gpu: dict[str, Any]) -> str:
    share = f"{row['pct_4bit']} %" if "pct_4bit" in row else ""
    graphs = " / ".join(map(str, row.get("graphs", ())))
    cells = [row["name"], f"`{row['class']}`", row["whole"], row["regional"], share, graphs, _errors(row), _gpu(on_gpu)]
    return _line(*cells, row["note"])


def _gpu(row: dict[str, Any]) -> str:
    """The errors there, or what went wrong."""
    wrong = {row[way] for way in ("whole", "regional") if row.get(way, "ok") != "ok"}
    return "; ".join([*sorted(wrong), _errors(row)]) if wrong else _errors(row)


def _errors(row: dict[str, Any]) -> str:
    off = f" ({max(row['inductor_err']):.2f})" if "inductor_err" in row else ""
    return " / ".join(f"{error:.3f}" for error in row.get("rel_err", ())) + off


def _size(row: dict[str, Any]) -> str:
    gib = [f"{row[key]:.2f}" for key in ("gib_16bit", "gib_predicted", "gib")]
    return _line(row["model"], f"`{row['class']}`", *gib, row["layers"], f"{row['rel_err']:.3f}")


def _line(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |\n"


def found() -> tuple[dict[str, Any], ...]:
    """What `page` is made of."""
    files = ("zoo.json", "zoo-h200.json", "real-sizes-h200.json")
    return tuple(json.loads((RESULTS / name).read_text()) for name in files)


if __name__ == "__main__":
    PAGE.write_text(page(*found()))
    print(f"wrote {PAGE}")
