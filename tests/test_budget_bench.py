"""bench/budget.py: one format for all and a target of the same bytes, in a tiny run."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import budget as bench
import quality

from svdq_compile import budget


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.demo, "CALIBRATION_STEPS", 1)
    monkeypatch.setattr(bench, "OF_LAYERS", {"pictures": 1, "steps": 2, "refine": 0})
    monkeypatch.setattr(bench, "CALLS", 1)
    monkeypatch.setattr(budget, "RANKS", (0,))
    monkeypatch.setattr(budget, "MAX_REPLAYS", 1)
    monkeypatch.setattr(budget, "EIGHT_BIT_RANKS", (0,))
    out = tmp_path / "budget.json"
    bench.main(["--layers", "--formats", "w4a8", "--sizes", "1.1", "--output", str(out)])
    result = json.loads(out.read_text())
    uniform, target = result["rows"]
    assert (uniform["recipe"], target["recipe"], target["size"]) == ("uniform", "target", 1.1)
    assert target["linear_bytes"] <= 1.1 * uniform["linear_bytes"]
    assert uniform["forms"].keys() == {"bfloat16 0", "w4a16 32", "w4a8 32"}
    assert "w8a8 0" in target["forms"]
    assert 0 < target["output_error"] < 0.9 * uniform["output_error"] < 0.1
    assert 0.5 < target["output_error"] / target["predicted"] < 2
