"""The ranks of torch.distributed that hold the same model: who they are, that they agree, what they tell each other.

They meet when a layer is first observed and whenever layers are quantized, each time for the same layers. What they say
goes through a group of gloo's beside their own (`words`), which moves CPU tensors, notices at once when a process ends,
and cannot mix with what the model sends; tensors on GPUs go through NCCL where the ranks' own group has it.

Nothing is sent before all ranks have said they are well. So an error while they meet ends all with its message, and
one that does not come is waited for as long as the ranks' own group would wait (`timeout` of init_process_group).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .config import ALONE, WORLD, Config
from .errors import OptionError, RankFailed, RanksApart, RanksDiffer
from .fallback import is_out_of_memory
from .lowering.torch_private import has_memory, patience_of
from .progress import Activity, show_by

T = TypeVar("T")
# What ranks compare, in its order; names may come twice.
_Facts = list[tuple[str, Any]]

_KNOWN: "dict[tuple[Any, tuple[int, ...]], Ranks]" = {}  # by torch.distributed's world, which may be set up anew
_ALIGNED = 256  # bytes: where tensors begin that are sent together
_CHUNK = 2**24  # numbers of 8 bytes that are read at once for a checksum


def ranks_of(config: Config) -> "Ranks | None":
    """Those that this process quantizes with, by option `group`; None: it is alone.

    Raises OptionError where the process does not belong to them itself, RanksApart if one of them does not come.
    """
    if config.group == ALONE or not (dist.is_available() and dist.is_initialized()):
        return None
    members = tuple(range(dist.get_world_size())) if config.group == WORLD else config.group
    assert isinstance(members, tuple)
    if dist.get_rank() not in members or max(members) >= dist.get_world_size():
        raise OptionError(
            f"option group={config.group!r}: this is rank {dist.get_rank()} of {dist.get_world_size()}; give each rank "
            f"the group that it belongs to, or group={ALONE!r}"
        )
    if len(members) == 1:
        return None
    show_by(members[0])
    return among(members, config.progress)


def among(members: tuple[int, ...], visible: bool) -> "Ranks":
    """These, of which this process is one; all of them call this. Raises RanksApart if one of them does not come."""
    known = dist.group.WORLD, members
    if known not in _KNOWN:
        _KNOWN[known] = Ranks.meet(members, visible)
    return _KNOWN[known]


def about(config: Config) -> dict[str, _Facts]:
    """What ranks that work as one must have alike, whatever the model."""
    return {
        "version": [("torch", torch.__version__), ("svdq-compile", version("svdq-compile"))],
        "option": [(k, v) for k, v in config.to_dict().items() if k not in ("progress", "group")],
    }


def together(ranks: "Ranks | None") -> Callable[[Callable[[], T]], T]:
    """What calls a function in each of some ranks, as `Ranks.each`; or here, where this process is alone."""
    return _alone if ranks is None else ranks.each


def _alone(make: Callable[[], T]) -> T:
    return make()


@dataclass
class Ranks:
    """Some ranks of torch.distributed.

    members   their numbers there
    own       the place of this process among them
    words     for what they tell each other, and for CPU tensors
    patience  how long they wait for each other
    nccl      whether what lies on their GPUs goes by NCCL
    visible   whether it is told that they are waited for
    """

    members: tuple[int, ...]
    own: int
    words: dist.ProcessGroup
    patience: timedelta
    nccl: bool
    visible: bool
    _is_apart: bool = False
    _gpus: dist.ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def meet(cls, members: tuple[int, ...], visible: bool) -> "Ranks":
        """Set up; all of them call this at once."""
        world = dist.group.WORLD
        assert world is not None
        patience = patience_of(world)
        # Of a world that is bound to a GPU NCCL splits groups off, for which all ranks of the world would have to come.
        splits = world.bound_device_id is not None and len(members) < dist.get_world_size()
        nccl = "nccl" in dist.get_backend_config(world) and not splits
        with _waiting(members, visible):
            words = dist.new_group(list(members), patience, "gloo", use_local_synchronization=True)
        return cls(members, members.index(dist.get_rank()), words, patience, nccl, visible)

    @property
    def size(self) -> int:
        return len(self.members)

    def agree(self, groups: Iterable[Sequence[tuple[Tensor, str]]], config: Config) -> None:
        """Check that all ranks are about to do the same, with weights of the same values and the same options.

        groups  weights that share an input, with the names of their layers: in the order in which they are quantized

        Raises RanksDiffer, which names the first difference; the same on all ranks.
        """
        groups = list(groups)
        named = [pair for group in groups for pair in group]

        def facts() -> dict[str, _Facts]:
            sums = checksums(weight for weight, _ in named)
            return about(config) | {
                "layer": [(n, f"{w.dtype}{list(w.shape)}") for w, n in named],
                "input": [(n, [other for _, other in group]) for group in groups for _, n in group],
                "weight": [(n, total) for (_, n), total in zip(named, sums, strict=True)],
            }

        self.compare(facts)

    def compare(self, facts: Callable[[], dict[str, _Facts]]) -> None:
        """Check that all ranks have the same facts, which are of the kinds that RanksDiffer knows.

        Raises RanksDiffer, which names the first difference; the same on all ranks.
        """
        first, *others = self.told(facts)
        for member, other in zip(self.members[1:], others, strict=True):
            for kind in first | other:  # other calls compare other kinds
                mine, theirs = first.get(kind, []), other.get(kind, [])
                if mine != theirs:
                    raise RanksDiffer(kind, *_difference(mine, theirs), self.members[0], member)

    def exchange(
        self, make: Callable[[], tuple[Any, Sequence[Tensor]]], device: torch.device
    ) -> list[tuple[Any, list[Tensor]]]:
        """What each rank makes, in their order: anything that pickle takes, and tensors.

        device  where this rank's tensors lie and the others' come to

        Raises what `make` raises here, and RankFailed if it raises on another rank, or torch.OutOfMemoryError where it
        lacked memory there.
        """
        own: list[Tensor] = []

        def announce() -> _Parcel:
            said, tensors = make()
            own.extend(tensor.contiguous() for tensor in tensors)
            return _Parcel(said, [(t.dtype, tuple(t.shape)) for t in own], checksums(own), device.type)

        parcels = self.told(announce)
        on_gpus = self.nccl and all(parcel.device == "cuda" for parcel in parcels)
        buffers: list[Tensor] = []

        def make_room() -> None:
            place = device if on_gpus else torch.device("cpu")
            buffers.extend(torch.empty(parcel.nbytes, dtype=torch.uint8, device=place) for parcel in parcels)
            for part, tensor in zip(parcels[self.own].parts(buffers[self.own]), own, strict=True):
                part.copy_(tensor)

        self.told(make_room)
        group = self._group_of_gpus() if on_gpus else self.words
        for member, buffer in zip(self.members, buffers, strict=True):
            self._patiently(partial(dist.broadcast, buffer, member, group=group))
        received: list[list[Tensor]] = []

        def unpack() -> None:
            for place, (parcel, buffer) in enumerate(zip(parcels, buffers, strict=True)):
                tensors = own if place == self.own else [p.to(device, copy=True) for p in parcel.parts(buffer)]
                if checksums(tensors) != parcel.checksums:
                    raise RuntimeError(f"what rank {self.members[place]} sent has arrived damaged")
                received.append(tensors)

        self.told(unpack)
        return [(parcel.said, tensors) for parcel, tensors in zip(parcels, received, strict=True)]

    def summed(
        self,
        own: Sequence[Tensor | None],
        shapes: Sequence[Sequence[int] | None],
        owners: Sequence[int],
        device: torch.device,
    ) -> list[Tensor | None]:
        """Of each place the ranks' tensors, added in the order of the ranks: fp32, at its owner; None at the others.

        own     this rank's; None: it has nothing to add
        shapes  the same on all ranks; None: there is nothing to sum

        One place's tensors lie beside each other at a time. Raises what `exchange` does.
        """
        on_gpus = self.nccl and all(kind == "cuda" for kind in self.told(lambda: device.type))
        place = device if on_gpus else torch.device("cpu")

        def make_room() -> tuple[Tensor, Tensor, list[Tensor | None]]:
            mine = [shape for shape, owner in zip(shapes, owners, strict=True) if owner == self.own]
            totals = [None if shape is None else torch.empty(*shape, device=place) for shape in mine]
            largest = max((torch.Size(shape).numel() for shape in shapes if shape is not None), default=0)
            rows = self.size if mine else 0
            return torch.empty(largest, device=place), torch.empty(rows, largest, device=place), totals

        buffer, landing, totals = self.each(make_room)
        group, left = self._group_of_gpus() if on_gpus else self.words, iter(totals)
        found: list[Tensor | None] = []
        for tensor, shape, owner in zip(own, shapes, owners, strict=True):
            total = next(left) if owner == self.own else None
            if shape is not None:
                sent = buffer[: torch.Size(shape).numel()]
                sent.zero_() if tensor is None else sent.view(shape).copy_(tensor)
                parts = None if total is None else [row[: len(sent)] for row in landing]
                self._patiently(partial(dist.gather, sent, parts, self.members[owner], group))
                if total is not None and parts is not None:
                    total.copy_(parts[0].view(total.shape))
                    for part in parts[1:]:
                        total += part.view(total.shape)
            found.append(total)
        return self.each(lambda: [total if total is None else total.to(device) for total in found])

    def told(self, make: Callable[[], Any]) -> list[Any]:
        """What each rank makes, in their order, anything that pickle takes; where it fails on one, all raise.

        Raises RanksApart if one of them does not come.
        """
        mine, error = None, None
        found: list[Any] = [None] * self.size

        def gather() -> None:
            dist.monitored_barrier(self.words, self.patience, wait_all_ranks=True)  # names who is missing
            dist.all_gather_object(found, (mine, error and _Failure.of(error)), group=self.words)

        with self.in_step():
            try:
                mine = make()
            except Exception as raised:
                error = raised
            self._patiently(gather)
        if error is not None:
            raise error
        for member, (_, failure) in zip(self.members, found, strict=True):
            if failure is not None:
                raise failure.error(member)
        return [said for said, _ in found]

    def each(self, make: Callable[[], T]) -> T:
        """What `make` gives here, once it has given something on every rank; raises what `told` does."""
        made: list[T] = []
        self.told(lambda: made.append(make()))
        return made[0]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Within the context this rank does what the others do: one that is interrupted has lost them."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self._is_apart = True
            raise

    def _patiently(self, wait: Callable[[], Any]) -> None:
        if self._is_apart:
            raise RanksApart(_listed(self.members), "they lost each other before: start all of them anew")
        try:
            with _waiting(self.members, self.visible):
                wait()
        except BaseException:
            self._is_apart = True  # what comes from the others now belongs to what this one has missed
            raise

    def _group_of_gpus(self) -> dist.ProcessGroup | None:
        if self.size == dist.get_world_size():
            return dist.group.WORLD
        if self._gpus is None:
            self._gpus = dist.new_group(list(self.members), self.patience, "nccl", use_local_synchronization=True)
        return self._gpus


@dataclass(frozen=True)
class _Parcel:
    """What a rank is about to send.

    said       words and numbers
    kinds      of each tensor: dtype and shape; they travel as one, each from a multiple of _ALIGNED bytes on
    checksums  of each tensor
    device     the type of that on which they lie
    """

    said: Any
    kinds: list[tuple[torch.dtype, tuple[int, ...]]]
    checksums: list[int]
    device: str

    @property
    def nbytes(self) -> int:
        return sum(-(-size // _ALIGNED) * _ALIGNED for size in self._sizes())

    def parts(self, buffer: Tensor) -> Iterator[Tensor]:
        """The tensors, as views of what they travel in."""
        start = 0
        for (dtype, shape), size in zip(self.kinds, self._sizes(), strict=True):
            yield buffer[start : start + size].view(dtype).reshape(shape)
            start += -(-size // _ALIGNED) * _ALIGNED

    def _sizes(self) -> list[int]:
        return [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in self.kinds]


@dataclass(frozen=True)
class _Failure:
    """An error as the other ranks are told of it."""

    kind: str
    text: str
    is_out_of_memory: bool

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        return cls(type(error).__name__, str(error), is_out_of_memory(error))

    def error(self, member: int) -> Exception:
        if self.is_out_of_memory:
            return torch.OutOfMemoryError(f"on rank {member}: {self.text}")
        return RankFailed(member, self.kind, self.text)


@contextmanager
def _waiting(members: Sequence[int], visible: bool) -> Iterator[None]:
    """Within the context others are waited for: torch's words for their absence become ours."""
    text = f"rank {dist.get_rank()} waits for ranks {_listed(members)} (option group)"
    with Activity(lambda: text, visible, everywhere=True):
        try:
            yield
        except RuntimeError as error:
            raise RanksApart(_listed(members), str(error)) from error


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Of each tensor's bytes, in their order; the same on every device. A tensor without values has 0."""
    sums = [_checksum(t) if has_memory(t) else torch.zeros((), dtype=torch.int64, device="cpu") for t in tensors]
    devices = {total.device for total in sums}
    by_device = {d: iter(torch.stack([s for s in sums if s.device == d]).tolist()) for d in devices}  # one wait each
    return [next(by_device[total.device]) for total in sums]


