"""Norm and rotation of heads in one kernel: what is fused, what is not, and the kernel's numbers and code."""

import re

import expecttest
import pytest
import torch
import torch.nn.functional as F
from fusion_testing import count, run, run_as_aten, zoo
from kernel_testing import builds, compile_for, compiled, error, interpreted, run_interpreted, waits_first
from torch import Tensor, fx, nn

from conftest import WIDTH, relative_error
from svdq_compile.lowering import ops
from svdq_compile.lowering.heads import parts
from svdq_compile.passes.group_sequences import _is_free

HEADS, CHANNELS = 4, WIDTH // 4
BOUND = 4e-3  # bf16 rounds to 2^-9 at most; fused arithmetic does it in fewer places

FLUX = """heads(x, a0: D, a1: BTD, a2: BTD)
t0 = mul(x, x)
t1 = row_mean(t0)
t2 = add(t1, 9.999999974752427e-07)
t3 = rsqrt(t2)
t4 = mul(x, t3)
t5 = mul(t4, a0)
t6 = bf16(t5)
t7 = even(t6)
t8 = odd(t6)
t9 = neg(t8)
t10 = pair(t9, t7)
t11 = mul(t6, a1)
t12 = mul(t10, a2)
t13 = add(t11, t12)
t14 = bf16(t13)""".replace("\n", "; ")

ALL_HEADS = """heads(x, a0: BT, a1: HD)
t0 = add(a0, 9.999999974752427e-07)
t1 = rsqrt(t0)
t2 = mul(x, t1)
t3 = mul(t2, a1)
t4 = bf16(t3)""".replace("\n", "; ")
WAN = (
    ALL_HEADS.replace("HD)", "HD, a2: BTD, a3: BTD)")
    + """
t5 = even(t4)
t6 = odd(t4)
t7 = even(a2)
t8 = odd(a3)
t9 = mul(t5, t7)
t10 = mul(t6, t8)
t11 = sub(t9, t10)
t12 = mul(t5, t8)
t13 = mul(t6, t7)
t14 = add(t12, t13)
t15 = bf16(t11)
t16 = bf16(t14)
t17 = pair(t15, t16)""".replace("\n", "; ")
)
LTX = (
    ALL_HEADS.replace("HD)", "HD, a2: BTHD, a3: BTHD)").replace("9.999999974752427e-07", "9.999999747378752e-06")
    + """
t5 = even(t4)
t6 = odd(t4)
t7 = neg(t6)
t8 = pair(t7, t5)
t9 = mul(t4, a2)
t10 = mul(t8, a3)
t11 = add(t9, t10)
t12 = bf16(t11)""".replace("\n", "; ")
)


def texts(graphs: list[fx.GraphModule]) -> list[str]:
    """The regions of all graphs, each once, in order."""
    return list(dict.fromkeys(n.args[1] for gm in graphs for n in gm.graph.nodes if n.target is ops.head_region))


