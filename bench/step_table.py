"""The results of bench/flux_step.py as markdown tables, printed or put between a document's markers.

<!-- table: steps -->
anything here is replaced
<!-- end -->
"""

import json
import re
from pathlib import Path
from typing import Any

from step_models import MODELS

Row = dict[str, Any]
PEERS = ("compile", "torchao-fp8", "sdnq-int4-svd")  # the ratios that are shown, over rows of the same run
GATHERED = ("attention", "gemm", "quantize", "gemv", "norms/pointwise", "copies", "other")


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def cell(value: Any, form: str = "") -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)


def by_model(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def steps(rows: list[Row]) -> str:
    head = ["method", "ms a step", *(f"x {peer}" for peer in PEERS), "resident GiB", "peak GiB", "first step, s"]
    head += ["in a second process, s", "loaded, s", "rel. error", "kernels", "host ms"]
    parts = []
    for model, own in by_model(rows).items():
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
        parts.append(f"{title} ({devices}):\n\n{table(head, lines)}")
    return "\n\n".join(parts)


def fusions(rows: list[Row]) -> str:
    """What each pass is worth: our step without it, over our step of the same run."""
    parts = []
    for model, own in by_model(rows).items():
        without = [
            row for row in own if "ours" in row.get("x", {}) and row["method"].startswith(("ours-un", "ours-wi"))
        ]
        lines = [
            [r["method"], cell(r["ms"], ".1f"), cell(1 / r["x"]["ours"], ".3f"), str(r["kernels"])] for r in without
        ]
        if lines:
            parts.append(f"{model}:\n\n{table(['method', 'ms a step', 'times as long', 'kernels'], lines)}")
    return "\n\n".join(parts)


def profile(rows: list[Row]) -> str:
    """Where a step's time goes, by kind of kernel, one column a profiled method; then the first model's longest."""
    parts = []
    for model, own in by_model(rows).items():
        profiled = [row for row in own if row.get("profile")]
        if not profiled:
            continue
        groups = [{g["group"]: g for g in row["profile"]["groups"]} for row in profiled]
        lines = [[name, *(_group(found.get(name)) for found in groups)] for name in GATHERED]
        lines.append(["all", *(f"{row['profile']['total_ms']:.1f} ms" for row in profiled)])
        parts.append(f"{model}:\n\n" + table(["kernels", *(row["method"] for row in profiled)], lines))
        for row in profiled if model == rows[0]["model"] else ():
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
    for model, own in by_model(rows).items():
        counted = [row for row in own if row.get("profile", {}).get("block_kernels")]
        if not counted:
            continue
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
        filled = f"<!-- table: {name} -->\n{make(rows)}\n<!-- end -->"
        text = re.sub(
            rf"<!-- table: {name} -->\n.*?<!-- end -->", lambda match, filled=filled: filled, text, flags=re.S
        )
    document.write_text(text)
