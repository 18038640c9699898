"""Which tile a GEMM takes, by classes of rows, without a GPU."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

tuning = pytest.importorskip("svdq_compile.kernels.runtime.tuning")
DEVICE = torch.device("cuda")
LAYER = (3072, 3072)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The candidates of each measurement; the last of them is the fastest, and nothing is known before."""
    asked: list[Sequence[str]] = []

    def measure(candidates: Sequence[str], run: object) -> int:
        asked.append(candidates)
        return len(candidates) - 1

    known: dict[str, Any] = {}
    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr(tuning, "_may_measure", lambda: True)
    monkeypatch.setattr(tuning, "_known", lambda device: known)
    monkeypatch.setattr(tuning, "_remember", lambda device, key, index: known.__setitem__(key, index))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_tiles", {})
    return asked


def tile(rows: int, layer: tuple[int, int] = LAYER) -> str:
    candidates = ("small", "narrow") if rows <= 1024 else ("large", "wide")
    return tuning.choose_tile("gemm", rows, layer, candidates, lambda tile: None, DEVICE)


def test_a_third_class_takes_the_nearest_tile(measured: list) -> None:
    assert [tile(512), tile(4096)] == ["narrow", "wide"]
    assert len(measured) == 2
    assert [tile(500), tile(4000), tile(128), tile(1024), tile(2048), tile(8192)] == [
        "narrow", "wide", "narrow", "narrow", "wide", "wide",
    ]  # fmt: skip
    assert len(measured) == 2
    assert tile(512, (9216, 3072)) == "narrow"
    assert len(measured) == 3, "another layer"


@pytest.mark.parametrize("rows", [64, 2048, 4096, 100_000])
def test_a_far_class_is_measured(rows: int, measured: list) -> None:
    """So is one whose candidates are others: small pictures first must not slow large ones down."""
    assert [tile(512), tile(1024)] == ["narrow", "narrow"]
    assert tile(rows) == ("wide" if rows > 1024 else "narrow")
    assert len(measured) == 3


def test_what_an_earlier_process_measured_counts(measured: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (512, 1024, 4096):
        tuning._tiles.clear()
        tile(rows)
    monkeypatch.setattr(tuning, "_chosen", {})
    tuning._tiles.clear()
    assert [tile(512), tile(1024), tile(4096)] == ["narrow", "narrow", "wide"]
    assert len(measured) == 3


def test_a_guess_is_not_kept(measured: list, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_may_measure", lambda: False)
        assert [tile(512), tile(4096), tile(64)] == ["small", "large", "small"]
    assert [tile(512), tile(4096)] == ["narrow", "wide"]
    assert len(measured) == 2


def test_tiles_do_not_use_up_the_time_of_whole_ways(measured: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_spent", tuning.SECONDS)
    assert tile(512) == "small", "a guess"
    rows = tuning.choose("attention", (512,), ("exact", "flash"), lambda row: None, DEVICE, limited=False)
    assert (rows, len(measured)) == ("flash", 1)
    own = tuning.choose_tile("attention_int8", 512, LAYER, ("a", "b"), lambda tile: None, DEVICE, limited=False)
    assert (own, len(measured)) == ("b", 2), "tiles of a whole way are measured with it"
    assert tuning._spent == tuning.SECONDS


def test_threads_that_ask_at_once_get_one_answer(measured: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a later one's measurement would replace what others run by now, and a result change its rounding."""
    all_have_asked = threading.Barrier(4)
    answer = tuning._answer
    first = threading.local()

    def asked(*question: Any) -> int | None:
        known = answer(*question)
        if not hasattr(first, "has_asked"):
            first.has_asked = True
            all_have_asked.wait(timeout=60)
        return known

    monkeypatch.setattr(tuning, "_answer", asked)
    monkeypatch.setattr(tuning, "_measure", lambda candidates, run: measured.append(candidates) or len(measured) % 2)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda _: tuning.choose("attention", (8,), ("a", "b"), print, DEVICE), range(4)))
    assert (rows, len(measured)) == (["b"] * 4, 1)
