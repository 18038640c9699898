"""The first phase of a compiled graph: it runs in exact 16-bit, eagerly, and remembers what its linears read.

When every weight of a call has been observed often enough, the call quantizes them on its way out. Their class changes
with that, Dynamo traces again at the next call, and the backend compiles the 4-bit code (compiled.py).
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import decisions, eager, stages
from .config import Config
from .convert import convert
from .fallback import is_out_of_memory, refuse_to_send_alone
from .input_statistics import MOMENT_ROWS
from .lowering.packed import matrix_shape
from .lowering.torch_private import clone_dynamo_graph, eagerly
from .parameter import QuantizedWeight
from .passes import observing, pipeline
from .passes.linears import rows_read
from .passes.subgraphs import placeholders
from .passes.weight_groups import WeightInputs
from .patches import patches
from .ranks import ranks_of
from .roots import models_under_way
from .task import Task

log = logging.getLogger("svdq_compile")


class ObservingGraph:
    """Callable like the graph it was made of. One instance serves all blocks and models that Dynamo gives the graph
    to.
    """

    def __init__(self, gm: fx.GraphModule, inputs: WeightInputs, config: Config) -> None:
        self._gm = clone_dynamo_graph(gm)
        self._inputs = inputs
        self._config = config
        graph_inputs = placeholders(self._gm.graph)
        expanded = [graph_inputs[i] for i in inputs.expanded]
        names = inputs.known_by_node(self._gm)
        pipeline.run(self._gm, observing(_observe, run_linear, names, run_convolution, expanded))
        self._run = eagerly(self._gm)

    def tasks(self, args: tuple) -> list[Task]:
        """What this call's weights need: the groups with a weight that is still undecided."""
        groups = [(tuple(args[i] for i in group.indices), group) for group in self._inputs.groups]
        if any(decisions.is_undecided(w) and not decisions.is_placed(w) for weights, _ in groups for w in weights):
            decisions.place_weights(args, models_under_way())  # another model than the one that the graph was made for
        decisions.settle(self._inputs, args, self._config.convolutions)
        return [
            Task(
                weights,
                _names(weights, group.names),
                group.few_rows,
                group.shift,
                decisions.statistics_of(weights),
                group.expanded,
            )
            for weights, group in groups
            if any(decisions.is_undecided(w) for w in weights)
        ]

    def __call__(self, *args: Any) -> Any:
        tasks = self.tasks(args)
        steps = self._config.calibration_steps
        if steps == 0:
            self._convert(tasks)
            return self._run(*args)
        call = max((task.statistics.calls for task in tasks), default=0) + 1
        if call == 1 and tasks and (ranks := ranks_of(self._config)) is not None:
            ranks.agree([task.undecided for task in tasks], self._config)
        with stages.observing(decisions.model_of(args), call, steps, self._config.progress and bool(tasks)):
            outputs = self._run(*args)
        for task in tasks:
            task.statistics.calls += 1
            task.statistics.wanted = steps
        self._convert([task for task in tasks if task.statistics.calls >= steps])
        return outputs

    def _convert(self, tasks: list[Task]) -> None:
        """What there is no memory for is tried again at the next call: this one has its result. Where that would send
        otherwise than ranks that have quantized, SendsAlone is raised.
        """
        try:
            convert(tasks, self._config)
        except Exception as error:
            if not is_out_of_memory(error) or not self._config.fallback:
                raise
            refuse_to_send_alone(error, "quantizing a graph's layers", self._config, self._gm)
            log.warning(
                "svdquant: not enough memory to quantize all layers. Those that are left run in 16-bit, and the next "
                "call tries again; svdq_compile.quantize(model, device=...) needs less, from CPU weights: %s",
                error,
            )


def _names(weights: tuple[nn.Parameter, ...], in_graph: tuple[str, ...]) -> tuple[str, ...]:
    """Of the layers in their model, or as far as the graph knows."""
    return tuple(decisions.name_of(w) or name for w, name in zip(weights, in_graph, strict=True))


def _observe(x: Tensor, weights: tuple[nn.Parameter, ...], channel_dim: int) -> None:
    """Called by the graph before linears that read x."""
    if any(decisions.is_undecided(w) for w in weights):
        decisions.statistics_of(weights).observe(x.movedim(channel_dim, -1), rows_read(x, channel_dim))


def run_linear(kind: str, channel_dim: int, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Called by the graph for each linear or 1x1 convolution: as it was, or in 4 bits if its weight is quantized
    already.

    kind  the name of the function in torch.nn.functional
    """
    if not isinstance(weight, QuantizedWeight):
        return getattr(F, kind)(x, weight, *args, **kwargs)
    return eager.product(x, weight._svdq, args[0] if args else kwargs.get("bias"), channel_dim)


def run_convolution(
    kind: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Called by the graph for each convolution whose weight is to be expanded: as it was, and watched; or by its 4 bits
    if it is quantized already.
    """
    if isinstance(weight, QuantizedWeight):
        weight = eager.expanded(weight, weight._svdq)
    elif (
        isinstance(weight, nn.Parameter)
        and decisions.is_undecided(weight)
        # Not in groups, nor where a long kernel counts as several matrices: rows of patches are no inputs of those.
        and matrix_shape(weight.shape)[1] == input.shape[1 - weight.dim()] * weight.shape[2:].numel()
    ):
        _observe_patches(input.detach(), weight, stride, padding, dilation)
    return getattr(F, kind)(input, weight, bias, stride, padding, dilation, groups)


def _observe_patches(
    x: Tensor,
    weight: nn.Parameter,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> None:
    """A padded copy of the input may be more than there is memory for: it must not take what the call itself needs."""
    try:
        rows = patches(x, weight.shape[2:], stride, padding, dilation, MOMENT_ROWS)
        decisions.statistics_of((weight,)).observe(rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _tell_of_memory()


@cache
def _tell_of_memory() -> None:
    log.warning("svdquant: no memory to observe some convolutions in every call; their weights lose a bit more")
