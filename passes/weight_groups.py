"""Which of a graph's inputs are weights of linears, and which of those read the same tensor: what gets quantized
together.

This is the view from outside: by the number of the input, subgraphs and their calls included.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import fx

from .expanded import find_expanded, is_matrix
from .linears import OTHERWISE, find_linears, group_by_input, why_not
from .pipeline import log
from .subgraphs import invocations, other_bodies, placeholders


@dataclass(frozen=True)
class WeightGroup:
    """Linears that read one tensor.

    indices   of their weights among the graph's inputs
    names     of the layers
    few_rows, shift   as in LinearSite
    expanded  no linear, but a weight that is expanded before use (expanded.py)
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    few_rows: bool
    shift: float
    expanded: bool = False


@dataclass(frozen=True)
class WeightInputs:
    """All weights of linears and other products in a graph: the groups that may be quantized, and (index, name, reason)
    of the others.

    outside   inputs that stand beside the repeated blocks, as far as the graph can tell
    known     names of layers in the model, by input, that the graph was looked through with
    """

    groups: list[WeightGroup]
    rejected: list[tuple[int, str, str]]
    outside: set[int]
    known: Mapping[int, str]

    @property
    def expanded(self) -> list[int]:
        """The inputs that are expanded before use."""
        return [index for group in self.groups if group.expanded for index in group.indices]

    def known_by_node(self, gm: fx.GraphModule) -> dict[fx.Node, str]:
        """`known`, by the inputs of the graph or of a copy."""
        return {node: self.known[i] for i, node in enumerate(placeholders(gm.graph)) if i in self.known}


def weight_inputs(
    gm: fx.GraphModule, known: Mapping[int, str] = MappingProxyType({}), parameters: Collection[int] = ()
) -> WeightInputs:
    """Analyse a graph as Dynamo made it.

    known       names of layers in the model, by the number of their weight's input, where more is known than the graph
                tells
    parameters  the inputs that are Parameters, of which those that no linear reads may be weights too
    """
    found = WeightInputs([], [], set(), known)
    nodes = placeholders(gm.graph)
    index = {node: i for i, node in enumerate(nodes)}
    _collect(gm, index, found.known_by_node(gm), found)
    expanded = find_expanded(gm, [nodes[i] for i in parameters])
    chosen = {index[weight] for weight in expanded}
    found.rejected[:] = [rejected for rejected in found.rejected if rejected[0] not in chosen]
    for weight, name in expanded.items():
        own = (index[weight],), (known.get(index[weight], name),)
        found.groups.append(WeightGroup(*own, few_rows=False, shift=0.0, expanded=True))
    known_of = {i for group in found.groups for i in group.indices} | {i for i, _, _ in found.rejected}
    for i in parameters:
        if i not in known_of and nodes[i].users and is_matrix(nodes[i]):
            name = known.get(i, nodes[i].name)
            found.rejected.append((i, name, why_not(name, nodes[i].meta["example_value"]) or OTHERWISE))
    return found


def _collect(gm: fx.GraphModule, index: dict[fx.Node, int], known: Mapping[fx.Node, str], found: WeightInputs) -> None:
    linears = find_linears(gm, known)
    found.outside.update(index[weight] for weight in linears.outside if weight in index)
    for weight, (name, reason) in linears.rejected.items():
        if weight in index:
            found.rejected.append((index[weight], name, reason))
    for group in group_by_input(linears.sites):
        sites = [site for site in group if site.weight in index]
        if sites:
            indices, names = zip(*((index[site.weight], site.name) for site in sites), strict=True)
            found.groups.append(WeightGroup(indices, names, sites[0].few_rows, sites[0].shift))
    for node, other in other_bodies(gm):
        for site in find_linears(other).sites:
            log.info("%s stays 16-bit: it stands inside %s, which runs its body in its own way", site.name, node.target)
    for call in invocations(gm):
        body = gm.get_submodule(call.subgraph)
        operands = zip(placeholders(body.graph), call.operands, strict=True)  # type: ignore[arg-type]
        _collect(body, {inner: index[outer] for inner, outer in operands if outer in index}, {}, found)  # type: ignore[arg-type]
