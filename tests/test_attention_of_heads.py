"""svdq::attention_of_heads: which attentions become one operator with what makes their heads, and both of its ways."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fusion_testing import count, run, run_as_aten, zoo
from kernel_testing import compiled, interpreted, run_interpreted
from test_heads import ALL_HEADS, CHANNELS, FLUX, HALVES, HEADS, LTX, NORM, WAN, norm, operands, rotated
from torch import Tensor, nn

from conftest import WIDTH, quiet, relative_error
from svdq_compile.kernels.runtime import target
from svdq_compile.lowering import attention_of_heads as of_heads
from svdq_compile.lowering import flash3, launch, ops, replay, sequences
from svdq_compile.lowering.heads import parts
from svdq_compile.lowering.kernel_table import REFERENCE

BSHD, BHSD = [0, 2, 1, 3], [0, 1, 2, 3]
PLAIN = "heads(x)"
PASSES = ("svdq_compile.passes.replace_attention", "svdq_compile.passes.group_sequences")
BOUND = 4e-3  # q, k and the result in bf16


# ** the pass **


@pytest.fixture
def a_choice_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take the CPU for a device with kernels; their graphs run by the reference."""
    rewrite, group = map(importlib.import_module, PASSES)
    monkeypatch.setattr(rewrite, "has_kernels", lambda device: True)
    monkeypatch.setattr(group, "has_kernels", lambda device: True)
    on_the_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    monkeypatch.setattr(rewrite, "TORCHS_ATTENTIONS", {on_the_cpu})


