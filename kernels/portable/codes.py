"""From values to codes and scales: what both quantize kernels are put together of. Formulas: quantize.py."""

import triton
import triton.language as tl

# Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits: no slow float-to-int.
ROUND = tl.constexpr(12582912.0)
LARGEST = tl.constexpr(3.0e38)  # for reciprocals of scales so small that they would overflow


@triton.jit
def nearest(v):
    """The nearest integer, ties to even, of values that are far below 2^22."""
    return (v + ROUND) - ROUND


@triton.jit
def prologue(v, rows, columns, live, extra, PROLOGUE: tl.constexpr):
    """A block of the input -> what the linear reads, in the same dtype; zero where nothing lives."""
    if PROLOGUE is not None:
        v = tl.where(live, PROLOGUE(v.to(tl.float32), rows, columns, live, extra), 0.0).to(v.dtype)
    return v


@triton.jit
def int8_scale(most):
    """The largest magnitude of a row -> its scale and the reciprocal."""
    scale = tl.where(most > 0, tl.div_rn(most, 127.0), 1.0)
    return scale, tl.minimum(1.0 / scale, LARGEST)


@triton.jit
def int8_codes(v, inverse, reciprocal):
    """v, with one over its smoothing factors and one over its scale -> int8."""
    return (v.to(tl.float32) * inverse * reciprocal + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def int8_pair(even, odd, reciprocal):
    """Neighbours, smoothed, with one over their row's scale -> int8 codes, the even one's in the low byte of int16."""
    even = (even * reciprocal + ROUND).to(tl.int32, bitcast=True)
    odd = (odd * reciprocal + ROUND).to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x0040;", "=r,r,r", [even, odd], dtype=tl.int32, is_pure=True, pack=1
    ).to(tl.int16)


@triton.jit
def quotient(a, b, inverse):
    """a / b as a division rounds it, signed zeros too, in three operations; inverse is 1 / b rounded.

    Negated by a product: until Triton 3.7 a minus is a subtraction from zero, which loses the sign of -0.
    """
    q = a * inverse
    return tl.fma(tl.fma(q, b, a * -1.0) * -1.0, inverse, q)


@triton.jit
def rotated(v):
    """v [TM, 64], as formats/rotation.py rotates it: the same additions in the same order."""
    for _ in tl.static_range(6):
        even, odd = tl.split(tl.reshape(v, (v.shape[0], 32, 2)))
        v = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (v.shape[0], 64))
    return v * 0.125


@triton.jit
def int4_codes(v, UNSIGNED: tl.constexpr, FP8: tl.constexpr):
    """v [TM, 64] -> codes [TM, 64] int8 or e4m3, scales [TM]."""
    if UNSIGNED:
        scale = tl.div_rn(tl.max(tl.abs(v), 1), 15.0)
    else:  # the largest magnitude has the code -8
        most, least = tl.max(v, 1), tl.min(v, 1)
        scale = tl.where(most > least * -1.0, most * -1.0, least * -1.0) * 0.125
    scale = tl.where(scale != 0, scale, 1.0)
    inverse = tl.maximum(tl.minimum(tl.div_rn(1.0, scale), LARGEST), -LARGEST)
    q = quotient(v, scale[:, None], inverse[:, None])
    q = tl.maximum(q, 0.0) if UNSIGNED else tl.minimum(q, 7.0)
    q += ROUND
    return (q - ROUND).to(tl.float8e4nv) if FP8 else q.to(tl.int32, bitcast=True).to(tl.int8), scale


@triton.jit
def e4m3(v):
    """v >= 0 -> the nearest e4m3 code, as int32, at most 448; zero becomes 1. Plain integers: for any GPU."""
    v = tl.minimum(v, 448.0)
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # three bits of mantissa; exponent bias 7, not 127
    small = (v * 512.0 + ROUND).to(tl.int32, bitcast=True) & 15
    code = tl.where(v < 0.015625, small, normal)
    return tl.where(code > 0, code, 0x38)


@triton.jit
def e4m3_value(code):
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, ((code + 960) << 20).to(tl.float32, bitcast=True))


@triton.jit
def e2m1(v):
    """The nearest e2m1 code, as int32; ties to the even code, saturating at 6."""
    m = tl.minimum(tl.abs(v), 6.0)
    # Codes count halves below 2 (from 0), ones below 4 (from 4), twos above (from 6).
    steps = tl.where(m < 2.0, 2.0, tl.where(m < 4.0, 1.0, 0.5))
    first = tl.where(m < 2.0, ROUND, tl.where(m < 4.0, ROUND + 2.0, ROUND + 4.0))
    return ((m * steps + first).to(tl.int32, bitcast=True) & 7) | ((v.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def nvfp4_codes(v, TM: tl.constexpr):
    """v [TM, 64] -> two codes a byte [TM, 32] uint8, scales [TM, 4] uint8."""
    g = tl.reshape(v, (TM, 4, 16))
    code = e4m3(tl.div_rn(tl.max(tl.abs(g), 2), 6.0))
    scale = e4m3_value(code)
    q = e2m1(quotient(g, scale[:, :, None], tl.div_rn(1.0, scale)[:, :, None]))
    low, high = tl.split(tl.reshape(q, (TM, 32, 2)))
    return (low | (high << 4)).to(tl.uint8), code.to(tl.uint8)
