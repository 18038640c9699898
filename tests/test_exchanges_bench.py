"""bench/exchanges.py in a tiny run, as aten graphs: how often a rank sends."""

import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from fusion_testing import run_as_aten

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import exchanges as bench


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    run_as_aten(monkeypatch)
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(sys, "argv", ["exchanges.py", "--tiny", "--out", str(out)])
    try:
        bench.main()
    finally:
        dist.destroy_process_group()
    rows = json.loads(out.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["one GPU", "ulysses", "apart"]
    assert [row["exchanges"] / row["blocks"] for row in rows] == [0, 2, 4]
    assert all(row["ms"] > 0 and row["host_ms"] > 0 for row in rows)
