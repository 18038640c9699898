"""docs/quality.md's tables and plots are what bench/results/ gives (bench/quality_page.py)."""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import quality_page  # noqa: E402


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / "quality.json").read_text())


@pytest.fixture(scope="module")
def of_peers() -> dict[str, Any]:
    return json.loads((ROOT / "bench" / "results" / "peers.json").read_text())


@pytest.mark.parametrize("name", ["quality.md", *quality_page.PLOTS])
def test_the_page_is_up_to_date(results: dict[str, Any], of_peers: dict[str, Any], name: str) -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    expected = quality_page.made(results, of_peers, page)[name]
    assert (ROOT / "docs" / name).read_text() == expected, "run python bench/quality_page.py"


def test_modelopts_layers_are_in_both_results(results: dict[str, Any], of_peers: dict[str, Any]) -> None:
    found = [(one["layer"], one["ours"], one["modelopt"]) for one in results["layers"] if one["recipe"] == "peers"]
    assert found == [(one["layer"], one["ours-nvfp4"], one["modelopt"]) for one in of_peers["layers"]], (
        "run python bench/peers.py"
    )


def test_only_what_is_between_the_markers_is_replaced(results: dict[str, Any], of_peers: dict[str, Any]) -> None:
    before = "before\n<!-- table: quality -->\nold\n<!-- end -->\nafter\n"
    page = quality_page.made(results, of_peers, before)["quality.md"]
    assert page.startswith("before\n<!-- table: quality -->\n| format |")
    assert page.endswith("<!-- end -->\nafter\n")
    assert "old" not in page.split()
    assert page.count("\n| `") == len(results["rows"])
    assert all(f"]({name})" in page for name in quality_page.PLOTS)


def row(recipe: str, rank: int, psnr: float, **more: float) -> dict[str, Any]:
    own = {"format": "int4", "recipe": recipe, "rank": rank, "psnr_db": psnr, "ci95_db": 0.5, "ssim": 0.9}
    return own | {"bytes": 2**20 * (10 + rank)} | more


def layer(name: str, recipe: str, rank: int, error: float) -> dict[str, Any]:
    return {"layer": name, "format": "int4", "recipe": recipe, "rank": rank, "ours": error}


EXAMPLE = {
    "rows": [
        row("today", 16, 27.0),
        row("all", 16, 28.0, gain_db=1.0, gain_ci95_db=0.25),
        row("all", 32, 29.0),
        row("rtn", 0, 24.0),
    ],
    "layers": [
        *(layer(name, "today", 16, 0.2) for name in "abc"),
        *(layer(name, "all", 16, error) for name, error in zip("abc", (0.1, 0.15, 0.3), strict=True)),
        *(layer(name, "rtn", 0, 0.4) for name in "abc"),
    ],
}


def test_numbers() -> None:
    rows = quality_page.numbers(EXAMPLE).splitlines()[2:]
    assert rows[1] == "| `int4` | all | 16 | 28.00 ± 0.50 | +1.00 ± 0.25 | 0.9000 | - | 26.0 | 2 of 3 | -25.0 % |"
    assert rows[0].endswith("| - | 0.9000 | - | 26.0 | - | - |")
    assert rows[3].endswith("| 0 of 3 | +100.0 % |"), "what has no branch is held against the rank that there is"


def test_peers() -> None:
    ours = {"method": "ours", "format": "nvfp4", "bits": "4.5, 4.5", "bytes_per_weight": 0.6, "layers": 4}
    ours |= {"median_rel_err": 0.02, "p90": 0.04}
    other = ours | {"method": "other", "median_rel_err": 0.03, "against": "ours", "share_ours_at_or_below": 0.5}
    errors = {"a": (0.01, 0.02), "b": (0.0201, 0.02), "c": (0.03, 0.02), "d": (0.02, None), "planted.0": (0.1, 0.2)}
    layers = [{"layer": name, "ours": own, "other": theirs} for name, (own, theirs) in errors.items()]
    lines = quality_page.peers({"rows": [ours, other], "layers": layers}).splitlines()[2:]
    assert lines[0] == "| `ours` | nvfp4 | 4.5, 4.5 | 0.60 | 2.00 % | 4.00 % | 10.00 % | - | - |"
    assert lines[1] == "| `other` | nvfp4 | 4.5, 4.5 | 0.60 | 3.00 % | 4.00 % | 20.00 % | `ours` | 2, 1, 1 |"


def test_plots_hold_every_row() -> None:
    svg = "{http://www.w3.org/2000/svg}"
    found = {name: ET.fromstring(plot(EXAMPLE)) for name, plot in quality_page.PLOTS.items()}
    assert len(found["quality-gain.svg"].findall(f"{svg}circle")) == 1
    assert len(found["quality-bytes.svg"].findall(f"{svg}circle")) == 4
    (joined,) = found["quality-bytes.svg"].findall(f"{svg}polyline")
    places = [tuple(map(float, point.split(","))) for point in joined.attrib["points"].split()]
    assert places[0][0] < places[1][0], "the larger rank is larger"
    assert places[0][1] > places[1][1], "and better, which is up"
    assert len(found["quality-layers.svg"].findall(f"{svg}polyline")) == 2


def test_ticks_are_round() -> None:
    assert quality_page.Scale(24.1, 33.9, 0, 1).ticks() == [26, 28, 30, 32]
    assert quality_page.Scale(-0.35, 0.9, 0, 1).ticks() == pytest.approx([-0.2, 0, 0.2, 0.4, 0.6, 0.8])
