"""Split a quantized model over ranks: `parallelize`, tensor parallelism of packed weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import decisions
from .config import Config
from .errors import OptionError, SplitRefused
from .given import model_in
from .lowering.torch_private import shell, while_nothing_is_traced
from .parameter import QuantizedWeight, become_quantized, has_quantized, is_kept, originals
from .passes.peft_names import is_adapter
from .progress import say
from .ranks import Ranks, checksums, ranks_of
from .split_linear import become_split, check_whole
from .split_plan import Plan, check_inputs, inputs_in, narrow, plan_for, steps_in
from .splits import INPUTS, OUTPUTS, Cutting, Part
from .summary import title

_SPLIT = "its weight is split over ranks in 16 bits"


@dataclass(frozen=True)
class Sharing:
    """The ranks that share a model. group: torch's name of them; ranks: None for one alone"""

    rank: int
    size: int
    group: str
    ranks: Ranks | None

    @classmethod
    def over(cls, mesh: Any) -> "Sharing":
        """Those of a device mesh of one dimension. Raises OptionError."""
        if not dist.is_available() or not dist.is_initialized():
            raise OptionError(f"mesh={mesh!r:.60}: torch.distributed is not set up: call init_process_group first")
        if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
            raise OptionError(
                f"mesh={mesh!r:.60}: give a device mesh of one dimension, as init_device_mesh('cuda', (2,)) makes it, "
                "or one dimension of a larger one, mesh['tp']"
            )
        if mesh.get_coordinate() is None:
            raise OptionError(f"mesh={mesh!r:.60}: this process, rank {dist.get_rank()}, is not in it")
        group = mesh.get_group()
        return cls(mesh.get_local_rank(), mesh.size(), group.group_name, ranks_of(Config(group=mesh)))


def parallelize(
    model: nn.Module, mesh: Any, plan: Mapping[str, Any] | None = None, *, progress: bool = True
) -> nn.Module:
    """Split a quantized model over ranks, in place; returns it. All ranks of the mesh call this, with the same model.

    mesh  a device mesh of one dimension, or one of a larger one: mesh["tp"]
    plan  patterns of module names -> "colwise" or "rowwise", or torch's ColwiseParallel() and RowwiseParallel(). By
          default the plan of the model's class, or attention by heads and feed-forwards by their inner channels, in
          the repeated blocks; what the ranks cannot share is left whole, and said

    Call it before the model is compiled, or compile anew. Adapters do not go with it: fuse them before.

    Raises NotAModel, OptionError, SplitRefused, RanksDiffer, RanksApart: before anything is changed.
    """
    inner = model_in(model, "parallelize")
    sharing = Sharing.over(mesh)
    check_splittable(inner)
    if not has_quantized(inner):
        raise OptionError(
            f"this {type(inner).__name__} is not quantized: call svdq_compile.quantize(model) or load first"
        )
    if sharing.ranks is None:
        return model
    found = plan_for(inner, plan, sharing.size, steps_in(inner))
    check_inputs(found.splits, inputs_in(inner))
    sharing.ranks.compare(lambda: {"split": told(found), "layer": _layers(inner), "weight": _weights(inner)})
    with while_nothing_is_traced(), decisions.LOCK: _split(inner, found, sharing)  # noqa: E701  # fmt: skip
    decisions.place(inner)
    tell(inner, found, sharing, progress)
    return model


def check_splittable(model: nn.Module) -> None:
    """Raises SplitRefused for a model that is split already, or has adapters."""
    check_whole(model, "splitting", "Split it once, or load it anew.")
    adapter = next((name for name, _ in model.named_modules() if is_adapter(name)), None)
    if adapter is not None:
        raise SplitRefused(
            f"{adapter} is an adapter's, whose matrices would not be split: remove it, or fuse it into the 16-bit "
            "model before that is quantized"
        )


def tell(model: nn.Module, plan: Plan, sharing: Sharing, progress: bool) -> None:
    """Say how much of a model this rank has."""
    say(f"svdquant: {title(model)}: {len(plan.splits)} linears are split over {sharing.size} ranks", progress)


def told(plan: Plan) -> list[tuple[str, Any]]:
    """A plan as ranks compare it."""
    return [(name, f"{('outputs', 'inputs')[split.dim]} {list(split.blocks)}") for name, split in plan.splits.items()]


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, f"{_kind(weight)}{list(weight.shape)}") for name, weight in model.named_parameters()]


def _kind(weight: Tensor) -> str:
    return f"{weight.dtype} {weight._svdq.precision}" if isinstance(weight, QuantizedWeight) else str(weight.dtype)


def _weights(model: nn.Module) -> list[tuple[str, Any]]:
    named = dict(model.named_parameters())
    values = [w._svdq.plain_weight[0] if isinstance(w, QuantizedWeight) else w for w in named.values()]
    return list(zip(named, checksums(values), strict=True))


@torch.no_grad()
def _split(model: nn.Module, plan: Plan, sharing: Sharing) -> None:
    cutting = Cutting()
    for name, split in plan.splits.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        part = split.of(sharing.rank, sharing.size)
        put_part(linear, part, sharing.group, _part_of(linear.weight, part, cutting))
    for name in plan.narrowed:
        narrow(model.get_submodule(name), sharing.size)


def put_part(linear: nn.Linear, part: Part, group: str, weight: nn.Parameter) -> None:
    """Let a linear have its part of the weight, and of the bias."""
    bias = linear.bias
    if bias is not None and part.split.dim == OUTPUTS:
        bias = nn.Parameter(part.cut(bias.detach(), 0), bias.requires_grad)
    become_split(linear, part, group, weight, bias)


def _part_of(weight: nn.Parameter, part: Part, cutting: Cutting) -> nn.Parameter:
    if not isinstance(weight, QuantizedWeight):
        own = nn.Parameter(part.cut(weight.detach(), part.split.dim), weight.requires_grad)
        decisions.leave_alone(own, decisions.reason_of(weight) or _SPLIT)
        return own
    kept = is_kept(weight)
    original = part.cut(originals(weight), part.split.dim) if kept or weight._svdq_original is not None else None
    packed = cutting.part_of(weight._svdq, part)
    values = original if kept and original is not None else empty_part(weight, part, packed.device)
    state = weight._svdq_name, weight._svdq_error, weight._svdq_calibrated
    own = nn.Parameter(values, weight.requires_grad)
    return become_quantized(own, packed, *state, None if kept else original, kept)


def empty_part(weight: Tensor, part: Part, device: torch.device) -> Tensor:
    """Of the shape of a rank's part of a weight, without memory."""
    n, k = weight.shape
    shape = (n, part.channels) if part.split.dim == INPUTS else (part.channels, k)
    return shell(shape, (shape[1], 1), weight.dtype, device)
