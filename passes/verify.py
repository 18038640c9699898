"""What must hold of a graph after every pass, checked where SVDQ_VERIFY=1 asks for it: in all tests.

    promise = Promise(gm)                  what the pass must leave alone
    changed = rewrite(gm)
    promise.check(gm, "fuse_heads", changed)

Raises BrokenGraph with the pass and the node. The rules:

- the graph is well formed (fx's own lint), and calls of subgraphs pass as many operands as those have inputs;
- an input that was read is still there, and so is whatever writes to memory; what draws random numbers and is no longer
  read is gone with its readers;
- as many outputs as before, of the same shapes and dtypes;
- an svdq:: operator gets what its schema says, and the tensors of its format; text in it is one line;
- a region can be parsed, belongs to its operator, has an operand for each name, and makes what the operator needs;
- in an aten graph, each node that is new, or reads something new, has the shape, strides and dtype that its operator
  gives for what it reads;
- a pass that says it changed nothing added and changed nothing.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..kernels.formats import FORMATS
from ..lowering import heads, ops
from ..lowering.region import GIVEN, Region
from ..lowering.torch_private import fake_mode_of
from .subgraphs import invocations, placeholders
from .vocabulary import same_shape

KINDS = {
    ops.fused_gemm: ("epilogue", "gate"),
    ops.fused_quantize: ("prologue",),
    ops.head_region: ("heads",),
    ops.attention_of_heads: ("heads",),
}


class BrokenGraph(AssertionError):
    """A pass has left something that cannot be right."""


class Promise:
    """What a graph is before a pass, and what of it must hold afterwards."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._nodes = {node: _look(node) for node in gm.graph.nodes}
        self._values = [_value(node) for node in gm.graph.nodes]  # held, so that no later one gets the same id
        self._used = {node for node in gm.graph.nodes if node.users}
        calls = {call.node for call in invocations(gm)}  # whose bodies may have stopped reading what they are passed
        self._read = {node for node in placeholders(gm.graph) if not calls.issuperset(node.users)}
        self._outputs = [_value(leaf) for leaf in _outputs(gm.graph)]
        self._writes = _writes(gm.graph)

    def check(self, gm: fx.GraphModule, name: str, changed: int) -> None:
        """Raise BrokenGraph where a rule does not hold after the pass `name`, which says it changed so much."""
        try:
            gm.graph.lint()
            self._check_what_stays(gm.graph)
            _check_subgraphs(gm)
            for node in gm.graph.nodes:
                is_new = node.op != "output" and self._nodes.get(node) != _look(node)
                if is_new and not changed:
                    raise BrokenGraph(f"{node.format_node()}: is new or changed, and the pass says 0")
                if getattr(node.target, "namespace", None) == "svdq":
                    _check_operator(node)
                if is_new:
                    _check_value(node)
        except Exception as error:
            raise BrokenGraph(f"after {name}: {error}") from error

    def _check_what_stays(self, graph: fx.Graph) -> None:
        left = set(graph.nodes)
        for node in self._nodes:
            if node in self._read and node not in left:
                raise BrokenGraph(f"the input {node} was read before the pass, and is gone")
            if node in self._used and node in left and not node.users and node.op != "placeholder" and node.is_impure():
                raise BrokenGraph(f"{node.format_node()}: nobody reads it any more, and it would still be computed")
        lost = self._writes - _writes(graph)
        if lost:
            raise BrokenGraph(f"what writes to memory is gone: {dict(lost)}")
        outputs = _outputs(graph)
        if len(outputs) != len(self._outputs):
            raise BrokenGraph(f"{len(self._outputs)} outputs have become {len(outputs)}")
        for i, (leaf, old) in enumerate(zip(outputs, self._outputs, strict=True)):
            new = _value(leaf)
            if old is not None and new is not None and (old.dtype != new.dtype or not same_shape(old.shape, new.shape)):
                raise BrokenGraph(f"output {i}, {leaf}: {_describe(old)} has become {_describe(new)}")


def _look(node: fx.Node) -> tuple:
    """What makes a node another one if it changes: what it calls, on what, and what it and its inputs stand for."""
    values = tuple(id(_value(n)) for n in (node, *node.all_input_nodes) if _value(n) is not None)
    return node.target, node.args, node.kwargs, values


def _value(node: Any) -> Tensor | None:
    """A node's fake tensor, in an aten graph or, where Dynamo or a pass left one, in Dynamo's."""
    meta = node.meta if isinstance(node, fx.Node) else {}
    value = meta.get("val", meta.get("example_value"))
    return value if isinstance(value, Tensor) else None


def _outputs(graph: fx.Graph) -> list:
    return tree_leaves(graph.output_node().args)


def _writes(graph: fx.Graph) -> Counter:
    schemas = ((node.target, getattr(node.target, "_schema", None)) for node in graph.nodes)
    return Counter(str(target) for target, schema in schemas if schema is not None and schema.is_mutable)


def _describe(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)} with strides {value.stride()}"


def _check_subgraphs(gm: fx.GraphModule) -> None:
    for call in invocations(gm):
        body: Any = gm.get_submodule(call.subgraph)
        body.graph.lint()
        if len(placeholders(body.graph)) != len(call.operands):
            wanted = len(placeholders(body.graph))
            raise BrokenGraph(
                f"{call.node}: {call.subgraph} has {wanted} inputs and gets {len(call.operands)} operands"
            )


