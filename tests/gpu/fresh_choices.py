"""What the tests of attention on a GPU share: nothing has been measured yet, and what is is forgotten afterwards."""

from collections.abc import Iterator

import pytest
import torch

from svdq_compile.kernels.runtime import tuning
from svdq_compile.lowering import kernel_table


@pytest.fixture(autouse=True)
def no_choice_yet(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For every test of a file that imports it; the same random numbers for each."""
    torch.manual_seed(0)
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    for name in ("SVDQ_TUNE", "SVDQ_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_tiles", {})
    monkeypatch.setattr(tuning, "_spent", 0.0)
    monkeypatch.setattr(kernel_table, "_told", set())
    tuning._file.cache_clear()
    tuning._known.cache_clear()
    yield
    tuning._file.cache_clear()
    tuning._known.cache_clear()
