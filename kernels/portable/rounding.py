"""Functions that generated code calls: an fp32 value rounded as a model's cast to 16 bits and back does it.

By pairs: there is one instruction that rounds two values, and one of a fraction of the speed that rounds one.
"""

import triton
import triton.language as tl

from .unpack import WITHOUT_PTX

_TO_BF16 = tl.constexpr("{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }")
_TO_FP16 = tl.constexpr("""{ .reg .b32 t; .reg .b16 a, b; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {a, b}, t;
    cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }""")
_BOTH_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;")
_BOTH_FP16 = tl.constexpr("""{ .reg .b16 a, b; cvt.rn.f16x2.f32 $0, $4, $3; mov.b32 {a, b}, $0;
    cvt.f32.f16 $1, a; cvt.f32.f16 $2, b; }""")
_FROM_BF16 = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@triton.jit
def to_bf16(x):
    if WITHOUT_PTX:
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(_TO_BF16, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def to_fp16(x):
    if WITHOUT_PTX:
        return x.to(tl.float16).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(_TO_FP16, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """fp32 -> in a 16-bit type, and that in fp32 again. sm_80 and newer."""
    if DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BOTH_BF16, "=r,=r,=r,r,r", [x], dtype=(tl.bfloat16, tl.float32), is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            _BOTH_FP16, "=r,=r,=r,r,r", [x], dtype=(tl.float16, tl.float32), is_pure=True, pack=2
        )


@triton.jit
def widened(x):
    """bf16, fp16 or fp32 -> fp32. Of neighbours in bf16 the even one takes a shift and the odd one a mask."""
    if WITHOUT_PTX or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(_FROM_BF16, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
