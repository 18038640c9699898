"""svdq::attention: the pass, on graphs for a GPU that need not be there; the operator; the choice among its rows."""

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from conftest import logged
from svdq_compile.kernels.operands import Attention
from svdq_compile.kernels.runtime import target
from svdq_compile.lowering import flash3, kernel_table, launch, ops, replay
from svdq_compile.lowering.inductor import compile_with_inductor
from svdq_compile.lowering.kernel_table import ANY, REFERENCE, Kernel, takes_all
from svdq_compile.passes import replace_attention

FLASH, CUDNN, EFFICIENT = launch._FLASH, launch._CUDNN, launch._EFFICIENT
BSHD, BHSD, SBHD = [0, 2, 1, 3], [0, 1, 2, 3], [2, 0, 1, 3]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices pass for sm_90, and torch for willing to run each of its kernels there."""
    monkeypatch.setattr(target, "capability", lambda device: (9, 0))
    for name in ("cudnn", "flash", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", lambda params: True)


# ** the pass **


def lying(order: Sequence[int], *shape: int | torch.SymInt, **options) -> Tensor:
    """A tensor [B, H, S, D] whose dimensions lie in this order in memory."""
    dense = torch.empty([shape[dim] for dim in order], dtype=torch.bfloat16, **options)
    return dense.permute([order.index(dim) for dim in range(4)])


def graph_of(target, *more, uses=(0,), order=BSHD, shape=(2, 4, 64, 32), fake=None, device="cuda", **options):
    """q, k, v -> the operator, whose results `uses` are the output."""
    graph = fx.Graph()
    with fake or FakeTensorMode():
        nodes = [graph.placeholder(name) for name in "qkv"]
        for node in nodes:
            node.meta["val"] = lying(order, *shape, device=device)
        call = graph.call_function(target, (*nodes, *more), options)
        args = fx.map_arg(call.args, lambda node: node.meta["val"])
        call.meta["val"] = target(*args, **options)
    results = []
    for i in uses:
        results.append(graph.call_function(operator.getitem, (call, i)))
        results[-1].meta["val"] = call.meta["val"][i]
    graph.output(tuple(results))
    return fx.GraphModule(nn.Module(), graph)


def calls(gm: fx.GraphModule) -> list:
    return [n.target for n in gm.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


def result_of(gm: fx.GraphModule) -> Tensor:
    return gm.graph.output_node().args[0][0].meta["val"]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("target", "more", "options", "expected"),
    [
        (FLASH, (), {}, (False, None)),
        (FLASH, (0.0, True), {"scale": 0.25}, (True, 0.25)),
        (CUDNN, (None, False, 0.0, True), {}, (True, None)),
        (EFFICIENT, (None, True), {"is_causal": True}, (True, None)),
    ],
)
def test_torchs_operators_are_replaced(target, more: tuple, options: dict, expected: tuple) -> None:
    gm = graph_of(target, *more, **options)
    before = result_of(gm)
    assert replace_attention(gm) == 1
    gm.graph.lint()
    assert calls(gm) == [ops.attention]
    (call,) = gm.graph.find_nodes(op="call_function", target=ops.attention)
    assert call.args == (*gm.graph.find_nodes(op="placeholder"), *expected, BSHD)
    after = result_of(gm)
    assert (after.shape, after.stride(), after.dtype) == (before.shape, before.stride(), before.dtype)
    assert replace_attention(gm) == 0


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("order", [list(order) for order in itertools.permutations(range(3))], ids=str)
def test_the_result_lies_as_torchs(order: list[int]) -> None:
    gm = graph_of(FLASH, order=[*order, 3], shape=(2, 3, 5, 8))
    before = result_of(gm)
    assert replace_attention(gm) == 1
    assert result_of(gm).stride() == before.stride()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("dynamic", ["backed", "unbacked"])
def test_sizes_need_not_be_known(dynamic: str) -> None:
    env = ShapeEnv()
    fake = FakeTensorMode(shape_env=env)
    rows = env.create_unbacked_symint()
    if dynamic == "backed":
        sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC])
        rows = fake.from_tensor(torch.empty(77), symbolic_context=sizes).shape[0]
    gm = graph_of(FLASH, fake=fake, shape=(2, 4, rows, 32))
    before = result_of(gm)
    assert replace_attention(gm) == 1
    after = result_of(gm)
    assert [str(n) for n in (*after.shape, *after.stride())] == [str(n) for n in (*before.shape, *before.stride())]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("target", "more", "uses", "reason"),
    [
        (FLASH, (0.1,), (0,), "it has dropout"),
        (FLASH, (0.0, False, True), (0,), "it has dropout"),  # its random numbers are asked for
        (FLASH, (), (0, 1), "more than its result is used"),
        (EFFICIENT, (None, True), (0, 1), "more than its result is used"),
    ],
)
def test_left_alone(target, more: tuple, uses: tuple, reason: str) -> None:
    gm = graph_of(target, *more, uses=uses)
    assert refusal(gm) == reason
    assert calls(gm) == [target]


def refusal(gm: fx.GraphModule) -> str:
    with logged("svdq_compile.passes") as records:
        assert replace_attention(gm) == 0
    (message,) = (record.getMessage() for record in records)
    return message.split(": ", 1)[1]


@pytest.mark.usefixtures("on_hopper")
def test_masks_are_left_alone() -> None:
    gm = graph_of(EFFICIENT, None, False)
    (call,) = gm.graph.find_nodes(op="call_function", target=EFFICIENT)
    call.args = (*call.args[:3], call.args[0], False)
    assert refusal(gm) == "it has a mask"


@pytest.mark.usefixtures("on_hopper")
def test_results_with_gaps_are_left_alone() -> None:
    """No order of the dimensions says how they lie."""
    gm = graph_of(FLASH)
    (call,) = gm.graph.find_nodes(op="call_function", target=FLASH)
    y, *more = call.meta["val"]
    with y.fake_mode:
        call.meta["val"] = (torch.empty(*y.shape[:3], 2 * y.shape[3])[..., ::2], *more)
    assert refusal(gm) == "its result has gaps in memory"


@pytest.mark.usefixtures("on_hopper")
def test_strides_of_single_samples_do_not_count() -> None:
    gm = graph_of(FLASH, shape=(1, 4, 64, 32))
    (call,) = gm.graph.find_nodes(op="call_function", target=FLASH)
    y, *more = call.meta["val"]
    call.meta["val"] = (y.as_strided(y.shape, (7, *y.stride()[1:])), *more)
    assert replace_attention(gm) == 1
    assert gm.graph.find_nodes(op="call_function", target=ops.attention)[0].args[-1] == BSHD


@pytest.mark.usefixtures("on_hopper")
def test_a_scale_computed_in_the_graph_is_left_alone() -> None:
    gm = graph_of(FLASH)
    (call,) = gm.graph.find_nodes(op="call_function", target=FLASH)
    call.kwargs = {"scale": call.args[0]}
    assert refusal(gm) == "its scale is not known"


def test_devices_without_a_choice_are_left_alone() -> None:
    assert refusal(graph_of(FLASH)) == "there is no choice on cuda:0"
    gm = graph_of(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, device="cpu")
    assert replace_attention(gm) == 0


# ** the operator **


def normal(order: Sequence[int], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return lying(order, *shape).normal_().to(dtype)


def of_gaps(order: Sequence[int], *shape: int) -> Tensor:
    return normal(order, *shape[:2], 3 * shape[2], shape[3])[:, :, 1::3]


@pytest.mark.parametrize("inputs", [normal, of_gaps])
@pytest.mark.parametrize("order", [BSHD, BHSD, SBHD], ids=str)
@pytest.mark.parametrize(
    ("heads", "channels", "options"),
    [
        (6, 16, {}),
        (6, 16, {"is_causal": True, "scale": 0.3}),
        (2, 16, {"is_causal": True}),  # of q three a head of k and v
        (6, 24, {"scale": 0.3}),  # of v more than of q
    ],
)
def test_the_reference(inputs: Callable, order: list[int], heads: int, channels: int, options: dict) -> None:
    torch.manual_seed(0)
    q, k, v = inputs(order, 2, 6, 9, 16), inputs(order, 2, heads, 7, 16), inputs(order, 2, heads, 7, channels)
    for lies in (BSHD, BHSD, SBHD):
        y = ops.attention(q, k, v, options.get("is_causal", False), options.get("scale"), lies)
        assert y.permute(lies).is_contiguous()
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options))
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(ops.attention, (q, k, v, False, None, SBHD), test_utils=checks)


class StandIn:
    """For torch's operators: exact results that lie in an order of their own, from operands as torch's take them."""

    def __init__(self, order: Sequence[int] = BHSD) -> None:
        self.order, self.calls = order, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *between, scale: float | None) -> tuple[Tensor]:
        assert {t.stride(3) for t in (q, k, v)} == {1}
        self.calls += 1
        y = F.scaled_dot_product_attention(q, k, v, is_causal=between[-1], scale=scale, enable_gqa=True)
        return (lying(self.order, *y.shape).to(y.dtype).copy_(y),)


def row(name: str, stand_in: Callable, why_not: Callable = takes_all) -> Kernel:
    return replace(launch._torchs_kernel(name, why_not, stand_in, None, False, 0.0), target=ANY, why_not=why_not)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put rows into the table, before the reference."""
    monkeypatch.delenv("SVDQ_KERNELS", raising=False)
    monkeypatch.setattr(kernel_table, "_told", set())
    monkeypatch.setattr(ops.IMPLEMENTATIONS["svdq.attention.default"], "_plans", {})

    def put(*kernels: Kernel) -> None:
        monkeypatch.setattr(launch.ATTENTION, "rows", [*kernels, launch.ATTENTION.rows[-1]])

    return put


