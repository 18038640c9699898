"""Split a quantized model over ranks: `parallelize`, tensor parallelism of packed weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import decisions
from .agreement import facts_of
from .errors import OptionError, SplitRefused
from .given import model_in
from .holders import Holders
from .lowering.torch_private import shell, while_nothing_is_traced
from .parameter import QuantizedWeight, become_quantized, has_quantized, is_kept, originals
from .passes.peft_names import is_adapter
from .progress import say
from .ranks import together
from .split_linear import SplitLinear, become_split, check_whole
from .split_plan import Plan, check_inputs, inputs_in, narrow, plan_for
from .splits import OUTPUTS, Cutting, Part
from .summary import title

_SPLIT = "its weight is split over ranks in 16 bits"


def parallelize(
    model: nn.Module, mesh: Any, plan: Mapping[str, Any] | None = None, *, progress: bool = True
) -> nn.Module:
    """Split a quantized model over ranks, in place; returns it. All ranks of the mesh call this, with the same model.

    mesh  a device mesh of one dimension, or one of a larger one: mesh["tp"]
    plan  patterns of module names -> "colwise" or "rowwise", or torch's ColwiseParallel() and RowwiseParallel(). By
          default the plan of the model's class, or attention by heads and feed-forwards by their inner channels, in
          the repeated blocks; what the ranks cannot share is left whole, and said

    Call it before the model is compiled, or compile anew. Adapters are loaded after it, whole, on all ranks.

    Raises NotAModel, OptionError, SplitRefused, RanksDiffer, RanksApart: before anything is changed.
    """
    holders = Holders.of(mesh)

    def checked() -> nn.Module:
        inner = model_in(model, "parallelize")
        check_splittable(inner)
        if not has_quantized(inner):
            raise OptionError(f"this {type(inner).__name__} is not quantized: svdq_compile.quantize it, or load a file")
        return inner

    inner = together(holders.ranks)(checked)
    if holders.ranks is None:
        return model

    def planned() -> Plan:
        found = plan_for(inner, plan, holders.size)
        check_inputs(found.splits, inputs_in(inner))
        return found

    found = holders.ranks.each(planned)
    holders.ranks.compare(lambda: {"split": as_facts(found)} | facts_of(dict(inner.named_parameters()), values=True))
    with while_nothing_is_traced(), decisions.LOCK: _split(inner, found, holders)  # noqa: E701  # fmt: skip
    decisions.place(inner)
    finish(inner, found, holders, progress)
    return model


def check_splittable(model: nn.Module) -> None:
    """Raises SplitRefused for a model that is split already, or has adapters."""
    check_whole(model, "splitting", "Split it once, or load it anew.")
    adapter = next((name for name, _ in model.named_modules() if is_adapter(name)), None)
    if adapter is not None:
        raise SplitRefused(
            f"{adapter} is an adapter's, around a linear that is still whole: delete_adapters, split the model, and "
            "load the adapter into that"
        )


def as_facts(plan: Plan) -> list[tuple[str, Any]]:
    """A plan as ranks compare it."""
    return [(name, f"{('outputs', 'inputs')[split.dim]} {list(split.blocks)}") for name, split in plan.splits.items()]


@torch.inference_mode(False)
@torch.no_grad()
def _split(model: nn.Module, plan: Plan, holders: Holders) -> None:
    cutting = Cutting()
    for name, split in plan.splits.items():
        module, part = model.get_submodule(name), holders.part(split)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if leaf == "weight" or split.dim == OUTPUTS:
                module.register_parameter(leaf, part_of(parameter, part, cutting))
        become_split(module, part, holders.group)


def part_of(parameter: nn.Parameter, part: Part, cutting: Cutting) -> nn.Parameter:
    """A rank's part of a weight, in 16 or 4 bits, or of a bias along its channels."""
    dim = min(part.split.dim, parameter.dim() - 1)
    if not isinstance(parameter, QuantizedWeight):
        own = nn.Parameter(part.cut(parameter.detach(), dim), parameter.requires_grad)
        if (reason := decisions.reason_of(parameter)) is not None:
            decisions.leave_alone(own, reason)
        return own
    kept = is_kept(parameter)
    original = part.cut(originals(parameter), dim) if kept or parameter._svdq_original is not None else None
    packed = cutting.part_of(parameter._svdq, part)
    values = original if kept and original is not None else _without_memory(parameter, part, packed.device)
    state = parameter._svdq_name, parameter._svdq_error, parameter._svdq_calibrated
    own = nn.Parameter(values, parameter.requires_grad)
    return become_quantized(own, packed, *state, None if kept else original, kept, parameter._svdq_effect)


def put_empty(module: nn.Module, part: Part, group: str) -> None:
    """Let a linear or a norm be the part of itself that a rank has, whose values are still to come."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        if leaf == "weight" or part.split.dim == OUTPUTS:
            own = _without_memory(parameter, part, torch.device("meta"))
            module.register_parameter(leaf, nn.Parameter(own, parameter.requires_grad))
    become_split(module, part, group)


def _without_memory(parameter: Tensor, part: Part, device: torch.device) -> Tensor:
    """Of the shape of a part."""
    shape = list(parameter.shape)
    shape[part.split.dim] = part.channels
    return shell(shape, (shape[-1], 1)[2 - len(shape) :], parameter.dtype, device)


def finish(model: nn.Module, plan: Plan, holders: Holders, progress: bool) -> None:
    """What is left to do for a model that has its parts. Linears that are 16-bit stay so: quantized later they would
    not be parts of one.
    """
    linears = [module for name in plan.splits if isinstance(module := model.get_submodule(name), SplitLinear)]
    for linear in linears:
        if decisions.is_undecided(linear.weight):
            decisions.leave_alone(linear.weight, _SPLIT)
    for name in plan.narrowed:
        narrow(model.get_submodule(name), holders.size)
    say(f"svdquant: {title(model)}: {len(linears)} linears are split over {holders.size} ranks", progress)
