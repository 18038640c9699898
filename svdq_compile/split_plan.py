"""Which linears of a model are split over ranks, and how.

A plan says "colwise" (by output channels) or "rowwise" (by input channels) for patterns of module names, as torch's
parallelize_module does and diffusers' models in `_tp_plan`. Without one a model's own `_tp_plan` is taken, or what the
names of diffusers' modules say: an attention's q, k and v are split by heads and its output by the same channels, a
feed-forward's first linear by outputs and its second by inputs. In between no rank needs what another one has, but for
the mean of squares where q or k are normed over all heads (split_norm.py).
"""

import difflib
import fnmatch
import logging
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import OptionError
from .layers import blocks_of
from .lowering.packed import SharedInput
from .parameter import QuantizedWeight
from .splits import INPUTS, OUTPUTS, Split

log = logging.getLogger("svdq_compile")

Splits = dict[str, Split]  # by the names of modules

_OUTPUTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_INPUTS = ("to_out", "to_out.0", "to_add_out")
_NORMS = {"norm_q": "to_q", "norm_k": "to_k", "norm_added_q": "add_q_proj", "norm_added_k": "add_k_proj"}
# What an attention is told of its heads, from which its processor takes the sizes of q, k and v.
_HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads", "kv_heads", "num_kv_heads", "num_key_value_heads")
_SIZES = (*_HEADS, "inner_dim", "inner_kv_dim", "kv_inner_dim", "sliceable_head_dim")


@dataclass(frozen=True)
class Plan:
    """What is split.

    splits    by the names of modules: linears, and norms over the channels of all heads
    narrowed  names of the modules that are told the numbers of their heads, of which a rank has a part
    """

    splits: Splits
    narrowed: frozenset[str]


def plan_for(model: nn.Module, given: Mapping[str, Any] | None, size: int) -> Plan:
    """The plan of a model for so many ranks.

    given  patterns of module names -> "colwise", "rowwise", or the styles of torch and diffusers that mean these

    Raises OptionError for what cannot be split so. Without a plan that is left whole, which is said once; it is raised
    if nothing is left to split.
    """
    own = getattr(model, "_tp_plan", None)
    units = [_given(model, given)] if given is not None else list(_units(model, own))
    splits: Splits = {}
    whole: dict[str, str] = {}
    for unit in units:
        reason = next((r for name in unit if (r := _why_not(model, name, unit[name], size))), None)
        reason = reason or _why_not_heads(model, unit, size)
        if reason is None:
            splits |= unit | _norms_over_heads(model, unit)
        elif given is not None:
            raise OptionError(f"plan: {reason}")
        else:
            whole |= dict.fromkeys(unit, reason)
    if not splits:
        reason = next(iter(whole.values()), "it has no attention or feed-forward in its repeated blocks that is known")
        raise OptionError(f"nothing of this {type(model).__name__} can be split over {size} ranks: {reason}; give plan")
    if whole:
        log.warning("svdquant: %d linears are whole on every rank: %s", len(whole), next(iter(whole.values())))
    # diffusers' processors take sizes from the tensors where there is a plan of diffusers'.
    holders = {name.rpartition(".")[0] for name, split in splits.items() if split.dim == OUTPUTS}
    narrowed = {name for name in holders if own is None and _sizes(model.get_submodule(name))}
    for name in narrowed:
        for attribute, value in _sizes(model.get_submodule(name)).items():
            if value % size:
                raise OptionError(f"plan: {name} has {attribute}={value}, which {size} ranks cannot share")
    return Plan(splits, frozenset(narrowed))