@pytest.mark.parametrize("shape", [(2, 4, 9, 16), (1, 4, 9, 16), (1, 1, 9, 16)], ids=str)
@pytest.mark.parametrize("own", [BSHD, BHSD, SBHD], ids=str)
def test_every_row_gives_the_same_layout(own: list[int], shape: tuple, rows: Callable) -> None:
    """Inductor plans views from the shape function; numbers that lie otherwise would be read as others."""
    rows(row("cudnn", StandIn(own)))
    q, k, v = (normal(BSHD, *shape) for _ in range(3))
    for order in (BSHD, BHSD, SBHD):
        planned = Attention(q, k, v, False, None, order).empty_result().stride()
        y = ops.attention(q, k, v, False, None, order)
        assert [s for n, s in zip(y.shape, y.stride(), strict=True) if n > 1] == [
            s for n, s in zip(y.shape, planned, strict=True) if n > 1
        ]
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v))


def test_a_site_calls_what_the_row_called(rows: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made in the first calls; what a row gives is brought into its order in all of them."""
    monkeypatch.setattr(replay, "_is_recordable", lambda operands: True)
    asked: list[Attention] = []
    stand_in = StandIn(BHSD)
    rows(row("cudnn", stand_in, asked.append))
    site = ops.sites("svdq.attention.default")()
    for is_causal, scale in ((True, 0.3), (True, 0.3), (True, 0.3), (True, 0.3)):
        q, k, v = (normal(BSHD, 2, 4, 9, 16) for _ in range(3))
        y = site(q, k, v, is_causal, scale, BSHD)
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale))
        assert y.stride() == q.stride()
    assert site._plan is not None
    assert (len(asked), stand_in.calls) == (2, 2), "from then on what it called is called"


class Around(nn.Module):
    """An attention by torch's operator, and views of its result that only the planned strides allow.

    q is a copy that Inductor would rather make with the tokens side by side, as they are in its source.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y = FLASH(*self.heads(q, k, v), 0.0, True)[0]
        return y.transpose(1, 2).flatten(2) * 2, y[:, 1:3].sum(-1)

    def heads(self, *qkv: Tensor) -> list[Tensor]:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (qkv[0].mT, *qkv[1:]))
        return [(q + 1).contiguous(), k, v]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_compiled_code_reads_the_layout_that_was_planned(dynamic: bool, rows: Callable) -> None:
    stand_in = StandIn(BHSD)
    rows(row("cudnn", stand_in))
    graphs: list[fx.GraphModule] = []

    def rewrite(gm: fx.GraphModule) -> None:
        assert replace_attention(gm) == 1
        graphs.append(gm)

    def backend(gm: fx.GraphModule, inputs: list) -> Callable:
        return compile_with_inductor(gm, inputs, None, rewrite)

    torch._dynamo.reset()
    call = torch.compile(Around(), backend=backend, fullgraph=True, dynamic=dynamic)
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        for length in (6, 10) if dynamic else (6, 6, 6):
            q, k, v = torch.randn(2, 64, length), torch.randn(2, length, 64), torch.randn(2, length, 64)
            y = F.scaled_dot_product_attention(*Around().heads(q, k, v), is_causal=True)
            flat, sums = call(q, k, v)
            torch.testing.assert_close(flat, y.transpose(1, 2).flatten(2) * 2)
            torch.testing.assert_close(sums, y[:, 1:3].sum(-1))
    assert len(graphs) == 1
    assert stand_in.calls > 1


