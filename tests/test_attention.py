"""Choosing the kernel of an attention: the pass, on graphs of tensors on a GPU that need not be there."""

import importlib
import operator

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from svdq_compile.lowering.attention import KINDS, fastest
from svdq_compile.passes import choose_attention

module = importlib.import_module("svdq_compile.passes.choose_attention")
FLASH, CUDNN = KINDS["flash"][0], KINDS["cudnn"][0]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `fastest` was asked about; its answer is cuDNN."""
    questions: list[tuple] = []

    def answer(torchs: str, *question) -> str:
        questions.append((torchs, *question[3:]))
        return "cudnn"

    monkeypatch.setattr(module, "fastest", answer)
    return questions


def graph_of(target, *more, uses: tuple[int, ...] = (0,), fake: FakeTensorMode | None = None, rows=64, **options):
    """q, k, v [2, 4, rows, 64], as the heads of [2, rows, 256] -> the operator, whose results `uses` are the output."""
    fake = fake or FakeTensorMode()
    graph = fx.Graph()
    with fake:
        inputs = [torch.empty(2, rows, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
        nodes = [graph.placeholder(name) for name in "qkv"]
        for node, value in zip(nodes, inputs, strict=True):
            node.meta["val"] = value
        call = graph.call_function(target, (*nodes, *more), options)
        call.meta["val"] = target(*inputs, *[m.meta["val"] if isinstance(m, fx.Node) else m for m in more], **options)
    results = []
    for i in uses:
        results.append(graph.call_function(operator.getitem, (call, i)))
        results[-1].meta["val"] = call.meta["val"][i]
    graph.output(tuple(results))
    return fx.GraphModule(torch.nn.Module(), graph)


def calls(gm: fx.GraphModule) -> list:
    return [n.target for n in gm.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


def test_the_faster_one_takes_its_place(asked: list) -> None:
    gm = graph_of(FLASH, 0.0, True, scale=0.25)
    before = gm.graph.output_node().args[0][0].meta["val"]
    assert choose_attention(gm) == 1
    gm.graph.lint()
    assert asked == [("flash", True, 0.25)]
    (call,) = gm.graph.find_nodes(op="call_function", target=CUDNN)
    assert (call.args[3:], dict(call.kwargs)) == ((None, False, 0.0, True), {"scale": 0.25})
    assert calls(gm) == [CUDNN]
    after = gm.graph.output_node().args[0][0].meta["val"]
    assert (after.shape, after.stride(), after.dtype) == (before.shape, before.stride(), before.dtype)


@pytest.mark.parametrize("kind", ["cudnn", "efficient"])
def test_what_torch_chose_is_named(kind: str, asked: list) -> None:
    gm = graph_of(KINDS[kind][0], None, False)
    assert choose_attention(gm) == (kind != "cudnn")
    assert asked == [(kind, False, None)]
    assert calls(gm) == [CUDNN]


@pytest.mark.parametrize(
    ("more", "options", "uses"),
    [
        ((0.1,), {}, (0,)),  # dropout
        ((0.0, False, True), {}, (0,)),  # its mask is asked for
        ((), {}, (0, 1)),  # the log-sum is read
    ],
)
def test_left_alone(more: tuple, options: dict, uses: tuple, asked: list) -> None:
    gm = graph_of(FLASH, *more, uses=uses, **options)
    assert choose_attention(gm) == 0
    assert calls(gm) == [FLASH]
    assert not asked


def test_masks_are_left_alone(asked: list) -> None:
    fake = FakeTensorMode()
    gm = graph_of(KINDS["efficient"][0], None, False, fake=fake)
    call = gm.graph.find_nodes(op="call_function", target=KINDS["efficient"][0])[0]
    call.args = (*call.args[:3], call.args[0], False)
    assert choose_attention(gm) == 0
    assert not asked


def test_sizes_that_are_not_known_are_left_alone(asked: list) -> None:
    rows = ShapeEnv().create_unbacked_symint()
    gm = graph_of(FLASH, fake=FakeTensorMode(shape_env=rows.node.shape_env), rows=rows)
    assert choose_attention(gm) == 0
    assert not asked


def test_without_a_gpu_torchs_choice_stays() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 4, 64, 64, dtype=torch.bfloat16)
    assert fastest("flash", q, q, q, False, None) == "flash"
