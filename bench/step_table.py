"""The results of bench/flux_step.py as markdown tables, printed or put between a document's markers.

<!-- table: steps -->
anything here is replaced
<!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_methods import LESS_FUSED
from step_models import MODELS

Row = dict[str, Any]
PEERS = ("compile", "torchao-fp8", "sdnq-int4-svd")  # the ratios that are shown, over rows of the same run
GATHERED = ("attention", "convolutions", "gemm", "quantize", "gemv", "norms/pointwise", "copies", "other")


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def cell(value: Any, form: str = "") -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)


def by_run(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of one model and one call each."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["run"]), []).append(row)
    return found


def _most(rows: list[Row], wanted: Callable[[Row], Any]) -> dict[str, list[Row]]:
    """Of each model the wanted rows of the call that has the most, if any has some."""
    found: dict[str, list[Row]] = {}
    for (model, _), own in by_run(rows).items():
        chosen = [row for row in own if wanted(row)]
        if len(chosen) > len(found.get(model, [])):
            found[model] = chosen
    return found


def steps(rows: list[Row]) -> str:
    head = ["method", "ms a step", *(f"x {peer}" for peer in PEERS), "resident GiB", "peak GiB", "first step, s"]
    head += ["in a second process, s", "loaded, s", "rel. error", "kernels", "host ms"]
    parts = []
    for (model, run), own in by_run(rows).items():
        lines = []
        for row in own:
            if "ms" not in row:
                problem = row.get("error", "no steps timed").replace("|", "/").replace("\n", " ")
                lines.append([row["method"], problem[:120], *["-"] * (len(head) - 2)])
                continue
            lines.append(
                [row["method"], cell(row["ms"], ".1f"), *(cell(row["x"].get(peer), ".2f") for peer in PEERS)]
                + [cell(row.get(key), ".2f") for key in ("resident_gib", "peak_gib")]
                + [cell(row.get(key), ".0f") for key in ("first_step_s", "warm_process_s", "loaded_process_s")]
                + [cell(row.get("rel_err"), ".3f"), cell(row.get("kernels")), cell(row.get("host_ms"), ".0f")]
            )
        title = MODELS[model].title if model in MODELS else model
        devices = ", ".join(sorted({row["device"] for row in own}))
        parts.append(f"{title} ({devices}, {run[:16]}):\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def fusions(rows: list[Row]) -> str:
    """What each pass is worth: our step without it, over our step of the same run."""
    parts = []
    for model, compared in _most(rows, lambda r: "ours" in r.get("x", {}) and r["method"] in LESS_FUSED).items():
        lines = [
            [row["method"], cell(row["ms"], ".1f"), cell(1 / row["x"]["ours"], ".3f"), cell(row["kernels"])]
            for row in compared
        ]
        parts.append(f"{model}:\n\n{table(['method', 'ms a step', 'times as long', 'kernels'], lines)}")
    return "\n\n".join(parts)


def profile(rows: list[Row]) -> str:
    """Where a step's time goes, by kind of kernel, a column for each profiled method; the first model's longest."""
    parts = []
    for model, profiled in _most(rows, lambda row: row.get("profile")).items():
        groups = [{g["group"]: g for g in row["profile"]["groups"]} for row in profiled]
        lines = [[name, *(_group(found.get(name)) for found in groups)] for name in GATHERED]
        lines.append(["all", *(f"{row['profile']['total_ms']:.1f} ms" for row in profiled)])
        parts.append(f"{model}:\n\n" + table(["kernels", *(row["method"] for row in profiled)], lines))
        for row in (row for row in profiled if model == rows[0]["model"] and row["method"] == "ours"):
            lines = [
                [f"`{k['kernel'][:70]}`".replace("|", "/"), k["group"], str(k["count"]), f"{k['ms']:.2f}"]
                + [f"{100 * k['share']:.1f} %"]
                for k in row["profile"]["kernels"][:12]
            ]
            head = ["kernel", "kind", "count", "ms", "share"]
            parts.append(f"{model}, {row['method']}, the longest:\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def _group(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    rate = f", {found['rate']:.{0 if found['unit'] == 'TFLOP/s' else 2}f} {found['unit']}" if "rate" in found else ""
    return f"{found['ms']:.1f} ms, {100 * found['share']:.0f} %, {found['count']} x{rate}"


def blocks(rows: list[Row]) -> str:
    """Kernels launched by one block of each kind."""
    parts = []
    for model, counted in _most(rows, lambda row: row.get("profile", {}).get("block_kernels")).items():
        names = list(counted[0]["profile"]["block_kernels"])
        lines = [[n, *(str(row["profile"]["block_kernels"].get(n, "-")) for row in counted)] for n in names]
        parts.append(f"{model}:\n\n" + table(["block", *(row["method"] for row in counted)], lines))
    return "\n\n".join(parts)


TABLES = {"steps": steps, "fusions": fusions, "profile": profile, "blocks": blocks}


def main(results: Path, document: Path) -> None:
    """Print all tables, or fill them into a document; '-' is the terminal."""
    rows = json.loads(results.read_text())["rows"]
    if str(document) == "-":
        print("\n\n".join(make(rows) for make in TABLES.values()))
        return
    text = document.read_text()
    for name, make in TABLES.items():
        text = filled(text, name, make(rows))
    document.write_text(text)


def filled(text: str, name: str, content: str) -> str:
    """A document with this between the markers of a table of this name, where it has some."""
    return re.sub(
        rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL
    )
