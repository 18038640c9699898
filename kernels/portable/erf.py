"""A function that generated code calls."""

import triton
import triton.language as tl

from .unpack import WITHOUT_PTX

_RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")


@triton.jit
def erf(x):
    """fp32, relative error below 2^-16: by half of the instructions that the library's takes (19 and 37 on sm_90).

    1 - (1 + a1 |x| + ... + a6 |x|^6)^-16 with Abramowitz and Stegun's coefficients (7.1.28), off by 1e-6 with fp32's
    roundings; near zero, where that would be much, the first two terms of the series.
    """
    z = tl.abs(x)
    p = z * (0.0000430638 * z + 0.0002765672) + 0.0001520143
    p = z * (z * (z * (z * p + 0.0092705272) + 0.0422820123) + 0.0705230784) + 1.0
    p = p * p
    p = p * p
    p = p * p
    p = p * p
    if WITHOUT_PTX:
        rest = 1.0 / p
    else:
        rest = tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [p], dtype=tl.float32, is_pure=True, pack=1)
    y = tl.where(z < 0.1, z * (1.1283791671 - 0.3761263890 * z * z), 1.0 - rest)
    return tl.where(x < 0.0, -y, y)
