"""Find the linears of a Dynamo graph: the analysis that every pass starts from.

At this level one `F.linear` node is one layer, its weight is a graph input with the model's own Parameter behind it,
and `nn_module_stack` says where it stands in the model. A 1x1 convolution is a linear over its channels.

Left alone, each with a reason: a weight that is not a graph input, that something else than a linear reads (but see
expanded.py), that is too small, of a dtype that has no 4-bit form, or an adapter of PEFT. Where a linear stands in its
model is not for a graph to say, which may hold a part of it only; what this one would say is told beside
(`scope.outside_blocks`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..lowering.packed import MIN_FEATURES, features
from ..lowering.torch_private import LINEAR_TARGETS as LINEAR
from .activations import input_shift
from .peft_names import is_adapter
from .scope import layer_name, outside_blocks, sibling_scope
from .subgraphs import bodies

POINTWISE_CONV = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}

OTHERWISE = "something other than a linear reads its weight"
QUANTIZABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEW_ROWS = 16  # up to here a linear waits for its weight's bytes; kernels' gemv takes as many


@dataclass(frozen=True)
class LinearSite:
    """One linear in a graph.

    node          the call
    weight        the placeholder of its weight, in the same (sub)graph
    name          where it stands in the model, as far as the graph knows
    channel_dim   the dimension of the input that is multiplied: -1, or 1 for a convolution
    few_rows      it reads one row a sample, or no more than FEW_ROWS, in this graph
    shift         what makes its input non-negative (`activations.py`), 0 if nothing does
    scope         linears share a quantized input only within one scope
    """

    node: fx.Node
    weight: fx.Node
    name: str
    channel_dim: int
    few_rows: bool
    shift: float
    scope: str

    @property
    def input(self) -> fx.Node:
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def bias(self) -> fx.Node | None:
        return argument(self.node, 2, "bias")

    @property
    def output(self) -> torch.Tensor:
        """The fake tensor that the 16-bit linear would return: its dtype, shape and strides."""
        return self.node.meta["example_value"]


@dataclass(frozen=True)
class Found:
    """The linears of one (sub)graph that may be quantized, and why the others may not, by weight placeholder.

    outside   of all these weights, those beside the repeated blocks, as far as this graph can tell
    """

    sites: list[LinearSite]
    rejected: dict[fx.Node, tuple[str, str]]
    outside: set[fx.Node]


def find_linears(gm: fx.GraphModule, names: Mapping[fx.Node, str] = MappingProxyType({})) -> Found:
    """Look through one graph; the bodies that it calls are looked through on their own (`subgraphs.invocations`).

    names  of layers in the model, by their weights, where more is known than the graph tells
    """
    sites: list[LinearSite] = []
    rejected: dict[fx.Node, tuple[str, str]] = {}
    told = _names(gm)
    beside = outside_blocks([*told.values(), *_names_in_bodies(gm)])
    outside: set[fx.Node] = set()
    for node, own_name in told.items():
        weight = argument(node, 1, "weight")
        if not isinstance(weight, fx.Node) or weight.op != "placeholder":
            continue
        if own_name in beside:
            outside.add(weight)
        name = names.get(weight, own_name)
        reason = _why_not(node, weight, name)
        if reason is None:
            sites.append(_site(node, weight, name))
        elif not is_spatial_conv(node):
            rejected[weight] = (name, reason)
    return Found([s for s in sites if s.weight not in rejected], rejected, outside)


def _names(gm: fx.GraphModule) -> dict[fx.Node, str]:
    nodes = (node for node in gm.graph.nodes if node.op == "call_function")
    return {node: layer_name(node) for node in nodes if node.target in LINEAR or node.target in POINTWISE_CONV}


def _names_in_bodies(gm: fx.GraphModule) -> Iterator[str]:
    for body in bodies(gm):
        yield from _names(body).values()
        yield from _names_in_bodies(body)


def argument(node: fx.Node, position: int, name: str) -> Any:
    """What a call was given for a parameter, by position or by name; None if nothing."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _why_not(node: fx.Node, weight: fx.Node, name: str) -> str | None:
    """Why this linear stays as it is; None if it may be quantized."""
    value = weight.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or "example_value" not in node.meta or len(node.args) < 2:
        return "the graph does not tell its shapes"
    if is_spatial_conv(node):
        return "a convolution larger than 1x1"
    reason = why_not(name, value)
    if reason is None and any(not reads_as_weight(user, weight) for user in weight.users):
        return OTHERWISE
    return reason


