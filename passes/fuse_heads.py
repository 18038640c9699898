"""Move what makes q and k out of a linear's result, head by head, into one kernel: norm, rotation, joining.

    before   v = view(gemm, [B, T, H, D])          after    q = svdq.head_region([v, w, cos, sin],
             m = mean(pow(v, 2), [-1], True)                    heads(x, a0: column, a1: token, a2: token)
             n = mul(mul(v, rsqrt(add(m, eps))), w)             t0 = mul(x, x)
             even, odd = unbind(view(n, [..., 2]), -1)          t1 = row_mean(t0)
             r = view(cat([-odd, even], -1), [..., D])          ...
             q = add(mul(n, cos), mul(r, sin))                  t8 = pair(t7, t6)
             attention(permute(q, [0, 2, 1, 3]), ...)           ...)

A region ends at what attention reads, a permutation or not, and grows backwards over operations on blocks [..., D] that
nothing else reads: pointwise ones, means over D, neighbouring channels or halves of D taken apart and put together. It
begins at one 16-bit tensor. Where it begins with tokens side by side (text and image in joint attention), it goes on
into each part, and each part becomes one of the operator's.

Left alone: regions that only do what Inductor does as well, that is, neither average nor rotate, or whose beginning is
itself elementwise and would have to be stored for them; several full tensors; operands with a value for each head.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..lowering import ops
from ..lowering.launch import takes_channels
from ..lowering.region import COLUMN, FULL, IN_THE_MIDDLE, NEIGHBOURS, PARTS, ROW, SCALAR, TOKEN, Region, Step
from ..lowering.torch_private import describe
from .pipeline import log
from .pointwise import FLOATS, SIXTEEN_BIT, cat_of, is_widening, operation, value_of

MAX_LINES = 96
UNTURNED = (0, 1, 2, 3)
aten = torch.ops.aten

_PERMUTES = (aten.permute.default, aten.transpose.int)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_RESTRIDES = (*_PERMUTES, *_VIEWS, *_SPLITS, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim,
              aten.unbind.int, operator.getitem)  # fmt: skip
_TELLING = {"row_mean", "moments", "pair", "halves", "complex_mul"}

Meaning = tuple[str, tuple[Any, ...]]  # an operation and what it reads: nodes and numbers
Line = tuple[fx.Node, str, tuple[Any, ...]]


def fuse_heads(gm: fx.GraphModule) -> int:
    """Rewrite what makes the q and k of every attention. Returns how many."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    ends = [_before_permutes(a) for node in gm.graph.nodes if _is_attention(node) for a in node.args[:2]]
    return sum(_fuse(gm.graph, end, place) for end in dict.fromkeys(ends))


