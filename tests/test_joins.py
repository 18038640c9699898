"""Parts that lie one after another: the operator, the pass, and that nobody writes to the memory of others."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fusion_testing import Two, count, run, run_as_aten, tokens
from torch import Tensor, nn

from conftest import WIDTH, quiet
from svdq_compile.config import FUSIONS
from svdq_compile.lowering import join, ops

APART = tuple(name for name in FUSIONS if name != "joins")
TEXT = 8


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :TEXT], x[:, TEXT:]


# ** the operator **

WHOLE = torch.arange(2 * 24 * WIDTH).view(2, 24, WIDTH).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("parts", "dim", "shares"),
    [
        (halves(WHOLE), 1, True),
        ((WHOLE[:, :5], WHOLE[:, 5:6], WHOLE[:, 6:]), 1, True),
        ((WHOLE[:1], WHOLE[1:]), 0, True),
        ((WHOLE[1:, :5], WHOLE[1:, 5:]), 1, True),
        ((WHOLE[:1, 8:16], WHOLE[:1, 16:20]), 1, True),  # one sample: how far apart samples are does not count
        ((WHOLE[..., :64], WHOLE[..., 64:]), 2, True),
        (halves(WHOLE)[::-1], 1, False),
        ((WHOLE[:, :8], WHOLE[:, 9:]), 1, False),  # a gap
        ((WHOLE[:, :8], WHOLE[:, 7:]), 1, False),  # an overlap
        ((WHOLE[:, :8], WHOLE[:, 8:16]), 1, False),  # less than whole samples
        ((WHOLE[:, :8], WHOLE[:, 8:].clone()), 1, False),
        ((WHOLE[:, :8], WHOLE[:1, 8:9].expand(2, 16, WIDTH)), 1, False),
        ((WHOLE[:1, :8, 1:65], WHOLE[:1, 8:, 1:65]), 1, False),
        ((WHOLE.view(-1)[1:129].view(1, 1, 128), WHOLE.view(-1)[129:257].view(1, 1, 128)), 1, False),  # not aligned
        ((WHOLE[:, -1:], WHOLE[:, -1:]), 1, False),  # past the end of the memory
    ],
)
def test_the_operator_shares_memory_or_copies(parts: tuple[Tensor, ...], dim: int, shares: bool) -> None:
    expected = torch.cat(parts, dim)
    y = join.joined(list(parts), dim)
    assert torch.equal(ops.joined(list(parts), dim), expected)
    assert torch.equal(y, expected)
    assert y.is_contiguous()
    assert (y.untyped_storage().data_ptr() == WHOLE.untyped_storage().data_ptr()) == shares


def test_its_shape_function() -> None:
    made = join.empty_result([torch.empty(2, 3, 8, device="meta"), torch.empty(2, 4, 8, device="meta")], 1)
    assert made.shape == (2, 7, 8)
    assert made.device.type == "meta"


# ** the pass **


def apart(linears: Callable[[Tensor], Tensor]) -> Callable:
    """A block of two streams: as one sequence through `linears`, and apart again."""
    return lambda a, b, text, image: halves(linears(a, b, torch.cat((text, image), 1)))


RESIDUAL = apart(lambda a, b, x: x + b(F.gelu(a(F.layer_norm(x, (WIDTH,))))))


def returned_both(f: Callable) -> Callable:
    """With all outputs as one, since a test compares one."""
    return lambda *inputs: torch.cat(f(*inputs), 1)


@pytest.mark.parametrize(
    ("around", "joins"),
    [
        (returned_both(RESIDUAL), 1),
        (lambda a, b, t, i: a(torch.cat((t, i), 1).view(1, -1, WIDTH)), 1),
        (lambda a, b, t, i: b(torch.cat((t, i), 1)) * torch.cat((t, i), 1).float().mean(-1, keepdim=True), 1),
        # Returned, itself or as a view: the caller may write to it.
        (lambda a, b, t, i: (a(x := torch.cat((t, i), 1)), x), 0),
        (lambda a, b, t, i: (a(x := torch.cat((t, i), 1)), x[:, 2:].transpose(0, 1)), 0),
        (lambda a, b, t, i: a(torch.cat((t, i), 1).add_(1.0)), 1),  # the whole is written to, functionally
        (lambda a, b, t, i: a(x := torch.cat((t, i), 1)) + b(x.mul_(2.0)), 1),
        # A part is written to.
        (lambda a, b, t, i: (a(torch.cat((t, i), 1)), t.mul_(2.0)), 0),
        # Not inputs; of two types; read by no quantized linear; biases.
        (lambda a, b, t, i: a(torch.cat((t * 2.0, i), 1)), 0),
        (lambda a, b, t, i: a(torch.cat((t, i.float()), 1).to(t.dtype)), 0),
        (lambda a, b, t, i: a(t) + torch.cat((t, i), 1).sum(), 0),
        (lambda a, b, t, i: (F.silu(a(t)), F.silu(b(t))), 0),
    ],
)
def test_near_misses(around: Callable, joins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    results = []
    for fuse in (FUSIONS, APART):
        whole = tokens()
        results.append(run(Two(around).to(torch.bfloat16).requires_grad_(False), halves(whole), fuse=fuse))
        if fuse == FUSIONS:
            assert count(graphs, ops.joined) == joins
    assert count(graphs, ops.joined) == joins  # none without the pass
    assert torch.equal(*results)


class Stack(nn.Module):
    """Two blocks on the same two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Two(RESIDUAL) for _ in range(2))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        for block in self.blocks:
            text, image = block(text, image)
        return image


