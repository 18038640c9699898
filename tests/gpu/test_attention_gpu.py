"""svdq::attention on a GPU: each of its kernels, the choice among them, and compiled code. Needs CUDA (sm_90):

python -m pytest tests/gpu/test_attention_gpu.py
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fresh_choices import no_choice_yet as no_choice_yet
from torch import Tensor, fx, nn

from svdq_compile.kernels.operands import Attention
from svdq_compile.kernels.runtime import tuning
from svdq_compile.lowering import flash3, launch, ops
from svdq_compile.lowering.inductor import compile_with_inductor
from svdq_compile.lowering.kernel_table import REFERENCE, Kernel
from svdq_compile.lowering.launch import ATTENTION
from svdq_compile.passes import replace_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BSHD, BHSD, SBHD = [0, 2, 1, 3], [0, 1, 2, 3], [2, 0, 1, 3]
# Those that are exact; FlashAttention-3 where it is installed.
ROWS = {kernel.name: kernel for kernel in ATTENTION.rows if kernel.name not in ("flash3_fp8", "attention_int8")}
if flash3.missing():
    del ROWS["flash3"]
ROUNDING = 4e-3  # of a result rounded to bf16 once, and of probabilities rounded to bf16


def normal(order: list[int], *shape: int) -> Tensor:
    """[B, H, S, D] bf16 whose dimensions lie in this order in memory, every other head of more."""
    wide = [shape[0], 2 * shape[1], *shape[2:]]
    dense = torch.randn([wide[dim] for dim in order], device="cuda", dtype=torch.bfloat16)
    return dense.permute([order.index(dim) for dim in range(4)])[:, ::2]


def error(y: Tensor, o: Attention) -> float:
    q, k, v = (t.float() for t in (o.q, o.k, o.v))
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=o.is_causal, scale=o.scale, enable_gqa=True
    )
    return float((y - expected).norm() / expected.norm())


def check(y: Tensor, o: Attention) -> None:
    planned = o.empty_result()
    assert (y.shape, y.stride(), y.dtype) == (planned.shape, planned.stride(), planned.dtype)
    assert error(y, o) < ROUNDING


@pytest.mark.parametrize("lies", [BSHD, BHSD, SBHD], ids=["BSHD", "BHSD", "SBHD"])
@pytest.mark.parametrize("order", [BSHD, BHSD, SBHD], ids=["BSHD", "BHSD", "SBHD"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", ROWS)
def test_each_row_is_exact(name: str, is_causal: bool, order: list[int], lies: list[int]) -> None:
    """In every layout of the operands and of the result."""
    torch.manual_seed(0)
    for width in (64, 128):
        q, k, v = (normal(order, 2, 4, 300, width) for _ in range(3))
        o = Attention(q, k, v, is_causal, 0.2, lies)
        assert ROWS[name].refuses(o) is None
        check(ROWS[name].run(o), o)


@pytest.mark.parametrize(
    ("heads", "length", "channels", "is_causal"),
    [(8, 77, 64, False), (8, 77, 64, True), (2, 300, 64, True), (8, 300, 128, False)],
    ids=["cross", "cross causal", "grouped heads", "wider values"],
)
def test_whoever_can_is_exact(heads: int, length: int, channels: int, is_causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = normal(BSHD, 2, 8, 300, 64), normal(BSHD, 2, heads, length, 64), normal(BSHD, 2, heads, length, channels)
    o = Attention(q, k, v, is_causal, None, BSHD)
    able = [kernel for kernel in ATTENTION.rows if kernel.refuses(o) is None]
    assert len(able) > 1
    for kernel in able:
        check(kernel.run(o), o)


def test_fp32_goes_to_the_one_row_that_has_it() -> None:
    q, k, v = (torch.randn(1, 4, 200, 64, device="cuda") for _ in range(3))
    o = Attention(q, k, v, False, None, BSHD)
    assert ATTENTION.choose(o).name == "efficient"
    assert error(ops.attention(*o), o) < 2e-3


def tokens(length: int) -> Attention:
    return Attention(*(normal(BSHD, 1, 8, length, 64) for _ in range(3)), False, None, BSHD)


def test_a_class_of_shapes_is_measured_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []
    measure = tuning._measure

    def counted(candidates: list[str], run: Callable) -> int:
        measured.append(candidates)
        return measure(candidates, run)

    monkeypatch.setattr(tuning, "_measure", counted)
    for length in (1000, 1024, 600, 1000):
        o = tokens(length)
        for _ in range(4):
            check(ops.attention(*o), o)
    assert measured == [[kernel.name for kernel in ATTENTION.rows if kernel.name in ROWS][:-1]]
    assert '"attention (' in next(tmp_path.glob("choices-*.json")).read_text()
    tuning._known.cache_clear()
    monkeypatch.setattr(tuning, "_chosen", {})
    assert ATTENTION.choose(tokens(1024)).name in measured[0]
    assert len(measured) == 1, "another process reads it"
    ops.attention(*tokens(1025))
    assert len(measured) == 2


@pytest.mark.parametrize("name", ROWS)
def test_a_row_can_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure", None)
    monkeypatch.setenv("SVDQ_KERNELS", name)
    o = tokens(512)
    assert ATTENTION.choose(o).name == name
    check(ops.attention(*o), o)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_what_the_user_switches_off_is_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = getattr(torch.backends.cuda, f"enable_{'mem_efficient' if name == 'efficient' else name}_sdp")
    switch(False)
    try:
        assert f"torch.backends.cuda.can_use_{name}_attention refuses" == ROWS[name].refuses(tokens(512))
    finally:
        switch(True)


@pytest.mark.parametrize("known", [False, True], ids=["not measured", "measured"])
def test_captured(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph holds what was chosen before, or the first row that can; nothing is measured meanwhile."""
    o = tokens(512)
    for kernel in ROWS.values():  # whoever runs has been loaded
        kernel.run(o)
    if known:
        for _ in range(3):
            ops.attention(*o)
    monkeypatch.setattr(tuning, "_measure", None)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = ops.attention(*o)
    for t in (o.q, o.k, o.v):
        t.normal_()
    graph.replay()
    check(y, o)


