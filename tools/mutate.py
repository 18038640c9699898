"""Break passes/ and lowering/ one place at a time, and see whether a test notices.

    python tools/mutate.py fusing          one of GROUPS; about 1500 mutants, an hour on two cores, minutes on sixteen
    python tools/mutate.py fusing --processes 8

The mutants are mutmut's (https://github.com/boxed/mutmut), which is not in requirements-dev.txt: `pip install mutmut`.
It wants one package in one folder, so the sources and tests are copied to build/mutants/<group>. Survivors go to
survivors.txt there, each as a patch.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What is broken, and the tests that should notice.
GROUPS = {
    "fusing": (
        ["passes/fuse_*", "passes/regions.py", "passes/vocabulary.py", "passes/measure_rows.py", "passes/merge_*",
         "passes/written_pairs.py", "passes/join_parts.py", "passes/replace_attention.py", "passes/share_*"],
        ["test_fusion", "test_heads", "test_siblings", "test_joins", "test_vocabulary", "test_attention", "test_passes",
         "test_row_moments"],
    ),
    "finding": (
        ["passes/linears.py", "passes/scope.py", "passes/fold_adapters.py", "passes/quantize_linears.py",
         "passes/subgraphs.py", "passes/weight_groups.py", "passes/observe_linears.py", "passes/drop_*",
         "passes/peft_names.py", "passes/activations.py", "passes/pipeline.py", "passes/__init__.py"],
        ["test_passes", "test_lora", "test_lora_formats", "test_subgraphs", "test_backend", "test_ahead"],
    ),
    "regions": (
        ["lowering/region.py", "lowering/generate*", "lowering/heads.py", "lowering/fused.py", "lowering/join.py",
         "lowering/reference.py"],
        ["test_region", "test_heads", "test_joins", "test_fusion", "test_ops"],
    ),
    "launching": (
        ["lowering/launch.py", "lowering/kernel_table.py", "lowering/ops.py", "lowering/packed.py",
         "lowering/replay.py", "lowering/inductor.py", "lowering/torch_private.py"],
        ["test_launch", "test_kernel_table", "test_ops", "test_replay", "test_attention", "test_weights", "test_layout",
         "test_threads", "test_siblings"],
    ),
}  # fmt: skip


def main() -> int:
    """Set up, run, write down; exit status 1 if a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    folder = set_up(options.group)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    run = [sys.executable, "-m", "mutmut", "run", "--max-children", str(options.processes)]
    subprocess.run(run, cwd=folder, env=environment, check=True)
    survivors = names_of(folder, "survived", "no tests", "timeout", "suspicious", "segfault")
    with ThreadPoolExecutor(options.processes) as pool:
        (folder / "survivors.txt").write_text("".join(pool.map(lambda name: patch(folder, name), survivors)))
    print(f"{len(survivors)} survivors: {folder / 'survivors.txt'}")
    return int(bool(survivors))


def set_up(group: str) -> Path:
    """A folder with the four source folders as one package, as they are installed, and the tests."""
    folder = ROOT / "build" / "mutants" / group
    package = folder / "svdq_compile"
    shutil.rmtree(folder, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (ROOT / "svdq_compile").glob("*.py"):
        shutil.copy(source, package)
    without_caches = shutil.ignore_patterns("__pycache__")
    for name in ("passes", "lowering", "kernels"):
        shutil.copytree(ROOT / name, package / name, ignore=without_caches)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=without_caches)
    broken, tests = GROUPS[group]
    settings = {
        "source_paths": ["svdq_compile"],
        "only_mutate": [f"svdq_compile/{path}" for path in broken],
        "also_copy": ["tests"],
        "pytest_add_cli_args": ["-q", "-x", "-p", "no:cacheprovider"],
        "pytest_add_cli_args_test_selection": [f"tests/{name}.py" for name in tests],
    }
    lines = ["", "[tool.mutmut]", *(f"{name} = {value}" for name, value in settings.items()), ""]
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "\n".join(lines))
    return folder


def names_of(folder: Path, *ends: str) -> list[str]:
    """The mutants that ended so."""
    results = [sys.executable, "-m", "mutmut", "results"]
    lines = subprocess.run(results, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = (line.strip().rsplit(": ", 1) for line in lines if ": " in line)
    return [name for name, end in pairs if end in ends]


def patch(folder: Path, name: str) -> str:
    """What a mutant changes."""
    show = [sys.executable, "-m", "mutmut", "show", name]
    return subprocess.run(show, cwd=folder, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
