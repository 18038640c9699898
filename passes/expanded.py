"""Weights that something else than a linear multiplies: experts that lie in one tensor, operands of matmul and einsum,
convolutions over more than channels, weights that are computed, sliced or put together before a linear reads them.

No 4-bit product takes these. They are kept in 4 bits and expanded to 16-bit before each use (`expand_weights.py`).

Looked for are Parameters all of whose uses end in a product, on the way at most reshaped, cast, cut, put together or
scaled with nothing but other Parameters. One that is added to activations (a table of positions), or looked up, stays.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from .linears import reads_as_weight, why_not
from .scope import layer_name
from .subgraphs import FIRST_OPERAND, placeholders

# Functions and methods, by the names that torch gives them.
PRODUCTS = frozenset(
    (
        "addbmm", "addmm", "addmv", "baddbmm", "bilinear", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
        "conv_transpose2d", "conv_transpose3d", "einsum", "grouped_mm", "_grouped_mm", "linear", "matmul", "mm",
        "multi_head_attention_forward", "mv", "tensordot", "__matmul__", "__rmatmul__",
    )
)  # fmt: skip
# What a weight may go through on its way to one.
STEPS = frozenset(
    (
        "T", "_weight_norm", "bfloat16", "cat", "chunk", "concat", "contiguous", "div", "expand", "flatten", "float",
        "getitem", "__getitem__", "half", "index_select", "linalg_vector_norm", "mT", "movedim", "mul", "narrow",
        "norm", "permute", "reshape", "select", "split", "squeeze", "stack", "swapaxes", "t", "tensor_split", "to",
        "transpose", "truediv", "type_as", "unbind", "unflatten", "unsqueeze", "vector_norm", "view",
    )
)  # fmt: skip


def find_expanded(gm: fx.GraphModule, parameters: Collection[fx.Node]) -> dict[fx.Node, str]:
    """Of these inputs of a graph, the weights that are to be expanded, with the names of the layers that read them.

    parameters  the inputs that are Parameters; those that linears alone read are not for here
    """
    computed = _computed(gm.graph, parameters)
    found = {}
    for weight in parameters:
        ends = list(_ends(weight, computed))
        if not ends or all(_is_linear(gm, end, last, weight) for end, last in ends):
            continue
        name = layer_name(ends[0][0])
        if all(_is_product(gm, end, last) for end, last in ends) and _why_not(name, weight) is None:
            found[weight] = name
    return found


def _computed(graph: fx.Graph, parameters: Collection[fx.Node]) -> set[fx.Node]:
    """What is made of Parameters alone, these included."""
    computed = set(parameters)
    for node in graph.nodes:
        if _name(node) in STEPS and node.all_input_nodes and computed.issuperset(_values(node)):
            computed.add(node)
    return computed


def _values(step: fx.Node) -> list[fx.Node]:
    """The operands of a step whose values it passes on; an index may be anything."""
    if _name(step) in ("getitem", "__getitem__", "index_select"):
        return [node for node in step.all_input_nodes if node is step.args[0]]
    return step.all_input_nodes


def _ends(node: fx.Node, computed: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Where a weight's steps lead: what reads the last of them, and that last one."""
    for user in node.users:
        if user in computed:
            yield from _ends(user, computed)
        else:
            yield user, node


def _is_linear(gm: fx.GraphModule, node: fx.Node, operand: fx.Node, weight: fx.Node) -> bool:
    """Whether a linear reads the weight as it is, in a body or here: that is for `find_linears`."""
    if node.target in FIRST_OPERAND:
        return all(_is_linear(body, end, last, own) for body, own, end, last in _inside(gm, node, operand))
    return operand is weight and reads_as_weight(node, weight)


def _is_product(gm: fx.GraphModule, node: fx.Node, operand: fx.Node) -> bool:
    if node.target in FIRST_OPERAND:
        return all(_is_product(body, end, last) for body, _, end, last in _inside(gm, node, operand))
    name = _name(node)
    return name in PRODUCTS and not ("conv" in name and node.args[0] is operand)


def _inside(
    gm: fx.GraphModule, call: fx.Node, operand: fx.Node
) -> Iterator[tuple[fx.GraphModule, fx.Node, fx.Node, fx.Node]]:
    """What reads an operand in the body of a call: the body, its own input, and the ends of that."""
    body: Any = gm.get_submodule(str(call.args[0].target))  # type: ignore[union-attr]
    given = zip(placeholders(body.graph), call.args[FIRST_OPERAND[call.target] :], strict=True)  # type: ignore[index]
    inner = [own for own, outer in given if outer is operand]
    computed = _computed(body.graph, inner)
    return ((body, own, end, last) for own in inner for end, last in _ends(own, computed))


def is_matrix(weight: fx.Node) -> bool:
    """Whether an input is a matrix, or several."""
    value = weight.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dim() > 1


def _why_not(name: str, weight: fx.Node) -> str | None:
    return why_not(name, weight.meta["example_value"]) if is_matrix(weight) else "no matrix"


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls; of the attribute that it reads."""
    target: Any = node.target
    if target is getattr:
        return str(node.args[1])
    return target if isinstance(target, str) else getattr(target, "__name__", "")
