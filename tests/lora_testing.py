"""What the tests of LoRA share: a quantized model of the zoo whose graphs run without Inductor.

graphs = run_as_rewritten(monkeypatch)      # from here on, the backend appends each graph to the list, and runs it
session = Session("flux", regional=True)
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import svdq_compile as svdq
from conftest import quiet
from svdq_compile import compiled as compiled_module
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.passes.linears import LINEAR, POINTWISE_CONV
from svdq_compile.passes.peft_names import is_adapter
from svdq_compile.passes.scope import layer_name
from zoo import make

# fp32 models: the folded product is summed in another order, and what that moves over a tie of int8 codes.
SAME = 3e-3
# This one blows codes up: 1e-6 of noise in its input moves its output by 2 %. So its activations stay as they are.
PRECISION = {"sdxl": "w4a16"}


def run_as_rewritten(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Run rewritten graphs as they are; -> the list they are put in."""
    graphs: list[fx.GraphModule] = []

    def as_it_is(gm: fx.GraphModule, inputs: list, mode: str | None, rewrite: Callable | None = None) -> Callable:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(compiled_module, "compile_with_inductor", as_it_is)
    return graphs


class Session:
    """A model of the zoo, quantized, with what tests ask of it.

    config    changes to the model's configuration
    observe   False: quantized by its weights alone, which saves one compilation
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float32,
        regional: bool = False,
        config: dict[str, Any] | None = None,
        observe: bool = True,
        **options,
    ) -> None:
        self.model, self.inputs = make(name, dtype, **(config or {}))
        options = quiet(rank=16, refine=0, precision=PRECISION.get(name, "w4a8")) | options
        if not observe:
            svdq.quantize(self.model, svdq.Config(**options))
        self.call: Callable = self.model
        if regional:
            self.model.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=options)
        else:
            self.call = torch.compile(self.model, backend="svdquant", fullgraph=True, options=options)
        self.run()
        self.before = self.run()
        self.packed = self.packs()

    def run(self, **more: Any) -> Tensor:
        return self.call(**self.inputs, **more)[0]

    def packs(self) -> dict[str, tuple]:
        """Which packed tensors each layer has, by identity and address."""
        found = {}
        for name, p in self.model.named_parameters():
            if isinstance(p, QuantizedWeight):
                tensors = p._svdq.own_tensors().values()
                found[name.replace(".base_layer", "")] = (id(p._svdq), *(t.data_ptr() for t in tensors))
        return found

    def check_nothing_was_quantized_again(self) -> None:
        assert self.packs() == self.packed


def products_of_adapters(gm: fx.GraphModule) -> int:
    """How many of PEFT's linears are left in a graph."""
    targets = (*LINEAR, *POINTWISE_CONV)
    return sum(1 for node in gm.graph.nodes if node.target in targets and is_adapter(layer_name(node)))
