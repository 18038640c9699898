"""The torch.compile backend: `torch.compile(model, backend="svdquant")`.

Dynamo's graph --> is some linear quantized, and none undecided?
                   yes --> CompiledGraph: svdq:: operators, the rest to Inductor
                   no  --> UndecidedGraph: its calls observe in exact 16-bit, eagerly, and then quantize
                           (ObservingGraph); where all that it has stays 16-bit, all goes to Inductor
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from . import decisions
from .compiled import EAGERLY, CompiledGraph
from .config import Config
from .errors import GradientsNeeded, TangentsNeeded
from .fallback import go_on
from .lowering.torch_private import convert_by_our_settings, converting_for_us, eagerly, transforms_in
from .parameter import QuantizedWeight
from .passes import gives_streams_work, lift_waits
from .roots import find_weights, model_of, models_of
from .stages import compiling, tracing
from .summary import tell_if_done
from .undecided import UndecidedGraph

log = logging.getLogger("svdq_compile")


def svdquant(
    gm: fx.GraphModule, example_inputs: list, *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable:
    """Compile one graph that Dynamo captured. Registered as "svdquant" for torch.compile.

    options  fields of `Config` by name; mode  Inductor's. Raises OptionError for an unknown or impossible option and
    GradientsNeeded where the call would record gradients. What fails otherwise goes on eagerly (fallback.py).
    """
    converting_for_us()
    config = Config.from_options(options, mode)
    _refuse_gradients(gm)
    if gives_streams_work(gm):
        log.info("a graph that gives streams work runs eagerly")
        return eagerly(gm)
    waits = lift_waits(gm)
    try:
        compiled = _compile(gm, example_inputs, config)
    except Exception as error:
        go_on(error, "compiling a graph", EAGERLY, config, gm)
        compiled = eagerly(gm)
    return compiled if waits is None else _after(eagerly(waits), compiled)


def _after(waits: Callable, compiled: Callable) -> Callable:
    """Waits, then the rest, of the same inputs."""

    def both(*args: Any) -> Any:
        waits(*args)
        return compiled(*args)

    return both


convert_by_our_settings(svdquant, tracing)


def _compile(gm: fx.GraphModule, example_inputs: list, config: Config) -> Callable:
    decisions.note_compiled_anew(example_inputs)
    inputs = find_weights(gm, example_inputs, models_of(gm), config.convolutions)
    weights = [example_inputs[i] for group in inputs.groups for i in group.indices]
    is_decided = not any(decisions.is_undecided(w) for w in weights)
    if not is_decided:
        config.refuse_target("needs the whole model at once, which torch.compile's backend never sees")
        return UndecidedGraph(gm, example_inputs, inputs, config)
    model = model_of(example_inputs, models_of(gm))
    tell_if_done(model, config)
    kind = CompiledGraph if any(isinstance(value, QuantizedWeight) for value in example_inputs) else UndecidedGraph
    with compiling(model, config.progress):
        return kind(gm, example_inputs, inputs, config)


def _refuse_gradients(gm: fx.GraphModule) -> None:
    """Or forward derivatives, that the call would record or that the graph itself works out (torch.func)."""
    works_out = transforms_in(gm)
    if "jvp" in works_out:
        raise TangentsNeeded
    if "grad" in works_out:
        raise GradientsNeeded
    outputs = torch.utils._pytree.tree_leaves(gm.graph.output_node().args)
    values = (node.meta.get("example_value") for node in outputs if isinstance(node, fx.Node))
    # A Parameter that is handed on, to what follows a graph break, wants gradients and records none.
    if any(isinstance(value, Tensor) and value.requires_grad and value.grad_fn is not None for value in values):
        raise GradientsNeeded