def test_not_measured_where_results_must_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure", None)
    torch.use_deterministic_algorithms(True)
    try:
        assert ATTENTION.choose(tokens(512)).name != REFERENCE
    finally:
        torch.use_deterministic_algorithms(False)


class Around(nn.Module):
    """An attention, and views of its result that only the planned strides allow."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y = self.attention(q + 1, k, v)
        return y.transpose(1, 2).flatten(2) * 2, y[:, 1:3].sum(-1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(t.unflatten(-1, (8, 64)).transpose(1, 2) for t in (q, k, v)))


@pytest.fixture
def other_layout(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The only row is flash, and gives its result heads first, which nobody has planned. -> one entry a run."""
    runs: list[int] = []

    def run(o: Attention) -> Tensor:
        runs.append(o.q.shape[2])
        return o.in_order(launch._FLASH(o.q, o.k, o.v, 0.0, o.is_causal, scale=o.scale)[0].contiguous())

    row: Kernel = ROWS["flash"]
    monkeypatch.setattr(ops.IMPLEMENTATIONS["svdq.attention.default"], "_plans", {})  # of rows chosen before
    monkeypatch.setattr(ATTENTION, "rows", [Kernel(row.name, row.target, (), None, row.why_not, run), ROWS[REFERENCE]])
    return runs


def compiled(mode: str | None, dynamic: bool) -> tuple[Callable, list[fx.GraphModule]]:
    graphs: list[fx.GraphModule] = []

    def rewrite(gm: fx.GraphModule) -> None:
        assert replace_attention(gm) == 1
        graphs.append(gm)

    def backend(gm: fx.GraphModule, inputs: list) -> Callable:
        return compile_with_inductor(gm, inputs, mode, rewrite)

    torch._dynamo.reset()
    return torch.compile(Around(), backend=backend, fullgraph=True, dynamic=dynamic), graphs


