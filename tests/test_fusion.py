"""The fusing passes: on blocks of five models, on near misses, and on random graphs against the same graph unfused."""

import random

import expecttest
import pytest
import torch
import torch.nn.functional as F
from fusion_testing import (
    ROUNDING,
    Two,
    compare,
    count,
    elementwise_before_quantize,
    regions,
    run,
    run_as_aten,
    tokens,
    zoo,
)
from torch import Tensor, fx, nn

from conftest import WIDTH, relative_error
from svdq_compile.config import FUSIONS
from svdq_compile.lowering import ops
from svdq_compile.passes import FUSING
from svdq_compile.passes.vocabulary import operation

FIVE = ["flux", "sd3", "pixart", "qwen_image", "wan"]


def own_buffers(model: nn.Module) -> nn.Module:
    """SD3's position table is a view of an fp32 tensor after the cast, which Dynamo cannot take in."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())
    return model


def fused_and_not(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[fx.GraphModule], Tensor, Tensor]:
    """The fused graphs of a zoo model, and its outputs fused and unfused."""
    graphs = run_as_aten(monkeypatch)
    model, inputs, regional = zoo(name)
    fused = run(own_buffers(model), inputs, regional)
    seen = list(graphs)
    model, inputs, regional = zoo(name)
    return seen, fused, run(own_buffers(model), inputs, regional, fuse=False)


@pytest.mark.parametrize("name", FIVE)
def test_a_model_fused_is_the_model_unfused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, fused, unfused = fused_and_not(name, monkeypatch)
    assert 0 < relative_error(fused, unfused) < ROUNDING
    assert count(graphs, ops.fused_quantize) >= 2
    assert count(graphs, ops.fused_gemm) >= 2
    for gm in graphs:
        assert elementwise_before_quantize(gm) == []
        assert residuals_left(gm) == []


def residuals_left(gm: fx.GraphModule) -> list[str]:
    """Elementwise operations that alone read the result of a GEMM."""
    gemms = [n for target in (ops.gemm, ops.fused_gemm) for n in gm.graph.find_nodes(op="call_function", target=target)]
    followers = [next(iter(n.users)) for n in gemms if len(n.users) == 1]
    return [
        str(n.target)
        for n in followers
        if (found := operation(n)) is not None and found[0] != "" and all(not operation(m) for m in n.all_input_nodes)
    ]


class Test(expecttest.TestCase):
    """What becomes of the first block of each model: its regions, as the operators carry them."""

    maxDiff = None

    def regions_of(self, name: str) -> str:
        with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
            graphs = run_as_aten(monkeypatch)
            model, inputs, regional = zoo(name)
            run(own_buffers(model), inputs, regional)
        return "\n\n".join(regions(graphs))

    def test_flux(self) -> None:
        self.assertExpectedInline(
            self.regions_of("flux"),
            """\
prologue(x, a0: BT, a1: BT, a2: C, a3: C)
t0 = add(a0, 1e-06)
t1 = rsqrt(t0)
t2 = sub(x, a1)
t3 = mul(t2, t1)
t4 = bf16(t3)
t5 = add(a2, 1.0)
t6 = mul(t4, t5)
t7 = add(t6, a3)

epilogue(y, a0: C, auxiliary: BTC)
t0 = mul(a0, y)
t1 = add(auxiliary, t0)

epilogue(y)
t0 = mul(y, y)
t1 = mul(t0, y)
t2 = mul(t1, 0.044715)
t3 = add(y, t2)
t4 = mul(t3, 0.7978845608028654)
t5 = mul(y, 0.5)
t6 = tanh(t4)
t7 = add(t6, 1.0)
t8 = mul(t5, t7)
t9 = bf16(t8)

prologue(x, right)""",
        )

    def test_sd3(self) -> None:
        self.assertExpectedInline(
            self.regions_of("sd3"),
            """\
prologue(x, a0: BC, a1: BC)
t0 = add(a0, 1.0)
t1 = mul(x, t0)
t2 = add(t1, a1)

prologue(x, a0: BT, a1: BT, a2: BC, a3: BC)
t0 = add(a0, 1e-06)
t1 = rsqrt(t0)
t2 = sub(x, a1)
t3 = mul(t2, t1)
t4 = bf16(t3)
t5 = add(a2, 1.0)
t6 = mul(t4, t5)
t7 = add(t6, a3)

epilogue(y, a0: BC)
t0 = mul(a0, y)

epilogue(y, a0: BC, auxiliary: BTC, a1: BTC)
t0 = mul(a0, y)
t1 = add(auxiliary, t0)
t2 = add(t1, a1)

epilogue(y)
t0 = mul(y, y)
t1 = mul(t0, y)
t2 = mul(t1, 0.044715)
t3 = add(y, t2)
t4 = mul(t3, 0.7978845608028654)
t5 = mul(y, 0.5)
t6 = tanh(t4)
t7 = add(t6, 1.0)
t8 = mul(t5, t7)
t9 = bf16(t8)

