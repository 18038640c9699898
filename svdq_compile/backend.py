"""The torch.compile backend: `torch.compile(model, backend="svdquant")`.

Dynamo's graph --> are all its linears decided?  no  --> ObservingGraph: exact 16-bit, eager, watches, then quantizes
                                                 yes --> CompiledGraph: svdq:: operators, the rest to Inductor
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from . import decisions
from .compiled import EAGERLY, CompiledGraph
from .config import Config
from .errors import GradientsNeeded
from .fallback import go_on
from .lowering.inductor import compile_with_inductor
from .lowering.torch_private import convert_by_our_settings, converting_for_us, eagerly
from .observing import ObservingGraph
from .parameter import QuantizedWeight
from .passes.weight_groups import weight_inputs
from .summary import TALLY


@convert_by_our_settings
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
    try:
        return _compile(gm, example_inputs, config)
    except Exception as error:
        go_on(error, "compiling a graph", EAGERLY, config)
        return eagerly(gm)


def _compile(gm: fx.GraphModule, example_inputs: list, config: Config) -> Callable:
    quantized = {i for i, value in enumerate(example_inputs) if isinstance(value, QuantizedWeight)}
    inputs = weight_inputs(gm, quantized)
    weights = [example_inputs[i] for group in inputs.groups for i in group.indices]
    if any(decisions.is_undecided(w) for w in weights):
        if config.calibration_steps:
            TALLY.watching(config.calibration_steps, config.progress)
        return ObservingGraph(gm, inputs, config)
    TALLY.tell(config.progress)
    if not quantized:
        return compile_with_inductor(gm, example_inputs, config.mode)
    return CompiledGraph(gm, example_inputs, inputs, config)


def _refuse_gradients(gm: fx.GraphModule) -> None:
    outputs = torch.utils._pytree.tree_leaves(gm.graph.output_node().args)
    values = (node.meta.get("example_value") for node in outputs if isinstance(node, fx.Node))
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise GradientsNeeded