def _check_operator(node: fx.Node) -> None:
    """The arguments of an svdq:: node, one by one, and what they must be together."""
    given = _arguments(node)
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        if not _fits(given[argument.name], str(argument.type)):
            raise BrokenGraph(f"{node.format_node()}: {argument.name} should be {argument.type}")
    texts = [value for value in given.values() if isinstance(value, str)]
    if not all(text.isascii() and text.isprintable() for text in texts):
        raise BrokenGraph(f"{node.format_node()}: text in a graph is one line of plain characters")
    if "precision" in given:
        fmt = FORMATS.get(given["precision"])
        if fmt is None or len(given.get("weight", fmt.fields)) != len(fmt.fields):
            wanted = f"its tensors are {', '.join(fmt.fields)}" if fmt else f"the formats are {', '.join(FORMATS)}"
            raise BrokenGraph(f"{node.format_node()}: precision {given['precision']!r}: {wanted}")
    if "reads" in given:
        given["operands"] = [given["operands"][i] for i in given["reads"]]
    if "region" in given:
        _check_region(node, given)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name. Raises BrokenGraph where there are too many or too few."""
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    missing = [a.name for a in schema.arguments if a.name not in given and not a.has_default_value()]
    if len(node.args) > len(names) or missing:
        raise BrokenGraph(f"{node.format_node()}: {len(node.args)} arguments for {schema}, missing: {missing}")
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def _fits(value: Any, kind: str) -> bool:
    """Whether an argument is of a schema's type."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1])
    if kind.startswith("List["):
        return isinstance(value, list | tuple) and all(_fits(v, kind[len("List[") : -1]) for v in value)
    if kind == "Tensor":
        return isinstance(value, fx.Node) and ("val" not in value.meta or isinstance(value.meta["val"], Tensor))
    if kind == "int" and isinstance(value, torch.dtype):  # what a ScalarType is to a schema
        return True
    kinds = {"str": str, "float": int | float, "bool": bool, "int": int | fx.Node}
    return isinstance(value, kinds[kind])


def _check_region(node: fx.Node, given: dict[str, Any]) -> None:
    """The text, its operands, and in an aten graph what comes of them in torch."""
    kinds, regions = KINDS[node.target], heads.parts(given["region"])  # type: ignore[index]
    if any(region.kind not in kinds for region in regions):
        raise BrokenGraph(f"{node.format_node()}: its region should be of the kind {' or '.join(kinds)}")
    named = sum(len(region.operands) for region in regions)
    if named != len(given["operands"]):
        raise BrokenGraph(f"{node.format_node()}: {named} operands are named, and it has {len(given['operands'])}")
    if any(_value(operand) is None for operand in given["operands"]):
        return
    waiting = iter(given["operands"])
    for region in regions:
        values = {name: _value(next(waiting)) for name, _ in region.operands}
        _check_result(node, region, values, given)


def _check_result(node: fx.Node, region: Region, values: dict[str, Any], given: dict[str, Any]) -> None:
    with fake_mode_of(values):
        if region.kind in GIVEN:
            values |= {name: torch.empty_like(node.meta["val"], dtype=torch.float32) for name in GIVEN[region.kind]}
        elif "right" in values:
            values["x"] = torch.cat((values["x"], values.pop("right")), -1)
        result, wanted = region.evaluate(values), values["y" if region.kind in GIVEN else "x"]
    if not same_shape(result.shape, wanted.shape):
        raise BrokenGraph(f"{node.format_node()}: the region makes {tuple(result.shape)} of {tuple(wanted.shape)}")
    smooth = _value(given.get("smooth"))
    if smooth is not None and result.shape[-1] != smooth.shape[0]:
        raise BrokenGraph(f"{node.format_node()}: the region makes {result.shape[-1]} channels for {smooth.shape[0]}")


def _check_value(node: fx.Node) -> None:
    """In an aten graph: whether a node's fake tensors are what its operator gives for the fake tensors it reads."""
    if not isinstance(node.target, torch._ops.OpOverload) or "val" not in node.meta:
        return
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with fake_mode_of(args, kwargs):
        found = tree_leaves(node.target(*args, **kwargs))
    said = tree_leaves(node.meta["val"])
    if len(found) != len(said):
        raise BrokenGraph(f"{node.format_node()}: it gives {len(found)} results, its meta says {len(said)}")
    for a, b in zip(found, said, strict=True):
        if isinstance(a, Tensor) and (not isinstance(b, Tensor) or not _alike(a, b)):
            told = _describe(b) if isinstance(b, Tensor) else str(b)
            raise BrokenGraph(f"{node.format_node()}: it gives {_describe(a)}, its meta says {told}")


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    strides = [(m, n) for size, m, n in zip(a.shape, a.stride(), b.stride(), strict=True) if str(size) != "1"]
    return all(_number(m) == _number(n) for m, n in [*zip(a.shape, b.shape, strict=True), *strides])


def _number(size: Any) -> Any:
    """What a symbolic size was when it was traced: one size may be written in two ways, as s and as (s * s) // s."""
    if isinstance(size, int):
        return size
    return str(size) if size.node.hint is None else size.node.hint
