"""Replace linears whose weights are packed by the svdq:: operators.

    before   y = linear(x, w, b)                       x [..., K]   w [N, K]   y [..., N]
    after    qx, ascales, xd = svdq.quantize(x, smooth, down)
             y = svdq.gemm(qx, ascales, xd, [qweight, ...], up, b)
    or       xd = linear(x, down)                      where activations stay 16-bit
             y = svdq.gemv(x, xd, [qweight, ...], up, b)

The packed tensors become graph inputs, never constants: one compiled block serves all blocks and all instances. Where
each comes from is noted in the placeholder's meta as `PackedInput`. Of what lies side by side the whole is
an input, and each linear takes its part. A 1x1 convolution is wrapped in moves of its channel dimension. A subgraph is
rewritten once for each way its calls' weights are packed.

Left alone: linears without an entry in `packs`, and what `find_linears` rejects.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..kernels.formats import FORMATS
from ..kernels.operands import Quantize
from ..lowering import ops
from ..lowering.packed import PackedLinear, form
from ..lowering.torch_private import clone_dynamo_graph, fake_like, mark_as_weight
from .linears import LinearSite, find_linears
from .subgraphs import Invocation, invocations, placeholders

Packs = dict[fx.Node, PackedLinear]


@dataclass(frozen=True)
class PackedInput:
    """Where a new graph input comes from: a field of the packed form of the graph's original input number `index`."""

    index: int
    field: str

    def value(self, packed: PackedLinear) -> Tensor:
        if self.field in ("smooth", "down"):
            return getattr(packed.shared, self.field)
        tensors = packed.own_tensors() if packed.siblings is None else packed.siblings.tensors
        return tensors[self.field]


def quantize_linears(gm: fx.GraphModule, packs: Packs) -> int:
    """Rewrite the linears whose weight placeholder is in `packs`. Returns how many were replaced."""
    inputs = PackedInputs(gm.graph, packs)
    count = 0
    for site in find_linears(gm).sites:
        if site.weight in packs:
            _replace(gm.graph, site, inputs)
            count += 1
    bodies: dict[tuple, tuple[str, int]] = {}
    for call in [call for call in invocations(gm) if not _is_quantized(gm, call)]:
        count += _quantize_subgraph(gm, call, inputs, bodies)
    return count


class PackedInputs:
    """The graph inputs for packed tensors, each made when first asked for; linears that share a tensor share its
    input.
    """

    def __init__(self, graph: fx.Graph, packs: Packs) -> None:
        self.packs = packs
        originals = placeholders(graph)
        self._index = {node: i for i, node in enumerate(originals)}
        self._graph = graph
        self._last = originals[-1]
        self._made: dict[tuple[int, str], fx.Node] = {}

    def own(self, weight: fx.Node, field: str, before: fx.Node) -> fx.Node:
        """One linear's tensor; where it lies beside its siblings', a view of what is the input."""
        whole, packed = self.get(weight, field), self.packs[weight]
        if packed.siblings is None:
            return whole
        window = packed.siblings.window(field, packed.place)
        node = emit(self._graph, before, operator.getitem, whole, window)
        node.meta["example_value"] = whole.meta["example_value"][window]
        return node

    def get(self, weight: fx.Node, field: str) -> fx.Node:
        packed = self.packs[weight]
        source = PackedInput(self._index[weight], field)
        tensor = source.value(packed)
        node = self._made.get((id(tensor), field))
        if node is None:
            with self._graph.inserting_after(self._last):
                node = self._graph.placeholder(f"{weight.name}_{field}")
            mark_as_weight(node, fake_like(weight.meta["example_value"], tensor))
            node.meta["packed_input"] = source
            self._made[id(tensor), field] = self._last = node
        return node


