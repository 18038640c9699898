"""Build the source distribution and the wheel from it, install that into an empty environment, and use it from there,
away from the checkout.

    python tools/try_wheel.py

What this finds: a file that MANIFEST.in forgets, a package that pyproject.toml does not list, an entry point that is
not found, a file that the program reads from beside its sources. torch and the other dependencies are lent by the
environment that runs this; of the program itself the new one has the wheel alone. Everything is in build/wheel.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel"
PACKAGES = {
    "svdq_compile": "svdq_compile",
    **{name: f"svdq_compile/{name}" for name in ("passes", "lowering", "kernels")},
}

USE = """
import sys, torch
from pathlib import Path
import svdq_compile as svdq

assert Path(svdq.__file__).is_relative_to(sys.prefix), f"{svdq.__file__} is not the wheel's"
assert "svdquant" in torch._dynamo.list_backends(), "torch does not list the backend"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU("tanh"), torch.nn.Linear(256, 128))
model = model.to(torch.bfloat16).requires_grad_(False)
x = torch.randn(2, 24, 128).to(torch.bfloat16)
exact = model(x)
options = {"progress": False, "calibration_steps": 1, "refine": 1, "rank": 16}
compiled = torch.compile(model, backend="svdquant", fullgraph=True, options=options)
errors = [float((compiled(x) - exact).norm() / exact.norm()) for _ in range(2)]
assert errors[0] == 0 and 0 < errors[1] < 0.2, errors
svdq.save(model, "tiny.svdq.safetensors")
print(f"torch.compile: {errors[1]:.3f} from 16-bit")
"""


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    wheel = build(unpacked_sdist())
    check_files(wheel)
    python = install(wheel)
    elsewhere = WORK / "elsewhere"
    elsewhere.mkdir()
    print(call(python, "-c", USE, cwd=elsewhere), end="")
    svdq = python.with_name("svdq")
    assert "quantize" in call(svdq, "--help", cwd=elsewhere)
    assert "w4a8" in call(svdq, "inspect", "tiny.svdq.safetensors", cwd=elsewhere)
    print(f"{wheel.name}: installs, compiles, and svdq runs")


def unpacked_sdist() -> Path:
    """The source distribution's folder, with all that a checkout has, made from a copy: setuptools would leave files of
    its own in the checkout and find them next time.
    """
    copy = WORK / "source"
    unwanted = (".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "demo.html", "*.bak")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*unwanted))
    sources = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()} - {Path(".gitignore")}
    make = f"from setuptools.build_meta import build_sdist; build_sdist({str(WORK)!r})"
    call(sys.executable, "-c", make, cwd=copy)
    (archive,) = WORK.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(WORK / "sdist", filter="data")
    (folder,) = (WORK / "sdist").iterdir()
    missing = sorted(str(path) for path in sources if not (folder / path).is_file())
    if missing:
        raise SystemExit(f"{archive.name} lacks {', '.join(missing[:20])}: is it in MANIFEST.in?")
    return folder


def build(sources: Path) -> Path:
    """The wheel."""
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
    call(sys.executable, "-m", "pip", "wheel", *quiet, "--no-build-isolation", "--wheel-dir", WORK, sources)
    (wheel,) = WORK.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """Whether every source is in it."""
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"{inside}/{path.relative_to(ROOT / name).as_posix()}"
        for name, inside in PACKAGES.items()
        for path in (ROOT / name).rglob("*.py")
    }
    missing = sorted(sources - held)
    if missing:
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}: is its package in pyproject.toml's list?")


def install(wheel: Path) -> Path:
    """-> the Python of a new environment that holds the wheel and borrows the rest."""
    empty = WORK / "empty"
    venv.create(empty, symlinks=True)
    python = empty / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (packages,) = empty.glob("lib/python*/site-packages")
    # Folders named in a .pth file lend their packages; their own .pth files, an editable install's, are not read.
    lent = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "lent.pth").write_text("\n".join(lent) + "\n")
    return python


def call(program: str | Path, *arguments: str | Path, cwd: Path = ROOT) -> str:
    """What a program prints; it fails loudly."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(part) for part in (program, *arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command[:6])}: failed\n{result.stdout}{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    main()