epilogue(y, a0: BC, auxiliary: BTC)
t0 = mul(a0, y)
t1 = add(auxiliary, t0)

prologue(x, a0: BT, a1: BT, a2: BC, a3: BC)
t0 = add(a0, 1e-06)
t1 = rsqrt(t0)
t2 = sub(x, a1)
t3 = mul(t2, t1)
t4 = bf16(t3)
t5 = mul(t4, a2)
t6 = add(t5, a3)""",
        )

    def test_pixart(self) -> None:
        self.assertExpectedInline(
            self.regions_of("pixart"),
            """\
prologue(x, a0: BT, a1: BT, a2: BC, a3: BC)
t0 = add(a0, 1e-06)
t1 = rsqrt(t0)
t2 = sub(x, a1)
t3 = mul(t2, t1)
t4 = bf16(t3)
t5 = add(a2, 1.0)
t6 = mul(t4, t5)
t7 = add(t6, a3)

epilogue(y, a0: BC, auxiliary: BTC)
t0 = mul(a0, y)
t1 = add(t0, auxiliary)

epilogue(y, auxiliary: BTC)
t0 = add(y, auxiliary)

epilogue(y)
t0 = mul(y, y)
t1 = mul(t0, y)
t2 = mul(t1, 0.044715)
t3 = add(y, t2)
t4 = mul(t3, 0.7978845608028654)
t5 = mul(y, 0.5)
t6 = tanh(t4)
t7 = add(t6, 1.0)
t8 = mul(t5, t7)
t9 = bf16(t8)""",
        )

    def test_qwen_image(self) -> None:
        self.assertExpectedInline(
            self.regions_of("qwen_image"),
            """\
prologue(x, a0: BT, a1: BT, a2: BC, a3: BC)
t0 = add(a0, 1e-06)
t1 = rsqrt(t0)
t2 = sub(x, a1)
t3 = mul(t2, t1)
t4 = bf16(t3)
t5 = add(a2, 1.0)
t6 = mul(t4, t5)
t7 = add(t6, a3)

epilogue(y, a0: BC, auxiliary: BTC)
t0 = mul(a0, y)
t1 = add(auxiliary, t0)

epilogue(y)
t0 = mul(y, y)
t1 = mul(t0, y)
t2 = mul(t1, 0.044715)
t3 = add(y, t2)
t4 = mul(t3, 0.7978845608028654)
t5 = mul(y, 0.5)
t6 = tanh(t4)
t7 = add(t6, 1.0)
t8 = mul(t5, t7)
t9 = bf16(t8)""",
        )

    def test_wan(self) -> None:
        self.assertExpectedInline(
            self.regions_of("wan"),
            """\
prologue(x, a0: BT, a1: BT, a2: BC, a3: BC)
t0 = add(a0, 1e-06)
t1 = rsqrt(t0)
t2 = sub(x, a1)
t3 = mul(t2, t1)
t4 = add(a2, 1.0)
t5 = mul(t3, t4)
t6 = add(t5, a3)
t7 = bf16(t6)

epilogue(y, a0: BC, auxiliary: BTC)
t0 = mul(y, a0)
t1 = add(auxiliary, t0)
t2 = bf16(t1)

prologue(x, a0: BT, a1: BT, a2: C, a3: C)
t0 = add(a0, 1e-06)
t1 = rsqrt(t0)
t2 = sub(x, a1)
t3 = mul(t2, t1)
t4 = mul(t3, a2)
t5 = add(t4, a3)
t6 = bf16(t5)

epilogue(y, auxiliary: BTC)
t0 = add(auxiliary, y)

