"""Where a linear stands in the model, read off the names that Dynamo leaves on a node.

Nothing here knows a model. The one structure it looks for is the list element: a module called `name.3`, child of a
ModuleList, which is how every transformer and UNet writes its repeated blocks.
"""

import re

from torch import fx

_ROOT = re.compile(r"^L\['\w+'\]\.?")
# Diffusers' models override attribute access, so Dynamo reaches their children through the dict.
_INDIRECT = re.compile(r"(?:\.__dict__)?(?:\.|\[')(?:_modules|_parameters)(?:'\])?\['([^']+)'\]")
_INDEX = re.compile(r"\[(\d+)\]")


def clean(path: str) -> str:
    """Dynamo's expression for a module -> the dotted name `named_modules` would give it; '' for the root."""
    path = _INDIRECT.sub(r".\1", path)
    path = _INDEX.sub(r".\1", path)
    return _ROOT.sub("", path).strip(".")


def module_path(node: fx.Node) -> tuple[str, ...] | None:
    """The dotted names of the modules a node is called in, outermost first; None where Dynamo left none."""
    stack = node.meta.get("nn_module_stack")
    return tuple(clean(path) for path, _ in stack.values()) if stack else None


def layer_name(node: fx.Node) -> str:
    """The dotted name of the innermost module, or the node's own name."""
    path = module_path(node)
    return path[-1] if path and path[-1] else str(node.name)


def _is_element(name: str) -> bool:
    return name.rpartition(".")[2].isdigit()


def sibling_scope(node: fx.Node) -> str:
    """The nearest list element a layer stands in, itself not counted.

    Layers share a quantized input only inside one: in a whole-model graph the cross-attention keys of all blocks read the
    same text, but what one block shares must be what it would share when the block is compiled by itself.
    """
    path = module_path(node) or ()
    return next((name for name in reversed(path[:-1]) if _is_element(name)), "")


def outside_blocks(paths: list[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Of all linears' paths in a graph, those outside the repeated blocks, if the graph has such blocks.

    A repeated block is a list element that holds two linears or more. What stands beside them embeds inputs or projects
    the result; it is small and sensitive. A graph without blocks is a block itself (regional compilation) or a plain
    network, and all its linears count as inside: so compiling a model whole or by blocks quantizes the same layers.
    """
    held: dict[str, set[str]] = {}
    for path in paths:
        for name in path[:-1]:
            if _is_element(name):
                held.setdefault(name, set()).add(path[-1])
    blocks = {name for name, layers in held.items() if len(layers) > 1}
    if not blocks:
        return set()
    return {path for path in paths if blocks.isdisjoint(path)}
