"""The text of a fused region: written and read back, evaluated, and turned into a Triton function that agrees."""

import random

import pytest
import torch
from kernel_testing import compiled, error, interpreted, run_interpreted
from torch import Tensor

from svdq_compile.lowering import generate
from svdq_compile.lowering.region import OPERATIONS, Region, Step, parse

MODULATE = """prologue(x, a0: BT, a1: BT, a2: C, a3: BC, a4: 1, a5: BTC)
t0 = sub(x, a0)
t1 = mul(t0, a1)
t2 = add(a2, 1.0)
t3 = mul(t1, t2)
t4 = add(t3, a3)
t5 = mul(t4, a4)
t6 = add(t5, a5)
t7 = fp16(t6)""".replace("\n", "; ")
RESIDUAL = """epilogue(y, a0: C, auxiliary: BTC)
t0 = mul(a0, y)
t1 = add(auxiliary, t0)""".replace("\n", "; ")
GATE = "gate(y, right, a0: C); t0 = mul(right, a0); t1 = erf(t0); t2 = add(t1, 1.0); t3 = mul(y, t2)"
EVERYTHING = (
    "prologue(x, a0: BTC); "
    "t0 = tanh(x); t1 = erf(x); t2 = exp(a0); t3 = sigmoid(x); t4 = relu(a0); t5 = abs(x); t6 = add(t5, 0.5); "
    "t7 = sqrt(t6); t8 = rsqrt(t6); t9 = reciprocal(t6); t10 = neg(t9); t11 = maximum(t0, t1); "
    "t12 = minimum(t2, t3); t13 = div(t11, t6); t14 = sub(t12, t13); t15 = mul(t14, t7); t16 = add(t15, t8); "
    "t17 = add(t16, t10); t18 = add(t17, t4); t19 = fp16(t18)"
)


@pytest.mark.parametrize(
    "text", [MODULATE, RESIDUAL, EVERYTHING, "prologue(x, right)", "epilogue(y); t0 = bf16(y)", GATE]
)
def test_what_is_written_is_read_back(text: str) -> None:
    assert str(parse(text)) == text
    compile(generate.source(parse(text)), "region.py", "exec")


def test_numbers_survive_exactly() -> None:
    numbers = [random.Random(0).uniform(-1e3, 1e-3) for _ in range(50)] + [1e-30, -0.0, 3e38]
    for number in numbers:
        region = Region("epilogue", (), (Step("t0", "mul", ("y", number)),))
        assert parse(str(region)) == region


@pytest.mark.parametrize(
    "text",
    ["", "epilogue", "both(y)", "epilogue(y, a0: diagonal)", "epilogue(y); t0 = launch(y)", "epilogue(y); t0 = exp(z)"],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"region|float"):
        parse(text)


def test_every_operation_has_a_line_in_triton() -> None:
    assert set(OPERATIONS) == set(generate._INFIX) | set(generate._CALLS)


def values_for(region: Region, m: int, c: int, samples: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"BTC": (samples, m // samples, c), "BT": (samples, m // samples, 1), "C": (c,), "BC": (samples, 1, c),
              "1": ()}  # fmt: skip
    return {name: torch.randn(shapes[axes], generator=g).to(torch.bfloat16) for name, axes in region.operands}


def run_function(region: Region, block: Tensor, values: dict[str, Tensor], samples: int, tiles: bool) -> Tensor:
    """The generated function over a whole matrix, in the interpreter."""
    import triton
    import triton.language as tl

    m, c = block.shape
    is_epilogue = region.kind == "epilogue"
    generated = generate.bind(str(region), values, torch.Size((samples, m // samples)), c, tiles)

    @triton.jit
    def kernel(x, y, auxiliary, M, C, extra, FUNCTION: tl.constexpr, AUXILIARY: tl.constexpr, EPILOGUE: tl.constexpr):
        rows = tl.arange(0, 32)[:, None]
        columns = tl.arange(0, 128)[None, :]
        live = (rows < M) & (columns < C)
        v = tl.load(x + rows * C + columns, mask=live, other=0.0)
        if AUXILIARY:
            other = tl.load(auxiliary + rows * C + columns, mask=live, other=0.0).to(tl.float32)
            v = FUNCTION(v, other, columns, rows, live, extra)
        elif EPILOGUE:
            v = FUNCTION(v, columns, rows, live, extra)
        else:
            v = FUNCTION(v, rows, columns, live, extra)
        tl.store(y + rows * C + columns, v, mask=live)

    y = torch.full_like(block, torch.nan)
    other = block if generated.auxiliary is None else generated.auxiliary
    kernel[(1,)](
        block, y, other, m, c, generated.operands, generated.function, generated.auxiliary is not None, is_epilogue
    )
    return y


@interpreted
def test_interpreted_erf() -> None:
    """Also near zero, where one minus something is not exact, and at the ends."""
    inf = float("inf")
    x = torch.cat([torch.linspace(-6, 6, 2048), torch.logspace(-30, 30, 1022), -torch.logspace(-30, 30, 1022)])
    x = torch.cat([x, torch.tensor([0.0, inf, -inf, float("nan")])])
    y = run_function(parse("prologue(x); t0 = erf(x)"), x.view(32, 128), {}, 1, False).flatten()
    off = (y - torch.erf(x.double())).abs()[:-4]
    assert (off / torch.erf(x.double()).abs()[:-4]).max() < 2**-16
    assert off.max() < 2e-6
    assert y[-4:].tolist()[:3] == [0, 1, -1]
    assert y[-1].isnan()


# The interpreter cuts bf16 off instead of rounding it: fp16 stands for both.
@interpreted
@pytest.mark.parametrize(
    ("text", "tiles"),
    [(MODULATE, False), (RESIDUAL, True), (RESIDUAL, False), (EVERYTHING, False), ("epilogue(y)", False)],
)
def test_interpreted_function_is_what_evaluate_says(text: str, tiles: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    region, m, c, samples = parse(text), 27, 100, 3
    block = torch.randn(m, c, generator=torch.Generator().manual_seed(1))
    values = values_for(region, m, c, samples)
    outside = {name: v for name, v in values.items() if name not in ("x", "right")}
    result = run_function(region, block, outside, samples, tiles)
    first = "y" if region.kind == "epilogue" else "x"
    expected = region.evaluate(outside | {first: block.view(samples, -1, c)}).reshape(m, c)
    assert error(result, expected) < 1e-5


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@compiled
def test_a_missing_file_is_written_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SVDQ_DUMP", str(tmp_path / "dump"))
    generate.function.cache_clear()
    generate.function(RESIDUAL)
    (file,) = (tmp_path / "cache" / "regions").iterdir()
    assert RESIDUAL.split("; ")[1] in file.read_text()
    assert [f.name for f in (tmp_path / "dump").iterdir()] == [file.name]
    file.write_text("damaged")
    generate.function.cache_clear()
    generate.function(RESIDUAL)
    assert "triton.jit" in file.read_text()
