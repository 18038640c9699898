"""Where a linear stands in the model, read off the names that Dynamo leaves on a node.

Nothing here knows a model. The one structure it looks for is the list element: a module called `name.3`, child of a
ModuleList, which is how every transformer and UNet writes its repeated blocks.
"""

import re

from torch import fx

from .peft_names import is_adapter, without_wrapper

OUTSIDE = "outside the repeated blocks: an embedder or a final projection"

_ROOT = re.compile(r"^[LG]\['\w+'\]\.?")
_GETATTR = re.compile(r"getattr\(([^()]*), '([^']+)'\)")
# Diffusers' models override attribute access, so Dynamo reaches their children through the dict.
_INDIRECT = re.compile(r"(?:\.__dict__)?(?:\.|\[')(?:_modules|_parameters)(?:'\])?\['([^']+)'\]")
_INDEX = re.compile(r"\[(\d+)\]")


def clean(path: str) -> str:
    """Dynamo's expression for a module -> the dotted name `named_modules` would give it; '' for the root."""
    while (plainer := _GETATTR.sub(r"\1.\2", path)) != path:
        path = plainer
    path = _INDIRECT.sub(r".\1", path)
    path = _INDEX.sub(r".\1", path)
    return _ROOT.sub("", path).strip(".")


def layer_name(node: fx.Node) -> str:
    """The dotted name of the innermost module a node is called in, or the node's own name."""
    stack = node.meta.get("nn_module_stack")
    innermost = clean(next(reversed(stack.values()))[0]) if stack else ""
    return without_wrapper(innermost) or str(node.name)


def elements(name: str) -> list[str]:
    """The list elements a layer stands in, outermost first, itself not counted: "a.0.b.1.c" -> ["a.0", "a.0.b.1"]."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()]


def sibling_scope(name: str) -> str:
    """The nearest list element a layer stands in.

    Layers share a quantized input only inside one: in a whole-model graph the cross-attention keys of all blocks read
    the same text, but what one block shares must be what it would share when the block is compiled by itself.
    """
    return next(reversed(elements(name)), "")


def outside_blocks(names: list[str]) -> set[str]:
    """Of all linears in a graph, those outside the repeated blocks, if there are such blocks.

    It is what is left where no module tree can be asked (weights as plain arguments). A repeated block is a list
    element that holds two linears or more. A graph without blocks is a block itself or a plain network, and all its
    linears count as inside. Adapters are not counted: what gets quantized must not depend on them.
    """
    held: dict[str, set[str]] = {}
    for name in (name for name in names if not is_adapter(name)):
        for element in elements(name):
            held.setdefault(element, set()).add(name)
    blocks = {element for element, layers in held.items() if len(layers) > 1}
    return {name for name in names if blocks.isdisjoint(elements(name))} if blocks else set()
