"""Generated code inside a hand-written kernel: a jit function, and the tensors and numbers it reads.

    prologue   of quantize: `function(v, rows, columns, live, extra) -> v`, v [rows, columns] fp32, the loaded input
    epilogue   of gemm and gemv: `function(out, features, tokens, live, extra) -> out`, out [features, tokens] fp32, the
               result with bias and low rank added, before it is rounded and stored

`rows`, `columns`, `features` and `tokens` are indices already shaped to broadcast against the block ([TM, 1], [1, TK],
...), `live` the mask of elements that exist, `extra` the tuple of `operands` as pointers and scalars. A hook is part of
a kernel's compile-time identity: Triton's cache sees the source of its function.

An epilogue may have one matrix `beside` the result, a residual say, that the kernel itself loads in whole tiles; its
function is then `function(out, beside, features, tokens, live, extra) -> out`, beside fp32, shaped like out.
"""

from dataclasses import dataclass

from torch import Tensor
from triton.runtime import JITFunction


@dataclass(frozen=True, eq=False)
class Hook:
    """A function for the kernel to call, and what it reads besides the block it is given."""

    function: JITFunction
    operands: tuple[Tensor | int | float, ...] = ()
    beside: Tensor | None = None
