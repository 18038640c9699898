"""Exchanges that become one: the pass by itself, on graphs whose ranks are played one node after another here.

What it does to diffusers' models on processes of their own is in test_context_parallel.py.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from expecttest import TestCase
from fusion_testing import run, run_as_aten
from test_passes import show
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from conftest import compiled, relative_error
from svdq_compile import compiled as compiled_module
from svdq_compile.errors import SendsAlone, WeightsReleased
from svdq_compile.lowering import inductor
from svdq_compile.lowering.inductor import compile_with_inductor
from svdq_compile.passes import fuse, pipeline
from svdq_compile.passes.join_exchanges import join_exchanges
from svdq_compile.passes.order import collectives, may_send

RANKS, TOKENS, HEADS, CHANNELS = 2, 6, 4, 16
SEND = torch.ops._c10d_functional.all_to_all_single.default
WAIT = torch.ops._c10d_functional.wait_tensor.default
aten = torch.ops.aten
SUM = torch.ops._c10d_functional.all_reduce.default


def started(sent: Tensor, group: str = "0") -> Tensor:
    part = sent.numel() // RANKS
    return SEND(sent.flatten(), [part] * RANKS, [part] * RANKS, group)


def exchanged(sent: Tensor, group: str = "0") -> Tensor:
    """The first dimension is the other rank's, as diffusers has it."""
    return WAIT(started(sent, group)).view(sent.shape)


def to_send(x: Tensor) -> Tensor:
    """[B, T, H, D] -> [P, T, B, H / P, D], a copy."""
    return x.unflatten(2, (RANKS, -1)).permute(2, 1, 0, 3, 4).contiguous()


def as_heads(came: Tensor) -> Tensor:
    return came.flatten(0, 1).permute(1, 0, 2, 3).contiguous()


def mine(x: Tensor, group: str = "0") -> Tensor:
    """My tokens of all heads -> all tokens of my heads."""
    return as_heads(exchanged(to_send(x), group))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def ulysses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(mine(q), mine(k), mine(v))


def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All are under way before one is waited for, and something is done meanwhile."""
    sent = [to_send(x) for x in (q, k, v)]
    came = [started(x) for x in sent]
    meanwhile = q.sum()
    return attention(*(as_heads(WAIT(y).view(x.shape)) for x, y in zip(sent, came, strict=True))) * meanwhile


def unflattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def one(x: Tensor) -> Tensor:
        sent = to_send(x).flatten(0, 1)
        return WAIT(SEND(sent, [TOKENS] * RANKS, [TOKENS] * RANKS, "0")).permute(1, 0, 2, 3)

    return attention(one(q), one(k), one(v))


def with_a_reader(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    came = mine(q)
    return attention(came, mine(k), mine(v)), came.float().exp()


def read_early(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Before the next is sent."""
    came = mine(q).float().exp().to(q.dtype)
    return attention(came, mine(k), mine(v))


def computed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Not copied to be sent: in 4 bits this is in an epilogue."""
    return tuple(exchanged(x.flatten(2).unflatten(1, (RANKS, -1)) * 2.0).exp() for x in (q, k, v))


def uneven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One rank has more tokens than the other."""

    def one(x: Tensor) -> Tensor:
        sent = to_send(x).flatten(0, 1)
        return WAIT(SEND(sent, [TOKENS, TOKENS - 1], [TOKENS, TOKENS], "0")).permute(1, 0, 2, 3)

    return attention(one(q), one(k), one(v))


def dependent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    came = mine(q)
    return attention(came, mine(k * came.mean()), mine(v))


def with_a_sum_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = mine(q), mine(k)
    return attention(q, k, mine(v * WAIT(SUM(v.mean(), "sum", "0"))))


