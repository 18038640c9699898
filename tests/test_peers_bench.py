"""bench/peers.py: what is fitted and what is shown, its counts, and a run of our own methods on one layer."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import peers
import quality


def group(names: str) -> peers.Group:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(32, 64, generator=generator).bfloat16() for _ in names]
    x = torch.randn(3, 16, 64, generator=generator).bfloat16()
    return peers.Group(list(names), weights, [x[0], x[1]], x[2])


def off_by(share: float) -> peers.Method:
    """A method whose outputs are so much too large, in a byte a weight."""

    def run(group: peers.Group) -> list[peers.Result]:
        outputs = [(group.shown.float() @ w.float().t()) * (1 + share) for w in group.weights]
        return [peers.Result(y, w.numel()) for y, w in zip(outputs, group.weights, strict=True)]

    return peers.Method(run, "int8", "8, 16")


def test_errors_of_each_layer() -> None:
    layers, bytes_per_weight = peers.measure([group("ab"), group("c")], {"near": off_by(0.01), "far": off_by(-0.5)})
    assert layers == [{"layer": name, "near": 0.01, "far": 0.5} for name in "abc"]
    assert bytes_per_weight == {"near": 1.0, "far": 1.0}


def test_what_stays_in_16_bits_is_not_counted() -> None:
    def nothing(model: nn.Module, calls: object) -> float:
        return peers.held(model)

    methods = {"near": off_by(0.01), "idle": peers.Method(peers.alone(nothing), "bf16", "16, 16", "near")}
    layers, bytes_per_weight = peers.measure([group("a")], methods)
    assert layers == [{"layer": "a", "near": 0.01, "idle": None}]
    assert bytes_per_weight == {"near": 1.0}
    assert peers.pairs(layers, "near", "idle") == []
    assert [row["method"] for row in peers.summary(layers, methods, bytes_per_weight)] == ["near"]


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="broken gives numbers that are not finite for a"):
        peers.measure([group("a")], {"broken": off_by(float("nan"))})


def test_shares() -> None:
    methods = {"ours": off_by(0), "other": peers.Method(off_by(0).run, "fp8", "8, 8", "ours")}
    errors = {"a": (0.1, 0.2), "b": (0.2, 0.2), "c": (0.3, 0.2), "d": (0.4, None), "e": (0.1, 0.4)}
    layers = [{"layer": name, "ours": own, "other": theirs} for name, (own, theirs) in errors.items()]
    own, other = peers.summary(layers, methods, {"ours": 0.5, "other": 1.0})
    assert "against" not in own
    assert (other["layers"], other["median_rel_err"], other["p90"]) == (4, 0.2, pytest.approx(0.34))
    assert (other["against"], other["share_ours_at_or_below"]) == ("ours", 0.75)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    absent = peers.Method(off_by(0).run, "fp8", "8, 8", "ours", ("not_there.quantization", "not-there"))
    monkeypatch.setattr(peers, "METHODS", {"ours": off_by(0), "absent": absent})
    assert list(peers.present()) == ["ours"]
    assert capsys.readouterr().out == "absent is left out, there is no not_there: pip install not-there\n"


def test_the_demos_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.demo, "CALIBRATION_STEPS", 2)
    monkeypatch.setattr(quality, "LAYER_PICTURES", 1)
    with torch.no_grad():
        groups = {tuple(group.names): group for group in peers.demo_groups(quality.job(8, 1, "cpu"))}
    assert sum(map(len, groups)) == 83, "those with few rows are no part of it"
    together = groups[tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv")]
    assert [weight.shape for weight in together.weights] == [(256, 256)] * 3
    assert [call.shape for call in together.calls] == [(512, 256)] * 2
    known, shown = torch.cat(list(together.calls)), together.shown
    assert shown.shape == (64, 256)
    assert not any((known == row).all(1).any() for row in shown), "what is shown has fitted nothing"


def test_a_run_of_our_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_others = {"layer": "x", "format": "w4a8", "recipe": "all", "rank": 32, "ours": 0.1, "modelopt": None}
    (tmp_path / "quality.json").write_text(json.dumps({"rows": [1], "layers": [of_others]}))
    ours = {name: method for name, method in peers.METHODS.items() if method.package is None}
    like_modelopt = peers.Method(ours["ours-int4"].run, "int4", "4.25, 4.25", "ours-nvfp4")
    monkeypatch.setattr(peers, "METHODS", ours | {"modelopt": like_modelopt})
    monkeypatch.setattr(peers, "demo_groups", lambda todo: [])
    monkeypatch.setattr(peers, "PLANTED", 1)
    for _ in range(2):  # layers of an earlier run are replaced
        peers.main(["--output", str(tmp_path / "peers.json"), "--quality", str(tmp_path / "quality.json")])
    result = json.loads((tmp_path / "peers.json").read_text())
    assert result.keys() == {"device", "torch", "triton", "command", "date", "versions", "rows", "layers"}
    (layer,) = result["layers"]
    assert 0.02 < layer["ours-w4a8"] < layer["ours-nvfp4"] < layer["ours-int4"] < 0.06
    own, w4a8, *_ = result["rows"]
    branch = 32 * 2 * (1 / 384 + 1 / 512)
    assert own["bytes_per_weight"] == pytest.approx(4.5 / 8 + branch, abs=0.015)  # smoothing factors, fp32
    assert w4a8["bytes_per_weight"] == pytest.approx((4 + 8 / 64) / 8 + branch, abs=0.03)
    merged = json.loads((tmp_path / "quality.json").read_text())
    own = {"layer": "planted.0", "format": "nvfp4", "recipe": "peers", "rank": 32, "ours": layer["ours-nvfp4"]}
    assert merged == {"rows": [1], "layers": [of_others, own | {"modelopt": layer["ours-int4"]}]}
