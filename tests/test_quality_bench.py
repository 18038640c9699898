"""bench/quality.py: its measures, what it calibrates on, and one row of a tiny run."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import quality

from svdq_compile import quantizer
from svdq_compile.config import Config
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.kernels.formats import w4a8
from svdq_compile.lowering.launch import round_weight


def test_measures() -> None:
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quality.psnr(pictures + 0.1, pictures), torch.full((3,), 20.0))
    torch.testing.assert_close(quality.ssim(pictures, pictures), torch.ones(3))
    assert (quality.ssim(pictures.flip(3), pictures) < 0.2).all()
    assert quality.interval(torch.tensor([1.0, 3.0, 1.0, 3.0])) == pytest.approx(1.96 * (4 / 3) ** 0.5 / 2)


def test_nothing_that_is_shown_calibrates() -> None:
    todo = quality.job(256, 16, "cpu")
    assert len(set(todo.shown)) == 256
    assert len(todo.calibration) == 4
    assert not set(todo.shown) & set(todo.calibration)


def test_earlier_codes() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    before, now = (round_("w4a8", w, None) for round_ in (quality.symmetric_codes, round_weight))
    smallest = [int((w4a8.expand_weight(*t[:2]) // t[1].repeat_interleave(64, 1)).min()) for t, _ in (before, now)]
    assert smallest == [-7, -8]
    losses = [float((rounded - w).square().mean()) for _, rounded in (before, now)]
    assert 0.85 < losses[1] / losses[0] < 0.95


def test_the_papers_search_moves_outliers_into_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 128, generator=generator) / 11, torch.randn(200, 128, generator=generator)
    x[:, 3] *= 50
    known = InputStatistics()
    known.observe(x)
    smooth = quality.searched_smoothing([w], known, "int4", Config("int4", rank=16))
    assert smooth[3] > 3 * smooth.median()
    with quality.changed(quality.RECIPES["svdquant"]):
        config = Config("int4", rank=16, rotate=False)
        shared = quantizer.quantize_group([w], ["layer"], "int4", config, known)[0].packed.shared
    assert torch.equal(shared.smooth, smooth)
    assert not shared.rotate


def test_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.demo, "CALIBRATION_STEPS", 1)
    monkeypatch.setitem(quality.RECIPES, "all", quality.Recipe({"refine": 1}))
    monkeypatch.setattr(quality, "LAYER_PICTURES", 1)
    out = tmp_path / "quality.json"
    of_peers = {"layer": "a", "format": "nvfp4", "recipe": "peers", "rank": 32, "ours": 0.1, "modelopt": 0.2}
    out.write_text(json.dumps({"layers": [of_peers, of_peers | {"recipe": "all"}]}))
    run = ["--pictures", "1", "--steps", "1", "--formats", "w4a8", "--recipes", "rtn,all", "--output", str(out)]
    quality.main(run)
    result = json.loads(out.read_text())
    assert result.keys() == {"device", "torch", "triton", "command", "date", "rows", "layers"}
    assert [(row["recipe"], row["rank"]) for row in result["rows"]] == [("rtn", 0), ("all", 32)]
    assert all(20 < row["psnr_db"] < 80 and row["bytes"] > 1e6 for row in result["rows"])
    assert result["layers"].pop() == of_peers
    errors = {(row["layer"], row["recipe"]): row["ours"] for row in result["layers"]}
    assert ("a", "all") not in errors, "of an earlier run"
    assert 0 < errors["transformer_blocks.0.ff.net.2", "all"] < errors["transformer_blocks.0.ff.net.2", "rtn"] < 0.2


def test_unknown_recipe(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--recipes", "best"])
    assert "no recipe best; there are rtn, smooth" in capsys.readouterr().err
