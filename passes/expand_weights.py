"""Expand weights that no 4-bit product takes, before each use.

    before   y = matmul(x, w)
    after    w16 = expand("w4a16", False, shape, dtype, smooth, up, down, qweight, ..., taps_first=..., contiguous=...)
             y = matmul(x, w16)

`expand` is a plain function of tensors: AOTAutograd traces through it, and Inductor makes a kernel of it.

Left alone: packs whose linears were all replaced.
"""

from collections.abc import Collection

import torch
from torch import fx

from ..kernels.formats import FORMATS
from ..lowering.packed import expand
from .quantize_linears import PackedInputs, Packs, emit


def expand_weights(gm: fx.GraphModule, packs: Packs, weights: Collection[fx.Node]) -> int:
    """Rewrite the uses of those of these weights that are in `packs`. Returns how many."""
    inputs = PackedInputs(gm.graph, packs)
    chosen = [weight for weight in weights if weight in packs and weight.users]
    for weight in chosen:
        _expand(gm.graph, weight, inputs)
    return len(chosen)


def _expand(graph: fx.Graph, weight: fx.Node, inputs: PackedInputs) -> None:
    packed = inputs.packs[weight]
    first = min(weight.users)  # so late that no more 16-bit weights are there at once than have to be
    fields = [inputs.own(weight, field, first) for field in FORMATS[packed.precision].fields]
    down = inputs.get(weight, "down")
    if packed.rank != packed.shared.down.shape[0]:
        down = emit(graph, first, torch.narrow, down, 0, packed.rank_start, packed.rank)
    value = weight.meta["example_value"]
    tensors = inputs.get(weight, "smooth"), inputs.own(weight, "up", first), down, *fields
    form = packed.precision, packed.shared.rotate, tuple(value.shape), value.dtype
    expanded = emit(graph, first, expand, *form, *tensors)
    # In the strides that the graph was traced with: Inductor's kernel writes them as its convolution wants them.
    expanded.kwargs = {"taps_first": packed.taps_first, "contiguous": value.is_contiguous()}
    expanded.meta["example_value"] = value
    weight.replace_all_uses_with(expanded)