# Attentions that are compiled: those whose q and k come out of a region, and others.
@compiled
@pytest.mark.usefixtures("a_choice_on_the_cpu")
@pytest.mark.parametrize(("name", "fused", "alone"), [("flux", 2, 0), ("wan", 2, 0)])
def test_models(name: str, fused: int, alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the reference runs, the result is that of heads and attention one by one, bit for bit."""
    graphs = run_as_aten(monkeypatch)
    outputs = []
    for attention, expected in (("int8", (fused, alone, 0)), ("exact", (0, fused + alone, 2 * fused))):
        graphs.clear()
        model, inputs, regional = zoo(name)
        outputs.append(run(model, inputs, regional, fuse=("heads", "attention"), attention=attention))
        kinds = (ops.attention_of_heads, ops.attention, ops.head_region)
        assert tuple(count(graphs, kind) for kind in kinds) == expected
    assert torch.equal(*outputs)


class Attention(nn.Module):
    """q and k normed and rotated; what becomes of q, k and v between that and attention comes from a test."""

    def __init__(self, between: Callable, options: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.between, self.options = between, options

    def forward(self, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, CHANNELS)) for f in (self.q, self.k, self.v))
        q, k, v, extra = self.between(rotated(norm(q), c, s), rotated(norm(k), c, s), v)
        turned = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*turned, **self.options)
        return torch.cat([out.flatten(), *(e.flatten() for e in extra)])


@compiled
@pytest.mark.usefixtures("a_choice_on_the_cpu")
@pytest.mark.parametrize(
    ("between", "options", "fused", "values"),
    [
        (lambda q, k, v: (q, k, v, ()), {}, True, 1),
        (lambda q, k, v: (q, k, v, ()), {"is_causal": True, "scale": 0.3}, True, 1),
        (lambda q, k, v: (q, k, torch.cat([v[:, 5:], v[:, :5]], 1), ()), {}, True, 2),  # parts of tokens
        (lambda q, k, v: (q, k, torch.cat([v[..., 5:], v[..., :5]], 3), ()), {}, True, 1),  # not of tokens
        (lambda q, k, v: (q, k, v.transpose(1, 2).contiguous().transpose(1, 2), ()), {}, True, 1),
        (lambda q, k, v: (q, k, v, (v,)), {}, True, 1),  # it is there anyway
        (lambda q, k, v: (q, k, w := torch.cat([v[:, 5:], v[:, :5]], 1), (w,)), {}, True, 1),  # put together anyway
        # q or k are read by others, or are no region's: they are stored as they were.
        (lambda q, k, v: (q, k, v, (q,)), {}, False, 0),
        (lambda q, k, v: (q, torch.tanh(v), v, ()), {}, False, 0),
        (lambda q, k, v: (q[:, :7], k, v, ()), {}, False, 0),
        (lambda q, k, v: (q.flip(1), k, v, ()), {}, False, 0),
    ],
)  # fmt: skip
def test_near_misses(
    between: Callable, options: dict, fused: bool, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = run_as_aten(monkeypatch)
    g = torch.Generator().manual_seed(0)
    x, c, s = torch.randn(2, 24, WIDTH, generator=g).bfloat16(), *torch.randn(2, 24, 1, CHANNELS, generator=g)
    outputs = []
    for fuse in (("heads", "attention"), False):
        model = Attention(between, options).bfloat16().eval().requires_grad_(False)
        allowed = {"attention": "fp8"} if fuse else {}
        outputs.append(run(model, (x.clone(), c, s), fuse=fuse, **allowed))
        if fuse:
            nodes = [n for gm in graphs for n in gm.graph.nodes if n.target in (ops.attention_of_heads, ops.attention)]
            (node,) = nodes
    assert (node.target is ops.attention_of_heads) == fused
    if fused:
        tensors, reads, text, counts, *_ = node.args
        assert len(set(tensors)) == len(tensors) == max(reads) + 1, "tables that q and k share are there once"
        assert counts == [1, 1]
        assert [str(part) for part in parts(text)[2:]] == [PLAIN] * values
    assert relative_error(*outputs) < BOUND


@compiled
@pytest.mark.usefixtures("a_choice_on_the_cpu")
@pytest.mark.parametrize("more", [(), ("siblings", "sequences")], ids=["alone", "in a sequence"])
def test_compiled_code_of_any_size_calls_it(more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By Inductor, whose text has the operator's lists and, for two sizes, one graph."""
    lengths: list[int] = []
    programs: list[str] = []
    run_exact, read_program = of_heads._exact, sequences._compiled
    monkeypatch.setattr(sequences, "_compiled", lambda text: programs.append(text) or read_program(text))

    def counted(o: of_heads.OfHeads) -> Tensor:
        lengths.append(o.shapes()[0][2])
        return run_exact(o)

    row = replace(of_heads.ATTENTION_OF_HEADS.rows[-1], run=counted)
    monkeypatch.setattr(of_heads.ATTENTION_OF_HEADS, "rows", [row])
    g = torch.Generator().manual_seed(0)
    calls = [(torch.randn(2, n, WIDTH, generator=g).bfloat16(), *torch.randn(2, n, 1, CHANNELS, generator=g))
             for n in (24, 24, 7, 24)]  # fmt: skip
    torch._dynamo.reset()
    model = Attention(lambda q, k, v: (q, k, torch.cat([v[:, 5:], v[:, :5]], 1), ()), {})
    model = model.bfloat16().eval().requires_grad_(False)
    options = quiet(rank=16, refine=1, precision="w4a8", fuse=("heads", "attention", *more), attention="fp8")
    call = torch.compile(model, backend="svdquant", dynamic=True, options=options)
    with torch._inductor.config.patch(force_disable_caches=True):
        outputs = [call(*inputs) for inputs in calls][1:]
    assert lengths == [24, 7, 24]
    assert any("svdq.attention_of_heads.default(" in text for text in programs) == bool(more)
    expected = [model(*inputs) for inputs in calls[1:]]  # eagerly, in 4 bits
    assert max(relative_error(a, b) for a, b in zip(outputs, expected, strict=True)) < 2 * BOUND


# ** the operator **


def heads_of(texts: list[str], lengths: list[list[int]], b: int, h: int, d: int, dtype: torch.dtype) -> tuple:
    """Operands of the operator, and q, k and v [B, H, S, D] as torch makes them."""
    tensors: list[Tensor] = []
    made, counts = [], []
    for text, each in zip(texts, lengths, strict=True):
        values = [operands(text, b, n, h, d, dtype, True) for n in each]
        (region,) = parts(text)
        names = [name for name, _ in region.operands]
        blocks = [region.evaluate(dict(zip(names, given, strict=True))).to(dtype) for given in values]
        made.append(torch.cat(blocks, 1).transpose(1, 2))
        tensors += [t for given in values for t in given]
        counts.append(len(each))
    text = " | ".join(text for text, each in zip(texts, lengths, strict=True) for _ in each)
    return (tensors, list(range(len(tensors))), text, counts[:2]), made


@compiled
@pytest.mark.parametrize("order", [BSHD, BHSD], ids=str)
@pytest.mark.parametrize(
    ("texts", "lengths", "options"),
    [
        ([FLUX, FLUX, PLAIN], [[5, 9], [5, 9], [5, 9]], (False, None)),
        ([FLUX, FLUX, PLAIN], [[9], [9], [9]], (True, 0.3)),
        ([HALVES, NORM, PLAIN], [[9], [3, 4], [7]], (False, None)),  # other keys
        ([FLUX, FLUX, PLAIN], [[0, 9], [9], [9, 0]], (False, None)),
        ([WAN, WAN, PLAIN], [[9], [9], [9]], (False, None)),
        ([LTX, LTX, PLAIN], [[9], [9], [9]], (False, None)),
        ([ALL_HEADS, ALL_HEADS, PLAIN], [[9], [7], [7]], (False, None)),  # the text's keys
    ],
)
def test_the_reference(texts: list[str], lengths: list[list[int]], options: tuple, order: list[int]) -> None:
    torch.manual_seed(0)
    given, (q, k, v) = heads_of(texts, lengths, 2, 3, 16, torch.bfloat16)
    y = ops.attention_of_heads(*given, *options, order, "fp8")
    assert y.permute(order).is_contiguous()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=options[0], scale=options[1])
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(ops.attention_of_heads, (*given, *options, order, "fp8"), test_utils=checks)


