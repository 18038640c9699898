"""4-bit codes to 8- and 16-bit values in registers, four packed bytes of the planar order (planar.py) at a time.

    scaled   (u - 8) * s    int8. u*s fits a byte, so one 32-bit multiply-add does four of them:
                            (u*s + 128 - 8s) ^ 128 in each byte
    biased   bias + u       bf16 (bias 128) or fp16 (1024): a code under a constant exponent, no int-to-float at all;
                            the caller takes the bias off

Each exists as PTX and, for Triton's interpreter and for AMD, as arithmetic.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
WITHOUT_PTX = tl.constexpr(INTERPRETED.value or torch.version.hip is not None)

# $1 four packed bytes; $2 the scale, $6 the bytes 128 - 8s (both int32, one copy for each byte, all equal).
SCALED_LOW = tl.constexpr("""{ .reg .b32 t; and.b32 t, $1, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6;
    xor.b32 $0, t, 0x80808080; }""")
SCALED_HIGH = tl.constexpr("""{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F; mad.lo.u32 t, t, $2, $6;
    xor.b32 $0, t, 0x80808080; }""")
SCALED_CONSTRAINTS = tl.constexpr("=r,r,r,r,r,r,r,r,r,r")
FOUR_128 = tl.constexpr(-0x7F7F7F80)  # 0x80808080 as an int32
FOUR_8 = tl.constexpr(0x08080808)

# $2 four packed bytes -> $0, $1 four 16-bit values; a byte under each code becomes its exponent.
_BIASED_LOW = """{ .reg .b32 t; and.b32 t, $2, 0x0F0F0F0F;
    prmt.b32 $0, t, EXPONENT, 0x4140; prmt.b32 $1, t, EXPONENT, 0x4342; }"""
_BIASED_HIGH = """{ .reg .b32 t; shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F;
    prmt.b32 $0, t, EXPONENT, 0x4140; prmt.b32 $1, t, EXPONENT, 0x4342; }"""
BF16_LOW, BF16_HIGH = (tl.constexpr(s.replace("EXPONENT", "0x43434343")) for s in (_BIASED_LOW, _BIASED_HIGH))
FP16_LOW, FP16_HIGH = (tl.constexpr(s.replace("EXPONENT", "0x64646464")) for s in (_BIASED_LOW, _BIASED_HIGH))


@triton.jit
def nibble(p, HIGH: tl.constexpr):
    """p int8 -> its low or high four bits, int8."""
    return (p >> 4) & 0xF if HIGH else p & 0xF


@triton.jit
def scaled(p, s, HIGH: tl.constexpr):
    """p [N, J] int8, s [N, 1] int32 in 0..16 -> (u - 8) * s, [N, J] int8."""
    if WITHOUT_PTX:
        return ((nibble(p, HIGH).to(tl.int32) - 8) * s).to(tl.int8)
    else:
        c = FOUR_128 - s * FOUR_8
        return tl.inline_asm_elementwise(
            SCALED_HIGH if HIGH else SCALED_LOW, SCALED_CONSTRAINTS, [p, s, c], dtype=tl.int8, is_pure=True, pack=4
        )


@triton.jit
def biased(p, DTYPE: tl.constexpr, HIGH: tl.constexpr):
    """p [N, J] int8 -> u + 128 in bf16 or u + 1024 in fp16, [N, J]."""
    BF16: tl.constexpr = DTYPE == tl.bfloat16
    if WITHOUT_PTX:
        return (nibble(p, HIGH).to(tl.float32) + (128.0 if BF16 else 1024.0)).to(DTYPE)
    elif BF16:
        return tl.inline_asm_elementwise(
            BF16_HIGH if HIGH else BF16_LOW, "=r,=r,r", [p], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            FP16_HIGH if HIGH else FP16_LOW, "=r,=r,r", [p], dtype=tl.float16, is_pure=True, pack=4
        )