def _replace(graph: fx.Graph, site: LinearSite, inputs: PackedInputs) -> None:
    packed = inputs.packs[site.weight]
    fmt = FORMATS[packed.precision]
    own = partial(inputs.own, site.weight, before=site.node)
    weight = [own(field) for field in fmt.fields]
    dtype = site.output.dtype
    call = partial(emit, graph, site.node)

    x = site.input
    if site.channel_dim != -1:
        x = call(torch.movedim, x, site.channel_dim, -1)
    if fmt.quantize_activation is None:
        xd = up = None
        if packed.rank:
            xd = _own_columns(call, call(F.linear, x, inputs.get(site.weight, "down")), packed)
            up = own("up")
        y = call(ops.gemv, x, xd, weight, up, site.bias, packed.precision, dtype)
    else:
        smooth, down = inputs.get(site.weight, "smooth"), inputs.get(site.weight, "down")
        shared = packed.shared
        quantized = call(ops.quantize, *Quantize(x, smooth, down, packed.precision, shared.shift, shared.rotate))
        qx, ascales, xd = (call(operator.getitem, quantized, i) for i in range(3))
        xd = _own_columns(call, xd, packed)
        up = own("up")
        offset = own("offset") if packed.offset is not None else None
        y = call(ops.gemm, qx, ascales, xd, weight, up, site.bias, offset, packed.precision, dtype)
    if site.channel_dim != -1:
        y = call(torch.movedim, y, -1, site.channel_dim)
        if site.output.is_contiguous():
            y = call(torch.Tensor.contiguous, y)
    y.meta["example_value"] = site.output
    site.node.replace_all_uses_with(y)
    graph.erase_node(site.node)


def _own_columns(call: Callable[..., fx.Node], xd: fx.Node, packed: PackedLinear) -> fx.Node:
    """Of the low-rank activations of all linears that share the input, this one's."""
    if packed.rank == packed.shared.down.shape[0]:
        return xd
    return call(operator.getitem, xd, (Ellipsis, slice(packed.rank_start, packed.rank_start + packed.rank)))


def emit(graph: fx.Graph, instead_of: fx.Node, target: Callable, *args: Any) -> fx.Node:
    """A call before `instead_of`, marked as standing where it stood in the model."""
    with graph.inserting_before(instead_of):
        node = graph.call_function(target, args)
    node.meta.update(
        {key: instead_of.meta[key] for key in ("nn_module_stack", "stack_trace") if key in instead_of.meta}
    )
    return node


def _is_quantized(gm: fx.GraphModule, call: Invocation) -> bool:
    """Whether a body reads packed tensors already."""
    body: Any = gm.get_submodule(call.subgraph)
    return any("packed_input" in p.meta for p in placeholders(body.graph))


def _quantize_subgraph(
    gm: fx.GraphModule, call: Invocation, inputs: PackedInputs, bodies: dict[tuple, tuple[str, int]]
) -> int:
    """Rewrite the body that one call runs, or reuse it as an earlier call with packs of the same form had it
    rewritten.
    """
    outer = {i: node for i, node in enumerate(call.operands) if isinstance(node, fx.Node) and node in inputs.packs}
    key = (call.subgraph, *outer, form([inputs.packs[node] for node in outer.values()]))
    if key not in bodies:
        body = clone_dynamo_graph(gm.get_submodule(call.subgraph))  # type: ignore[arg-type]
        own = placeholders(body.graph)
        count = quantize_linears(body, {own[i]: inputs.packs[node] for i, node in outer.items()})
        body.recompile()
        name = (
            call.subgraph
            if not any(known[0] == call.subgraph for known in bodies)
            else f"{call.subgraph}_{len(bodies)}"
        )
        setattr(gm, name, body)
        bodies[key] = name, count
    name, count = bodies[key]
    extra = [p.meta["packed_input"] for p in placeholders(gm.get_submodule(name).graph) if "packed_input" in p.meta]  # type: ignore[arg-type]
    operands = (*call.operands, *(inputs.get(outer[source.index], source.field) for source in extra))
    call.point_to(gm, name, operands)
    return count