def own_buffers(model: nn.Module) -> nn.Module:
    """SD3's position table is a view of an fp32 tensor after the cast, which Dynamo cannot take in."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())
    return model


@compiled
class Test(expecttest.TestCase):
    """What becomes of q and k."""

    maxDiff = None

    def texts_of(self, name: str) -> list[str]:
        with pytest.MonkeyPatch.context() as monkeypatch, torch.no_grad():
            graphs = run_as_aten(monkeypatch)
            model, inputs, regional = zoo(name)
            run(model, inputs, regional)
        return texts(graphs)

    def test_flux(self) -> None:
        """Text and image tokens of a double block, and a single block."""
        double, single = self.texts_of("flux")
        self.assertEqual(double, f"{single} | {single}")
        self.assertExpectedInline(single, FLUX)

    def test_wan(self) -> None:
        """Attention to oneself, and q and k of the text."""
        rotated, plain = self.texts_of("wan")
        self.assertExpectedInline(rotated, WAN)
        self.assertExpectedInline(plain, ALL_HEADS)

    def test_ltx(self) -> None:
        rotated, _ = self.texts_of("ltx_video")
        self.assertExpectedInline(rotated, LTX)


@compiled
@pytest.mark.parametrize(
    ("image", "heads", "moments"),
    [(0, 4, 7), (40, 5, 8)],  # with an image's keys beside the text's, whose q is the same
    ids=["text", "text and image"],
)
def test_a_block_of_wan_is_operators_of_ours(
    image: int, heads: int, moments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows as long as the kernel measures them, nothing of Inductor's comes between q's linear and attention."""
    block_class = pytest.importorskip("diffusers.models.transformers.transformer_wan").WanTransformerBlock
    graphs = run_as_aten(monkeypatch)
    g = torch.Generator().manual_seed(0)
    x, text = (torch.randn(2, n, 512, generator=g).bfloat16() for n in (40, image + 512 if image else 24))
    angle = torch.rand(1, 40, 1, 64, generator=g).repeat_interleave(2, -1)
    inputs = (x, text, torch.randn(2, 6, 512, generator=g), (angle.cos(), angle.sin()))
    outputs = []
    for fuse in (True, False):
        torch.manual_seed(0)
        block = block_class(512, 1024, 4, cross_attn_norm=True, added_kv_proj_dim=512 if image else None)
        block = block.bfloat16().eval().requires_grad_(False)
        outputs.append(run(block, inputs, fuse=fuse))
        if fuse:
            (gm,) = graphs
            nodes = [n for n in gm.graph.nodes if n.op == "call_function" and not _is_free(n)]
            others = {n.target for n in nodes if not str(n.target).startswith("svdq.")}
            attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
            biases, modulation = torch.ops.aten.cat.default, torch.ops.aten.add.Tensor
            assert others == {modulation, biases, attention}
            assert count(graphs, modulation) == 1
            assert (count(graphs, ops.head_region), count(graphs, ops.row_moments)) == (heads, moments)
    assert relative_error(*outputs) < 0.02


# q and k of each attention that is compiled.
@compiled
@pytest.mark.parametrize(
    ("name", "fused"),
    [("flux", 4), ("flux2", 4), ("sd3", 10), ("hunyuan_video", 6), ("qwen_image", 2), ("wan", 4), ("ltx_video", 4)],
)
def test_a_model_fused_is_the_model_unfused(name: str, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    outputs = []
    for fuse in (("heads",), False):
        model, inputs, regional = zoo(name)
        outputs.append(run(own_buffers(model), inputs, regional, fuse=fuse))
        if fuse:
            assert count(graphs, ops.head_region) == fused
    assert relative_error(*outputs) < 0.02  # codes that flip


# ** near misses **


class Attention(nn.Module):
    """q, k and v of [B, T, H, D]; what is between q's linear and attention comes from a test."""

    def __init__(self, around) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.around = around

    def forward(self, x: Tensor, *tables: Tensor):
        q, k, v = (f(x).unflatten(-1, (HEADS, CHANNELS)) for f in (self.q, self.k, self.v))
        q, extra = self.around(q, *tables)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return torch.cat([out.flatten(), *(e.flatten().to(out.dtype) for e in extra)])


def norm(q: Tensor) -> Tensor:
    return F.rms_norm(q, (CHANNELS,))


def interleaved(q: Tensor) -> Tensor:
    even, odd = q.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-odd, even], -1).flatten(-2)


def half_turned(q: Tensor) -> Tensor:
    low, high = q.chunk(2, -1)
    return torch.cat([-high, low], -1)


def sliced(q: Tensor) -> Tensor:
    return torch.stack([-q[..., 1::2], q[..., 0::2]], -1).flatten(-2)


def triples(q: Tensor) -> Tensor:
    a, b, c = F.pad(q, (0, 1)).unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([c, a, b], -1).flatten(-2)[..., :CHANNELS]


def rotated(q: Tensor, cos: Tensor, sin: Tensor, turn=interleaved) -> Tensor:
    return (q.float() * cos + turn(q).float() * sin).to(q.dtype)


