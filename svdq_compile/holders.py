"""The ranks that hold a model together, each a part of it."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .config import Config
from .errors import OptionError
from .ranks import Ranks, ranks_of
from .splits import Part, Split


@dataclass(frozen=True)
class Holders:
    """Those of a device mesh of one dimension.

    rank   the place of this one; size: how many they are
    group  torch's name of them, which graphs hold
    ranks  to talk to each other; None: there is one alone
    """

    rank: int
    size: int
    group: str
    ranks: Ranks | None

    @classmethod
    def of(cls, mesh: Any) -> "Holders":
        """All of them call this. Raises OptionError, RanksApart."""
        if not dist.is_available() or not dist.is_initialized():
            raise OptionError(f"mesh={mesh!r:.60}: torch.distributed is not set up: call init_process_group first")
        if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
            raise OptionError(
                f"mesh={mesh!r:.60}: give a device mesh of one dimension, as init_device_mesh('cuda', (2,)) makes it, "
                "or one dimension of a larger one, mesh['tp']"
            )
        if mesh.get_coordinate() is None:
            raise OptionError(f"mesh={mesh!r:.60}: this process, rank {dist.get_rank()}, is not in it")
        ranks = ranks_of(Config.of(None, {"group": mesh}))
        return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name, ranks)

    def part(self, split: Split) -> Part:
        """What this rank has."""
        return Part(split, self.rank, self.size)
