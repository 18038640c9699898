"""Fused operators and whole fused models on a CUDA device: python -m pytest tests/gpu/test_fusion_gpu.py."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import error
from torch import Tensor, nn

from conftest import compiled, net, relative_error
from conftest import inputs as cpu_inputs
from svdq_compile import Config
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.lowering import fused, ops, reference
from svdq_compile.lowering.packed import PackedLinear
from svdq_compile.lowering.region import parse
from svdq_compile.quantizer import quantize_group

if not torch.cuda.is_available():
    raise RuntimeError("these tests need a CUDA device")

BF16 = torch.bfloat16
FLIPS = 0.02  # a bf16 rounding less or more flips codes, one step in a few hundred

NORM = """prologue(x, a0: BT, a1: BT, a2: C, a3: BC)
t0 = sub(x, a0)
t1 = mul(t0, a1)
t2 = add(a2, 1.0)
t3 = mul(t1, t2)
t4 = add(t3, a3)""".replace("\n", "; ")
JOINED = "prologue(x, right); t0 = tanh(x); t1 = mul(t0, 2.0)"
GATED = "prologue(x, a0: BTC); t0 = sigmoid(a0); t1 = mul(x, t0)"
RESIDUAL = "epilogue(y, a0: C, auxiliary: BTC); t0 = mul(a0, y); t1 = add(auxiliary, t0)"
GELU = "epilogue(y); t0 = mul(y, 0.7978845608); t1 = tanh(t0); t2 = add(t1, 1.0); t3 = mul(y, t2); t4 = bf16(t3)"
MIXED = "epilogue(y, a0: BC, a1: BT, a2: BTC, auxiliary: BTC, a3: 1); t0 = mul(y, a0); t1 = add(t0, a1); " \
    "t2 = maximum(t1, a2); t3 = add(t2, auxiliary); t4 = mul(t3, a3)"  # fmt: skip


def linear(n: int, k: int, precision: str, rank: int = 32) -> PackedLinear:
    torch.manual_seed(n + k)
    weight = (torch.randn(n, k) * k**-0.5).to("cuda", BF16)
    config = Config(precision=precision, rank=rank, refine=1)
    return quantize_group([weight], ["layer"], precision, config, InputStatistics())[0].packed


def operands(text: str, lead: tuple[int, ...], columns: int) -> list[Tensor]:
    """Random ones, each along its axes; x and `right` share the columns."""
    region = parse(text)
    shapes = {"BTC": (*lead, columns), "BT": (*lead, 1), "C": (columns,), "BC": (lead[0], 1, columns), "1": ()}
    made = [torch.randn(shapes[axes], device="cuda").to(BF16) for _, axes in region.operands]
    if "right" in region.named(made):
        made[:2] = made[0][..., : columns // 2], made[1][..., columns // 2 :]
    return made


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize("text", [NORM, JOINED, GATED])
@pytest.mark.parametrize(("lead", "k"), [((2, 77), 320), ((1, 333), 3072), ((3, 1), 128)])
def test_prologue(text: str, lead: tuple[int, ...], k: int, precision: str) -> None:
    packed = linear(128, k, precision)
    shared = packed.shared
    inputs = operands(text, lead, k)
    named = dict(zip((n for n, _ in parse(text).operands), inputs, strict=True))
    x = torch.cat((named.pop("x"), named.pop("right")), -1) if "right" in named else named.pop("x")
    h = parse(text).evaluate({"x": x, **named}).to(BF16)
    expected = reference.gemm(
        *reference.quantize(h, shared.smooth, shared.down, precision, 0.0), list(packed.plain_weight), packed.up, None,
        None, precision, torch.float32,
    )  # fmt: skip
    quantized = ops.fused_quantize(inputs, shared.smooth, shared.down, precision, 0.0, text)
    result = ops.gemm(*quantized, list(packed.weight), packed.up, None, None, precision, BF16)
    assert error(result, expected) < FLIPS


GEGLU = "gate(y, right); t0 = mul(right, 0.7071067811865476); t1 = erf(t0); t2 = add(t1, 1.0); " \
    "t3 = mul(right, 0.5); t4 = mul(t3, t2); t5 = mul(y, t4)"  # fmt: skip
SCALED = "gate(y, right, a0: C, a1: BTC); t0 = sigmoid(y); t1 = mul(t0, right); t2 = mul(t1, a0); t3 = add(t2, a1)"


@pytest.mark.parametrize("kernels", ["", "ampere_gemm_w4a8", "portable_gemm"])
@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize("text", [GEGLU, SCALED])
@pytest.mark.parametrize(
    ("lead", "features", "k", "rank"),
    [((2, 77), 80, 192, 32), ((1, 333), 2560, 640, 16), ((4, 1), 96, 320, 0), ((2, 4096), 2560, 640, 32),
     ((1, 16), 5120, 1280, 48), ((2, 1024), 5120, 1280, 32)],
)  # fmt: skip
def test_gate(
    text: str, lead: tuple[int, ...], features: int, k: int, rank: int, precision: str, kernels: str, monkeypatch
) -> None:
    """Both halves of the features in one tile, by every kernel; halves that end within a tile."""
    monkeypatch.setenv("SVDQ_KERNELS", kernels)
    packed = linear(2 * features, k, precision, rank)
    x = torch.randn(*lead, k, device="cuda").to(BF16)
    quantized = ops.quantize(x, packed.shared.smooth, packed.shared.down, precision, 0.0)
    plain = (*quantized, list(packed.weight), packed.up, None, None, precision)
    left, right = ops.gemm(*plain, torch.float32).chunk(2, -1)
    inputs = operands(text, lead, features)
    named = parse(text).named(inputs)
    expected = parse(text).evaluate(named | {"y": left, "right": right})
    for _ in range(3):
        y = ops.fused_gemm(*plain, BF16, inputs, text)
        assert y.shape == (*lead, features)
        assert error(y, expected) < 4e-3


@pytest.mark.parametrize("precision", ["w4a8", "int4"])
@pytest.mark.parametrize("text", [RESIDUAL, GELU, MIXED])
@pytest.mark.parametrize(("lead", "n"), [((2, 77), 192), ((1, 333), 3072), ((4, 1), 200), ((2, 1024), 1536)])
def test_epilogue(text: str, lead: tuple[int, ...], n: int, precision: str) -> None:
    packed = linear(n, 256, precision)
    x = torch.randn(*lead, 256, device="cuda").to(BF16)
    quantized = ops.quantize(x, packed.shared.smooth, packed.shared.down, precision, 0.0)
    rest = (*quantized, list(packed.weight), packed.up, None, None, precision)
    inputs = operands(text, lead, n)
    named = dict(zip((name for name, _ in parse(text).operands), inputs, strict=True))
    expected = parse(text).evaluate({"y": ops.gemm(*rest, torch.float32), **named})
    assert error(ops.fused_gemm(*rest, BF16, inputs, text), expected) < 4e-3


def test_strange_operands() -> None:
    """Strided, expanded, misaligned, and side by side in one tensor: copied if they must be, never misread."""
    packed, lead, n = linear(256, 256, "w4a8"), (2, 40), 256
    x = torch.randn(*lead, 256, device="cuda").to(BF16)
    quantized = ops.quantize(x, packed.shared.smooth, packed.shared.down, "w4a8", 0.0)
    rest = (*quantized, list(packed.weight), packed.up, None, None, "w4a8")
    y = ops.gemm(*rest, torch.float32)
    wide = torch.randn(2, 40, 2 * n + 2, device="cuda").to(BF16)
    gate = torch.randn(2 * n, device="cuda").to(BF16)[::2]
    for auxiliary in (wide[..., :n], wide[..., 1 : n + 1], wide[..., ::2][..., :n], wide[:, :1, :n].expand(*lead, n),
                   wide[..., :n].transpose(0, 1).contiguous().transpose(0, 1)):  # fmt: skip
        expected = auxiliary.float() + gate.float() * y
        assert error(ops.fused_gemm(*rest, BF16, [gate, auxiliary], RESIDUAL), expected) < 4e-3


def test_no_rows() -> None:
    packed = linear(256, 256, "w4a8")
    inputs = operands(NORM, (2, 0), 256)
    quantized = fused.quantize(inputs, packed.shared.smooth, packed.shared.down, "w4a8", 0.0, NORM)
    rest = (*quantized, list(packed.weight), packed.up, None, None, "w4a8", BF16)
    assert ops.fused_gemm(*rest, operands(RESIDUAL, (2, 0), 256), RESIDUAL).shape == (2, 0, 256)


def test_row_moments() -> None:
    for shape in ((2, 77, 3072), (1, 5, 513), (3, 0, 512)):
        x = (torch.randn(shape, device="cuda") + 10.0).to(BF16)
        for result, expected in zip(ops.row_moments(x), reference.row_moments(x), strict=True):
            assert result.shape == expected.shape
            assert error(result, expected) < 1e-5


class Block(nn.Module):
    def __init__(self, width: int = 512) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_v = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:]) * (1 + gate) + gate
        attention = F.scaled_dot_product_attention(*(t.unflatten(-1, (8, -1)).transpose(1, 2) for t in
                                                     (self.to_q(h), self.to_v(h), self.to_v(h))))  # fmt: skip
        attention = attention.transpose(1, 2).flatten(2)
        h = torch.cat((attention, F.gelu(self.up(h), approximate="tanh")), -1)
        return x + gate * self.down(h)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_block_fused_is_the_block_unfused(mode: str | None) -> None:
    x, gate = torch.randn(2, 200, 512, device="cuda").to(BF16), torch.randn(2, 1, 512, device="cuda").to(BF16)
    outputs = []
    for fuse in (True, False):
        torch._dynamo.reset()
        model = Block().to("cuda", BF16).requires_grad_(False)
        exact = model(x, gate)
        run = compiled(model, fuse=fuse, mode=mode, precision="w4a8")
        run(x, gate)
        outputs.append([run(x, gate).clone() for _ in range(5)][-1])
        assert relative_error(outputs[-1], exact) < 0.1
    assert relative_error(*outputs) < FLIPS


@pytest.mark.parametrize("attention", ["exact", "fp8"])
def test_a_block_of_wan_fused_is_the_block_unfused(attention: str) -> None:
    """Norms over all heads, rotations written into slices; at two sizes, by plans and graphs from the third call."""
    block_class = pytest.importorskip("diffusers.models.transformers.transformer_wan").WanTransformerBlock

    def inputs(tokens: int) -> tuple:
        x, text = (torch.randn(1, n, 1024, device="cuda").to(BF16) for n in (tokens, 77))
        angle = torch.rand(1, tokens, 1, 64, device="cuda").repeat_interleave(2, -1)
        return x, text, torch.randn(1, 6, 1024, device="cuda"), (angle.cos(), angle.sin())

    torch.manual_seed(0)
    given = [inputs(tokens) for tokens in (900, 900, 333)]
    outputs = []
    for fuse in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        block = block_class(1024, 2048, 8, cross_attn_norm=True).to("cuda", BF16).requires_grad_(False)
        exact = [block(*call) for call in given[1:]]
        run = compiled(block, fuse=fuse, precision="w4a8", **({"attention": attention} if fuse else {}))
        run(*given[0])
        outputs.append([[run(*call).clone() for _ in range(5)][-1] for call in given[1:]])
        assert all(relative_error(y, expected) < 0.1 for y, expected in zip(outputs[-1], exact, strict=True))
    bound = FLIPS if attention == "exact" else 0.05
    assert all(relative_error(a, b) < bound for a, b in zip(*outputs, strict=True))


def test_another_stream_and_other_inputs_are_not_confused() -> None:
    """Replayed launches take the tensors of this call, on this call's stream."""
    model = net(dtype=BF16).cuda()
    run = compiled(model)
    many = [[t.cuda() * (1 + i) for t in cpu_inputs(dtype=BF16)] for i in range(3)]
    run(*many[0])
    expected = [run(*arguments).clone() for arguments in many]
    with torch.cuda.stream(torch.cuda.Stream()):
        results = [run(*arguments).clone() for arguments in many for _ in range(3)]
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i // 3])
