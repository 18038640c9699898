"""Run every model of the zoo, whole and by its blocks, each in a process of its own, and write a row for each.

    python -m tests.zoo.sweep --out bench/results/zoo.json                             # CPU, without Inductor
    python -m tests.zoo.sweep --device cuda --processes 15 --out bench/results/zoo-h200.json

On a CPU: w4a8 in bfloat16 and two sizes, int4 in float16 and one; the rewritten graphs run as they are, unless asked
for --inductor. On a GPU: w4a8 in bfloat16, through Inductor and the real kernels. The file is written after each model,
so a run that is cut has its rows.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = "ROW "


def main() -> int:
    options = _options()
    if options.row is not None:
        print(MARK + json.dumps(row(options.row, options)), flush=True)
        return 0
    from . import ZOO

    names = _chosen(options)
    start, rows = time.monotonic(), _rows_of(options.out)
    with ThreadPoolExecutor(options.processes) as pool:
        waiting = {pool.submit(run_alone, name, options, start): name for name in names}
        for count, done in enumerate(as_completed(waiting), start=1):
            name = waiting[done]
            rows[name] = done.result()
            _write(options.out, [rows[name] for name in ZOO if name in rows])
            print(f"{count}/{len(names)} {time.monotonic() - start:.0f} s  {_line(name, rows[name])}", flush=True)
    wrong = [name for name in names if not is_right(rows[name])]
    print(f"{len(names) - len(wrong)} of {len(names)} are right" + "".join(f"\n  {name}" for name in wrong))
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/zoo.json")
    parser.add_argument("--seconds", type=float, default=5000.0, help="for all of them; what is left then is not run")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one model")
    parser.add_argument("--only", nargs="*", help="names of models; rows of others stay in the file")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three parts of the models")
    parser.add_argument("--sizes", type=int, default=2, choices=[1, 2])
    parser.add_argument("--inductor", action="store_true", help="on a CPU too, where it takes minutes for a model")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[str]:
    """Names to run, those with many convolutions first, which take the longest."""
    from . import ZOO

    part, parts = map(int, options.part.split("/"))
    names = (options.only or list(ZOO))[part - 1 :: parts]
    return sorted(names, key=lambda name: not ZOO[name].float32_on_cpu)


def _rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The rows that a file has already, by name."""
    return {row["name"]: row for row in json.loads(path.read_text())["classes"]} if path.exists() else {}


def run_alone(name: str, options: argparse.Namespace, start: float) -> dict[str, Any]:
    """The row of one model, whatever becomes of its process."""
    left = min(options.timeout, options.seconds - (time.monotonic() - start))
    if left <= 0:
        return failed(name, "not run: no time was left")
    command = [sys.executable, "-m", "tests.zoo.sweep", "--row", name, "--device", options.device]
    command += ["--inductor"] * options.inductor + ["--sizes", str(options.sizes)]
    # Each process has one core: no pool of compilers, no threads. Measuring tiles is not what is tested.
    alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "SVDQ_TUNE": "0", "SVDQ_VERIFY": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=alone | os.environ, capture_output=True, text=True, timeout=left, check=False
        )
    except subprocess.TimeoutExpired:
        return failed(name, f"no answer in {left:.0f} s")
    found = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(found[-1]) if found else failed(name, f"exit {done.returncode}: {done.stderr[-500:]}")


def failed(name: str, why: str) -> dict[str, Any]:
    """The row of a model whose process gave none."""
    from . import ZOO

    return {"name": name, "class": ZOO[name].title, "whole": why, "regional": why, "note": ZOO[name].note}


def is_right(row: dict[str, Any]) -> bool:
    return row["whole"] == row["regional"] == "ok"


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one model in every way.

    whole, regional  "ok", or what went wrong
    pct_4bit         of the linears' weights, whole
    graphs           how many parts Dynamo cuts the model into: whole, by blocks
    rel_err          of the output against 16 bits, w4a8: whole, by blocks
    layers           how many are quantized: whole, by blocks
    seconds          by the clock, and of a processor
    """
    import torch

    from . import ZOO
    from .check import ONE_SIZE, TWO_SIZES, Outcome, Way

    torch.set_num_threads(1)
    inductor = options.inductor or options.device != "cpu"
    start = time.monotonic()
    entry = ZOO[name]
    result: dict[str, Any] = {"name": name, "class": entry.title, "whole": "ok", "regional": "ok"}
    formats = [("w4a8", torch.bfloat16, TWO_SIZES if options.sizes == 2 else ONE_SIZE)]
    if options.device == "cpu":
        formats.append(("int4", torch.float16, ONE_SIZE))
    seen: dict[tuple[bool, str], Outcome] = {}
    for precision, dtype, calls in formats:
        for regional in (False, True):
            way = Way(regional, precision, dtype, calls, options.device, inductor)
            key = "regional" if regional else "whole"
            outcome, why = _attempt(name, way)
            if outcome is not None:
                seen[regional, precision] = outcome
            elif result[key] == "ok":
                result[key] = f"{precision}: {why}"
    both = [seen[regional, "w4a8"] for regional in (False, True) if (regional, "w4a8") in seen]
    if len(both) == 2 and both[0].layers != both[1].layers and result["regional"] == "ok":
        result["regional"] = _difference(both[0].layers, both[1].layers)
    if both:
        result |= {
            "pct_4bit": round(100 * both[0].bits4, 1),
            "graphs": [outcome.graphs for outcome in both],
            "rel_err": [round(outcome.error, 4) for outcome in both],
            "layers": [len(outcome.layers) for outcome in both],
            "worst_layer": [round(both[0].worst_layer[0], 4), both[0].worst_layer[1]],
        }
    seconds = [round(time.monotonic() - start, 1), round(time.process_time(), 1)]
    return result | {"seconds": seconds, "note": entry.note}


def _attempt(name: str, way: Any) -> tuple[Any, str]:
    """(outcome, "") or (None, what went wrong)."""
    from .check import check

    try:
        return check(name, way), ""
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {text[0][:300]} ({_where(error)})"


def _where(error: BaseException) -> str:
    """The last line of ours that the error came through."""
    places = list(_places(error))
    ours = [place for place in places if "svdq" in place or "/zoo/" in place] or places
    return ours[-1].rpartition("/")[2] if ours else "nowhere"


def _places(error: BaseException) -> Iterator[str]:
    trace = error.__traceback__
    while trace is not None:
        yield f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next


def _difference(whole: frozenset[str], regional: frozenset[str]) -> str:
    only = [sorted(whole - regional), sorted(regional - whole)]
    parts = [
        f"{len(names)} only {way} ({names[0]})"
        for way, names in zip(("whole", "by blocks"), only, strict=True)
        if names
    ]
    return "other layers: " + ", ".join(parts)


def _line(name: str, row: dict[str, Any]) -> str:
    if is_right(row):
        return (
            f"{name}: ok, {row['layers'][0]} layers, {row['pct_4bit']} %, error {row['rel_err']}, {row['seconds'][0]} s"
        )
    return f"{name}: whole: {row['whole']}; by blocks: {row['regional']}"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows so far, with where they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps(_environment(), indent=1).removesuffix("\n}")
    partial.write_text(f'{head},\n "classes": [\n{lines}\n ]\n}}\n')
    partial.replace(path)


def _environment() -> dict[str, Any]:
    import diffusers
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main())