def why_not(name: str, weight: torch.Tensor) -> str | None:
    """Why a linear of this name and weight stays as it is, wherever it stands; None if it may be quantized."""
    return why_never(name, weight) or why_not_in(weight.dtype)


def why_never(name: str, weight: torch.Tensor) -> str | None:
    """`why_not`, whatever the weight's dtype, which hooks may change around a call (layerwise casting)."""
    if is_adapter(name):
        return "an adapter, which is small and may be swapped"
    n, k = features(weight.shape)
    if min(n, k) < MIN_FEATURES:
        return f"it is small ({n} x {k})"
    return None


def why_not_in(dtype: torch.dtype) -> str | None:
    """Why a weight of this dtype is not quantized, None if it may be."""
    return None if dtype in QUANTIZABLE_DTYPES else f"its weight is {dtype}"


def is_storage(dtype: torch.dtype) -> bool:
    """Whether weights are only stored in this dtype, and a hook casts them for each use (layerwise casting): fp8."""
    return dtype.is_floating_point and dtype.itemsize == 1


def reads_as_weight(user: fx.Node, weight: fx.Node) -> bool:
    """Whether it is a linear, or a convolution over channels alone, of this weight."""
    is_linear = user.target in LINEAR or (user.target in POINTWISE_CONV and not is_spatial_conv(user))
    return is_linear and argument(user, 1, "weight") is weight and user.args[0] is not weight


def is_spatial_conv(node: fx.Node) -> bool:
    """Whether it is a convolution, and not one over channels alone."""
    dims = POINTWISE_CONV.get(node.target)  # type: ignore[arg-type]
    if dims is None:
        return False
    weight = argument(node, 1, "weight").meta.get("example_value")
    stride, padding, groups = argument(node, 3, "stride"), argument(node, 4, "padding"), argument(node, 6, "groups")
    return (
        not isinstance(weight, torch.Tensor)
        or node.args[0].meta["example_value"].dim() != dims + 2  # type: ignore[union-attr]
        or not is_over_channels(weight.shape[2:], stride or 1, padding or 0, groups or 1)
    )


def is_over_channels(kernel: Any, stride: Any, padding: Any, groups: int) -> bool:
    """Whether a convolution multiplies channels alone. Sizes as torch takes them: a number, or one a dimension."""

    def all_are(size: int, given: Any) -> bool:
        return all(n == size for n in ((given,) if isinstance(given, int) else given))

    return all_are(1, kernel) and all_are(1, stride) and all_are(0, padding) and groups == 1


def _site(node: fx.Node, weight: fx.Node, name: str) -> LinearSite:
    x = node.args[0].meta["example_value"]  # type: ignore[union-attr]
    channel_dim = -1 if node.target in LINEAR else 1
    few_rows = rows_read(x, channel_dim) <= FEW_ROWS
    return LinearSite(node, weight, name, channel_dim, few_rows, input_shift(node), sibling_scope(name))


def rows_read(x: torch.Tensor, channel_dim: int) -> float:
    """How many rows a linear that reads x multiplies at once: 1 where it reads one a sample, however many samples there
    are; without a guard on symbolic sizes. Infinite where that is not known, and for a convolution.
    """
    if channel_dim != -1:
        return math.inf
    if x.dim() <= 2:
        return 1
    sizes = [s if isinstance(s, int) else s.node.hint for s in x.shape[:-1]]
    return math.inf if None in sizes else math.prod(sizes)


def group_by_input(sites: list[LinearSite]) -> list[list[LinearSite]]:
    """Linears that read the same tensor along the same dimension, within one scope, in the graph's order."""
    groups: dict[tuple, list[LinearSite]] = {}
    for site in sites:
        key = (site.input, site.channel_dim, site.scope)
        members = groups.setdefault(key, [])
        if all(member.weight is not site.weight for member in members):
            members.append(site)
    return list(groups.values())
