"""The two halves of a linear's features, multiplied by one another in its GEMM: which are, and which are left alone."""

import expecttest
import pytest
import torch
import torch.nn.functional as F
from fusion_testing import ROUNDING, compare, count, regions, run, run_as_aten, tokens, zoo
from torch import fx, nn

from conftest import WIDTH, quiet, relative_error
from svdq_compile.lowering import ops
from svdq_compile.lowering.region import parse

HALF = WIDTH // 2


def gates(graphs: list[fx.GraphModule]) -> int:
    nodes = [node for gm in graphs for node in gm.graph.find_nodes(op="call_function", target=ops.fused_gemm)]
    return sum(parse(node.args[-1]).kind == "gate" for node in nodes)


def halves(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return y.chunk(2, -1)


@pytest.mark.parametrize(
    "around",
    [
        lambda a, b, x: (h := halves(a(x)))[0] * F.gelu(h[1]),
        lambda a, b, x: F.silu((h := halves(a(x)))[0]) * h[1],
        lambda a, b, x: (y := a(x))[..., HALF:] * torch.sigmoid(y[..., :HALF]),
        lambda a, b, x: (h := a(x).split([HALF, HALF], 2))[0] * F.gelu(h[1], approximate="tanh"),
        # What else the result is made of: a value for each channel, for each element, for each token.
        lambda a, b, x: x[..., HALF:] + (h := halves(a(x)))[1] * F.silu(h[0]) * x[0, 0, :HALF] * x[..., :1],
    ],
)
def test_halves_that_become_one(around, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = compare(around, tokens(), monkeypatch=monkeypatch)
    assert (gates(graphs), count(graphs, ops.gemm)) == (1, 0)


def flat(*values: torch.Tensor) -> torch.Tensor:
    return torch.cat([v.float().reshape(-1) for v in values])


@pytest.mark.parametrize(
    "around",
    [
        # A half, or both, or the whole are read by somebody else.
        lambda a, b, x: flat((h := halves(a(x)))[0] * F.silu(h[1]), h[1]),
        lambda a, b, x: flat((h := halves(y := a(x)))[0] * F.silu(h[1]), y),
        lambda a, b, x: (h := halves(a(x)))[0] * h[1].mean(-1, keepdim=True),
        lambda a, b, x: F.silu(halves(a(x))[0]),
        # Other parts than a left and a right half.
        lambda a, b, x: (h := a(x).chunk(4, -1))[0] * F.silu(h[1]) + h[2] * h[3],
        lambda a, b, x: (y := a(x))[..., : HALF // 2] * F.silu(y[..., HALF : HALF + HALF // 2]),
        lambda a, b, x: (y := a(x))[..., ::2] * F.silu(y[..., 1::2]),
        lambda a, b, x: (h := a(x).chunk(2, 1))[0] * F.silu(h[1]),
        # The halves of two linears, and a result that takes more memory.
        lambda a, b, x: halves(a(x))[0] * F.silu(halves(b(x))[1]),
        lambda a, b, x: (h := halves(a(x)))[0].float() * h[1].float(),
    ],
)
def test_near_misses(around, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gates(compare(around, tokens(), monkeypatch=monkeypatch)) == 0


class Gated(nn.Module):
    """A gated feed-forward network."""

    def __init__(self, features: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 2 * features), nn.Linear(features, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).chunk(2, -1)
        return self.second(left * F.gelu(right))


@pytest.mark.parametrize(("features", "fused"), [(72, 1), (68, 0)])
def test_features_come_in_eights(features: int, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    model = Gated(features).to(torch.bfloat16).requires_grad_(False)
    run(model, (tokens(),))
    assert gates(graphs) == fused


@pytest.mark.parametrize("precision", ["w4a8", "int4", "nvfp4", "w8a8"])
def test_every_format_with_sizes_that_change(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and lengths are symbols after the second; no rows at all give no rows."""
    graphs = run_as_aten(monkeypatch)
    outputs = []
    for fuse in (True, False):
        torch._dynamo.reset()
        options = quiet(rank=16, refine=1, precision=precision, fuse=fuse)
        model = Gated(128).to(torch.bfloat16).requires_grad_(False)
        call = torch.compile(model, backend="svdquant", dynamic=True, options=options)
        with torch._inductor.config.patch(force_disable_caches=True):
            outputs.append([call(tokens(2, n, WIDTH)) for n in (24, 24, 7, 40, 0)][1:])
    assert (gates(graphs) >= 1) == (precision != "w8a8")
    assert all(a.shape == b.shape for a, b in zip(*outputs, strict=True))
    # int4 and nvfp4 round a flipped code further than w4a8 does
    bound = ROUNDING if precision in ("w4a8", "w8a8") else 0.06
    assert all(relative_error(a, b) < bound for a, b in zip(*outputs, strict=True) if a.numel())


class Test(expecttest.TestCase):
    """What becomes of GEGLU in a block of SDXL, as the operator carries it."""

    def test_sdxl(self) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
            graphs = run_as_aten(monkeypatch)
            model, inputs, regional = zoo("sdxl")
            run(model, inputs, regional)
        found = [text for text in regions(graphs) if text.startswith("gate")]
        self.assertExpectedInline(
            "\n\n".join(found),
            """\
gate(y, right)
t0 = mul(right, 0.5)
t1 = mul(right, 0.7071067811865476)
t2 = erf(t1)
t3 = add(t2, 1.0)
t4 = mul(t0, t3)
t5 = bf16(t4)
t6 = mul(y, t5)""",
        )