def other_order(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = norm(q.transpose(1, 2))
    return rotated(q, cos.transpose(0, 1), sin.transpose(0, 1)).transpose(1, 2)


def joined(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotated(torch.cat([norm(q[:, :5]), F.layer_norm(q[:, 5:], (CHANNELS,))], 1), cos, sin)


def in_heads(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (HEADS, CHANNELS))


def over_all(q: Tensor, norm=F.rms_norm, *affine: Tensor) -> Tensor:
    return norm(q.flatten(2), (WIDTH,), *(t.to(q.dtype) for t in affine))


def wide(cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Tables for the channels of all heads, which differ from head to head."""
    return [torch.cat([t * (i + 1) for i in range(HEADS)], -1).squeeze(-2) for t in (cos, sin)]


def summed(q: Tensor) -> Tensor:
    return q.float().cumsum(-1)


def in_16_bits(c: Tensor) -> Tensor:
    """A table for the channels of all heads, cast before it is put together."""
    return wide(c.bfloat16(), c.bfloat16())[0]


def apart(table: Tensor) -> Tensor:
    """The same values, a head's channels not side by side."""
    return table.transpose(0, -1).contiguous().transpose(0, -1)


def written(q: Tensor, cos: Tensor, sin: Tensor, memory=torch.empty_like, at=(0, 1)) -> Tensor:
    even, odd = q.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = memory(q)
    out[..., at[0] :: 2] = even * cos - odd * sin
    out[..., at[1] :: 2] = even * sin + odd * cos
    return out


def cut(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([rotated(q[:, :-5], cos[:-5], sin[:-5]), q[:, -5:]], 1)


@compiled
@pytest.mark.parametrize(
    ("around", "fused"),
    [
        (lambda q, c, s: (norm(q), ()), 1),
        (lambda q, c, s: (F.layer_norm(q, (CHANNELS,)), ()), 1),
        (lambda q, c, s: (F.layer_norm(q, (CHANNELS,), c[0, 0], s[0, 0]), ()), 1),
        (lambda q, c, s: (rotated(q, c, s), ()), 1),
        (lambda q, c, s: (rotated(norm(q), c, s), ()), 1),
        (lambda q, c, s: (rotated(norm(q), c[None], s.bfloat16()), ()), 1),
        (lambda q, c, s: (rotated(norm(q), c, s, sliced), ()), 1),
        (lambda q, c, s: (rotated(norm(q), c, s, half_turned), ()), 1),
        (lambda q, c, s: (other_order(q, c, s), ()), 1),
        (lambda q, c, s: (joined(q, c, s), ()), 1),
        (lambda q, c, s: (torch.cat([norm(q[:, :5]), q[:, 5:]], 1), ()), 1),
        (lambda q, c, s: (cut(norm(q), c, s), ()), 1),
        (lambda q, c, s: (torch.cat([(n := norm(q))[:, 5:], n[:, :5]], 1), ()), 1),
        (lambda q, c, s: (norm(q)[:, 3:20] * 2.0, ()), 1),
        (lambda q, c, s: (norm(q) * torch.tanh(c[:1, :, :1]).to(q.dtype) + q.mean(-1, True), ()), 1),
        # The result is read by others too: it is stored anyway. A value on the way is not.
        (lambda q, c, s: (y := norm(q), (y,)), 1),
        (lambda q, c, s: (rotated(n := norm(q), c, s), (n,)), 0),
        (lambda q, c, s: (rotated(n := norm(q), c, s), (n.mean(1),)), 0),
        (lambda q, c, s: (rotated(n := norm(q), c, s, sliced), (n[..., 0::2],)), 0),
        (lambda q, c, s: (norm(q), (q,)), 1),
        # The joined tokens are read by others too: only what comes after.
        (lambda q, c, s: (rotated(n := torch.cat([norm(q[:, :5]), q[:, 5:]], 1), c, s), (n,)), 1),
        (lambda q, c, s: (cut(n := norm(q), c, s), (n,)), 0),
        # Other rotations and means.
        (lambda q, c, s: (rotated(norm(q), c, s, triples), ()), 0),
        (lambda q, c, s: (rotated(norm(q), c, s, lambda v: v.roll(1, -1)), ()), 0),
        (lambda q, c, s: (rotated(q, c, s, lambda v: interleaved(half_turned(v))), ()), 0),
        (lambda q, c, s: (q * torch.rsqrt(q.float().pow(2).mean((-2, -1), True)).to(q.dtype), ()), 0),
        (lambda q, c, s: (q - q.mean(1, True), ()), 0),
        (lambda q, c, s: (q * torch.rsqrt(q.float().var(-1, keepdim=True)).to(q.dtype), ()), 0),
        # A slice, which lies in something longer.
        (lambda q, c, s: (norm(q)[:, 3:20], ()), 0),
        # A value for each head's channels; and before they are heads.
        (lambda q, c, s: (norm(q) * (c[0].expand(HEADS, -1) * s[:HEADS, 0]).to(q.dtype), ()), 1),
        (lambda q, c, s: (norm(in_heads(torch.tanh(q.flatten(2)))), ()), 1),
        # Nothing but elementwise; elementwise before, and stored; two full tensors.
        (lambda q, c, s: (torch.tanh(q) * 2.0, ()), 0),
        (lambda q, c, s: (norm(in_heads(t := torch.tanh(q.flatten(2)))), (t,)), 0),
        (lambda q, c, s: (norm(q) + q.flip(1), ()), 0),
        (lambda q, c, s: (norm(q[:, :12]) + q[:, 12:], ()), 0),
        # Norms over all heads, whose moments stay outside.
        (lambda q, c, s: (in_heads(over_all(q)), ()), 1),
        (lambda q, c, s: (in_heads(over_all(q, F.layer_norm)), ()), 1),
        (lambda q, c, s: (in_heads(over_all(q, F.layer_norm, c[:HEADS].flatten(), s[:HEADS].flatten())), ()), 1),
        (lambda q, c, s: (rotated(in_heads(over_all(q)), c, s), ()), 1),
        (lambda q, c, s: (norm(in_heads(over_all(q))), ()), 1),
        (lambda q, c, s: (cut(in_heads(over_all(q)), c, s), ()), 1),
        (lambda q, c, s: (torch.cat([in_heads(over_all(q[:, :5])), q[:, 5:]], 1), ()), 1),
        (lambda q, c, s: (in_heads(n := over_all(q)), (n,)), 0),
        (lambda q, c, s: (in_heads(q.flatten(2) * c.mean(-1).to(q.dtype)), ()), 0),  # of something else
        (lambda q, c, s: (in_heads(over_all(q) + q.flatten(2).flip(1)), ()), 0),
        (lambda q, c, s: (in_heads(over_all(q).flip(-1)), ()), 0),
        (lambda q, c, s: (other_order(in_heads(over_all(q)), c, s), ()), 0),  # turned in between
        # Rotated before they are cut into heads, by tables of each head; halves of all channels are not a head's.
        (lambda q, c, s: (in_heads(rotated(over_all(q), *wide(c, s), interleaved)), ()), 1),
        (lambda q, c, s: (in_heads(rotated(q.flatten(2), *wide(c[None], s[:1]), sliced)), ()), 1),
        (lambda q, c, s: (in_heads(rotated(over_all(q), *wide(c.bfloat16(), s.bfloat16()))), ()), 0),
        (lambda q, c, s: (in_heads(rotated(q.flatten(2), *wide(c, s), half_turned)), ()), 0),
        # What would be x is in fp32; in 16 bits is only a table, the same for all samples or tokens.
        (lambda q, c, s: (interleaved(summed(q) * in_heads(in_16_bits(c)[None])).bfloat16(), ()), 0),
        (lambda q, c, s: (interleaved(summed(q) * in_heads(in_16_bits(c)[:2, None])).bfloat16(), ()), 0),
        (lambda q, c, s: (in_heads(interleaved(summed(q.flatten(2)) * in_16_bits(c)).bfloat16()), ()), 0),
        # A table that is elementwise and read by others would have to be stored; channels apart would be copied.
        (lambda q, c, s: (rotated(norm(q), t := c * s[:HEADS, 0, :1], s), (t,)), 0),
        (lambda q, c, s: (rotated(norm(q), c, t := s * c[:2, :, :HEADS, None]), (t,)), 0),
        (lambda q, c, s: (rotated(norm(q), apart(c), s), ()), 0),
        (lambda q, c, s: (rotated(norm(q), c, apart(in_heads(wide(c, s)[1]))), ()), 0),
        # What is taken apart is neither a block nor a row: a result of that is x.
        (lambda q, c, s: (norm(in_heads(torch.stack([r := q.flatten(2), r.flip(-1)], -1).unbind(-1)[0])), ()), 1),
        (lambda q, c, s: (norm(torch.stack([q, q.flip(-1)], -1).unbind(-1)[1]), ()), 1),
        (lambda q, c, s: (norm(torch.cat([q, q.flip(1)], -1).chunk(2, -1)[1]), ()), 1),
        # Written into every second channel.
        (lambda q, c, s: (written(q, c, s), ()), 1),
        (lambda q, c, s: (written(in_heads(over_all(q)), c, s), ()), 1),
        (lambda q, c, s: (written(norm(q), c.bfloat16(), s.bfloat16()), ()), 1),
        (lambda q, c, s: (written(norm(q), c, s, torch.zeros_like, (1, 0)), ()), 1),
        (lambda q, c, s: (written(q, c.double(), s.double()), ()), 0),
        (lambda q, c, s: (written(q, c, s, torch.ones_like, (0, 0)), ()), 0),
        (lambda q, c, s: (written(q.transpose(1, 2), *(t.transpose(0, 1) for t in (c, s))).transpose(1, 2), ()), 0),
    ],
)  # fmt: skip
def test_near_misses(around, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    g = torch.Generator().manual_seed(0)
    x, c, s = torch.randn(2, 24, WIDTH, generator=g).bfloat16(), *torch.randn(2, 24, 1, CHANNELS, generator=g)
    outputs = []
    for fuse in (("heads",), False):
        model = Attention(around).bfloat16().eval().requires_grad_(False)
        outputs.append(run(model, (x.clone(), c, s), fuse=fuse))
        if fuse:
            assert count(graphs, ops.head_region) == fused
    assert error(*outputs) < BOUND if fused else torch.equal(*outputs)


@compiled
@pytest.mark.parametrize(
    "around",
    [
        lambda q, c, s: (rotated(norm(q), c, s), ()),
        lambda q, c, s: (written(in_heads(over_all(q)), c, s), ()),
        lambda q, c, s: (in_heads(rotated(over_all(q), *wide(c[None], s[None]))), ()),
    ],
    ids=["one head", "all heads", "rows"],
)
def test_dynamic_tokens(around, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    g = torch.Generator().manual_seed(0)
    calls = [(torch.randn(2, n, WIDTH, generator=g).bfloat16(), *torch.randn(2, n, 1, CHANNELS, generator=g))
             for n in (24, 24, 7)]  # fmt: skip
    for _, *tables in calls:
        for table in tables:  # as by default, where only what has changed is symbolic
            torch._dynamo.mark_static(table, 2)
    outputs = []
    for fuse in (("heads",), False):
        torch._dynamo.reset()
        model = Attention(around).bfloat16().eval().requires_grad_(False)
        options = {
            "progress": False,
            "calibration_steps": 1,
            "refine": 1,
            "rank": 16,
            "precision": "w4a8",
            "fuse": fuse,
        }
        call = torch.compile(model, backend="svdquant", dynamic=True, options=options)
        with torch._inductor.config.patch(force_disable_caches=True):
            outputs.append([call(*inputs) for inputs in calls][1:])
    assert count(graphs[:1], ops.head_region) == 1
    assert all(error(a, b) < BOUND for a, b in zip(*outputs, strict=True))


# ** the kernel **

HALVES = FLUX.replace("even(", "low(").replace("odd(", "high(").replace("pair(", "halves(")
NORM = """heads(x, a0: BTH, a1: 1)
t0 = row_mean(x)
t1 = sub(x, t0)
t2 = mul(t1, t1)
t3 = row_mean(t2)
t4 = add(t3, a1)
t5 = rsqrt(t4)
t6 = mul(t1, t5)
t7 = add(t6, a0)
t8 = tanh(t7)""".replace("\n", "; ")
COMPLEX = """heads(x, a0: BTD)
t0 = even(x)
t1 = odd(x)
t2 = even(a0)
t3 = odd(a0)
t4 = mul(t0, t2)
t5 = mul(t1, t3)
t6 = sub(t4, t5)
t7 = mul(t0, t3)
t8 = mul(t1, t2)
t9 = add(t7, t8)
t10 = pair(t6, t9)""".replace("\n", "; ")


def operands(text: str, b: int, t: int, h: int, d: int, dtype: torch.dtype, is_wide: bool) -> list[Tensor]:
    """Of one part; a wide x is a slice of a merged result."""
    shapes = {"D": (d,), "BTD": (t, 1, d), "BTH": (b, 1, h, 1), "1": ()}
    shapes |= {"BT": (b, t, 1, 1), "HD": (h, d), "BTHD": (t, h, d)}
    x = torch.randn(b, t, 3 * h * d)[..., h * d : 2 * h * d].unflatten(-1, (h, d)).to(dtype)
    others = [torch.rand(shapes[axes]) + 0.5 for name, axes in parts(text)[0].operands if name != "x"]
    return [x if is_wide else x.contiguous(), *others]


@interpreted
@pytest.mark.parametrize("text", [FLUX, HALVES, NORM, COMPLEX, WAN, LTX])
@pytest.mark.parametrize(
    ("b", "t", "h", "d", "is_wide"), [(1, 5, 3, 64, True), (2, 17, 4, 32, False), (2, 1, 1, 8, True)]
)
def test_interpreted_kernel(text, b, t, h, d, is_wide, tmp_path, monkeypatch) -> None:
    """The result is the middle of something longer, whose ends stay."""
    from svdq_compile.kernels.portable import heads as triton_heads
    from svdq_compile.lowering import generate_heads

    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    (region,) = parts(text.replace("bf16(", "fp16("))
    x, *others = operands(text, b, t, h, d, torch.half, is_wide)
    values = dict(zip([name for name, _ in region.operands[1:]], others, strict=True))
    y = torch.full((b, t + 2, h, d), torch.nan, dtype=torch.half)
    generated = generate_heads.bind(region, values, x.shape)
    triton_heads.run(x, y[:, 1:-1], generated, generate_heads.is_interleaved(region))
    assert error(y[:, 1:-1], region.evaluate({"x": x, **values})) < 4e-4
    assert y[:, 0].isnan().all()
    assert y[:, -1].isnan().all()


@interpreted
@pytest.mark.parametrize("tokens", [16, 23])
def test_one_sample_has_no_stride(tokens: int, tmp_path, monkeypatch) -> None:
    """Triton compiles in whether a stride is a multiple of 16: the number of tokens must be no stride."""
    from svdq_compile.lowering import generate_heads

    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    (region,) = parts(ALL_HEADS)
    values = {"a0": torch.rand(1, tokens, 1, 1), "a1": torch.rand(2, 64)}
    _, *strides, _ = generate_heads.bind(region, values, torch.Size([1, tokens, 2, 64])).operands
    assert strides == [0, 1]


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@compiled
def test_without_kernels_the_text_is_evaluated() -> None:
    parts_of_both = (
        operands(FLUX, 2, 5, 3, 24, torch.bfloat16, True),
        operands(NORM, 2, 4, 3, 24, torch.bfloat16, False),
    )
    y = ops.head_region([*parts_of_both[0], *parts_of_both[1]], f"{FLUX} | {NORM}")
    assert y.shape == (2, 9, 3, 24)
    other = ops.head_region([*parts_of_both[0], *parts_of_both[1]], f"{FLUX} | {NORM}", True)
    assert torch.equal(other, y)
    assert other.transpose(1, 2).is_contiguous()
    for text, (x, *others), some in zip((FLUX, NORM), parts_of_both, (y[:, :5], y[:, 5:]), strict=True):
        values = dict(zip([name for name, _ in parts(text)[0].operands[1:]], others, strict=True))
        assert torch.equal(some, parts(text)[0].evaluate({"x": x, **values}).bfloat16())


def compiled_kernel(text: str, tile, d: int, extra: tuple[str, ...]):
    from triton.compiler import ASTSource

    from svdq_compile.kernels.portable import heads as triton_heads
    from svdq_compile.lowering import generate_heads

    (region,) = parts(text)
    module = generate_heads._module(region)
    constants = {"D": d, "TOKENS": tile.tokens, "HEADS": tile.heads, "LOAD": module.load, "FUNCTION": module.fused,
                 "INTERLEAVED": generate_heads.is_interleaved(region), "EARLY": True}  # fmt: skip

    def source(kernel, signature, constants, even):
        at = kernel.arg_names.index("extra")
        return ASTSource(
            kernel, signature, constants, even | {(at, i): [["tt.divisibility", 16]] for i in range(len(extra))}
        )

    types = {"x": "*bf16", "y": "*bf16", "extra": extra}
    return compile_for(triton_heads._heads_kernel, 90, constants, tile.warps, types, source=source)


ONE_HEAD = ("*bf16", *("*fp32", "i32", "i32") * 2)
EXTRA = {
    FLUX: ONE_HEAD,
    HALVES: ONE_HEAD,
    ALL_HEADS: ("*fp32", "i32", "i32", "*bf16"),
    WAN: ("*fp32", "i32", "i32", *ONE_HEAD),
    LTX: ("*fp32", "i32", "i32", "*bf16", *("*fp32", "i32", "i32", "i32") * 2),
}


@builds
@pytest.mark.parametrize("text", EXTRA)
@pytest.mark.parametrize(("heads", "d"), [(24, 128), (24, 64), (30, 256)])
def test_values_stay_in_registers_and_copies_are_wide(text, heads, d, tmp_path, monkeypatch) -> None:
    """Tables and a head's weight are loaded once for all heads of a program; nothing passes shared memory."""
    from svdq_compile.kernels.portable.heads import choose

    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    built = compiled_kernel(text, choose(4608, heads, d, 132), d, EXTRA[text])
    assert built.spilled == 0
    assert built.registers <= 80
    assert waits_first(built.ptx)
    widths = re.findall(r"(?:ld|st)\.global\.([\w.:]*)", built.ptx)
    if text == HALVES:  # 4 neighbours a thread
        assert set(widths) <= {"v4.b32", "v2.b32"}
        return
    assert built.shared == 0
    assert set(widths) <= {"v4.b32", "b32"}
    # Triton 3.6 loads it for each of a thread's channels, from one address.
    moments = set(re.findall(r"ld\.global\.b32 .*\[ (.*) \]", built.ptx))
    assert len(moments) == ("BT, " in text), "a row's moment, once for all heads"


@compiled
@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32), "16-bit"),
        (torch.zeros(1, 2, 3, 32).half(), torch.zeros(1, 2, 3, 32).bfloat16(), "16-bit"),
        (torch.zeros(1, 2, 3, 24).half(), torch.zeros(1, 2, 3, 24).half(), "power of two"),
        (torch.zeros(1, 2, 3, 512).half(), torch.zeros(1, 2, 3, 512).half(), "power of two"),
        (torch.zeros(1, 2, 96).half(), torch.zeros(1, 2, 96).half(), "B, T, H, D"),
        (torch.zeros(1, 2, 3, 32).half(), torch.zeros(1, 2, 3, 64).half()[..., ::2], "neighbouring"),
    ],
)
def test_bad_input(x: Tensor, y: Tensor, match: str) -> None:
    from svdq_compile.kernels.portable import heads as triton_heads

    with pytest.raises((TypeError, ValueError), match=match):
        triton_heads.run(x, y, triton_heads.GeneratedHeads(None, None, ()))