def check_compiled(call: Callable, length: int) -> None:
    q, k, v = (torch.randn(2, length, 512, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    torch.compiler.cudagraph_mark_step_begin()
    flat, sums = call(q, k, v)
    y = Around().attention(*(t.double() for t in ((q + 1), k, v)))
    for result, expected in ((flat, y.transpose(1, 2).flatten(2) * 2), (sums, y[:, 1:3].sum(-1))):
        assert float((result - expected).norm() / expected.norm()) < 8e-3


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
def test_compiled(mode: str | None) -> None:
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        call, graphs = compiled(mode, dynamic=False)
        for _ in range(5):
            check_compiled(call, 256)
    assert len(graphs) == 1


def test_two_sizes_in_one_graph() -> None:
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        call, graphs = compiled(None, dynamic=True)
        for length in (256, 300, 256, 1000, 300, 300, 1000):
            check_compiled(call, length)
    assert len(graphs) == 1


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_compiled_with_a_row_of_another_layout(dynamic: bool, other_layout: list[int]) -> None:
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        call, _ = compiled(None, dynamic)
        for _ in range(4):
            check_compiled(call, 256)
    assert other_layout == [256] * 2, "from then on torch's operator is called, and what it gave is copied"


def test_a_compiled_model_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the backend, unless `fuse` leaves it out."""
    runs: list[str] = []

    def counted(kernel: Kernel) -> Kernel:
        def run(o: Attention) -> Tensor:
            runs.append(kernel.name)
            return kernel.run(o)

        return Kernel(kernel.name, kernel.target, (), None, kernel.why_not, run, fuses=False)

    monkeypatch.setattr(ATTENTION, "rows", [counted(ROWS["cudnn"]), ROWS[REFERENCE]])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(512, 512) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = Around().attention(self.q(x), self.k(x), self.v(x))
            return self.out(y.transpose(1, 2).flatten(2))

    x = torch.randn(1, 256, 512, device="cuda", dtype=torch.bfloat16)
    results = []
    for fuse in (True, ("epilogues", "siblings")):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Model().cuda().bfloat16().eval().requires_grad_(False)
        options = {"calibration_steps": 0, "refine": 0, "precision": "w4a8", "fuse": fuse, "progress": False}
        call = torch.compile(model, backend="svdquant", options=options)
        with torch._inductor.config.patch(force_disable_caches=True):
            results.append([call(x) for _ in range(3)][-1])
        assert bool(runs) == (fuse is True)
        runs.clear()
    assert float((results[0] - results[1]).norm() / results[1].norm()) < 0.02


needs_flash3 = pytest.mark.skipif(flash3.missing() is not None, reason="needs fa3-fwd")


@needs_flash3
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lies", [BSHD, BHSD], ids=["BSHD", "BHSD"])
def test_eight_bits(lies: list[int], is_causal: bool) -> None:
    """Near the exact result; what all keys share costs nothing."""
    torch.manual_seed(0)
    q, k, v = (normal(BSHD, 2, 4, 700, 128) for _ in range(3))
    k += 20 * torch.randn(1, 4, 1, 128, device="cuda", dtype=torch.bfloat16)
    o = Attention(q, k, v, is_causal, None, lies, "fp8")
    (row,) = [kernel for kernel in ATTENTION.rows if kernel.name == "flash3_fp8"]
    y = row.run(o)
    planned = o.empty_result()
    assert (y.shape, y.stride(), y.dtype) == (planned.shape, planned.stride(), planned.dtype)
    assert 0.01 < error(y, o) < 0.09


@needs_flash3
def test_eight_bits_are_taken_where_they_are_faster() -> None:
    """In compiled code's operator, by plans and graphs too; without leave they never are."""
    torch.manual_seed(0)
    q, k, v = (normal(BSHD, 1, 24, 8192, 128) for _ in range(3))
    site = ops.sites("svdq.attention.default")()
    results = [site(q, k, v, False, None, BSHD, "fp8") for _ in range(5)]
    assert ATTENTION.choose(Attention(q, k, v, False, None, BSHD, "fp8")).name == "flash3_fp8"
    assert all(torch.equal(results[0], y) for y in results)
    exact = ops.attention(q, k, v, False, None, BSHD)
    assert ATTENTION.choose(Attention(q, k, v, False, None, BSHD)).name != "flash3_fp8"
    assert 0.01 < float((results[0] - exact).norm() / exact.norm()) < 0.09