@compiled
def test_what_is_read_twice_is_there_once() -> None:
    x, w = torch.randn(1, 7, 2, 16).bfloat16(), torch.rand(16)
    text = "heads(x, a0: D); t0 = mul(x, a0)"
    y = ops.attention_of_heads([x, w], [0, 1, 0, 1, 0], f"{text} | {text} | {PLAIN}", [1, 1], False, None, BSHD, "fp8")
    q, v = ((x.float() * w).bfloat16().transpose(1, 2), x.transpose(1, 2))
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, q, v), rtol=0.02, atol=0.02)


# ** its rows, without a GPU and without FlashAttention-3 **


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVDQ_KERNELS", raising=False)
    monkeypatch.setattr(target, "capability", lambda device: (9, 0))
    monkeypatch.setattr(flash3, "missing", lambda: None)


def able(given: tuple, is_causal: bool = False, arithmetic: str = "fp8") -> list[str]:
    o = of_heads.record(*given, is_causal, None, BSHD, arithmetic)
    return [kernel.name for kernel in of_heads.ATTENTION_OF_HEADS._able(o, None)]


BOTH, EXACT = ["exact_heads", "flash3_fp8_heads", REFERENCE], ["exact_heads", REFERENCE]
SAME = [[5, 9], [5, 9], [14]]