# ** the table **


def operands(dtype: torch.dtype = torch.bfloat16, length: int = 64, is_causal: bool = False, order=BSHD, batch=2):
    q, k = normal(BSHD, batch, 4, 64, 32, dtype=dtype), normal(BSHD, batch, 4, length, 32, dtype=dtype)
    return Attention(q, k, k, is_causal, None, order)


def able(o: Attention) -> list[str]:
    return [kernel.name for kernel in launch.ATTENTION._able(o, None)]


@pytest.mark.usefixtures("on_hopper")
def test_who_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVDQ_KERNELS", raising=False)
    assert able(operands()) == ["cudnn", "flash", "efficient", REFERENCE]
    assert able(operands(torch.float32)) == ["efficient", REFERENCE]
    assert able(operands(length=65)) == ["cudnn", "flash", "efficient", REFERENCE]
    assert able(operands(length=65, is_causal=True)) == ["efficient", REFERENCE]
    for name in ("cudnn", "flash", "efficient"):
        with monkeypatch.context() as torch_says:
            torch_says.setattr(torch.backends.cuda, f"can_use_{name}_attention", lambda params: False)
            assert name not in able(operands())
    monkeypatch.setenv("SVDQ_KERNELS", "flash")
    assert able(operands()) == ["flash", REFERENCE]
    assert launch.ATTENTION.choose(operands()).name == "flash"
    monkeypatch.setenv("SVDQ_KERNELS", REFERENCE)
    assert launch.ATTENTION.choose(operands()).name == REFERENCE


