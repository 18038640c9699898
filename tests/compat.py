"""Every torch that pyproject.toml allows, with its own Triton: set up in build/compat, tested, written down.

    python tests/compat.py                 `make compat`: each kernel compiled once and then all of the kernels' tests
                                           with each Triton over the torch of .venv, the whole suite where PAIRS says
                                           so. 15 GB on disk, hours on two cores
    python tests/compat.py --only 3.8.0    the same for one Triton; other rows of the table stay
    python tests/compat.py --quick         in `make test`: each kernel compiled once by each Triton that .venv has not

A Triton lies in a folder of its own, ahead of .venv on the path, so one torch serves them all. Results go to
docs/compat.json, and from there to docs/compat.md. The interpreter's tests of a file count as one.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "compat"
RESULTS = ROOT / "docs" / "compat.json"
PAGE = ROOT / "docs" / "compat.md"

KERNELS, WHOLE, QUICK = "kernels' tests", "whole suite", "each kernel compiled once"


class Pair(NamedTuple):
    """A torch and the Triton that it brings.

    whole   whether the whole suite runs with both, or only the kernels' tests with the Triton
    beside  what else is installed with the Triton, for a reason that the page's notes give
    """

    torch: str
    triton: str
    whole: bool = False
    beside: tuple[str, ...] = ()


PAIRS = (
    Pair("2.11.0", "3.6.0", beside=("numpy==2.3.5",)),
    Pair("2.12.0", "3.7.0", whole=True),
    Pair("2.13.0", "3.7.1"),
    Pair("2.14.1", "3.8.0", whole=True),
    Pair("2.13.0", "3.9.0"),
)

NOTES = """\
- Triton 3.6.0's interpreter fails under NumPy 2.4, so its row has NumPy 2.3. Compiled kernels do not use NumPy, and the
  package has no bound.
- Triton before 3.7.1 lacks a fence that nvfp4 on sm_100 needs: without it the kernel copies and multiplies in turns,
  correct and slow. sm_121 needs Triton 3.8 for nvfp4. `kernels/portable/gemm_nvfp4.py` decides both.
- A kernel that another Triton cannot import or compile is left out with one warning that names it, and the next in its
  table runs. Without any Triton that can be imported the reference runs, and a warning says why.
- Of the whole suite with torch 2.14.1 one test failed: with Triton 3.8 a kernel spills three registers on RDNA 3, which
  its test allows by now.
- Of the whole suite with torch 2.12.0 eight failed. Two are mended: a bound on registers that spill on RDNA 3, and a
  tile that changed during the run. Two are of torch 2.12's FlexAttention for CPUs, which refuses q, k and v that lie in
  one buffer, as ours do. Two are of FLUX's context parallelism, one of an embedding on the meta device, one of
  bench/small_memory.py: why is not known yet.
- Where kernels' tests failed it was by sm_110, which Triton 3.6.0's assembler does not know (kernels are left out
  there, as the test says by now), by the same bound on RDNA 3, or by the tile that changed during the run.
- No GPU here: what kernels compile to is checked for sm_80 to sm_120, their numbers in Triton's interpreter.
"""


def main() -> int:
    """Run what is asked for; the exit status says whether all tests passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[pair.triton for pair in PAIRS], help="a Triton, repeatable")
    parser.add_argument("--quick", action="store_true", help="each kernel once, with the Tritons that .venv has not")
    parser.add_argument("--processes", default="2", help="that test at once, 2 by default")
    options = parser.parse_args()
    pairs = [pair for pair in PAIRS if not options.only or pair.triton in options.only]
    if options.quick:
        mine = importlib.metadata.version("triton")
        runs = [test(pair, QUICK, options.processes) for pair in pairs if pair.triton != mine]
    else:
        runs = [recorded(pair, what, options.processes) for what in (QUICK, KERNELS) for pair in pairs]
        runs += [recorded(pair, WHOLE, options.processes) for pair in pairs if pair.whole]
    return int(any(run["failed"] for run in runs))


def recorded(pair: Pair, what: str, processes: str) -> dict:
    """Like `test`, and the result goes into the files."""
    run = test(pair, what, processes)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[f"{pair.triton} {what}"] = run
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results))
    return run


def test(pair: Pair, what: str, processes: str) -> dict:
    """Some of the tests with this pair: which versions they ran with, and how they ended."""
    path = [install(f"triton-{pair.triton}", "--no-deps", f"triton=={pair.triton}", *pair.beside)]
    expected = {"triton": pair.triton}
    if what == WHOLE:
        path.append(install(f"torch-{pair.torch}", f"torch=={pair.torch}"))
        expected["torch"] = pair.torch
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    versions = imported_versions(environment)
    assert all(versions[name].split("+")[0] == version for name, version in expected.items()), versions
    print(f"\n{what} with " + ", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    report = FOLDER / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n", processes, f"--junitxml={report}", *selection(what)]
    begin = time.perf_counter()
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if status not in (0, 1):  # 1: tests failed
        raise SystemExit(f"pytest ended with {status}")
    minutes = round((time.perf_counter() - begin) / 60, 1)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    tests, failures, errors, skipped = (int(suite.attrib[k]) for k in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return {"versions": versions, "passed": tests - failed - skipped, "failed": failed, "skipped": skipped,
            "minutes": minutes, "date": date.today().isoformat()}  # fmt: skip


def selection(what: str) -> list[str]:
    """What pytest is told to run."""
    by_file = ["--dist", "loadfile"]
    if what == WHOLE:
        return by_file
    files = [f for f in sorted((ROOT / "tests").glob("test_*.py")) if re.search("kernel_t(esting|able)", f.read_text())]
    return [*(["-m", "builds", "--one-of-each"] if what == QUICK else by_file), *map(str, files)]


def install(name: str, *requirements: str) -> Path:
    """The folder with these packages, set up whole or not at all."""
    folder = FOLDER / name
    if not folder.exists():
        print(f"setting up {folder.relative_to(ROOT)}", flush=True)
        partial = FOLDER / f"{name}.partial"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        subprocess.run([*command, "--target", partial, *requirements], check=True)
        partial.rename(folder)
    return folder


def imported_versions(environment: dict[str, str]) -> dict[str, str]:
    """Of what Python imports there."""
    code = "import json, numpy, torch, triton; modules = torch, triton, numpy; "
    code += "print(json.dumps({module.__name__: module.__version__ for module in modules}))"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def page(results: dict[str, dict]) -> str:
    """docs/compat.md."""
    lines = ["# Which torch and Triton", "", "Written by `make compat`.", "",
             "| torch | its Triton | each kernel compiled once | kernels' tests | whole suite |",
             "|---|---|---|---|---|"]  # fmt: skip
    for pair in PAIRS:
        cells = [cell(results.get(f"{pair.triton} {what}")) for what in (QUICK, KERNELS, WHOLE)]
        lines.append(f"| {pair.torch} | {pair.triton} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", NOTES])


def cell(run: dict | None) -> str:
    """How a run ended, and with what."""
    if run is None:
        return "not run"
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "numpy"))
    skipped = f", {run['skipped']} skipped" if run["skipped"] else ""
    return f"{run['passed']} passed, {run['failed']} failed{skipped} ({versions}; {run['date']})"


if __name__ == "__main__":
    sys.exit(main())
