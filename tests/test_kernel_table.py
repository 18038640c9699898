"""How a kernel is found: in order, with reasons, by force, and past those that do not compile."""

import inspect
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import logged
from svdq_compile.kernels.runtime.target import HOPPER
from svdq_compile.lowering import inductor, kernel_table, launch
from svdq_compile.lowering.kernel_table import ANY, REFERENCE, Kernel, NoKernel, Table
from svdq_compile.passes import fuse

ONE = torch.ones(3)


class Compiled:
    """A generated function, as a Hook holds it."""

    def __init__(self, function: object) -> None:
        self.function = function


def row(name: str, run=None, why_not=lambda x: None, target=ANY, needs=None) -> Kernel:
    return Kernel(name, target, (), needs, why_not, run or (lambda x, *more: name))


@pytest.fixture(autouse=True)
def table_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that these tests leave out or register outlives them."""
    monkeypatch.setattr(kernel_table, "_left_out", {})
    monkeypatch.setattr(kernel_table, "_told", set())
    monkeypatch.setattr(kernel_table, "TABLES", dict(kernel_table.TABLES))
    monkeypatch.delenv("SVDQ_KERNELS", raising=False)
    kernel_table.forced.cache_clear()
    yield
    kernel_table.forced.cache_clear()


def table(*rows: Kernel) -> Table:
    return Table("test", list(rows), lambda x, *more: REFERENCE)


def does_not_compile(x: Tensor, *more: object) -> str:
    raise RuntimeError("PassManager::run failed")


def test_the_first_row_that_can_runs() -> None:
    long = row("long", why_not=lambda x: "it is short" if len(x) < 5 else None)
    rows = table(long, row("short"))
    assert rows.run(ONE) == "short"
    assert rows.run(torch.ones(9)) == "long"
    assert table(row("fast", target=HOPPER)).run(ONE) == REFERENCE
    assert table(row("fast", needs="portable.no_such_module")).run(ONE) == REFERENCE


def test_a_reason_is_told_once() -> None:
    rows = table(row("fast", why_not=lambda x: "it is Sunday"))
    with logged("svdq_compile.lowering") as records:
        rows.run(ONE)
        rows.run(ONE)
    assert [(r.levelname, r.getMessage()) for r in records] == [("DEBUG", "test not by fast: it is Sunday")]


def test_a_kernel_that_does_not_compile_is_left_out() -> None:
    pytest.importorskip("triton")
    rows = table(row("new", does_not_compile), row("old"))
    with logged("svdq_compile.lowering", logging.WARNING) as records:
        for _ in range(2):
            assert rows.run(ONE) == "old"
    (warning,) = (r.getMessage() for r in records)
    assert "kernel new" in warning
    assert torch.__version__ in warning


def test_a_generated_function_that_does_not_compile_is_left_out_alone() -> None:
    pytest.importorskip("triton")
    bad, good = Compiled("bad"), Compiled("good")

    def run(x: Tensor, hook: Compiled | None) -> str:
        return does_not_compile(x) if hook is bad else "kernel"

    rows = table(row("kernel", run))
    with pytest.raises(NoKernel):  # the reference has no generated functions
        rows.run(ONE, bad)
    assert rows.run(ONE, good) == "kernel"
    assert rows.run(ONE, None) == "kernel"


@pytest.mark.parametrize("fused", [Compiled("hook"), ONE])
def test_what_is_fused_goes_to_no_row_that_cannot(fused: object) -> None:
    """A part of the input, say, is no generated function, and must not be dropped either."""
    pytest.importorskip("triton")
    plain = Kernel("plain", ANY, (), None, lambda x: None, lambda x, *fused: "plain", fuses=False)
    rows = table(row("kernel", does_not_compile), plain)
    with pytest.raises(NoKernel):
        rows.run(ONE, None, fused)
    assert rows.run(ONE, None, None) == "plain"


def test_errors_of_a_launch_are_raised() -> None:
    def run(x: Tensor) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory"):
        table(row("kernel", run), row("other")).run(ONE)


def test_a_row_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(row("fast"), row("slow"))
    for text, expected in ((REFERENCE, REFERENCE), ("slow", "slow"), ("portable_gemm", "fast"), ("slow, fast", "fast")):
        monkeypatch.setenv("SVDQ_KERNELS", text)
        assert rows.run(ONE) == expected


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDQ_KERNELS", "hopper_gem_w4a8")
    with pytest.raises(ValueError, match="did you mean 'hopper_gemm_w4a8'"):
        launch.GEMM.run(ONE)


def test_docs_show_the_tables() -> None:
    """docs/kernels.md holds what `kernel_table.markdown()` gives."""
    page = Path(__file__).parent.parent / "docs" / "kernels.md"
    assert kernel_table.markdown() in page.read_text()


def test_names_are_unique() -> None:
    names = [kernel.name for table in kernel_table.TABLES.values() for kernel in table.rows[:-1]]
    assert len(set(names)) == len(names)


def test_the_passes_identity_covers_what_decides_their_result(monkeypatch: pytest.MonkeyPatch) -> None:
    files = inductor._sources(Path(inspect.getfile(fuse)).parent)
    names = {"/".join(Path(file).parts[-2:]) for file in files}
    assert {"passes/fuse_heads.py", "lowering/region.py", "hopper/gemm_w4a8.py", "formats/w4a8.py"} <= names

    def identity(*fusions: str) -> object:
        return inductor._aten_pass(partial(fuse, fusions=fusions)).uuid()

    before = identity()
    assert identity() == before
    assert identity("rows") != before
    monkeypatch.setenv("SVDQ_KERNELS", REFERENCE)
    assert identity() != before
    monkeypatch.delenv("SVDQ_KERNELS")
    monkeypatch.setattr(inductor, "_sources", lambda passes: files[1:])
    assert identity() != before