def sent_and_read(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    sent = to_send(q)
    return attention(as_heads(exchanged(sent)), mine(k), mine(v)), sent.exp()


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    came = exchanged(to_send(q))
    return attention(as_heads(came), mine(k), mine(v)), came


def as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Read as rows longer than those that were sent."""
    q, k, v = (exchanged(to_send(x)).flatten(3) for x in (q, k, v))
    return q * k + v


def as_they_came(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(WAIT(started(to_send(x))) * 2.0 for x in (q, k, v))


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q.add_(1.0)
    return ulysses(q, k, v)


# How many exchanges of three are left.
CASES: list[tuple[Callable, int]] = [
    (ulysses, 1),
    (late, 1),
    (unflattened, 1),
    (with_a_reader, 1),
    (read_early, 1),
    (lambda q, k, v: ulysses(q, k[..., :2, :], v[..., :2, :]), 2),  # fewer heads
    (lambda q, k, v: attention(mine(q[:, :4]), mine(k), mine(v)), 2),  # fewer tokens
    (lambda q, k, v: attention(mine(q), mine(k), mine(v, "1")), 2),  # another group
    (lambda q, k, v: attention(mine(q), mine(k, "1"), mine(v)), 3),
    (lambda q, k, v: attention(mine(q), mine(k), mine(v.float()).to(v.dtype)), 2),  # another dtype
    (dependent, 2),
    (with_a_sum_between, 2),
    (sent_and_read, 2),
    (uneven, 3),
    (returned, 3),
    (as_rows, 3),
    (as_they_came, 3),
    (computed, 3),
    (written, 3),
    (lambda q, k, v: tuple(exchanged(x).exp() for x in (q, k, v)), 3),  # what others hold is sent as it is
    (lambda q, k, v: ulysses(*(x[..., :4].contiguous() for x in (q, k, v))), 3),  # rows of 8 bytes
]


def heads(samples: int = 1, seed: int = 0) -> list[Tensor]:
    """q, k and v [B, T, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, TOKENS, HEADS, CHANNELS)
    return [torch.randn(*shape, generator=generator).to(torch.bfloat16) for _ in range(3)]


def traced(function: Callable, samples: int = 1, mode: str = "fake") -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(function, tracing_mode=mode)(*heads(samples))  # type: ignore[arg-type]


def exchanges(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=SEND))