epilogue(y)
t0 = mul(y, y)
t1 = mul(t0, y)
t2 = mul(t1, 0.044715)
t3 = add(y, t2)
t4 = mul(t3, 0.7978845608028654)
t5 = mul(y, 0.5)
t6 = tanh(t4)
t7 = add(t6, 1.0)
t8 = mul(t5, t7)
t9 = bf16(t8)""",
        )


# ** near misses: what must not be fused, or not further **


def flat(*values: Tensor) -> Tensor:
    """Several outputs as one, each of norm 1, so that all of them are compared."""
    return torch.cat([(v.float() / (v.float().norm() + 1e-3)).reshape(-1) for v in values])


def by_columns(x):
    """The same values, the elements of a column side by side in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    ("around", "epilogues", "prologues"),
    [
        # The result is an output too: stored as it is, and what follows is not fused into it.
        (lambda a, b, x: flat(y := a(x), b(F.gelu(y))), 0, 1),
        # Two readers.
        (lambda a, b, x: b(torch.tanh(y := a(x)) * torch.exp(-y.abs())), 1, 0),
        (lambda a, b, x: flat(torch.tanh(y := a(x)), b(y)), 0, 0),
        # A residual on both sides of the product, and one that depends on the product itself.
        (lambda a, b, x: b(a(x) + x) + x, 2, 0),
        (lambda a, b, x: (y := a(x)) + y.mean(-1, keepdim=True), 0, 0),
        (lambda a, b, x: a(x) * a(x).sum(), 1, 0),
        (lambda a, b, x: (t := torch.tanh(a(x))) * t.mean(-1, keepdim=True), 1, 0),
        # Another linear's result beside: the second one is fused, and the first one only stored.
        (lambda a, b, x: F.silu(a(x)) * b(x), 1, 0),
        # Written in place, and into a view.
        (lambda a, b, x: a(x).add_(x).relu_(), 1, 0),
        (lambda a, b, x: flat((y := a(x)), y[:, :3].mul_(0.5), b(y)), 0, 0),
        (lambda a, b, x: b(a(x).mul_(2.0)), 1, 0),
        # Shapes that do not lie along the block.
        (lambda a, b, x: a(x)[None] + torch.ones(3, 1, 1, 1, dtype=x.dtype), 0, 0),
        (lambda a, b, x: b(a(x).transpose(0, 1) * 2.0), 0, 1),
        (lambda a, b, x: a(x).view(2, 24, 4, -1) * torch.ones(4, 1, dtype=x.dtype), 0, 0),
        (lambda a, b, x: a(x) + torch.arange(24.0, dtype=x.dtype)[:, None], 0, 0),
        # Division by one is nothing, for others and by itself; adding zero is not.
        (lambda a, b, x: torch.tanh(a(x) / 1.0) + 0.0 * x, 1, 0),
        (lambda a, b, x: b(torch.tanh(a(x) / 1.0)), 1, 0),
        # Wider results are not stored by the GEMM; casts to bf16 within round.
        (lambda a, b, x: a(x).float(), 0, 0),
        (lambda a, b, x: (a(x).float() * 3.0 + x.float()).to(x.dtype), 1, 0),
        # Norms: the mean stays outside, the rest goes in; of one tensor, for two linears with inputs of their own.
        (lambda a, b, x: a(F.layer_norm(x, (WIDTH,))), 0, 1),
        (lambda a, b, x: a(F.rms_norm(x, (WIDTH,)) * 2.0) + b(F.rms_norm(x, (WIDTH,))), 1, 2),
        # Side by side.
        (lambda a, b, x: a(torch.cat((x[..., :32], F.gelu(x[..., 32:])), -1)), 0, 1),
        (lambda a, b, x: a(torch.cat((x[:, :8], x[:, 8:] * 2.0), 1)), 0, 0),
        (lambda a, b, x: a(torch.cat((x[..., :32], x[..., 32:64], x[..., 64:]), -1) * 1.5), 0, 1),
        # Integers, comparisons, dropout left on, and an epilogue with alpha.
        (lambda a, b, x: a(x) * (x > 0), 0, 0),
        (lambda a, b, x: torch.where(x > 0, a(x), x), 0, 0),
        (lambda a, b, x: torch.add(a(x), x, alpha=2.0), 0, 0),
        (lambda a, b, x: a(x) // 0.5, 0, 0),
        # Modulation of each sample, gated halves of one tensor, strange strides.
        (lambda a, b, x: a(x * x[:, :1] + x[:, 1:2]), 0, 1),
        (lambda a, b, x: b(F.silu((h := torch.cat((x, x * 0.5), -1).flip(-1))[..., ::2]) * h[..., 1::2]), 0, 1),
        (lambda a, b, x: b(a(x.transpose(0, 1)).transpose(0, 1) * x), 0, 1),
        (lambda a, b, x: a(x) * x.transpose(0, 1).contiguous().transpose(0, 1), 1, 0),
        # A residual that hands its strides on, to what is not fused and to what the graph returns.
        (lambda a, b, x: (by_columns(x) + a(x)).float().cumsum(1), 1, 0),
        (lambda a, b, x: b((by_columns(x) + a(x)).cumsum(1)), 1, 0),
        (lambda a, b, x: by_columns(x) + a(x), 1, 0),
    ],
)  # fmt: skip
def test_near_misses(around, epilogues: int, prologues: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = compare(around, tokens(), monkeypatch=monkeypatch)
    assert (count(graphs, ops.fused_gemm), count(graphs, ops.fused_quantize)) == (epilogues, prologues)


def test_dropout_left_on_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    model = Two(lambda a, b, x: b(F.dropout(a(x), 0.5, training=True))).to(torch.bfloat16).requires_grad_(False)
    run(model, (tokens(),))
    assert count(graphs, ops.fused_gemm) == 0


def test_dynamic_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    outputs = []
    for fuse in (True, False):
        model = Two(lambda a, b, x, g: x + g * b(F.gelu(a(F.layer_norm(x, (WIDTH,))))))
        model.to(torch.bfloat16).requires_grad_(False)
        torch._dynamo.reset()
        options = {"progress": False, "calibration_steps": 1, "refine": 1, "rank": 16, "precision": "w4a8"}
        call = torch.compile(model, backend="svdquant", dynamic=True, options=options | {"fuse": fuse})
        with torch._inductor.config.patch(force_disable_caches=True):
            outputs += [call(tokens(2, n, WIDTH), tokens(2, 1, WIDTH, seed=1)) for n in (24, 24, 7, 40)][1:]
    assert count(graphs[:1], ops.fused_gemm) == 2
    assert count(graphs[:1], ops.fused_quantize) == 1
    for a, b in zip(outputs[:3], outputs[3:], strict=True):
        assert relative_error(a, b) < ROUNDING


def test_autocast_mixes_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    outputs = []
    for fuse in (True, False):
        model = Two(lambda a, b, x: x + b(F.silu(a(F.layer_norm(x, (WIDTH,)))))).requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(model, (tokens().float(),), fuse=fuse))
    assert outputs[0].dtype == outputs[1].dtype
    assert relative_error(*outputs) < ROUNDING
    assert graphs


