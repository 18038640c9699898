"""bench/convolutions.py in a tiny run: bytes and errors, in the order that they must have."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import convolutions as bench


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {name: dataclasses.replace(model, config=model.tiny_config) for name, model in bench.MODELS.items()}
    monkeypatch.setattr(bench, "MODELS", tiny)
    monkeypatch.setattr(bench, "RANKS", (0, 4))
    bench.main(["--steps", "1", "--out", str(tmp_path / "rows.json")])
    *sizes, plain, branched, whole = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["model"] for row in sizes] == ["sd1.5", "sdxl"]
    for row in sizes:
        assert row["16-bit"] > row["linears"] > 1.3 * row["linears and convolutions"]
    assert (plain["rank"], branched["rank"]) == (0, 4)
    assert branched["bytes"] > plain["bytes"]
    assert 0 < branched["error_observed"] < plain["error_observed"] < 0.9 * plain["error_alone"] < 0.1
    assert 0 < whole["error_observed"] < whole["error_alone"]