def on_all_ranks(gm: fx.GraphModule, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
    """The outputs of each rank, which get such inputs: all do one node after another, and hand over what is sent."""
    ranks = [fx.Interpreter(gm) for _ in inputs]
    for rank, given in zip(ranks, inputs, strict=True):
        rank.args_iter = iter(x.clone() for x in given)
    for node in gm.graph.nodes:
        if node.target is SEND:
            given = [rank.map_nodes_to_values(node.args, node) for rank in ranks]
            parts = [sent.split(splits) for sent, _, splits, _ in given]
            results = [torch.cat([sender[place] for sender in parts]) for place in range(len(ranks))]
        elif node.target is SUM:
            total = sum(rank.env[node.args[0]] for rank in ranks)
            results = [total for _ in ranks]
        else:
            results = [rank.run_node(node) for rank in ranks]
        for rank, result in zip(ranks, results, strict=True):
            rank.env[node] = result
    return [[result] if isinstance(result, Tensor) else list(result) for result in results]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("as_inductor_has_it", [False, True])
@pytest.mark.parametrize(("function", "left"), CASES)
def test_near_misses(function: Callable, left: int, as_inductor_has_it: bool, samples: int) -> None:
    gm = traced(function, samples)
    for node in gm.graph.find_nodes(op="call_function", target=aten.view.default) if as_inductor_has_it else ():
        node.target = aten.reshape.default
    inputs = [heads(samples, seed) for seed in range(RANKS)]
    expected = on_all_ranks(gm, inputs) if function is not uneven else None
    pipeline.run(gm, [join_exchanges])  # checked by verify.py: run again it changes nothing
    assert exchanges(gm) == left
    if expected is not None:
        torch.testing.assert_close(on_all_ranks(gm, inputs), expected, rtol=0, atol=0)


class Ulysses(nn.Module):
    forward = staticmethod(ulysses)


def test_any_number_of_tokens() -> None:
    dynamic = {name: {1: Dim("tokens", min=2)} for name in "qkv"}
    gm = torch.export.export(Ulysses(), tuple(heads()), dynamic_shapes=dynamic).run_decompositions({}).graph_module
    inputs = [[x[:, :4] for x in heads(seed=seed)] for seed in range(RANKS)]
    expected = on_all_ranks(gm, inputs)
    pipeline.run(gm, [join_exchanges])
    assert exchanges(gm) == 1
    torch.testing.assert_close(on_all_ranks(gm, inputs), expected, rtol=0, atol=0)


def test_it_is_waited_for_as_late_as_before() -> None:
    gm = traced(late)
    pipeline.run(gm, [join_exchanges])
    order = [node.target for node in gm.graph.nodes if node.target in (SEND, aten.sum.default, WAIT)]
    assert order == [SEND, aten.sum.default, WAIT]


def test_two_attentions_that_depend_on_nothing_are_sent_together() -> None:
    gm = traced(lambda q, k, v: ulysses(q, k, v) + ulysses(v, k, q))
    pipeline.run(gm, [join_exchanges])
    assert exchanges(gm) == 1


@pytest.fixture
def first_of_two() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_inductor_writes_what_is_sent_and_attention_reads_what_came(as_on_a_gpu: bool) -> None:
    """Nothing is copied but q, k and v, as before, by one kernel."""
    rewrite = partial(fuse, fusions=["exchanges"])
    gm = traced(lambda q, k, v: (ulysses(q, k, v),))
    with torch._inductor.config.patch(force_disable_caches=True, force_pointwise_cat=as_on_a_gpu):
        (text,) = run_and_get_code(compile_with_inductor, gm, heads(), None, rewrite)[1]
    lines = [line.strip() for line in text.splitlines()]
    assert sum(line.startswith("cpp_fused") and "async_compile" not in line for line in lines) == 1
    attention = next(line for line in lines if "_scaled_dot_product" in line and "torch.ops" in line)
    (came,) = {*re.findall(r"reinterpret_tensor\((\w+), ", attention)}
    assert any(line.startswith(f"{came} = torch.ops._c10d_functional.all_to_all_single") for line in lines)


@pytest.mark.usefixtures("without_inductor")
def test_compiled_code_goes_past_autograd() -> None:
    """As an exchange has it, autograd's part of this operator is Python."""
    asked: list[bool] = []

    def by_autograd(keys: torch.DispatchKeySet, x: Tensor) -> Tensor:
        asked.append(True)
        return send.redispatch(keys & torch._C._after_autograd_keyset, x)

    class Sending(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(send(x))

    with torch.library._scoped_library("svdq_test_exchanges", "DEF") as library, torch.no_grad():
        library.define("send(Tensor x) -> Tensor")
        library.impl("send", torch.clone, "CompositeExplicitAutograd")
        library.impl("send", by_autograd, "Autograd", with_keyset=True)
        send = torch.ops.svdq_test_exchanges.send.default
        model, x = compiled(Sending(128, 128)), torch.randn(2, 128)
        model(x)  # observed, eagerly
        observed = len(asked)
        assert observed > 0
        model(x)  # traced
        del asked[:]
        model(x)
        assert not asked


class Net(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return ulysses(*3 * [super().forward(x).view(1, -1, HEADS, CHANNELS)])


def fails(*_: Any) -> Callable:
    raise RuntimeError("a bug")


def is_released(*_: Any) -> Callable:
    raise WeightsReleased("q", "a graph", "")


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize(
    ("inductor", "fuse", "error"),
    [
        (fails, True, r"a bug\. Mend that, or .* on all ranks, with options=\{'fuse': \['epilogues', "),
        (fails, ["epilogues"], None),  # sent one by one, compiled or not
        (lambda *_: fails, True, r"the first call .* a bug\. Mend that, or .* with options=\{'fuse': \['epilogues', "),
        (lambda *_: fails, ["epilogues"], None),
        (is_released, True, r"needs the 16-bit weight of q.* Mend that, or .* with options=\{'fuse': \['epilogues', "),
        (is_released, ["epilogues"], None),
    ],
)
def test_no_rank_sends_what_others_do_not_expect(
    inductor: Callable, fuse: Any, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdq_compile.compiled.compile_with_inductor", inductor)
    with torch.no_grad():
        model, x = compiled(Net(128, HEADS * CHANNELS), fuse=fuse, fallback=True, group="alone"), torch.randn(2, 128)
        model(x)
        if error is None:
            assert model(x).shape == (1, RANKS * 2, HEADS // RANKS, CHANNELS)
            return
        for _ in range(2):
            with pytest.raises(Exception, match=error):
                model(x)


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize("fuse", [True, ["epilogues"]])
def test_a_rank_without_memory_to_quantize_does_not_send_alone(fuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have quantized, and compile."""

    def convert(*_: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("svdq_compile.observing.convert", convert)
    model, x = compiled(Net(128, HEADS * CHANNELS), fuse=fuse, fallback=True, group="alone"), torch.randn(2, 128)
    refused = pytest.raises(SendsAlone, match=r"quantizing .* none left\. .* options=\{'fuse': \['epilogues', ")
    with refused if fuse is True else nullcontext():
        assert model(x).shape == (1, RANKS * 2, HEADS // RANKS, CHANNELS)


@pytest.mark.usefixtures("first_of_two")
def test_a_failed_first_call_goes_on_where_nothing_could_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    class Summing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return WAIT(SUM(super().forward(x), "sum", "0"))

    monkeypatch.setattr("svdq_compile.compiled.compile_with_inductor", lambda *_: fails)
    model, x = compiled(Summing(128, 128), fallback=True, group="alone"), torch.randn(2, 128)
    assert relative_error(model(x), model(x)) < 0.2  # in 16 bits, in 4 bits


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize(
    ("model", "fuse", "names"),
    [(Net(128, HEADS * CHANNELS), True, ["exchanges"]), (Net(128, HEADS * CHANNELS), ["epilogues"], None),
     (nn.Linear(128, 128), True, None)],
)  # fmt: skip
def test_a_graph_in_16_bits_is_rewritten_where_it_sends(
    model: nn.Module, fuse: Any, names: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrites: list[Any] = []

    def inductor(gm: fx.GraphModule, inputs: list, mode: str | None, rewrite: Callable | None) -> Callable:
        rewrites.append(rewrite and rewrite.keywords["fusions"])
        return gm.forward

    monkeypatch.setattr("svdq_compile.undecided.compile_with_inductor", inductor)
    call = compiled(model, fuse=fuse, skip=["*"], group="alone")
    for _ in range(2):  # the first only finds out that nothing is to be quantized
        call(torch.randn(2, 128))
    assert rewrites == [names]


class OfTheirs(CustomGraphPass):
    """Counts exchanges."""

    def __init__(self, name: str | None) -> None:
        self.name, self.seen = name, list[int]()

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(len(graph.find_nodes(op="call_function", target=SEND)))

    def uuid(self) -> Any:
        return self.name


@pytest.mark.parametrize("several", [False, True])
def test_a_pass_of_somebody_else_runs_first(several: bool) -> None:
    theirs, rewrite = OfTheirs("theirs"), partial(fuse, fusions=["exchanges"])
    alone = inductor._aten_pass(rewrite).uuid()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=[theirs] if several else theirs):
        both = inductor._aten_pass(rewrite)
    gm = traced(ulysses)
    both(gm.graph)
    assert theirs.seen == [3]
    assert exchanges(gm) == 1
    assert both.uuid() not in (alone, None)


@pytest.mark.parametrize("theirs", [OfTheirs(None), lambda graph: None])
def test_inductors_caches_are_passed_by_where_a_pass_has_no_identity(theirs: Callable) -> None:
    with torch._inductor.config.patch(post_grad_custom_pre_pass=theirs):
        assert inductor._aten_pass(partial(fuse, fusions=["exchanges"])).uuid() is None


@pytest.mark.parametrize("namespace", ["_c10d_functional", "_c10d_functional_autograd"])
def test_collectives_that_know_gradients_are_collectives(namespace: str) -> None:
    send = getattr(torch.ops, namespace).all_to_all_single
    for target in (send, send.default):
        graph = fx.Graph()
        graph.output(graph.call_function(target, (graph.placeholder("x"), [1], [1], "0")))
        gm = fx.GraphModule({}, graph)
        assert may_send(gm, "all_to_all_single")
        assert not may_send(gm, "all_reduce")
    assert [node.target for node in collectives(graph)] == [send.default]


class Layers(nn.Module):
    """What `send` does with its linears, and a linear of that."""

    def __init__(self, send: Callable) -> None:
        super().__init__()
        self.send = send
        self.q, self.k, self.v, self.gate = (nn.Linear(128, HEADS * CHANNELS) for _ in range(4))
        self.o = nn.Linear(HEADS * CHANNELS, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.send(self, x).reshape(1, -1, HEADS * CHANNELS))


def product(model: Layers, x: Tensor, send: Callable) -> Tensor:
    return exchanged(send(model.q(x))) * exchanged(send(model.k(x)))


def heads_of(model: Layers, x: Tensor) -> Tensor:
    return ulysses(*(layer(x).unflatten(-1, (HEADS, CHANNELS)) for layer in (model.q, model.k, model.v)))


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize(
    ("send", "left"),
    [
        (heads_of, 1),
        (lambda model, x: product(model, x, lambda y: y), 2),
        (lambda model, x: product(model, x, F.gelu), 2),
        (lambda model, x: product(model, x, lambda y: y * 0.3), 2),
        (lambda model, x: product(model, x, lambda y: F.silu(model.gate(x)) * y), 2),
    ],
)
def test_whatever_is_quantized(send: Callable, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that quantize each for itself may leave other layers in 16 bits."""
    graphs = run_as_aten(monkeypatch)
    monkeypatch.setattr("svdq_compile.undecided.compile_with_inductor", compiled_module.compile_with_inductor)
    for skip in ([], ["q"], ["q", "k", "v"], ["o"], ["*"]):
        del graphs[:]
        run(
            Layers(send).to(torch.bfloat16), (torch.randn(1, TOKENS, 128).to(torch.bfloat16),), skip=skip, group="alone"
        )
        assert [exchanges(gm) for gm in graphs] == [left], skip


class TestGraph(TestCase):
    """Read the difference before a new one is accepted."""

    maxDiff = None

    def test_two(self) -> None:
        gm = traced(lambda q, k, v: mine(q) * mine(k))
        pipeline.run(gm, [join_exchanges])
        self.assertExpectedInline(
            show(gm),
            """\
q_1 = input
k_1 = input
v_1 = input
view = view(q_1, [1, 6, 2, 2, 16])
permute = permute(view, [2, 1, 0, 3, 4])
clone = clone(permute)
view_4 = view(k_1, [1, 6, 2, 2, 16])
permute_2 = permute(view_4, [2, 1, 0, 3, 4])
clone_1 = clone(permute_2)
cat_default = cat([clone, clone_1], 4)
view_default = view(cat_default, [-1, 2])
all_to_all_single_default = all_to_all_single(view_default, [192, 192], [192, 192], 0)
wait_tensor_default = wait_tensor(all_to_all_single_default)
view_default_1 = view(wait_tensor_default, [-1, 32])
slice_tensor = slice.Tensor(view_default_1, 1, 0, 16)
view_2 = view(slice_tensor, [2, 6, 1, 2, 16])
view_3 = view(view_2, [12, 1, 2, 16])
permute_1 = permute(view_3, [1, 0, 2, 3])
slice_tensor_1 = slice.Tensor(view_default_1, 1, 16, 32)
view_6 = view(slice_tensor_1, [2, 6, 1, 2, 16])
view_7 = view(view_6, [12, 1, 2, 16])
permute_3 = permute(view_7, [1, 0, 2, 3])
mul = mul.Tensor(permute_1, permute_3)
return mul""",
        )
