"""What a user is told of a model, a line each: what was quantized (when the first 4-bit code is compiled) or why
nothing was, and that it wants to be compiled.
"""

import re
from collections import defaultdict

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from . import decisions
from .config import Config
from .kernels.formats import FORMATS
from .layers import layers
from .parameter import has_quantized
from .passes.peft_names import is_adapter
from .progress import say
from .report import LayerReport, report

_TITLES = WeakIdKeyDictionary()  # model -> its title
_TOLD = WeakIdKeyDictionary()  # model -> the last line of it
_CURRENT = WeakIdKeyDictionary()  # models of which nothing was decided since their last line
_WAITING = WeakIdKeyDictionary()  # model -> left_alone() and the option convolutions when some layers were undecided
_LARGE = 2**26  # bytes: what stays 16-bit and takes more is told with its size


def title(model: nn.Module | None) -> str:
    """Its class, and a number where others of the class were told of."""
    if model is None:
        return "a function"
    if model not in _TITLES:
        name, taken = type(model).__name__, set(_TITLES.values())
        numbered = (f"{name} #{i}" for i in range(2, len(taken) + 3))
        _TITLES[model] = name if name not in taken else next(t for t in numbered if t not in taken)
    return _TITLES[model]


def summary(model: nn.Module) -> str:
    """The sentence, read off the model as it is."""
    rows = [row for row in report(model) if not is_adapter(row.name)]
    quantized = [row for row in rows if row.precision in FORMATS]
    left = [row for row in rows if row.precision not in FORMATS]
    text = f"svdquant: {title(model)}: {_what(quantized)}"
    if left:
        text += f"; {len(left)} left in 16-bit: {_why(left)}"
    return text if rows else f"{text}: it has no nn.Linear and no convolution"


def _what(rows: list[LayerReport]) -> str:
    if not rows:
        return "nothing was quantized"
    names = [row.precision for row in rows]
    kinds = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))
    before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    return f"{len(rows)} linears quantized ({kinds}), {before / 2**20:.1f} -> {after / 2**20:.1f} MiB"


def _why(rows: list[LayerReport]) -> str:
    """The reasons, the most common first; those that differ only in a number are one."""
    alike = defaultdict(list)
    for row in rows:
        alike[re.sub(r"[\d.]+", "", row.reason)].append(row)
    told = []
    for own in sorted(alike.values(), key=len, reverse=True):
        size = sum(row.bytes_before for row in own)
        text = own[0].reason + (", and the like" if len({row.reason for row in own}) > 1 else "")
        told.append(f"{len(own)} {text}" + (f" ({size / 2**20:.1f} MiB)" if size > _LARGE else ""))
    return "; ".join(told)


def decided(model: nn.Module | None) -> None:
    """Something was decided of a model: its line is not what was told any more."""
    if model is not None:
        _CURRENT.pop(model, None)


def tell(model: nn.Module, visible: bool) -> None:
    """Say the line, unless it was said and is the same still."""
    if model not in _CURRENT:
        _CURRENT[model] = True
        line = summary(model)
        if _TOLD.get(model) != line:
            _TOLD[model] = line
            say(line, visible)


def forget(model: nn.Module) -> None:
    """What was told of a model counts no more: it begins anew."""
    _TOLD.pop(model, None)
    decided(model)


def tell_again(model: nn.Module, visible: bool) -> None:
    """Say the line to somebody who has just asked for it to be quantized."""
    forget(model)
    tell(model, visible)


def tell_if_done(model: nn.Module | None, config: Config) -> None:
    """Say the line once the first of a model's layers is quantized, or none will be."""
    if model is None or model in _CURRENT:
        return
    if has_quantized(model) or not _is_waiting(model, config.convolutions):
        tell(model, config.progress)


def _is_waiting(model: nn.Module, convolutions: bool) -> bool:
    """Whether some layer may still be quantized. Asked before calls of 16-bit graphs, and a large model's tree takes a
    tenth of a second, so it is looked through again only once something was decided.
    """
    known = decisions.left_alone(), convolutions
    if _WAITING.get(model) == known:
        return True
    waiting = (layer for layer in layers(model) if decisions.is_undecided(layer.weight))
    is_waiting = any(layer.why_not(convolutions) is None for layer in waiting)
    if is_waiting:
        _WAITING[model] = known
    return is_waiting


def tell_to_compile(model: nn.Module, visible: bool) -> None:
    """What is left to do with a quantized model, unless it or a part of it was compiled already."""
    if has_quantized(model) and not any(module._compiled_call_impl is not None for module in model.modules()):
        say("svdquant: quantized; now compile it, for speed: svdq_compile.compile(model)", visible)
