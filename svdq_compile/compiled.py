"""The second phase of a compiled graph: 4-bit code, and before each call the packed tensors of the weights it was
given.

Dynamo passes the model's own Parameters; the compiled code wants their packed tensors. Which blocks or models the
Parameters belong to does not matter, so a block compiled once serves all, as long as they are packed in the same form.
For another form (another rank, a layer that shares its input with others) another variant is compiled.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from .agreement import Agreement
from .config import Config
from .errors import TangentsNeeded, WeightsReleased
from .fallback import cause_of, go_on, is_out_of_memory, refuse_to_send_alone
from .lowering import kernel_table
from .lowering.inductor import compile_with_inductor
from .lowering.packed import PackedLinear, form, side_by_side
from .lowering.torch_private import are_differentiated, below_autograd, clone_dynamo_graph, eagerly
from .observing import ObservingGraph
from .pace import Pace
from .parameter import QuantizedWeight, is_kept, is_stale, thaw
from .passes import fuse, pipeline, quantizing
from .passes.quantize_linears import PackedInput
from .passes.subgraphs import placeholders
from .passes.weight_groups import WeightInputs
from .passes.writes import may_write
from .roots import model_of, models_under_way
from .stages import compiling
from .summary import tell_if_done

log = logging.getLogger("svdq_compile")

LEAVE = 'Leave the layer in 16-bit, with the option skip=["{}"].'
FIRST_CALL = "the first call of a compiled graph"
EAGERLY = "it runs eagerly, what is quantized in 4 bits"


class CompiledGraph:
    """Callable like the graph it was made of."""

    def __init__(self, gm: fx.GraphModule, example_inputs: list, inputs: WeightInputs, config: Config) -> None:
        self._gm = gm
        self._config = config
        self._inputs = inputs
        self._agreement = Agreement(gm, config)
        self._weights = [
            i for group in inputs.groups for i in group.indices if isinstance(example_inputs[i], QuantizedWeight)
        ]
        self._observing: ObservingGraph | None = None
        self._pace = Pace(config)
        self._variants: dict[tuple, Variant | None] = {}  # None: it could not be compiled, or its first call failed
        packs = [example_inputs[i]._svdq for i in self._weights]
        self._lay_out(packs)
        try:
            self._variants[form(packs)] = self._compile(example_inputs, packs)
        except Exception as error:
            if is_out_of_memory(cause_of(error)):
                log.info("not enough memory to compile a graph; its first call tries again")
            else:
                go_on(error, "compiling a graph", EAGERLY, config, gm)
                self._variants[form(packs)] = None
        # What makes code compiled later, outside Dynamo's tracing, valid for these sizes only.
        self._sizes = [i for i, value in enumerate(example_inputs) if not isinstance(value, Tensor)]

    def __call__(self, *args: Any) -> Any:
        if are_differentiated(args):
            raise TangentsNeeded
        packs = []
        for i in self._weights:
            weight = args[i]
            if not isinstance(weight, QuantizedWeight) or (is_kept(weight) and is_stale(weight)):
                return self._observe_again(args)
            packs.append(weight._svdq)
        resolved = packs[0].resolved.get(self) if packs else None
        if resolved is None or not resolved.is_for(packs):
            return self._first_call(args, packs)
        if not self._pace.is_known:
            self._look(resolved, packs[0].device, args)
        return resolved(args)

    def _look(self, resolved: "Resolved", device: torch.device, args: tuple) -> None:
        self._pace.look(resolved, device)
        if self._pace.is_known:
            self._pace.tell(model_of(args, models_under_way()))

    def _first_call(self, args: tuple, packs: list[PackedLinear]) -> Any:
        """Of these packs: there may be a variant for them, or it has to be compiled."""
        self._lay_out(packs)
        key = self._key(args, packs)
        self._agreement.reach(args)
        model = model_of(args, models_under_way())
        tell_if_done(model, self._config)
        variant = self._variants.get(key)
        is_ready = key in self._variants and (variant is None or variant.has_run)
        with compiling(model, self._config.progress and not is_ready):
            return self._call_variant(key, args, packs)

    def _call_variant(self, key: tuple, args: tuple, packs: list[PackedLinear]) -> Any:
        """Goes on eagerly where compiling fails, or the first launch of the kernels."""
        try:
            variant = self._variants[key] if key in self._variants else self._compile(list(args), packs)
        except Exception as error:
            go_on(error, "compiling a graph", EAGERLY, self._config, self._gm)
            variant = None
        self._variants[key] = variant
        if variant is None:
            return eagerly(self._gm)(*args)
        resolved = Resolved(variant, packs, self._weights)
        try:
            result = resolved.first_call(args)
        except Exception as error:
            if variant.has_run or is_out_of_memory(error):
                raise
            return self._without(key, error, args)
        if packs:
            packs[0].resolved[self] = resolved
        return result

    def _without(self, key: tuple, error: Exception, args: tuple) -> Any:
        """The first call of compiled code has failed: run the graph eagerly, from now on. If that fails as well it was
        the call's fault; where a call may have written to its inputs already it is not repeated, nor where it would
        send otherwise than on ranks where it has not failed.
        """
        if not self._config.fallback:
            raise error
        refuse_to_send_alone(error, FIRST_CALL, self._config, self._gm)
        if may_write(self._gm):
            self._variants[key] = None
            raise error
        result = eagerly(self._gm)(*args)
        go_on(error, FIRST_CALL, EAGERLY, self._config)
        self._variants[key] = None
        return result

    def _lay_out(self, packs: list[PackedLinear]) -> None:
        if "siblings" in self._config.fusions:
            side_by_side(packs)

    def _key(self, args: tuple, packs: list[PackedLinear]) -> tuple:
        """Of the variant in this form: the first, or one that was compiled outside Dynamo, for these sizes."""
        key = form(packs)
        return key if key in self._variants else (*key, *(args[i] for i in self._sizes))

    def _compile(self, args: list, packs: list[PackedLinear]) -> "Variant":
        return Variant(
            self._gm, args, dict(zip(self._weights, packs, strict=True)), self._inputs.expanded, self._config
        )

    def _observe_again(self, args: tuple) -> Any:
        """Some weight has new 16-bit values: run as the first phase does, which quantizes it in its time."""
        for i in self._weights:
            if isinstance(args[i], QuantizedWeight) and is_kept(args[i]) and is_stale(args[i]):
                thaw(args[i])
        if self._observing is None:
            self._observing = ObservingGraph(self._gm, self._inputs, self._config)
        return self._observing(*args)


class Fusing(partial):
    """`fuse`, which knows whether it ran: it does not where Inductor has the code in its caches."""

    has_run = False

    def __call__(self, gm: fx.GraphModule) -> None:
        self.has_run = True
        super().__call__(gm)


class Variant:
    """The graph rewritten and compiled for one form of its packed weights."""

    def __init__(
        self, gm: fx.GraphModule, args: list, packs: dict[int, PackedLinear], expanded: list[int], config: Config
    ) -> None:
        gm = clone_dynamo_graph(gm)
        originals = placeholders(gm.graph)
        number = {node: i for i, node in enumerate(originals)}
        by_node = {originals[i]: packed for i, packed in packs.items()}
        pipeline.run(gm, quantizing(by_node, [originals[i] for i in expanded]))
        # (position among the new inputs, number of the old input) and the same with where a packed tensor comes from.
        self.plain: list[tuple[int, int]] = []
        self.packed: list[tuple[int, PackedInput]] = []
        for position, node in enumerate(placeholders(gm.graph)):
            source = node.meta.get("packed_input")
            if source is not None:
                self.packed.append((position, source))
                continue
            index = number[node]
            if isinstance(args[index], QuantizedWeight) and not is_kept(args[index]):
                readers = ", ".join(sorted({str(user.target) for user in node.users}))
                name = args[index]._svdq_name
                raise WeightsReleased(name, f"the compiled graph ({readers or 'an output'})", LEAVE.format(name))
            self.plain.append((position, index))
        inputs = self.template(packs)
        for position, index in self.plain:
            inputs[position] = args[index]
        self.has_run = False
        fusing = Fusing(fuse, fusions=config.fusions, attention=config.attention)
        self.run: Callable = compile_with_inductor(gm, inputs, config.mode, fusing)
        if not fusing.has_run:
            pipeline.dump_from_cache()

    def template(self, packs: dict[int, PackedLinear]) -> list:
        """The inputs with the packed tensors filled in and gaps for the others."""
        inputs: list = [None] * (len(self.plain) + len(self.packed))
        for position, source in self.packed:
            inputs[position] = source.value(packs[source.index])
        return inputs


class Resolved:
    """A variant with the packed tensors of one block looked up: what is left to do at a call is to fill in the rest."""

    def __init__(self, variant: Variant, packs: list[PackedLinear], weights: list[int]) -> None:
        self._variant = variant
        self._others = packs[1:]
        self._template = variant.template(dict(zip(weights, packs, strict=True)))

    def is_for(self, packs: list[PackedLinear]) -> bool:
        """Whether these are the packs it was made for; the first one is the caller's key."""
        return all(a is b for a, b in zip(self._others, packs[1:], strict=True))

    def first_call(self, args: tuple) -> Any:
        """Call, and log once for each variant how often each kernel ran."""
        with kernel_table.counted() as counts:
            result = self(args)
        if not self._variant.has_run:
            self._variant.has_run = True
            log.info("kernels of this graph: %s", ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
        return result

    def __call__(self, args: tuple) -> Any:
        inputs = self._template.copy()
        for position, index in self._variant.plain:
            inputs[position] = args[index]
        with below_autograd():
            return self._variant.run(*inputs)
