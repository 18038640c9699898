"""Move what follows a GEMM, elementwise, into the kernel that stores its result.

    before   y = svdq.gemm(...)                  after    h = svdq.fused_gemm(..., [gate, h0],
             t = mul(gate, y)                                 epilogue(y, a0: C, auxiliary: BTC)
             h = add(h0, t)                                   t0 = mul(a0, y)
                                                              t1 = add(auxiliary, t0))

Biases, activations, gates, residuals and casts come this way (after_gemm.py).

Left alone: a value that is reshaped or reduced, one that somebody else reads too, operands of shapes that do not lie
along the block, what depends on y by another way than through the region, and a result whose strides somebody relies
on.
"""

from torch import fx

from ..lowering import ops
from .after_gemm import fuse_after
from .regions import erase


def fuse_epilogues(gm: fx.GraphModule) -> int:
    """Rewrite every GEMM that something elementwise follows. Returns how many."""
    count = 0
    for gemm in gm.graph.find_nodes(op="call_function", target=ops.gemm):
        if fuse_after("epilogue", gemm, {gemm: "y"}):
            erase(gm.graph, [gemm])
            count += 1
    return count