def narrow(module: nn.Module, size: int) -> None:
    """Let an attention know that this rank has a part of its heads."""
    for attribute, value in _sizes(module).items():
        setattr(module, attribute, value // size)


def _sizes(module: nn.Module) -> dict[str, int]:
    return {name: value for name in _SIZES if type(value := module.__dict__.get(name)) is int}


def check_inputs(splits: Splits, shared: Mapping[str, Hashable]) -> None:
    """That linears of one input agree whether a rank has a part of it. shared: by module, what stands for its input.
    Raises OptionError.
    """
    readers: dict[Hashable, str] = {}
    for name, input in shared.items():
        other = readers.setdefault(input, name)
        mine, theirs = (s if (s := splits.get(n)) and s.dim == INPUTS else None for n in (name, other))
        if mine != theirs:
            raise OptionError(f"plan: {other} and {name} read one input, and only one is split by its channels")


def inputs_in(model: nn.Module) -> dict[str, SharedInput]:
    """By module, the input of each quantized weight."""
    weights = {name: module._parameters.get("weight") for name, module in model.named_modules()}
    return {name: weight._svdq.shared for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}


def _why_not(model: nn.Module, name: str, split: Split, size: int) -> str | None:
    linear = _linear(model, name)
    if type(linear).forward is not nn.Linear.forward:
        return f"{name} is a {type(linear).__name__}, and only torch's Linear is split"
    weight = linear.weight
    if isinstance(weight, QuantizedWeight) and weight._svdq.expanded:
        return f"{name} is expanded before each use"
    whole = weight.shape[split.dim]
    if sum(split.blocks) != whole:
        return f"{name} has {whole} channels, which are not the blocks {list(split.blocks)}"
    reason = split.why_not(size)
    return reason and f"{name}: {reason}"


def _why_not_heads(model: nn.Module, unit: Splits, size: int) -> str | None:
    """Why the heads of an attention cannot be shared: parts are whole heads, and a norm over all of them needs all."""
    for name in unit:
        parent, _, leaf = name.rpartition(".")
        if leaf in _OUTPUTS and unit[name].dim == OUTPUTS:
            reason = _why_not_counted(model, name, size) or _why_not_normed(model, parent, leaf, size)
            if reason is not None:
                return reason
    return None


def _why_not_counted(model: nn.Module, name: str, size: int) -> str | None:
    """By the number of heads, where an attention has one."""
    parent = name.rpartition(".")[0]
    holder = model.get_submodule(parent)
    heads, q = getattr(holder, "heads", None), getattr(holder, "to_q", None)
    if not isinstance(heads, int) or not isinstance(q, nn.Linear):
        return None
    if heads % size:
        return f"{parent} has {heads} heads, which {size} ranks cannot share"
    if _linear(model, name).weight.shape[0] % (q.weight.shape[0] // heads * size):
        return f"{name} has other heads than q, which {size} ranks cannot share"
    return None


def _why_not_normed(model: nn.Module, parent: str, leaf: str, size: int) -> str | None:
    """By the norm of what a linear gives, where it is not over heads of one rank."""
    holder = model.get_submodule(parent)
    whole = _linear(model, f"{parent}.{leaf}").weight.shape[0]
    for norm in (norm for norm, linear in _NORMS.items() if linear == leaf):
        module = getattr(holder, norm, None)
        channels = _channels(module)
        if channels is None or whole // size % channels == 0:
            continue
        if channels != whole:
            return f"{parent}.{norm} is over {channels} channels together, which {size} ranks cannot share"
        if type(module) is not nn.RMSNorm:
            return f"{parent}.{norm} is over all heads, and only torch's RMSNorm is split"
        if any(_rotates(part, whole) for part in model.modules()):
            return f"{parent} rotates the channels of all heads as one"
    return None


def _channels(norm: nn.Module | None) -> int | None:
    """Of what it norms together; None where it is not known, or there is no norm."""
    weight = getattr(norm, "weight", None)
    shape = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)  # torch's name, and diffusers'
    if weight is not None:
        return weight.numel()
    return shape[-1] if isinstance(shape, tuple) else None


def _rotates(module: nn.Module, channels: int | None) -> bool:
    """Whether it makes the angles for this many channels (LTX): they would have to be split as well."""
    return "Rotary" in type(module).__name__ and getattr(module, "dim", None) == channels


def _norms_over_heads(model: nn.Module, unit: Splits) -> Splits:
    """Those of what some split linears give."""
    found: Splits = {}
    for name in unit:
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        for norm, linear in _NORMS.items():
            whole = unit[name].blocks
            if leaf == linear and unit[name].dim == OUTPUTS and (_channels(getattr(holder, norm, None)),) == whole:
                found[f"{parent}.{norm}"] = Split(OUTPUTS, whole)
    return found


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _given(model: nn.Module, plan: Mapping[str, Any]) -> Splits:
    """The linears that a plan names. Raises OptionError."""
    if not isinstance(plan, Mapping):
        raise OptionError(
            f"plan={plan!r:.60}: give a dict, as {{'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'}}"
        )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {name: split for unit in _units(model, None) for name, split in unit.items()}  # gate and value, say
    splits: Splits = {}
    for pattern, style in plan.items():
        found = [name for name in linears if fnmatch.fnmatchcase(name, str(pattern))]
        if not found:
            near = difflib.get_close_matches(str(pattern), linears, n=1, cutoff=0.4)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise OptionError(f"plan: {pattern!r} names no linear of this {type(model).__name__}{hint}")
        for name in found:
            split = _styled(style, linears[name], f"{pattern!r}: {style!r:.60}")
            if len(split.blocks) == 1 and name in known and known[name].dim == split.dim:
                split = known[name]
            if splits.setdefault(name, split) != split:
                raise OptionError(f"plan: {pattern!r} says another thing of {name} than a pattern before it")
    return splits


def _styled(style: Any, linear: nn.Linear, told: str) -> Split:
    """What a style means for a linear. Raises OptionError."""
    kind = style if isinstance(style, str) else type(style).__name__
    dims = {"colwise": OUTPUTS, "rowwise": INPUTS, "ColwiseParallel": OUTPUTS, "RowwiseParallel": INPUTS}
    dims |= {"PackedColwiseParallel": OUTPUTS, "PackedRowwiseParallel": INPUTS}
    if kind not in dims:
        raise OptionError(f"plan: {told} is not known: give 'colwise' or 'rowwise'")
    dim = dims[kind]
    if kind.endswith("wiseParallel") and not kind.startswith("Packed") and not _is_usual(style):
        raise OptionError(f"plan: {told} has layouts of its own: only the usual ones are served, give {kind}()")
    blocks = getattr(style, "blocks", None) or (
        getattr(linear, f"_tp_packed_{'col' if dim == OUTPUTS else 'row'}_blocks", None)
        if kind.startswith("Packed")
        else None
    )
    whole = linear.weight.shape[dim]
    if not blocks:
        return Split(dim, (whole,))
    return Split(dim, tuple(block * whole // sum(blocks) for block in blocks))


def _is_usual(style: Any) -> bool:
    """Whether torch's style takes what the linear before it leaves, and leaves what the next one takes."""
    usual = type(style)()
    return all(getattr(style, n, None) == getattr(usual, n, None) for n in ("input_layouts", "output_layouts"))


def _units(model: nn.Module, own: Mapping[str, Any] | None) -> Iterator[Splits]:
    """What is split together or not at all, where nobody says."""
    for path, block in blocks_of(model).items():
        if own is not None:
            yield from _of_diffusers(model, path, own)
            continue
        for name, module in block.named_modules(prefix=path):
            unit = _attention(name, module) or _feed_forward(name, module)
            if unit:
                yield unit


def _of_diffusers(model: nn.Module, path: str, plan: Mapping[str, Any]) -> Iterator[Splits]:
    """A block's part of `_tp_plan`: by the modules in it, or together where some linears are the block's own."""
    linears = {n: m for n, m in model.get_submodule(path).named_modules(prefix=path) if isinstance(m, nn.Linear)}
    found = {n: _styled(s, m, f"{p!r}") for n, m in linears.items() for p, s in plan.items() if fnmatch.fnmatch(n, p)}
    inner = {name: name.removeprefix(f"{path}.").split(".")[0] for name in found}
    if any(f"{path}.{first}" == name for name, first in inner.items()):
        inner = dict.fromkeys(inner, "")
    for first in dict.fromkeys(inner.values()):
        yield {name: split for name, split in found.items() if inner[name] == first}


def _attention(path: str, module: nn.Module) -> Splits | None:
    """q, k and v by heads, and what reads the heads' results; None if it is no attention, or has linears beyond."""
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    dims = {name: OUTPUTS if name in _OUTPUTS else INPUTS for name in linears if name in (*_OUTPUTS, *_INPUTS)}
    if not {"to_q", "to_k", "to_v"} <= dims.keys() or dims.keys() != linears.keys() or INPUTS not in dims.values():
        return None
    if not isinstance(getattr(module, "heads", None), int):
        return None
    return {f"{path}.{name}": Split(dim, (linears[name].weight.shape[dim],)) for name, dim in dims.items()}


def _feed_forward(path: str, module: nn.Module) -> Splits | None:
    """diffusers' FeedForward: `net.0.proj`, which may give value and gate side by side, and `net.2`."""
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    if linears.keys() != {"net.0.proj", "net.2"}:
        return None
    up, down = linears["net.0.proj"].weight.shape[0], linears["net.2"].weight.shape[1]
    if up not in (down, 2 * down):
        return None
    return {
        f"{path}.net.0.proj": Split(OUTPUTS, (down,) * (up // down)),
        f"{path}.net.2": Split(INPUTS, (down,)),
    }
