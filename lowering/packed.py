"""A quantized linear as tensors: what replaces a 16-bit weight."""

import itertools
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from ..kernels.formats import FORMATS, layout
from ..kernels.formats.rotation import rotate as rotated
from . import launch
from .locks import free_in_child
from .torch_private import without_fake_tensors

ALIGNMENT = 256  # bytes, of tensors that lie one after another: what kernels want, with room to spare
BRANCH = frozenset(("up", "down"))  # of the packed tensors those that have the model's dtype
MIN_FEATURES = 64  # below this a 16-bit branch of the usual rank is as large as the weight

_LOCK = free_in_child(threading.Lock())


@dataclass(frozen=True)
class Copy:
    """Where packed tensors are wanted: what moves a pack, and by what a pack knows its copies.

    dtype         of the low-rank branch
    pinned        in memory of the host that a GPU can fetch from while the host goes on
    non_blocking  the host does not wait for the copy; only on the way to a GPU, where what reads it is queued behind
    """

    device: torch.device
    dtype: torch.dtype
    pinned: bool = False
    non_blocking: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, branch: Tensor, other: Tensor) -> "Copy":
        """Where a pack is of which these are the low-rank branch, which may be empty, and another tensor."""
        return cls(branch.device, branch.dtype, other.is_pinned())

    def tensors(self, precision: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of a pack, or of several that lie side by side, by name, in the order that is wanted there."""
        if self.pinned and torch.cuda.is_available():
            # What a GPU will fetch at each call is not to be brought into its order each time.
            named = named | _ordered(precision, named, torch.device("cuda"))
        moved = self.moved(named)
        return moved | _ordered(precision, moved, self.device)

    def moved(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the order that they have: those that are pinned come to lie in few pieces of memory, and what lies
        in one is moved as one, since to begin a copy takes longer than the copy of a small tensor. BRANCH is cast.
        """
        moved: dict[str, Tensor] = {}
        for piece in _pieces(named):
            moved |= self._moved(piece)
        moved = _pinned(moved) if self.pinned else moved
        return {name: moved[name] for name in named}

    def _moved(self, piece: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that lie in one piece of memory, with nothing else or alone."""
        # To the host it is waited for: whoever reads it there does not know that it is under way.
        non_blocking = self.non_blocking and self.device.type != "cpu"
        dtypes = {name: self.dtype if name in BRANCH else tensor.dtype for name, tensor in piece.items()}
        if len(piece) == 1 or any(dtypes[name] != tensor.dtype for name, tensor in piece.items()):
            return {name: t.to(self.device, dtypes[name], non_blocking=non_blocking) for name, t in piece.items()}
        first = next(iter(piece.values()))
        whole = torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())
        memory = whole.to(self.device, non_blocking=non_blocking)
        return {
            name: memory.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset()) for name, t in piece.items()
        }


def _pieces(named: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """These by the memory in which they lie, where nothing else does; else each by itself."""
    by_memory: dict[int, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        by_memory.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
    pieces = []
    for piece in by_memory.values():
        is_whole = next(iter(piece.values())).untyped_storage().nbytes() == sum(map(_room, piece.values()))
        pieces += [piece] if is_whole else [{name: tensor} for name, tensor in piece.items()]
    return pieces


def _pinned(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in pinned memory, in one piece. In two, the largest one by itself, where that takes less: torch gives
    pinned memory in powers of two.
    """
    largest = max(named, key=lambda name: named[name].nbytes)
    rest = {name: tensor for name, tensor in named.items() if name != largest}
    if rest and _given(named) > _given({largest: named[largest]}) + _given(rest):
        return _in_one_piece({largest: named[largest]}) | _in_one_piece(rest)
    return _in_one_piece(named)


def _given(named: dict[str, Tensor]) -> int:
    """Bytes that torch gives for one piece."""
    return 1 << max(sum(map(_room, named.values())) - 1, 0).bit_length()


def _in_one_piece(named: dict[str, Tensor]) -> dict[str, Tensor]:
    starts = list(itertools.accumulate((_room(tensor) for tensor in named.values()), initial=0))
    memory = pinned_memory(starts[-1])
    pinned = {}
    for (name, tensor), start in zip(named.items(), starts, strict=False):
        pinned[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        pinned[name].copy_(tensor)
    return pinned


def pinned_memory(count: int) -> Tensor:
    """So many bytes of the host's memory that a GPU fetches from."""
    return torch.empty(count, dtype=torch.uint8, device="cpu", pin_memory=True)


def _room(tensor: Tensor) -> int:
    """Bytes that it takes where several lie one after another."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _ordered(precision: str, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The format's tensors among these, in the order for a device."""
    fields = FORMATS[precision].fields
    weight = launch.in_device_order(precision, tuple(tensors[name] for name in fields), device)
    return dict(zip(fields, weight, strict=True))


def _feature_dims(precision: str, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which dimension of each tensor of a pack counts output channels."""
    fields = FORMATS[precision].fields
    of_weight = layout.feature_dims(precision, tuple(tensors[name] for name in fields))
    return dict.fromkeys(tensors, 0) | dict(zip(fields, of_weight, strict=True))


@dataclass(frozen=True, eq=False)
class SharedInput:
    """What linears that read the same tensor share, so that it is quantized once for all of them.

    smooth  [K]     fp32             the input is divided by it, the weight was multiplied by it
    down    [R, K]  model dtype      the low-rank branches' first matrices, one under the other; they read the raw input
    shift   added to the input before an unsigned code; 0 for signed codes
    rotate  the smoothed input is rotated before it is rounded (formats/rotation.py), and so is what the codes stand for
    """

    precision: str
    smooth: Tensor
    down: Tensor
    shift: float = 0.0
    rotate: bool = False
    # Of all copies of copies, this one too: a linear that comes the same way later, or comes back, finds them.
    _copies: "WeakValueDictionary[Copy, SharedInput]" = field(default_factory=WeakValueDictionary, repr=False)

    def copied(self, copy: "Copy") -> "SharedInput":
        """The same elsewhere; every linear that shares this one gets the same."""
        self._copies[Copy.of(self.down, self.smooth)] = self
        made = self._copies.get(copy)
        if made is None:
            moved = copy.moved({"smooth": self.smooth, "down": self.down})
            made = self._copies[copy] = replace(self, smooth=moved["smooth"], down=moved["down"])
        return made


@dataclass(frozen=True, eq=False)
class Siblings:
    """Linears of one input and one size, whose tensors lie side by side, so that one product can compute them all.

    tensors  by name, of all members together; each member's own are views of them
    dims     by name: the dimension that counts output channels
    count    members
    """

    tensors: dict[str, Tensor]
    dims: dict[str, int]
    count: int
    _copies: "WeakValueDictionary[Copy, Siblings]" = field(default_factory=WeakValueDictionary, repr=False)  # likewise

    def copied(self, copy: Copy, precision: str) -> "Siblings":
        """All members elsewhere; every member gets the same."""
        first = self.tensors[FORMATS[precision].fields[0]]
        self._copies[Copy.of(self.tensors["up"], first)] = self
        made = self._copies.get(copy)
        if made is None:
            tensors = copy.tensors(precision, self.tensors)
            made = self._copies[copy] = replace(self, tensors=tensors, dims=_feature_dims(precision, tensors))
        return made

    def window(self, name: str, place: int) -> tuple[slice, ...]:
        """What of a tensor is one member's."""
        dim = self.dims[name]
        size = self.tensors[name].shape[dim] // self.count
        return *(slice(None),) * dim, slice(place * size, (place + 1) * size)

    def of(self, place: int) -> dict[str, Tensor]:
        """The tensors of one member."""
        return {name: tensor[self.window(name, place)] for name, tensor in self.tensors.items()}


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """One linear, W diag(smooth) = R + up @ down[rank_start : rank_start + rank] diag(smooth), where R is
    dequantize(weight), or of a rotated input rotate(dequantize(weight)).

    weight      the format's tensors (`Format.fields`), in the order that the device's kernels want
    up          [N, r]  model dtype
    offset      [N]     fp32 or None: what the input's shift adds to each output; the GEMM subtracts it
    siblings    where the tensors are parts of larger ones (`side_by_side`), and which part
    expanded    no linear reads it: it is expanded before each use (`expand`), and its shape is `as_matrix`'s
    taps_first  of a convolution: its columns are those of `as_matrix`; of older files they are [I, kh, kw] in a row
    """

    shared: SharedInput
    weight: tuple[Tensor, ...]
    up: Tensor
    rank_start: int = 0
    offset: Tensor | None = None
    siblings: Siblings | None = None
    place: int = 0
    expanded: bool = False
    taps_first: bool = False
    # What compiled graphs look up once for the block this linear comes first in; it goes when the weights go.
    resolved: "WeakKeyDictionary[Any, Any]" = field(default_factory=WeakKeyDictionary, repr=False)

    @property
    def precision(self) -> str:
        return self.shared.precision

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def in_features(self) -> int:
        return self.shared.smooth.shape[0]

    @property
    def out_features(self) -> int:
        return self.up.shape[0]

    @property
    def device(self) -> torch.device:
        return self.up.device

    @property
    def down(self) -> Tensor:
        """[r, K], this linear's own rows of the shared matrix."""
        return self.shared.down[self.rank_start : self.rank_start + self.rank]

    @property
    def plain_weight(self) -> tuple[Tensor, ...]:
        """The format's tensors in the order that its reference and files hold."""
        return layout.to_plain(self.precision, self.weight, self.in_features)

    def plain_tensors(self) -> dict[str, Tensor]:
        """`own_tensors` in that order."""
        plain = zip(FORMATS[self.precision].fields, self.plain_weight, strict=True)
        return self.own_tensors() | dict(plain)

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors no other linear uses, by name."""
        named = dict(zip(FORMATS[self.precision].fields, self.weight, strict=True), up=self.up)
        return named if self.offset is None else named | {"offset": self.offset}

    def nbytes(self) -> int:
        """Bytes of its own tensors and of its rows of `down`; the few of `smooth` are counted too."""
        own = sum(t.nbytes for t in self.own_tensors().values())
        return own + self.down.nbytes + self.shared.smooth.nbytes

    def to(self, device: torch.device, dtype: torch.dtype, non_blocking: bool = False) -> "PackedLinear":
        """The same on another device, with a branch of another dtype. Linears that share an input go on sharing it, and
        those that lie side by side go on lying so: the first that moves takes the memory of all along.
        """
        if (device, dtype) == (self.device, self.up.dtype):
            return self
        return self._copied(Copy(device, dtype, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedLinear":
        """The same in the host's pinned memory, in the order that the GPU's kernels want."""
        return self if self.is_pinned() else self._copied(Copy(torch.device("cpu"), self.up.dtype, pinned=True))

    def is_pinned(self) -> bool:
        """Whether it lies in pinned memory."""
        return self.weight[0].is_pinned()

    def record_stream(self, stream: Any) -> None:
        """Let the memory be used by nobody else before what `stream` has been given by then is done."""
        tensors = (*self.own_tensors().values(), self.shared.smooth, self.shared.down)
        for tensor in {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values():
            tensor.record_stream(stream)

    def _copied(self, copy: Copy) -> "PackedLinear":
        siblings = self.siblings and self.siblings.copied(copy, self.precision)
        own = siblings.of(self.place) if siblings else copy.tensors(self.precision, self.own_tensors())
        return replace(
            self,
            shared=self.shared.copied(copy),
            weight=tuple(own[name] for name in FORMATS[self.precision].fields),
            up=own["up"],
            offset=own.get("offset"),
            siblings=siblings,
            resolved=WeakKeyDictionary(),
        )

    def _join(self, siblings: Siblings, place: int) -> None:
        """From now on be a part of them. Nothing else changes, so those who hold the tensors as they were may go on."""
        own = siblings.of(place)
        weight = tuple(own[name] for name in FORMATS[self.precision].fields)
        fields = {"weight": weight, "up": own["up"], "offset": own.get("offset"), "place": place, "siblings": siblings}
        self.__dict__.update(fields)  # at once: an interruption must not leave half of them

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The plain [N, K] matrix this linear now multiplies by: quantized part plus low-rank branch."""
        shared = self.shared
        rest = _without_branch(self.precision, shared.smooth, self.weight, shared.rotate)
        return (rest + self.up.float() @ self.down.float()).to(dtype)

    def values(self, weight: Tensor) -> Tensor:
        """`dequantize`, of the shape, dtype and order of the weight that this is of."""
        return _in_shape(self.dequantize(weight.dtype), weight.shape, self.taps_first, weight.is_contiguous())

    def signature(self) -> tuple:
        """What a compiled graph depends on: equal signatures can run the same code."""
        tensors = (*self.own_tensors().values(), self.shared.smooth, self.shared.down)
        return (
            self.precision,
            self.shared.shift,
            self.shared.rotate,
            self.rank_start,
            self.place,
            self.taps_first,
            self.siblings and self.siblings.count,
            *((t.dtype, tuple(t.shape), t.device) for t in tensors),
        )


def features(shape: Sequence[int]) -> tuple[int, int]:
    """How many channels a weight of this shape has on its two sides: of a matrix, of each of several, of a kernel."""
    return (shape[-2], shape[-1]) if _are_several(shape) else (shape[0], shape[1])


def as_matrix(weight: Tensor) -> Tensor:
    """The [N, K] as which a weight is packed: several matrices under one another; of a convolution [O, I, kh, kw] rows
    of [kh, kw, I], which is how channels_last has them: codes are read and values written in one order.
    """
    return weight.flatten(0, -2) if _are_several(weight.shape) else weight.movedim(1, -1).flatten(1)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The [N, K] of `as_matrix`, which may be a copy, of a weight of this shape."""
    if _are_several(shape):
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


def is_kernel(shape: Sequence[int]) -> bool:
    """Whether it is a convolution's of several taps, which has a matrix of channels for each."""
    return any(size > 1 for size in shape[2:]) and not _are_several(shape)


def _are_several(shape: Sequence[int]) -> bool:
    """Whether these are several matrices, and not a kernel of each pair of channels."""
    return len(shape) > 2 and shape[-1] >= MIN_FEATURES


def expand(
    precision: str,
    rotate: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    smooth: Tensor,
    up: Tensor,
    down: Tensor,
    *weight: Tensor,
    taps_first: bool = False,
    contiguous: bool = True,
) -> Tensor:
    """A weight of this shape out of its packed tensors, `weight` those of the format, in any order.

    rotate, taps_first   as in SharedInput and PackedLinear
    contiguous           False: a convolution's channels may lie last
    """
    matrix = _without_branch(precision, smooth, weight, rotate).to(dtype)
    matrix = torch.addmm(matrix, up.to(dtype), down.to(dtype)) if up.shape[1] else matrix
    return _in_shape(matrix, shape, taps_first, contiguous)


def _in_shape(matrix: Tensor, shape: Sequence[int], taps_first: bool, contiguous: bool) -> Tensor:
    """The inverse of `as_matrix`."""
    values = matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if taps_first else matrix.reshape(shape)
    return values.contiguous() if contiguous else values


def _without_branch(precision: str, smooth: Tensor, weight: tuple[Tensor, ...], rotate: bool) -> Tensor:
    """[N, K] fp32: what the codes of a weight stand for, in any order."""
    values = layout.dequantize(precision, weight, smooth.shape[0])
    return (rotated(values) if rotate else values) / smooth


def form(packs: list[PackedLinear]) -> tuple:
    """What a graph of several depends on: how each is packed, which share an input, and which lie side by side."""
    signatures = (packed.signature() for packed in packs)
    return (*signatures, _alike([packed.shared for packed in packs]), _alike([packed.siblings for packed in packs]))


def _alike(items: list) -> tuple[int, ...]:
    """Which of these are one and the same: [a, b, a] -> (0, 1, 0)."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(item), len(first)) for item in items)


def side_by_side(packs: Iterable[PackedLinear]) -> None:
    """Bring the tensors of linears that could be one product next to each other, once; the memory is not doubled.

    These are linears of one input, one size and one rank, whose rows of `down` follow one another. Those that lie
    beside others already stay there: graphs compiled before know their tensors.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # nothing is copied before the graph runs
    # On one line: an interruption before the next would leave it locked.
    with _LOCK, without_fake_tensors(): _join_families(packs)  # noqa: E701  # fmt: skip


@torch.inference_mode(False)
@torch.no_grad()
def _join_families(packs: Iterable[PackedLinear]) -> None:
    for members in _families(packs):
        first = members[0]
        owns = [packed.own_tensors() for packed in members]
        dims = _feature_dims(first.precision, owns[0])
        tensors = {name: torch.cat([own[name] for own in owns], dims[name]) for name in owns[0]}
        _wait_for_join(owns)
        siblings = Siblings(tensors, dims, len(members))
        for place, packed in enumerate(members):
            packed._join(siblings, place)


def _wait_for_join(owns: list[dict[str, Tensor]]) -> None:
    """Memory that a hook fetched on its own stream must not be taken there before it was read on this one."""
    for tensor in (tensor for own in owns for tensor in own.values() if tensor.is_cuda):
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _families(packs: Iterable[PackedLinear]) -> list[list[PackedLinear]]:
    by_input: dict[SharedInput, list[PackedLinear]] = {}
    for packed in dict.fromkeys(packs):
        if (
            packed.siblings is None
            and FORMATS[packed.precision].siblings
            and packed.out_features % layout.SIBLING_STEP == 0
        ):
            by_input.setdefault(packed.shared, []).append(packed)
    families: list[list[PackedLinear]] = []
    for linears in by_input.values():
        last = None
        for packed in sorted(linears, key=lambda packed: packed.rank_start):
            if last is not None and _is_next(packed, last):
                families[-1].append(packed)
            else:
                families.append([packed])
            last = packed
    return [members for members in families if len(members) > 1]


def _is_next(packed: PackedLinear, last: PackedLinear) -> bool:
    sizes, others = ([(t.dtype, t.shape) for t in p.own_tensors().values()] for p in (packed, last))
    return packed.rank_start == last.rank_start + last.rank and sizes == others