@compiled
@pytest.mark.parametrize(
    ("texts", "lengths", "channels", "expected"),
    [
        ([FLUX, FLUX, PLAIN], SAME, 128, BOTH),
        ([FLUX, FLUX, PLAIN], SAME, 64, BOTH),
        ([FLUX, FLUX, PLAIN], SAME, 8, EXACT),
        ([FLUX, FLUX, PLAIN], SAME, 256, EXACT),
        ([HALVES, HALVES, PLAIN], SAME, 64, BOTH),
        ([HALVES, NORM, PLAIN], SAME, 64, BOTH),
        ([WAN, ALL_HEADS, PLAIN], SAME, 128, BOTH),
        ([HALVES, FLUX, PLAIN], SAME, 64, EXACT),  # pairs of channels, and halves
        ([FLUX, FLUX, PLAIN], [[0], [5], [5]], 64, EXACT),
        ([FLUX, FLUX, PLAIN], [[5], [0], [0]], 64, EXACT),
        ([FLUX, FLUX, PLAIN], [[0, 5], [5], [5, 0]], 64, BOTH),
    ],
)
def test_who_can(on_hopper: None, texts: list[str], lengths: list, channels: int, expected: list[str]) -> None:
    given, _ = heads_of(texts, lengths, 1, 2, channels, torch.bfloat16)
    assert able(given) == expected
    assert able(given, arithmetic="exact") == EXACT


