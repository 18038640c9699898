"""Norm and rotation of heads on a GPU, against the region's text in torch. Needs CUDA."""

import pytest
import torch

from svdq_compile.lowering import ops
from svdq_compile.lowering.heads import parts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BOUND = {torch.bfloat16: 3e-3, torch.float16: 4e-4}  # a rounding is 2^-9 and 2^-12 at most
NORM = """heads(x, a0: D)
t0 = mul(x, x)
t1 = row_mean(t0)
t2 = add(t1, 1e-06)
t3 = rsqrt(t2)
t4 = mul(x, t3)
t5 = mul(t4, a0)""".replace("\n", "; ")
ROTATED = (
    NORM.replace("D)", "D, a1: BTD, a2: BTD)")
    + """
t6 = even(t5)
t7 = odd(t5)
t8 = neg(t7)
t9 = pair(t8, t6)
t10 = mul(t5, a1)
t11 = mul(t9, a2)
t12 = add(t10, t11)""".replace("\n", "; ")
)
HALVES = ROTATED.replace("even(", "low(").replace("odd(", "high(").replace("pair(", "halves(")
# Normed over all heads; rotated as Wan does it, and by LTX's tables, which differ from head to head.
ALL_HEADS = """heads(x, a0: BT, a1: HD)
t0 = add(a0, 1e-06)
t1 = rsqrt(t0)
t2 = mul(x, t1)
t3 = mul(t2, a1)""".replace("\n", "; ")
WAN = (
    ALL_HEADS.replace("HD)", "HD, a2: BTD, a3: BTD)")
    + """
t4 = even(t3)
t5 = odd(t3)
t6 = even(a2)
t7 = odd(a3)
t8 = mul(t4, t6)
t9 = mul(t5, t7)
t10 = sub(t8, t9)
t11 = mul(t4, t7)
t12 = mul(t5, t6)
t13 = add(t11, t12)
t14 = pair(t10, t13)""".replace("\n", "; ")
)
LTX = WAN.replace("BTD", "BTHD")


def operands(text, b, t, h, d, dtype, is_wide):
    """A wide x is a slice of a merged result, q beside k and v."""
    x = torch.randn(b, t, 3 * h * d, device="cuda").to(dtype)[..., h * d : 2 * h * d].unflatten(-1, (h, d))
    shapes = {"D": (d,), "HD": (h, d), "BTD": (t, 1, d), "BTHD": (b, t, h, d)}
    made = [x if is_wide else x.contiguous()]
    for _, axes in parts(text)[0].operands[1:]:
        if axes == "BT":
            made.append(x.float().square().mean((2, 3), keepdim=True))
        else:
            made.append(torch.randn(shapes[axes], device="cuda").to(torch.float32 if "T" in axes else dtype))
    return made


def check(y, text, inputs):
    names = [name for name, _ in parts(text)[0].operands]
    expected = parts(text)[0].evaluate({name: v.double() for name, v in zip(names, inputs, strict=True)})
    assert y.dtype == inputs[0].dtype
    assert ((y - expected).norm() / expected.norm()).item() < BOUND[y.dtype]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("text", [NORM, ROTATED, HALVES, ALL_HEADS, WAN, LTX])
@pytest.mark.parametrize(
    ("b", "t", "h", "d", "is_wide"),
    [
        (1, 4608, 24, 128, True),
        (2, 77, 24, 128, False),
        (2, 1, 5, 64, True),
        (1, 333, 3, 256, True),
        (1, 9, 2, 8, False),
    ],
)
def test_heads(text, b, t, h, d, is_wide, dtype):
    inputs = operands(text, b, t, h, d, dtype, is_wide)
    check(ops.head_region(inputs, text), text, inputs)


def test_text_and_image_tokens():
    text, image = (operands(ROTATED, 1, t, 24, 128, torch.bfloat16, True) for t in (77, 500))
    y = ops.head_region([*text, *image], f"{ROTATED} | {ROTATED}")
    check(y[:, :77], ROTATED, text)
    check(y[:, 77:], ROTATED, image)


def test_no_tokens_and_other_strides():
    inputs = operands(ROTATED, 1, 0, 24, 128, torch.bfloat16, False)
    assert ops.head_region(inputs, ROTATED).shape == (1, 0, 24, 128)
    inputs = operands(ROTATED, 2, 77, 4, 64, torch.bfloat16, False)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    check(ops.head_region(inputs, ROTATED), ROTATED, inputs)
    inputs[0] = inputs[0].transpose(1, 3).contiguous().transpose(1, 3)
    check(ops.head_region(inputs, ROTATED), ROTATED, inputs)


def test_captured_in_a_graph():
    inputs = operands(ROTATED, 1, 100, 24, 128, torch.bfloat16, True)
    ops.head_region(inputs, ROTATED)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.head_region(inputs, ROTATED)
    inputs[0].normal_()
    graph.replay()
    check(y, ROTATED, inputs)
