"""Generated code inside a hand-written kernel: a jit function, and the tensors and numbers it reads.

    prologue   of quantize: `function(v, rows, columns, live, extra) -> v`, v [rows, columns] fp32, the loaded input
    epilogue   of gemm and gemv: `function(out, features, tokens, live, extra) -> out`, out [features, tokens] fp32, the
               result with bias and low rank added, before it is rounded and stored

`rows`, `columns`, `features` and `tokens` are indices already shaped to broadcast against the block ([TM, 1], [1, TK],
...), `live` the mask of elements that exist, `extra` the tuple of `operands` as pointers and scalars. A function is
part of a kernel's compile-time identity: Triton's cache sees its source.

An epilogue may have an auxiliary input shaped like the result, a residual say, that the kernel itself loads in whole
tiles; its function is then `function(out, auxiliary, features, tokens, live, extra) -> out`, auxiliary fp32.

An epilogue that gates makes one feature of two, the f-th of each half of the product's:
`function(left, right, features, tokens, live, extra) -> out`, features those of a half. It has no auxiliary input.
"""

from typing import NamedTuple

from torch import Tensor
from triton.runtime import JITFunction


class Generated(NamedTuple):
    """An epilogue or a prologue for the kernel to call, and what it reads besides the block it is given."""

    function: JITFunction
    operands: tuple[Tensor | int | float, ...] = ()
    auxiliary: Tensor | None = None
    gates: bool = False
