"""One call for any model or pipeline: `compile`."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from . import decisions
from .blocks import declared
from .config import Config
from .convert import warn_of_skip
from .errors import AlreadyWrapped, NothingToQuantize
from .given import denoisers
from .layers import UNASKED, layers, matrices
from .lowering.torch_private import compile_in_place
from .parameter import QuantizedWeight, has_quantized
from .progress import say
from .report import why_nothing

log = logging.getLogger("svdq_compile")

T = TypeVar("T")


def compile(model: T, config: Config | Mapping[str, Any] | None = None, **options: Any) -> T:
    """Compile a model, or the denoisers of a diffusers pipeline (transformer, transformer_2, unet), in place; returns
    what it was given.

        svdq.compile(pipe)
        svdq.compile(pipe, precision="int4", skip=["*.proj_out"])
        svdq.compile(pipe.text_encoder, calibration_steps=0)

    Where the class of a model names its repeated blocks (diffusers' `_repeated_blocks`) each of them is compiled, which
    takes the compiler a fraction of the time; else the model whole, as where convolutions outside these blocks are in 4
    bits (option `convolutions`). What was compiled before is compiled anew. The
    first calls run in 16-bit and watch, unless the model is quantized already; a model that `restore` has turned back
    to 16-bit is quantized again.

    config, options  a Config or a dict of options, and options by name, which count more. Raises OptionError for an
    unknown or impossible option, NotAModel, NothingToQuantize, and AlreadyWrapped for what torch.compile(model) gives:
    before anything is changed.
    """
    chosen = Config.of(config, options)
    found = denoisers(model, "compile")
    for name, part in found.items():
        _check(name, part, chosen)
    if not all(has_quantized(part) for part in found.values()):
        chosen.refuse_target("needs the whole model at once, so it is quantized before it is compiled")
    warn_of_skip(list(found.values()), chosen)
    _warn_of_convolutions(list(found.values()), chosen)
    told = [_compile(name, part, chosen) for name, part in found.items()]
    say(f"svdquant: {', '.join(told)}; {_what_comes(list(found.values()), chosen)}", chosen.progress)
    return model


def _check(name: str, model: nn.Module, config: Config) -> None:
    if hasattr(model, "_orig_mod"):
        raise AlreadyWrapped(f"pipe.{name}" if name else "model")
    if not any(
        isinstance(matrix.weight, QuantizedWeight)
        or (matrix.never is None and (config.convolutions or not matrix.is_between))
        for matrix in matrices(model)
    ):
        raise NothingToQuantize(f"{why_nothing(model)} torch.compile(model) compiles it as it is.")


def _warn_of_convolutions(models: list[nn.Module], config: Config) -> None:
    """Say which of these models were quantized without the option `convolutions` that is given now."""
    for model in filter(has_quantized, models if config.convolutions else ()):
        left = [w for w in _between(model) if decisions.reason_of(w) in UNASKED]
        if left:
            log.warning(
                "svdquant: option convolutions: this %s was quantized without it, so its %d convolutions stay in "
                "16-bit: turn it back by svdq_compile.restore(model, state_dict), or load it anew in 16 bits, then "
                "call svdq_compile.quantize(model, convolutions=True)",
                type(model).__name__,
                len(left),
            )


def _compile(name: str, model: nn.Module, config: Config) -> str:
    """Compile one model, and say how."""
    decisions.ask_again(model)
    for module in model.modules():
        module._compiled_call_impl = None
    options, place = config.to_dict(), name or type(model).__name__
    blocks = declared(model, dict(model.named_modules())).values()
    if not blocks or _has_convolutions(model, config):
        compile_in_place(model, backend="svdquant", options=options)
        return f"{place} compiled as a whole"
    for block in blocks:  # not fullgraph=True: hooks break graphs, as those of step caches do, and may come later
        block.compile(backend="svdquant", options=options)
    kinds = Counter(type(block).__name__ for block in blocks)
    return f"{place} compiled by its blocks ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"


def _has_convolutions(model: nn.Module, config: Config) -> bool:
    """Whether convolutions outside the blocks are in 4 bits, or shall be: only the whole model holds them."""
    return any(
        isinstance(weight, QuantizedWeight) or (config.convolutions and decisions.is_undecided(weight))
        for weight in _between(model)
    )


def _between(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the convolutions outside the blocks."""
    return [layer.weight for layer in layers(model) if layer.is_between]


def _what_comes(models: list[nn.Module], config: Config) -> str:
    if all(has_quantized(model) for model in models):
        return "quantized already, the first call compiles"
    if config.calibration_steps == 0:
        return "the first call quantizes by the weights alone and compiles"
    calls = f"{config.calibration_steps} calls" if config.calibration_steps > 1 else "call"
    return f"the first {calls}: 16-bit, watching what the layers read; the next compiles"
