"""The repeated blocks of a module tree. What stands beside them embeds inputs or projects the result: it is small and
sensitive, and stays 16-bit.

A class that says what its blocks are is taken at its word: diffusers' `_repeated_blocks`, the names of their classes,
which regional compilation compiles. In all the rest of the tree a block is a list element (`name.3`) that holds two
matrices or more, whatever lies deeper in it. A list of embedders looks the same, if it is poorer: see `_embeds`.

A tree without blocks is a block itself or a plain network, and nothing of it stands beside one.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from .passes.scope import elements

T = TypeVar("T")
Sizes = Mapping[str, int]  # the matrices of a tree: name of the layer -> number of values


def repeated_blocks(modules: Mapping[str, nn.Module], matrices: Sizes) -> set[str]:
    """The names of the blocks, none inside another.

    modules   of the tree, by name
    matrices  that its linears read
    """
    blocks: set[str] = set()
    declaring: set[str] = set()
    for root, module in modules.items():
        for path in declared(module, _below(root, modules)):
            declaring.add(root)
            # What stands in no list stands there once: it may be a small model with blocks of its own.
            own = set() if any(part.isdigit() for part in path.split(".")) else _listed(modules, _below(path, matrices))
            blocks |= own or {path}
    rest = {name: size for name, size in matrices.items() if _ancestors(name).isdisjoint(declaring)}
    return blocks | _listed(modules, rest)


def is_beside(name: str, blocks: set[str]) -> bool:
    """Whether a layer stands outside all blocks, of which there are some."""
    return bool(blocks) and blocks.isdisjoint(_ancestors(name))


def declared(module: nn.Module, below: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Of the modules below one, the blocks that its class names, as diffusers' compile_repeated_blocks takes them."""
    classes = getattr(type(module), "_repeated_blocks", None) or ()
    return {name: part for name, part in below.items() if type(part).__name__ in classes}


def _listed(modules: Mapping[str, nn.Module], matrices: Sizes) -> set[str]:
    """Blocks by the tree alone: the outermost list elements with two matrices or more, without lists of embedders."""
    held: dict[str, dict[str, int]] = defaultdict(dict)
    for name, size in matrices.items():
        for element in elements(name):
            held[element][name] = size
    lists: dict[str, list[str]] = defaultdict(list)
    blocks = {element for element, own in held.items() if len(own) > 1}
    for block in blocks:
        if blocks.isdisjoint(elements(block)):
            lists[block.rpartition(".")[0]].append(block)
    told = {
        path: _List(
            path.rpartition(".")[0],
            max(sum(held[block].values()) for block in own),
            any(_is_rich(block, held[block], modules) for block in own),
        )
        for path, own in lists.items()
    }
    return {block for path, own in lists.items() if not _embeds(told[path], list(told.values())) for block in own}


@dataclass(frozen=True)
class _List:
    """A list of what may be blocks.

    holder   the module it hangs on
    largest  the number of values in the matrices of its largest element
    is_rich  whether some element is more than two linears with a function between
    """

    holder: str
    largest: int
    is_rich: bool


def _embeds(own: _List, lists: list[_List]) -> bool:
    """Whether the elements of a list are embedders: two linears and nothing else, smaller than the blocks of a list
    that hangs on a module around it.

    Chroma's `distilled_guidance_layer.layers` hang beside its `transformer_blocks`. Only lists around it count, so that
    a model is judged alike by itself and beside another in a pipeline.
    """
    if own.is_rich:
        return False
    around = _ancestors(own.holder)
    return any(other.is_rich and other.largest > own.largest for other in lists if other.holder in around)


def _is_rich(block: str, own: Sizes, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a list element has more than two matrices, or parameters that are not theirs (a norm's, a table)."""
    return len(own) > 2 or any(
        next(module.parameters(recurse=False), None) is not None
        for name, module in _below(block, modules).items()
        if name not in own
    )


def _ancestors(name: str) -> set[str]:
    """A module and all that it stands in: "a.0.b" -> {"", "a", "a.0", "a.0.b"}."""
    parts = name.split(".") if name else []
    return {".".join(parts[:i]) for i in range(len(parts) + 1)}


def _below(root: str, named: Mapping[str, T]) -> dict[str, T]:
    """What stands in a module, itself included."""
    return {name: value for name, value in named.items() if not root or name == root or name.startswith(f"{root}.")}
