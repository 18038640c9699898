"""bench/flux_target.py: the default, and two targets for which is measured once, in a tiny run."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import flux_target as bench

from svdq_compile import budget


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "measured_groups", budget.measured_groups)  # which the script replaces
    monkeypatch.setattr(budget, "RANKS", (0,))
    monkeypatch.setattr(budget, "EIGHT_BIT_RANKS", (0,))
    monkeypatch.setattr(bench, "compiled_by_us", lambda model: model)  # eager is 4-bit too
    out = tmp_path / "target.json"
    bench.main(["--tiny", "--targets", "0.0022,0.003", "--repeats", "1", "--out", str(out)])
    default, small, large = json.loads(out.read_text())["rows"]
    assert default["forms"].keys() == {"bfloat16 0", "w4a16 32", "w4a8 32"}
    assert small["target_bytes"] == int(0.0022 * 2**30)
    assert small["linears_gib"] <= 0.0022 < large["linears_gib"] <= 0.003
    assert small["measure_s"] > large["measure_s"] == 0
    for key in ("rel_err", "other_rel_err"):
        assert 0 < large[key] < small[key]
    assert 0.4 < small["rel_err"] / small["predicted"] < 2.5