# ** random graphs **

UNARY = [torch.tanh, torch.sigmoid, F.silu, F.gelu, F.relu, torch.neg, torch.abs, lambda v: v.float().to(v.dtype)]
BINARY = [torch.add, torch.sub, torch.mul, torch.maximum, lambda a, b: a / (b.abs() + 1.0)]


def halves(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat((a[..., : WIDTH // 2], b[..., WIDTH // 2 :]), -1)


def turned(a: Tensor) -> Tensor:
    return a.transpose(0, 1).contiguous().transpose(0, 1)


def random_function(seed: int):
    """Up to fourteen operations between and around two linears, on values picked from everything made so far."""
    chance = random.Random(seed)
    plan = []
    for made in range(1, chance.randint(6, 14)):
        recent, other = chance.randint(max(0, made - 3), made - 1), chance.randint(0, made - 1)
        kind = chance.choice(["unary", "binary", "operand", "linear", "linear", "norm", "halves", "turn"])
        choice = {"unary": UNARY, "binary": BINARY, "operand": BINARY, "linear": [0, 1],
                  "norm": [F.layer_norm, F.rms_norm], "halves": [halves], "turn": [turned]}[kind]  # fmt: skip
        plan.append((kind, chance.choice(choice), recent, other))
    kept = chance.sample(range(1, len(plan) + 1), 2)

    def around(a, b, x, column, sample):
        made = [x]
        for kind, f, recent, other in plan:
            value = made[recent]
            if kind in ("unary", "turn"):
                made.append(f(value))
            elif kind in ("binary", "halves"):
                made.append(f(value, made[other]))
            elif kind == "operand":
                made.append(f(value, (column, sample, value.mean(-1, True))[other % 3]))
            elif kind == "linear":
                made.append((a, b)[f](value))
            else:
                made.append(f(value, (WIDTH,)))
        return flat(a(made[-1]), *(made[k] for k in kept))

    return around


@pytest.mark.parametrize("seed", range(16))
def test_random_graphs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tokens(), tokens(WIDTH, seed=1), tokens(2, 1, WIDTH, seed=2)
    compare(random_function(seed), *inputs, monkeypatch=monkeypatch)


def test_fusions_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def around(a, b, x):
        return x + b(F.gelu(a(F.layer_norm(x, (WIDTH,)))))

    for fuse, expected in ((("epilogues",), (2, 0)), (["prologues"], (0, 2)), ((), (0, 0)), (FUSIONS, (2, 1))):
        graphs = run_as_aten(monkeypatch)
        run(Two(around).to(torch.bfloat16).requires_grad_(False), (tokens(),), fuse=fuse)
        assert (count(graphs, ops.fused_gemm), count(graphs, ops.fused_quantize)) == expected
    assert tuple(FUSING) == FUSIONS


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_graph_holds_only_single_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor copies nodes into comments above its kernels, where a second line would be code."""
    graphs = run_as_aten(monkeypatch)
    model, inputs, regional = zoo(name)
    run(own_buffers(model), inputs, regional)
    nodes = [node for gm in graphs for node in gm.graph.nodes]
    assert any(node.target in (ops.fused_gemm, ops.fused_quantize) for node in nodes)
    for node in nodes:
        assert node.format_node() is None or len(node.format_node().splitlines()) == 1
        for text in (a for a in node.args if isinstance(a, str)):
            assert text.isprintable()
            assert text.isascii()
            assert not set(text) & set("'\"\\{}#")
