"""Where and how a number was measured, for the JSON files under bench/results/."""

import datetime
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Device, versions, command and date."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "command": " ".join(["python", *_without_out(sys.argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _without_out(arguments: list[str]) -> list[str]:
    """Where the file was written is no part of how it was measured."""
    at = next((i for i, a in enumerate(arguments) if a in ("--out", "--output")), len(arguments))
    return arguments[:at] + arguments[at + 2 :]


def results(kind: str) -> Path:
    """The file for what is measured on this machine: gemm-h200.json."""
    card = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0] if torch.cuda.is_available() else "cpu"
    return RESULTS / f"{kind}-{card.lower()}.json"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows and where they come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environment() | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")
