"""Quantize a tensor once for all the linears that read it.

    before   q0 = svdq.quantize(x, smooth, down)      q = svdq.gemm(q0...)
             k0 = svdq.quantize(x, smooth, down)      k = svdq.gemm(k0...)
    after    q0 = svdq.quantize(x, smooth, down)      q = svdq.gemm(q0...),  k = svdq.gemm(q0...)

The same for the channel moves around 1x1 convolutions and for the low-rank branch of linears whose input stays 16-bit.
Left alone: linears with smoothing factors of their own.
"""

import torch
import torch.nn.functional as F
from torch import fx

from ..lowering import ops
from .subgraphs import invocations


def share_quantized_inputs(gm: fx.GraphModule) -> int:
    """Merge equal nodes, in subgraphs too. Returns how many went away."""
    merged = 0
    for target in (torch.movedim, F.linear, ops.quantize):
        first: dict[tuple, fx.Node] = {}
        for node in gm.graph.find_nodes(op="call_function", target=target):
            kept = first.setdefault((node.args, tuple(node.kwargs.items())), node)
            if kept is not node:
                for own, other in zip(_items(node), _items(kept), strict=True):
                    own.replace_all_uses_with(other)
                    if own is not node:
                        gm.graph.erase_node(own)
                gm.graph.erase_node(node)
                merged += 1
    for name in {call.subgraph for call in invocations(gm)}:
        merged += share_quantized_inputs(gm.get_submodule(name))  # type: ignore[arg-type]
    return merged


def _items(node: fx.Node) -> list[fx.Node]:
    """The three parts that are taken out of a `quantize`, or the node itself if it gives one tensor."""
    return list(node.users)[:3] if node.target is ops.quantize else [node]