@pytest.mark.usefixtures("on_hopper")
def test_torch_is_asked_about_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: asked.append(params) or True)
    o = operands(is_causal=True)
    assert "flash" in able(o)
    assert "flash" in able(o._replace(k=o.k[:, :2], v=o.v[:, :2]))
    assert [(p.is_causal, p.dropout, p.attn_mask, p.enable_gqa) for p in asked] == [
        (True, 0.0, None, False),
        (True, 0.0, None, True),
    ]
    assert (asked[0].query.data_ptr(), asked[0].key.data_ptr()) == (o.q.data_ptr(), o.k.data_ptr())


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would be measured: (class, candidates). The last candidate that runs is the fastest."""
    tuning = pytest.importorskip("svdq_compile.kernels.runtime.tuning")
    asked: list[tuple] = []

    def choose(
        kernel: str, shape: tuple, candidates: list[str], run: Callable, *device: torch.device, limited: bool
    ) -> str:
        assert kernel == "attention"
        assert not limited, "tiles must not use up the time"
        asked.append((shape, candidates))
        for name in reversed(candidates):
            try:
                run(name)
            except tuning.CannotRun:
                continue
            return name
        raise AssertionError("none can")

    monkeypatch.setattr(tuning, "choose", choose)
    return asked


def test_the_rows_that_can_are_measured(rows: Callable, questions: list[tuple]) -> None:
    """Never the reference; one that raises after all is out; alone it is not measured."""

    def fails(*args, **options) -> None:
        raise RuntimeError("no valid execution plans")

    never = replace(row("other", StandIn()), why_not=lambda o: "it is Sunday")
    rows(row("cudnn", StandIn()), row("flash", StandIn()), never, row("efficient", fails))
    assert launch.ATTENTION.choose(operands()).name == "flash"
    assert [candidates for _, candidates in questions] == [["cudnn", "flash", "efficient"]]
    rows(never, row("cudnn", StandIn()))
    assert launch.ATTENTION.choose(operands()).name == "cudnn"
    rows(never)
    assert launch.ATTENTION.choose(operands()).name == REFERENCE
    assert len(questions) == 1


def test_one_measurement_for_a_class_of_shapes() -> None:
    def seen(**options) -> tuple:
        return launch._attention_class(operands(**options))

    assert seen(length=65) == seen(length=128) != seen(length=129)
    assert seen(batch=3) == seen(batch=4) != seen(batch=5)
    o = operands()
    other = [
        seen(dtype=torch.float16),
        seen(is_causal=True),
        seen(order=BHSD),
        launch._attention_class(o._replace(k=o.k[:, :2], v=o.v[:, :2])),
        launch._attention_class(o._replace(v=o.v[..., :16])),
        launch._attention_class(o._replace(q=o.q[..., :16], k=o.k[..., :16])),
        launch._attention_class(o._replace(q=o.q[:, :2])),
        launch._attention_class(o._replace(q=o.q[:, :, :32])),
        *(launch._attention_class(o._replace(**{name: getattr(o, name).contiguous()})) for name in "qkv"),
    ]
    assert len({seen(), *other}) == 1 + len(other)
    one = operands(batch=1)
    q = one.q.as_strided(one.q.shape, (1, *one.q.stride()[1:]))
    assert launch._attention_class(one._replace(q=q)) == launch._attention_class(one)


# ** FlashAttention-3, which is not there **


@pytest.mark.parametrize("arithmetic", ["fp8", "int8"])
def test_eight_bits_are_asked_for(arithmetic: str, on_hopper: None) -> None:
    """By an argument more, so that graphs without them stay as they were."""
    exact, allowed = graph_of(CUDNN, None, False), graph_of(CUDNN, None, False)
    assert replace_attention(exact) == 1
    assert replace_attention(allowed, arithmetic=arithmetic) == 1
    nodes = [next(n for n in gm.graph.nodes if n.target is ops.attention) for gm in (exact, allowed)]
    assert nodes[1].args[3:] == (*nodes[0].args[3:], arithmetic)
    assert len(nodes[0].args) == 6


@pytest.fixture
def with_flash3(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """As if it were installed: an operator with its signature, in torch. What it is called with."""
    calls: list[tuple] = []

    def fwd(q, k, v, out, q_descale, k_descale, v_descale, softmax_scale, is_causal, window_left, num_splits):
        calls.append((q, k, v, num_splits))
        given = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(*given, is_causal=is_causal, scale=softmax_scale, enable_gqa=True)
        return y.transpose(1, 2).contiguous(), *(q.new_empty(0) for _ in range(3))

    library = torch.library.Library("fa3_fwd", "DEF")
    library.define(
        "fwd(Tensor q,Tensor k,Tensor v,Tensor(out!)? out=None,Tensor? q_descale=None,Tensor? k_descale=None,"
        "Tensor? v_descale=None,float? softmax_scale=None,bool is_causal=False,int window_left=-1,int num_splits=0)"
        " -> (Tensor(out!), Tensor, Tensor, Tensor)"
    )
    library.impl("fwd", fwd, "CPU")
    monkeypatch.delenv("SVDQ_KERNELS", raising=False)
    monkeypatch.setattr(flash3, "import_module", lambda name: None)
    flash3.missing.cache_clear()
    yield calls
    library._destroy()
    flash3.missing.cache_clear()


def test_who_can_with_flash3(with_flash3: list) -> None:
    assert able(operands()) == ["cudnn", "flash3", "flash", "efficient", REFERENCE]
    o = operands()._replace(arithmetic="fp8")
    assert able(o) == ["cudnn", "flash3", "flash3_fp8", "flash", "efficient", REFERENCE]
    grouped = o._replace(k=o.k[:, :2], v=o.v[:, :2])
    assert "flash3" in able(grouped)
    assert "flash3_fp8" not in able(grouped), "a scale for each head of q would be needed"
    for channels, names in ((36, set()), (40, {"flash3"}), (264, set())):
        x = torch.zeros(1, 2, 8, channels, dtype=torch.bfloat16)
        assert {n for n in able(Attention(x, x, x, False, None, BSHD, "fp8")) if "flash3" in n} == names
    wide = torch.zeros(2, 4, 64, 64, dtype=torch.bfloat16)
    assert not any("flash3" in name for name in able(o._replace(v=wide)))
    assert not any("flash3" in name for name in able(operands(batch=0)))
    odd = torch.zeros(2 * 64 * 4 * 32 + 1, dtype=torch.bfloat16)[1:].view(2, 64, 4, 32).transpose(1, 2)
    apart = torch.zeros(2, 64, 4 * 36 + 4, dtype=torch.bfloat16)[..., : 4 * 36].unflatten(-1, (4, 36))[..., :32]
    for x in (odd, apart.transpose(1, 2)):
        assert x.data_ptr() % 16 or x.stride(1) % 8
        named = [name for name in able(o._replace(q=x, k=x, v=x)) if "flash3" in name]
        assert named == ["flash3_fp8"], "its codes are written anew, however q, k and v lie"
    one = torch.zeros(1, 8, 32, dtype=torch.bfloat16).as_strided((1, 1, 8, 32), (7, 5, 32, 1))
    assert "flash3_fp8" in able(Attention(one, one, one, False, None, BSHD, "fp8")), "nobody steps along one sample"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "flash3" not in able(operands())
    assert not any("flash3" in name for name in able(operands(torch.float32)))


def test_who_can_in_int8(on_hopper: None) -> None:
    """The last, so that where nothing is measured an exact one runs; whatever the length of k, and who shares it."""
    o = operands()._replace(arithmetic="int8")
    assert able(o)[-2:] == ["attention_int8", REFERENCE]
    assert able(o._replace(k=o.k[:, :2, :9], v=o.v[:, :2, :9]))[-2:] == ["attention_int8", REFERENCE]
    assert "attention_int8" in able(o._replace(is_causal=True))
    causal_of_fewer_keys = o._replace(is_causal=True, k=o.k[:, :, :9], v=o.v[:, :, :9])
    for other in (operands(), o._replace(arithmetic="fp8"), operands(torch.float32)._replace(arithmetic="int8"),
                  operands(batch=0)._replace(arithmetic="int8"), causal_of_fewer_keys):  # fmt: skip
        assert "attention_int8" not in able(other)


@pytest.mark.parametrize("order", [BSHD, BHSD], ids=str)
def test_flash3_has_tokens_before_heads(order: list[int], with_flash3: list) -> None:
    o = operands(order=order, is_causal=True)._replace(scale=0.3)
    y = flash3.attention(o)
    assert [tuple(x.shape) for x in with_flash3[0][:3]] == [(2, 64, 4, 32)] * 3
    assert with_flash3[0][3] == 1
    assert y.stride() == o.empty_result().stride()
    torch.testing.assert_close(y, F.scaled_dot_product_attention(o.q, o.k, o.v, is_causal=True, scale=0.3))


def test_codes_give_bf16_and_the_result_has_the_inputs_type(with_flash3: list, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = pytest.importorskip("svdq_compile.kernels.portable.attention_codes")
    scales = (torch.ones(2, 4),) * 3
    monkeypatch.setattr(codes, "attention_codes", lambda qkv, generated: (*(x.bfloat16() for (x,) in qkv), *scales))
    o = operands(torch.float16)._replace(arithmetic="fp8")
    y = next(kernel for kernel in launch.ATTENTION.rows if kernel.name == "flash3_fp8").run(o)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, F.scaled_dot_product_attention(o.q, o.k, o.v), rtol=0.02, atol=0.02)


def test_flash3_is_replayed(with_flash3: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_is_recordable", lambda operands: True)
    monkeypatch.setenv("SVDQ_KERNELS", "flash3")
    monkeypatch.setattr(ops.IMPLEMENTATIONS["svdq.attention.default"], "_plans", {})
    site = ops.sites("svdq.attention.default")()
    for _ in range(4):
        o = operands()._replace(v=normal(BSHD, 2, 4, 64, 32, dtype=torch.bfloat16))
        torch.testing.assert_close(site(*o), F.scaled_dot_product_attention(o.q, o.k, o.v))
    assert site._plan is not None
    assert len(with_flash3) == 4


def test_another_version_of_flash3(with_flash3: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash3, "ARGUMENTS", flash3.ARGUMENTS | {"k_new"})
    assert "another version" in str(flash3.missing())
    assert "flash3" not in able(operands())


def test_eight_bits_that_cannot_be_had_are_told_once(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    flash3._tell.cache_clear()
    monkeypatch.setattr(flash3, "missing", lambda: "fa3-fwd is not installed (pip install fa3-fwd)")
    with logged("svdq_compile.lowering") as records:
        for _ in range(2):
            assert "flash3_fp8" not in able(operands()._replace(arithmetic="fp8"))
        able(operands())
    told = [r.getMessage() for r in records if r.levelname == "WARNING"]
    why = "fa3-fwd is not installed (pip install fa3-fwd)"
    assert told == [f"svdquant: attention='fp8' has no kernel here, {why}: attention is exact"]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ModuleNotFoundError("No module named 'fa3_fwd'", name="fa3_fwd"), "is not installed"),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            "cannot be loaded (ModuleNotFoundError: No module named",
        ),
        (RuntimeError(""), "cannot be loaded (RuntimeError: )"),
        (OSError("undefined symbol: aoti_torch_x\nmore"), "cannot be loaded (OSError: undefined symbol: aoti_torch_x)"),
    ],
)
def test_a_flash3_that_does_not_load(failure: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise failure

    monkeypatch.setattr(flash3, "import_module", fails)
    flash3.missing.cache_clear()
    assert reason in str(flash3.missing())
    flash3.missing.cache_clear()