@compiled
def test_who_can_of_other_operands(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = heads_of([FLUX, FLUX, PLAIN], [[9], [7], [7]], 1, 4, 64, torch.bfloat16)
    assert able(given) == BOTH
    assert able(given, is_causal=True) == EXACT
    tensors, *rest = given
    assert able(([*tensors[:-1], tensors[-1].float()], *rest)) == EXACT
    grouped = [t[:, :, :2] if t is tensors[4] or t is tensors[-1] else t for t in tensors]
    assert able((grouped, *rest)) == EXACT
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert able(given) == EXACT
    monkeypatch.setattr(flash3, "missing", lambda: "fa3-fwd is not installed")
    assert able(given) == EXACT
    monkeypatch.setattr(target, "capability", lambda device: (8, 9))
    assert able(given) == EXACT


@compiled
def test_who_can_in_int8(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever there are kernels, with grouped heads too."""
    expected = ["exact_heads", "attention_int8_heads", REFERENCE]
    tensors, *rest = heads_of([FLUX, FLUX, PLAIN], [[9], [7], [7]], 1, 4, 64, torch.bfloat16)[0]
    grouped = [t[:, :, :2] if t is tensors[4] or t is tensors[-1] else t for t in tensors]
    for capability in ((9, 0), (8, 0), (12, 0)):
        monkeypatch.setattr(target, "capability", lambda device, capability=capability: capability)
        assert able((tensors, *rest), arithmetic="int8") == able((grouped, *rest), arithmetic="int8") == expected
    assert able((tensors, *rest), arithmetic="exact") == EXACT
    assert able((tensors, *rest), is_causal=True, arithmetic="int8") == EXACT
    assert able(([*tensors[:-1], tensors[-1].float()], *rest), arithmetic="int8") == EXACT
    for texts, lengths, channels in (
        ([FLUX, FLUX, PLAIN], SAME, 16),
        ([HALVES, FLUX, PLAIN], SAME, 64),
        ([FLUX, FLUX, PLAIN], [[5], [0], [0]], 64),
    ):
        given, _ = heads_of(texts, lengths, 1, 2, channels, torch.bfloat16)
        assert able(given, arithmetic="int8") == EXACT


@compiled
def test_a_class_of_sizes() -> None:
    def seen(lengths: list[list[int]], b: int = 2) -> tuple:
        given, _ = heads_of([FLUX, FLUX, PLAIN], lengths, b, 2, 16, torch.bfloat16)
        return of_heads._shape_class(of_heads.record(*given, False, None, BSHD, "fp8"))

    assert seen([[5], [33], [33]]) == seen([[8], [64], [64]]) != seen([[9], [64], [64]])
    assert seen([[5], [33], [33]]) != seen([[5], [32], [32]])
    assert seen([[5], [8, 25], [33]]) != seen([[5], [33], [33]]), "parts are kernels, and copies"
    assert seen([[5], [33], [33]], 3) == seen([[5], [33], [33]], 4) != seen([[5], [33], [33]])


@compiled
def test_the_exact_way_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_is_recordable", lambda operands: True)
    monkeypatch.setattr(ops.IMPLEMENTATIONS["svdq.attention_of_heads.default"], "_plans", {})
    site = ops.sites("svdq.attention_of_heads.default")()
    for _ in range(4):
        given, (q, k, v) = heads_of([PLAIN] * 3, [[5, 9], [14], [5, 9]], 2, 3, 16, torch.bfloat16)
        y = site(*given, False, None, BSHD, "fp8")
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v), rtol=0.02, atol=0.02)
    assert site._plan is not None


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture
def of_codes(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[list[tuple]]:
    """FlashAttention-3 in torch, on the codes times their scales. What it was given."""
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    given: list[tuple] = []

    def fwd(q, k, v, out, q_descale, k_descale, v_descale, softmax_scale, is_causal, window_left, num_splits):
        given.append((q, k, v))
        codes = zip((q, k, v), (q_descale, k_descale, v_descale), strict=True)
        values = [(x.float() * scale[:, None, :, None]).transpose(1, 2) for x, scale in codes]
        y = F.scaled_dot_product_attention(*values, is_causal=is_causal, scale=softmax_scale)
        return y.transpose(1, 2).contiguous().bfloat16(), *(q.new_empty(0) for _ in range(3))

    library = torch.library.Library("fa3_fwd", "DEF")
    library.define(
        "fwd(Tensor q,Tensor k,Tensor v,Tensor(out!)? out=None,Tensor? q_descale=None,Tensor? k_descale=None,"
        "Tensor? v_descale=None,float? softmax_scale=None,bool is_causal=False,int window_left=-1,int num_splits=0)"
        " -> (Tensor(out!), Tensor, Tensor, Tensor)"
    )
    library.impl("fwd", fwd, "CPU")
    yield given
    library._destroy()


@interpreted
@pytest.mark.parametrize("order", [BSHD, BHSD], ids=str)
@pytest.mark.parametrize(
    ("text", "lengths", "is_causal"),
    [
        (FLUX, [[5, 40], [5, 40], [5, 40]], False),
        (HALVES, [[33], [33], [33]], True),
        (FLUX, [[0, 17], [40], [40, 0]], False),
        (WAN, [[40], [40], [40]], False),
        (ALL_HEADS, [[40], [17], [17]], False),
    ],
)
def test_interpreted_way_by_codes(text: str, lengths: list, is_causal: bool, order: list[int], of_codes: list) -> None:
    """Near attention of the heads as torch makes them; the interpreter halves codes that round up to powers of two."""
    torch.manual_seed(0)
    text = text.replace("bf16(", "fp16(")
    given, (q, k, v) = heads_of([text, text, PLAIN], lengths, 2, 2, 32, torch.half)
    y = of_heads._fp8(of_heads.record(*given, is_causal, 0.1, order, "fp8"))
    assert y.dtype == torch.half
    assert y.permute(order).is_contiguous()
    assert all(x.dtype == torch.float8_e4m3fn for x in of_codes[0])
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=is_causal, scale=0.1)
    assert 0.01 < relative_error(y, expected) < 0.2


@interpreted
def test_interpreted_attention_of_heads_that_are_there(of_codes: list) -> None:
    """The row of svdq::attention makes its codes by the same kernels."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 48).half()
    k += 5 * torch.randn(1, 2, 1, 48).half()
    (row,) = [kernel for kernel in launch.ATTENTION.rows if kernel.name == "flash3_fp8"]
    y = row.run(launch.Attention(q, k, v, False, None, BSHD, "fp8"))
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert 0.01 < relative_error(y, expected) < 0.2
