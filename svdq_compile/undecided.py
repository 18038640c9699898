"""A compiled graph none of whose weights was quantized when it was made: it observes those that are undecided, and is
compiled where none is.

Dynamo tells graphs apart by what they compute and by the classes of their weights, not by where they stand in a model.
So a block and an embedder that is built like it, or a block that option `skip` names, are given one graph; each call
asks what is decided of its own weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, fx

from . import decisions
from .agreement import Agreement
from .compiled import EAGERLY, CompiledGraph
from .config import Config
from .fallback import go_on, joins_exchanges
from .lowering.inductor import compile_with_inductor
from .lowering.torch_private import clone_dynamo_graph, eagerly
from .observing import ObservingGraph
from .parameter import QuantizedWeight
from .passes import fuse
from .passes.weight_groups import WeightInputs
from .roots import model_of, models_under_way
from .stages import compiling
from .summary import tell_if_done


class UndecidedGraph:
    """Callable like the graph it was made of."""

    def __init__(self, gm: fx.GraphModule, example_inputs: list, inputs: WeightInputs, config: Config) -> None:
        self._gm = clone_dynamo_graph(gm)
        self._inputs = inputs
        self._config = config
        self._agreement = Agreement(gm, config)
        self._weights = [i for group in inputs.groups for i in group.indices]
        # What makes code compiled later, outside Dynamo's tracing, valid for these sizes only.
        self._sizes = [i for i, value in enumerate(example_inputs) if not isinstance(value, Tensor)]
        self._observing: Callable | None = None
        self._compiled: dict[tuple, Callable] = {}
        self._for_all_sizes: Callable | None = None
        if not self._is_undecided(example_inputs):
            self._for_all_sizes = self._or_go_on(lambda: self._compile(example_inputs))

    def __call__(self, *args: Any) -> Any:
        decisions.note_compiled_anew(args)
        if self._is_undecided(args):
            return self._observe(args)
        self._agreement.reach(args)
        tell_if_done(decisions.model_of(args), self._config)  # of another model than it was compiled for, too
        if self._for_all_sizes is not None:
            return self._for_all_sizes(*args)
        key = tuple(args[i] for i in self._sizes)
        if key not in self._compiled:
            with compiling(model_of(args, models_under_way()), self._config.progress):
                self._compiled[key] = self._or_go_on(lambda: self._compile(list(args)))
        return self._compiled[key](*args)

    def _is_undecided(self, args: list | tuple) -> bool:
        return any(decisions.is_undecided(args[i]) for i in self._weights)

    def _observe(self, args: tuple) -> Any:
        if self._observing is None:
            self._observing = self._or_go_on(lambda: ObservingGraph(self._gm, self._inputs, self._config))
        return self._observing(*args)

    def _or_go_on(self, make: Callable[[], Callable]) -> Callable:
        """What `make` gives, or the graph run eagerly."""
        try:
            return make()
        except Exception as error:
            go_on(error, "compiling a graph", EAGERLY, self._config, self._gm)
            return eagerly(self._gm)

    def _compile(self, args: list) -> Callable:
        if any(isinstance(value, QuantizedWeight) for value in args):
            return CompiledGraph(self._gm, args, self._inputs, self._config)
        # What is exchanged must fit ranks where some layer of this graph is in 4 bits.
        rewrite = partial(fuse, fusions=["exchanges"]) if joins_exchanges(self._gm, self._config) else None
        return compile_with_inductor(clone_dynamo_graph(self._gm), args, self._config.mode, rewrite)
