"""A compiled graph none of whose weights is quantized: all of it is Inductor's.

Dynamo tells graphs apart by what they compute, not by where it stands. The embedder that this one was compiled for may
be built like a part of a block, which is then given the same graph; so each call asks whether all is decided.
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from . import decisions
from .config import Config
from .lowering.inductor import compile_with_inductor
from .lowering.torch_private import clone_dynamo_graph
from .observing import ObservingGraph
from .passes.weight_groups import WeightInputs


class SixteenBitGraph:
    """Callable like the graph it was made of."""

    def __init__(self, gm: fx.GraphModule, example_inputs: list, inputs: WeightInputs, config: Config) -> None:
        self._gm = gm
        self._inputs = inputs
        self._config = config
        self._weights = [i for group in inputs.groups for i in group.indices]
        self._observing: ObservingGraph | None = None
        self._run: Callable = compile_with_inductor(clone_dynamo_graph(gm), example_inputs, config.mode)

    def __call__(self, *args: Any) -> Any:
        if any(decisions.is_undecided(args[i]) for i in self._weights):
            return self._observe(args)
        return self._run(*args)

    def _observe(self, args: tuple) -> Any:
        if self._observing is None:
            self._observing = ObservingGraph(self._gm, self._inputs, self._config)
        return self._observing(*args)
