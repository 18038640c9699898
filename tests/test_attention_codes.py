"""q, k and v in 8 bits for attention: numbers in the interpreter, and what the kernels compile to."""

import re

import pytest
import torch
from kernel_testing import builds, compile_for, compiled, interpreted, run_interpreted
from torch import Tensor

from svdq_compile.kernels.portable import attention_codes as ac

LONG = ("i64", "i64", "i64")
WIDE = re.compile(r"(ld\.global\S*\.v4\.b32|cp\.async\.c[ag]\.shared\.global .*0x10)")  # 16 bytes a thread


@compiled
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


def reference(x: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """[B, H, S, D] -> values that codes and scales should be near, [B, S, H, D], and the scales [B, H]."""
    x = x.float()
    x = x - x.mean(2, keepdim=True) if centred else x
    most = x.abs().amax((2, 3))
    return x.transpose(1, 2), torch.where(most > 0, most / 448, 1.0)


@interpreted
@pytest.mark.parametrize(("b", "h", "s", "t", "d"), [(1, 1, 1, 1, 16), (2, 3, 70, 9, 48), (1, 2, 300, 515, 64)])
@pytest.mark.parametrize("heads_first", [False, True])
def test_interpreted_codes(b: int, h: int, s: int, t: int, d: int, heads_first: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, h, n, d).half() for n in (s, t, t))
    k += 3 * torch.randn(1, 1, 1, d).half()
    v[0, 0] = 0
    if not heads_first:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    *codes, sq, sk, sv = ac.attention_codes(q, k, v)
    for x, code, scale in zip((q, k, v), codes, (sq, sk, sv), strict=True):
        expected, scales = reference(x, centred=x is k)
        assert code.shape == expected.shape
        assert code.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(scale, scales, rtol=1e-4, atol=1e-6 if t == 1 else 0)
        got = code.float() * scale[:, None, :, None]
        # e4m3 has 3 bits of mantissa: a sixteenth; below 2^-6 of a scale it has steps of 2^-9.
        bound = expected.abs() / 16 + scales[:, None, :, None] * 2**-9
        # Where rounding goes up to a power of two, the interpreter leaves the exponent as it was.
        assert (((got - expected).abs() <= bound) | ((2 * got - expected).abs() <= bound)).all()


@builds
@pytest.mark.parametrize("capability", [89, 90, 100, 120])
@pytest.mark.parametrize("width", [64, 128])
def test_compiles_without_spills(capability: int, width: int) -> None:
    types = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "spans": "*fp32", "scales": "*fp32"}
    types |= dict.fromkeys(("qq", "kq", "vq"), "*fp8e4nv") | dict.fromkeys(
        ("q_strides", "k_strides", "v_strides"), LONG
    )
    spans = {"WIDTH": width, "ROWS": ac.STEP // width, "CHUNKS": ac.CHUNKS}
    built = compile_for(ac._attention_spans_kernel, capability, spans, 8, types, stages=2)
    assert not built.spilled
    assert WIDE.search(built.ptx)
    scales = {"WIDTH": width, "CHUNKS": ac.CHUNKS}
    assert not compile_for(ac._attention_scales_kernel, capability, scales, 2, types | {"means": "*fp32"}).spilled
    codes = {"WIDTH": width, "ROWS": ac.BLOCK // width}
    built = compile_for(ac._attention_codes_kernel, capability, codes, 8, types | {"means": "*fp32"})
    assert not built.spilled
    assert WIDE.search(built.ptx)
    assert "cvt.rn.satfinite.e4m3x2.f32" in built.ptx