def _checksum(tensor: Tensor) -> Tensor:
    """Each 8 bytes are a whole number, counted as often as an odd number that tells its place; and how many bytes there
    are; modulo 2^64.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    rest = data.numel() % 8
    if rest:
        data = torch.cat([data, data.new_zeros(8 - rest)])
    if data.data_ptr() % 8:
        data = data.clone()
    total = torch.full((), tensor.nbytes, dtype=torch.int64, device=data.device)
    for number, chunk in enumerate(data.view(torch.int64).split(_CHUNK)):
        odd = torch.arange(chunk.numel(), device=data.device).mul_(2).add_(2 * number * _CHUNK + 1)
        total += odd.mul_(chunk).sum()
    return total


def _difference(facts: _Facts, others: _Facts) -> tuple[str, Any, Any]:
    """Of two ranks the first name that one has and the other has not, or with another value, and the two values (None:
    it has none); where only their order differs, the place, and the names there.
    """
    pairs = zip_longest(facts, others, fillvalue=("", None))
    place, ((name, value), (other_name, other)) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    if name == other_name:
        return name, value, other
    mine, theirs = dict(facts), dict(others)
    lone = next((n for n in (*mine, *theirs) if (n in mine) != (n in theirs)), None)
    if lone is not None:
        return lone, mine.get(lone), theirs.get(lone)
    return f"number {place + 1}", name, other_name


def _listed(members: Sequence[int]) -> str:
    return f"{members[0]} to {members[-1]}" if len(members) > 8 else ", ".join(map(str, members))