def _is_attention(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and "::_scaled_dot_product" in node.target.name()


def _before_permutes(node: Any) -> fx.Node:
    while node.target in _PERMUTES:
        node = node.args[0]
    return node


@dataclass
class _Piece:
    """Lines on some of a block's tokens. seen_as: what the next piece reads `last` as, a `cat` or a slice."""

    lines: list[Line]
    last: fx.Node
    start: int | None = None  # of the part's tokens in the block; None: they are all of them
    seen_as: fx.Node | None = None


@dataclass
class _Part:
    """What makes some of the tokens, from the block that it begins with; end: all of these tokens and nothing else."""

    x: fx.Node
    pieces: list[_Piece]
    end: fx.Node

    def start(self) -> int | None:
        """Of its tokens in x."""
        return self.pieces[0].start if self.pieces[0].last is not self.end else None


def _fuse(graph: fx.Graph, end: fx.Node, place: dict[fx.Node, int]) -> bool:
    block = value_of(end)
    if block is None or block.dim() != 4 or block.dtype not in SIXTEEN_BIT or not takes_channels(block.shape[3]):
        return False
    parts, joined = _parts(end, place)
    pieces = [piece for part in parts for piece in part.pieces]
    lines = [line for piece in pieces for line in piece.lines]
    names = {name for _, name, _ in lines}
    if names.isdisjoint(_TELLING) or any(_is_elementwise(_origin(part.x)) for part in parts):
        log.debug("not fused before attention: %s", end.name)
        return False
    if not (names.isdisjoint(IN_THE_MIDDLE) or names.isdisjoint(NEIGHBOURS | {"complex_mul"})):
        return False
    turn = _turn(parts[0].x)
    if any(_turn(part.x) != turn for part in parts) or (joined and turn[cat_of(joined)[1]] != 1):  # type: ignore[index]
        return False
    heads_first = _is_heads_first(block, turn)
    if heads_first is None:
        return False
    writers = [_Writer(part, turn) for part in parts]
    if not all(writer.write() for writer in writers):
        return False
    inner = {node for node, _, _ in lines} | {piece.seen_as for piece in pieces if piece.seen_as is not None}
    _replace(graph, end, writers, turn, heads_first)
    for node in sorted(inner, key=place.__getitem__, reverse=True):
        if not node.users:
            graph.erase_node(node)
    return True


def _is_heads_first(block: Tensor, turn: tuple[int, ...]) -> bool | None:
    """Whether a result lies in memory as [B, H, T, D]; False: as [B, T, H, D]; None: otherwise."""
    _, t, h, d = (block.shape[turn.index(dim)] for dim in range(4))
    for answer, strides in ((False, (t * h * d, h * d, d, 1)), (True, (t * h * d, d, t * d, 1))):
        pairs = zip(block.shape, block.stride(), (strides[dim] for dim in turn), strict=True)
        if all(statically_known_true(size == 1) or statically_known_true(m == n) for size, m, n in pairs):
            return answer
    return None


def _parts(end: fx.Node, place: dict[fx.Node, int]) -> tuple[list[_Part], fx.Node | None]:
    """The region before `end` in parts, and the `cat` that joins them, if there is one."""
    below = _grow(end, set(), place)
    x = _beginning(below, end)
    if x is None:
        return [], None
    inside = {node for node, _, _ in below}
    tokens = _tokens(x)
    if tokens is None or not (x is end or inside.issuperset(x.users)):
        return [_Part(x, [_Piece(below, end)], end)], None
    operands, dim = tokens
    parts, start = [], 0
    for operand in operands:
        above = _grow(operand, {x}, place)
        first = _beginning(above, operand)
        if first is None:
            return [], None
        parts.append(_Part(first, [_Piece(above, operand, seen_as=x), _Piece(below, end, start)], operand))
        start += _shape(operand)[dim]
    _go_on_before_slices(parts, dim, place)
    return parts, x


def _go_on_before_slices(parts: list[_Part], dim: int, place: dict[fx.Node, int]) -> None:
    """Where tokens are cut out of something that only the parts read, each part makes its own."""
    slices = {part.x for part in parts}
    for part in parts:
        source, start = _window(part.x, dim)
        used = {node for piece in part.pieces for node, _, _ in piece.lines} | {piece.seen_as for piece in part.pieces}
        if source is None or not (slices.issuperset(source.users) and used.issuperset(part.x.users)):
            continue
        lines = _grow(source, slices, place)
        first = _beginning(lines, source)
        if lines and first is not None:
            part.pieces.insert(0, _Piece(lines, source, start, seen_as=part.x))
            part.x = first


def _window(node: fx.Node, dim: int) -> tuple[fx.Node | None, int]:
    """What a slice along `dim` cuts neighbours out of, and where they begin."""
    args: Any = node.args
    if node.target is not aten.slice.Tensor or args[1] % 4 != dim or type(_shape(args[0])[dim]) is not int:
        return None, 0
    kept = _kept(args, _shape(args[0])[dim])
    return (None, 0) if kept is None or kept.step != 1 else (args[0], kept.start)


def _tokens(node: fx.Node) -> tuple[tuple[fx.Node, ...], int] | None:
    """The 16-bit blocks of known lengths that a `cat` puts side by side, and along which dimension."""
    value, cat = value_of(node), cat_of(node)
    if value is None or cat is None:
        return None
    operands, dim = cat
    values = [value_of(operand) for operand in operands]
    fit = all(v is not None and v.dim() == 4 and v.dtype == value.dtype and type(v.shape[dim]) is int for v in values)
    return cat if fit and dim < 3 else None


def _grow(end: fx.Node, readers: set[fx.Node], place: dict[fx.Node, int]) -> list[Line]:
    """The lines that make `end`, in the graph's order; others may read `end` itself only where there are no readers."""
    block = value_of(end)
    assert block is not None
    inside, waiting = set(readers), {end}
    lines: list[Line] = []
    while waiting and len(lines) < MAX_LINES:
        node = max(waiting, key=lambda node: place.get(node, -1))  # -1: an operator that this pass made
        waiting.remove(node)
        if not inside.issuperset(node.users) and not is_widening(node) and (node is not end or readers):
            continue
        found = _meaning(node, block)
        if found is not None:
            inside.add(node)
            lines.append((node, *found))
            waiting.update(a for a in found[1] if isinstance(a, fx.Node))
    return sorted(lines, key=lambda line: place[line[0]])


def _beginning(lines: list[Line], end: fx.Node) -> fx.Node | None:
    """The one 16-bit block that the lines read; `end` itself where there are none."""
    if not lines:
        return end
    block, inside = value_of(end), {node for node, _, _ in lines}
    assert block is not None
    outside = dict.fromkeys(a for _, _, read in lines for a in read if isinstance(a, fx.Node) and a not in inside)
    full = [(a, value_of(a)) for a in outside if _class_of(a, block) == FULL]
    if len(full) != 1 or full[0][1] is None or full[0][1].dtype != block.dtype:
        return None
    return full[0][0]


# ** what a node means **


def _meaning(node: fx.Node, block: Tensor) -> Meaning | None:
    """(operation, what it reads) of a node, None if a region cannot hold it. "": the same values in another shape."""
    if node.op != "call_function":
        return None
    found = _taken_apart(node, block) or _mean(node, block)
    if found is not None:
        return found
    found = operation(node)
    if found is None:
        return None
    half, read = _half(block), [a for a in found[1] if isinstance(a, fx.Node)]
    if _equal(_shape(node), half):
        fit = all(_equal(_shape(a), half) or _class_of(a, block) in (ROW, SCALAR) for a in read)
        return found if fit else None
    if _class_of(node, block) == TOKEN and found[0] != "":
        return None  # better computed once than for each head
    return found if all(_class_of(a, block) for a in [node, *read]) else None


def _mean(node: fx.Node, block: Tensor) -> Meaning | None:
    """Means and variances over D."""
    args: Any = node.args
    if node.target is operator.getitem and args[0].target is aten.var_mean.correction:
        return ("variance", "mean")[args[1]], args[:1]
    if node.target not in (aten.mean.dim, aten.var_mean.correction) or _class_of(args[0], block) != FULL:
        return None
    if args[1:2] not in (([-1],), ([3],)):
        return None
    if node.target is aten.mean.dim:
        return ("row_mean", args[:1]) if args[2:] == (True,) and not node.kwargs else None
    plain = node.kwargs.get("correction") == 0 and node.kwargs.get("keepdim") is True
    return ("moments", args[:1]) if plain else None


def _taken_apart(node: fx.Node, block: Tensor) -> Meaning | None:
    """Views of D as pairs, neighbours and halves taken out of it and joined to it again."""
    target: Any = node.target
    args: Any = node.args
    whole, half, pairs = block.shape, _half(block), (*_half(block), 2)
    cat = cat_of(node)
    if cat is not None:
        return _join(*cat, half)
    if target is operator.getitem and args[1] in (0, 1):
        if _is_unbound(args[0], pairs):
            return ("even", "odd")[args[1]], args[:1]
        return (("low", "high")[args[1]], args[:1]) if _is_halved(args[0], whole) else None
    source, value = value_of(args[0]) if args else None, value_of(node)
    if source is None:
        return None
    if target is aten.view_as_complex.default and _equal(source.shape, pairs) and source.dtype == torch.float32:
        return "", args[:1]
    if target is aten.view_as_real.default and _equal(source.shape, half):
        return "", args[:1]
    if target is aten.mul.Tensor and source.is_complex() and _equal(source.shape, half):
        return ("complex_mul", args) if _table_class(args[1], block) in (TOKEN, COLUMN) else None
    if target is aten.clone.default and _equal(source.shape, whole) and source.dtype in FLOATS:
        return "", args[:1]
    if target in _VIEWS and value is not None:
        there = _equal(source.shape, whole) and _equal(value.shape, pairs)
        back = _equal(source.shape, pairs) and _equal(value.shape, whole)
        return ("", args[:1]) if there or back else None
    if _is_unbound(node, pairs) or _is_halved(node, whole):
        return "", args[:1]
    if target is aten.select.int and _equal(source.shape, pairs) and args[1] in (-1, 4):
        return ("even", "odd")[args[2]], args[:1]
    if target is aten.unsqueeze.default and _equal(source.shape, half) and args[1] in (-1, 4):
        return "", args[:1]
    if target is aten.slice.Tensor and _equal(source.shape, whole) and args[1] in (-1, 3):
        return _slice(args, block.shape[3])
    return None


def _slice(args: tuple[Any, ...], d: int) -> Meaning | None:
    names = {range(0, d, 2): "even", range(1, d, 2): "odd", range(d // 2): "low", range(d // 2, d): "high"}
    kept = _kept(args, d)
    return (names[kept], args[:1]) if kept in names else None


def _kept(args: tuple[Any, ...], size: int) -> range | None:
    """The indices that a slice keeps."""
    bounds = [*args[2:], *[None, None, 1][len(args) - 2 :]]
    return range(size)[slice(*bounds)] if all(isinstance(bound, int | None) for bound in bounds) else None


def _join(operands: tuple[fx.Node, ...], dim: int, half: tuple) -> Meaning | None:
    shapes = [_shape(operand) for operand in operands]
    if len(shapes) == 2 and dim == 4 and all(_equal(shape, (*half, 1)) for shape in shapes):
        return "pair", operands
    if len(shapes) == 2 and dim == 3 and all(_equal(shape, half) for shape in shapes):
        return "halves", operands
    return None


def _is_unbound(node: Any, pairs: tuple) -> bool:
    return node.target is aten.unbind.int and node.args[1:] in ((-1,), (4,)) and _equal(_shape(node.args[0]), pairs)


def _is_halved(node: Any, whole: tuple) -> bool:
    if node.target not in _SPLITS or not _equal(_shape(node.args[0]), whole):
        return False
    sizes, dim = [*node.args[1:], 0][:2]
    half = whole[3] // 2
    return dim in (-1, 3) and sizes in (half, [half, half])


def _shape(node: fx.Node) -> Any:
    value = value_of(node)
    return () if value is None else value.shape


def _half(block: Tensor) -> tuple:
    return (*block.shape[:3], block.shape[3] // 2)


def _equal(a: Sequence, b: Sequence) -> bool:
    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def _class_of(node: Any, block: Tensor) -> str | None:
    """How a tensor lies against a block of any order: B, T and H, or B, H and T."""
    value = value_of(node)
    if value is None or value.dtype not in FLOATS or value.device != block.device:
        return None
    return _lies(value.shape, block.shape)


def _table_class(node: Any, block: Tensor) -> str | None:
    """How a complex tensor lies against a block whose neighbouring channels are complex numbers."""
    value = value_of(node)
    if value is None or value.dtype != torch.complex64 or value.device != block.device:
        return None
    if value.dim() == 0 or value.stride(-1) != 1 or sum(type(size) is not int for size in value.shape) > 1:
        return None
    return _lies(value.shape, _half(block))


def _lies(shape: Sequence, whole: Sequence) -> str | None:
    shape = (1,) * (4 - len(shape)) + tuple(shape)
    ones = [statically_known_true(size == 1) for size in shape]
    equal = [statically_known_true(m == n) for m, n in zip(shape, whole, strict=False)]
    if len(shape) > 4 or not all(one or same for one, same in zip(ones, equal, strict=True)):
        return None
    if all(ones):
        return SCALAR
    if all(equal):
        return FULL
    if ones[-1]:
        return ROW
    return COLUMN if all(ones[:-1]) else TOKEN


def _turn(x: fx.Node) -> tuple[int, ...]:
    """Which dimensions of [B, T, H, D] the dimensions of x are."""
    args: Any = x.args
    turn = [0, 1, 2, 3]
    if x.target is aten.permute.default:
        turn = [dim % 4 for dim in args[1]]
    elif x.target is aten.transpose.int:
        a, b = args[1:]
        turn[a], turn[b] = turn[b], turn[a]
    return tuple(turn) if turn[3] == 3 and len(turn) == 4 else UNTURNED


def _origin(node: Any) -> fx.Node:
    while node.target in _RESTRIDES:
        node = node.args[0]
    return node


def _is_elementwise(node: fx.Node) -> bool:
    """Whether Inductor would not have to store this, could it go on."""
    return operation(node) is not None


# ** the text **


class _Writer:
    """One part's steps and operands while they are put together.

    operands: (name, class, node, where the part's tokens begin in it, if it holds others too)
    """

    def __init__(self, part: _Part, turn: tuple[int, ...]) -> None:
        self.part, self.turn = part, turn
        self.names: dict[fx.Node, str] = {part.x: "x"}
        self.moments: dict[fx.Node, dict[str, str]] = {}
        self.operands: list[tuple[str, str, fx.Node, int | None]] = [("x", FULL, part.x, part.start())]
        self.steps: list[Step] = []

    def write(self) -> bool:
        """Whether all that the part reads can be an operand."""
        for piece in self.part.pieces:
            block = value_of(piece.last)
            assert block is not None
            for node, name, read in piece.lines:
                if not all(self._take_in(argument, block, piece.start) for argument in read):
                    return False
                self._line(node, name, read)
            if piece.seen_as is not None:
                self.names[piece.seen_as] = self.names[piece.last]
        return True

    def _take_in(self, node: Any, block: Tensor, start: int | None) -> bool:
        if not isinstance(node, fx.Node) or node in self.names or node in self.moments:
            return True
        cls = _class_of(node, block) or _table_class(node, block)
        if cls not in (TOKEN, ROW, COLUMN, SCALAR):
            return False
        head = self.turn.index(2) - 4
        shape = _shape(node)
        if cls == TOKEN and len(shape) >= -head and not statically_known_true(shape[head] == 1):
            return False
        self.names[node] = f"a{len(self.operands) - 1}"
        self.operands.append((self.names[node], cls, node, start))
        return True

    def _line(self, node: fx.Node, name: str, read: tuple[Any, ...]) -> None:
        if name == "moments":
            mean = self._step("row_mean", self.names[read[0]])
            off = self._step("sub", self.names[read[0]], mean)
            self.moments[node] = {"mean": mean, "variance": self._step("row_mean", self._step("mul", off, off))}
        elif name in ("mean", "variance"):
            self.names[node] = self.moments[read[0]][name]
        elif name == "complex_mul":
            (a, b), (c, d) = ([self._step(part, self.names[z]) for part in ("even", "odd")] for z in read)
            real = self._step("sub", self._step("mul", a, c), self._step("mul", b, d))
            imaginary = self._step("add", self._step("mul", a, d), self._step("mul", b, c))
            self.names[node] = self._step("pair", real, imaginary)
        else:
            arguments = [self.names[a] if isinstance(a, fx.Node) else float(a) for a in read]
            self.names[node] = self._step(name, *arguments) if name else self.names[read[0]]

    def _step(self, name: str, *arguments: str | float) -> str:
        self.steps.append(Step(f"t{len(self.steps)}", name, arguments))
        return self.steps[-1].name

    def text(self) -> str:
        return str(Region("heads", tuple((name, cls) for name, cls, *_ in self.operands), tuple(self.steps)))

    def nodes(self, insert: Callable[..., fx.Node]) -> list[fx.Node]:
        """The operands as the operator takes them: in the order B, T, H, D, and only this part's tokens."""
        result = []
        for _, cls, operand, start in self.operands:
            node: Any = operand
            if node.meta["val"].is_complex():
                sizes: list[Any] = [size if type(size) is int else -1 for size in _shape(node)]
                node = insert(aten.view_as_real.default, node)
                node = insert(aten.view.default, node, [*sizes[:-1], 2 * sizes[-1]])
            if cls in (FULL, TOKEN, ROW):
                node = self._laid_out(node, start, insert)
            result.append(node)
        return result

    def _laid_out(self, node: Any, start: int | None, insert: Callable[..., fx.Node]) -> fx.Node:
        if self.turn != UNTURNED:
            if node is self.part.x:
                node = node.args[0]
            else:
                for _ in range(4 - len(_shape(node))):
                    node = insert(aten.unsqueeze.default, node, 0)
                node = insert(aten.permute.default, node, [self.turn.index(dim) for dim in range(4)])
        dim, tokens = len(_shape(node)) - 3, _shape(self.part.end)[self.turn.index(1)]
        if start is not None and dim >= 0 and not statically_known_true(_shape(node)[dim] == 1):
            node = insert(aten.slice.Tensor, node, dim, start, start + tokens)
        return node


def _replace(graph: fx.Graph, end: fx.Node, writers: list[_Writer], turn: tuple[int, ...], heads_first: bool) -> None:
    def insert(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        describe(node, end)
        return node

    with graph.inserting_before(end):
        operands = [node for writer in writers for node in writer.nodes(insert)]
        text = PARTS.join(writer.text() for writer in writers)
        result = insert(ops.head_region, operands, text, heads_first)
        if turn != UNTURNED:
            result = insert(aten.permute.default, result, list(turn))
    end.replace_all_uses_with(result)
