"""How a kernel is found: in order, with reasons, by force, and past those that do not compile."""

import inspect
import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from conftest import compiled, logged
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
    for cached in (kernel_table.forced, kernel_table._missing):
        cached.cache_clear()
    yield
    for cached in (kernel_table.forced, kernel_table._missing):
        cached.cache_clear()


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
    assert [(r.levelname, r.getMessage()) for r in records] == [("INFO", "test not by fast: it is Sunday")]


def test_a_row_for_other_gpus_is_no_news() -> None:
    rows = table(row("fast", target=HOPPER))
    with logged("svdq_compile.lowering") as records:
        rows.run(ONE)
    assert [(r.levelname, r.getMessage()) for r in records] == [("DEBUG", "test not by fast: not on sm_90")]


def test_what_ran_is_counted() -> None:
    long = row("long", why_not=lambda x: "it is short" if len(x) < 5 else None)
    rows = table(long, row("short"))
    rows.run(ONE)
    with kernel_table.counted() as counts:
        rows.run(ONE)
        rows.run(torch.ones(9))
        rows.run(ONE)
    assert counts == {"test long": 1, "test short": 2}


def test_a_graph_tells_its_kernels_once() -> None:
    model = compiled(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).requires_grad_(False))
    with logged("svdq_compile", logging.INFO) as records:
        for _ in range(3):  # the first only observes
            model(torch.randn(2, 80, 128))
    told = [r.getMessage() for r in records if "kernels of this graph" in r.getMessage()]
    assert told == ["kernels of this graph: gemm reference 2, quantize reference 2"]


def test_a_kernel_that_does_not_compile_is_left_out() -> None:
    rows = table(row("new", does_not_compile), row("old"))
    with logged("svdq_compile.lowering", logging.WARNING) as records:
        for _ in range(2):
            assert rows.run(ONE) == "old"
    (warning,) = (r.getMessage() for r in records)
    assert "kernel new" in warning
    assert torch.__version__ in warning


@pytest.mark.parametrize("module", ["hopper.gemm_w4a8", "hopper.gemm_int4", "hopper.quantize"])
@pytest.mark.parametrize("gluon", [None, ModuleType("empty")])
def test_a_kernel_that_cannot_be_imported_is_left_out(
    module: str, gluon: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Triton without Gluon, or with another one than we know: one warning, and the next row."""
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", gluon)
    monkeypatch.delitem(sys.modules, f"{kernel_table.kernels.__name__}.{module}", raising=False)
    rows = table(row("new", needs=module), row("old", needs="portable.row_moments"))
    with logged("svdq_compile.lowering", logging.WARNING) as records:
        for _ in range(2):
            assert rows.run(ONE) == "old"
    (warning,) = (r.getMessage() for r in records)
    assert "kernel new cannot be imported" in warning
    assert torch.__version__ in warning


@triton.jit
def uses_what_is_not_there(x):
    tl.store(x, tl.no_such_operation(x))


@triton.jit
def does_not_assemble(x):
    tl.store(x, tl.inline_asm_elementwise("nonsense $0, $1;", "=r,r", [tl.load(x)], tl.int32, True, 1))


@pytest.mark.parametrize("stage", ["front end", "ptxas"])
def test_what_compilers_raise_is_known(stage: str) -> None:
    """By the real compilers: a kernel that uses what Triton has not, and one whose PTX does not assemble."""
    kernel = {"front end": uses_what_is_not_there, "ptxas": does_not_assemble}[stage]
    source = ASTSource(kernel, {"x": "*i32"}, {})
    with pytest.raises(Exception) as caught:  # noqa: PT011 any kind, that is the question
        triton.compile(source, target=GPUTarget("cuda", 80, 32))
    rows = table(row("new", lambda x: raised(caught.value)), row("old"))
    assert rows.run(ONE) == "old"


def raised(error: BaseException) -> str:
    raise error


BROKEN = """
import sys, logging, torch
{break_triton}
import svdq_compile as svdq
from svdq_compile.kernels.runtime.target import PORTABLE
model = torch.nn.Sequential(torch.nn.Linear(128, 128)).requires_grad_(False)
x = torch.randn(4, 128)
expected = model(x)
svdq.quantize(model, svdq.Config(progress=False))
assert (model(x) - expected).norm() < 0.2 * expected.norm()
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda device: (9, 0)
assert not PORTABLE.includes(torch.device("cuda", 0))
assert not PORTABLE.includes(torch.device("cuda", 1))
"""


@pytest.mark.parametrize(
    ("init", "complaint"),
    [
        (
            "raise ImportError('libtriton.so: undefined symbol: foo')",
            "ImportError: libtriton.so: undefined symbol: foo",
        ),
        (None, "(ModuleNotFoundError: "),
    ],
)
def test_a_broken_triton_leaves_the_reference(init: str | None, complaint: str, tmp_path: Path) -> None:
    """On the CPU nobody asks for Triton; on a GPU one warning says why no kernel runs. (An import that raises anything
    else than ImportError ends torch's own.)
    """
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(init or "")
    break_triton = "sys.modules['triton'] = None" if init is None else f"sys.path.insert(0, {str(tmp_path)!r})"
    code = BROKEN.format(break_triton=break_triton)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (warning,) = (line for line in run.stderr.splitlines() if "Triton cannot be imported" in line)
    assert complaint in warning
    assert torch.__version__ in warning


def test_a_generated_function_that_does_not_compile_is_left_out_alone() -> None:
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