def stack() -> Stack:
    return Stack().to(torch.bfloat16).eval().requires_grad_(False)


def test_in_a_whole_model_the_second_block_reads_what_the_first_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    joined = run(stack(), halves(tokens()))
    assert count(graphs, ops.joined) == 1
    assert count(graphs, torch.ops.aten.cat.default) == 0
    assert torch.equal(joined, run(stack(), halves(tokens()), fuse=APART))


@pytest.mark.parametrize("cut", [(8, 8, 24), (8, 9, 24), (8, 8, 23), (1, 8, 24)])
def test_slices_that_are_not_the_whole_are_put_together(cut: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    end, start, last = cut
    begin = 1 if end == 1 else 0

    def around(a, b, text, image):
        y = a(torch.cat((text, image), 1))
        return b(torch.cat((y[:, begin : max(end, 8)], y[:, start:last]), 1))

    graphs = run_as_aten(monkeypatch)
    results = [run(Two(around).to(torch.bfloat16).requires_grad_(False), halves(tokens()), fuse=f)
               for f in (FUSIONS, APART)]  # fmt: skip
    assert torch.equal(*results)
    assert (count(graphs[:1], torch.ops.aten.cat.default) == 0) == (cut == (8, 8, 24))


# ** through Inductor **


def test_nothing_is_written_where_the_parts_lie() -> None:
    """Inductor gives a result's memory to another once it has been read: not that of a borrowed one. Here the sum would
    take the place of the tokens.
    """

    def around(a, b, text, image):
        y = a(tokens := torch.cat((text, image), 1))
        return y, tokens + y[:, :1] + b(y)

    outputs = []
    for fuse in (FUSIONS, ("joins",)):
        torch._dynamo.reset()
        model = Two(around).to(torch.bfloat16).eval().requires_grad_(False)
        options = quiet(rank=16, refine=1, precision="w4a8", fuse=fuse)
        compiled = torch.compile(model, backend="svdquant", fullgraph=True, options=options)
        whole = tokens()
        for _ in range(3):
            out = compiled(*halves(whole))
            assert torch.equal(whole, tokens())
        outputs.append(torch.cat(out))
    model = Two(around).to(torch.bfloat16).eval().requires_grad_(False)
    exact = torch.cat(model(*halves(tokens())))
    for out in outputs:
        assert (out - exact).norm() < 0.2 * exact.norm()
