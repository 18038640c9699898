"""What the tests of fusion share: running models as aten graphs with the reference operators, without code generation.

graphs = run_as_aten(monkeypatch)      # from here on, the backend appends each graph to the list, and runs it
"""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

from conftest import WIDTH, quiet, relative_error
from svdq_compile import compiled as compiled_module
from svdq_compile.lowering import ops
from svdq_compile.lowering.region import parse
from svdq_compile.passes.vocabulary import operation
from zoo import ZOO, make

# Fused arithmetic rounds to bf16 in fewer places (one rounding is 2^-9), which flips codes, one step in a few hundred.
ROUNDING = 0.02


def run_as_aten(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Make the backend run Inductor's aten graphs as they are after the fusing passes; -> the list they are put in."""
    graphs: list[fx.GraphModule] = []

    def compile_without_code(gm: fx.GraphModule, inputs: list, mode: str | None, rewrite=None) -> Callable:
        def inner(aten: fx.GraphModule, _: list, **__: object) -> Callable:
            if rewrite is not None:
                rewrite(aten)
                aten.graph.lint()
                aten.recompile()
            graphs.append(aten)
            return make_boxed_func(aten.forward)

        return compile_fx(gm, list(inputs), inner_compile=inner)  # type: ignore[return-value]

    monkeypatch.setattr(compiled_module, "compile_with_inductor", compile_without_code)
    return graphs


def run(model: nn.Module, inputs: dict | tuple, regional: bool = False, **options) -> Tensor:
    """The output of the second call, in 4-bit."""
    torch._dynamo.reset()
    options = quiet(rank=16, refine=1, precision="w4a8") | options
    call = model
    if regional:
        model.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=options)
    else:
        call = torch.compile(model, backend="svdquant", fullgraph=True, options=options)
    with torch._inductor.config.patch(force_disable_caches=True):
        for _ in range(2):
            out = call(**inputs) if isinstance(inputs, dict) else call(*inputs)
    return out if isinstance(out, Tensor) else out[0]


def zoo(name: str) -> tuple[nn.Module, dict, bool]:
    """A zoo model in bf16, its inputs, and whether to compile it by blocks."""
    model, inputs = make(name, torch.bfloat16)
    return model, inputs, ZOO[name].regional


def count(graphs: list[fx.GraphModule], target: Callable) -> int:
    """Calls of an operator in all the graphs."""
    return sum(len(gm.graph.find_nodes(op="call_function", target=target)) for gm in graphs)


def regions(graphs: list[fx.GraphModule]) -> list[str]:
    """The texts of all fused regions, drawn a step a line, each once, in order."""
    places = {ops.fused_gemm: -1, ops.fused_quantize: 5}  # of the region among the operands
    texts = [n.args[places[n.target]] for gm in graphs for n in gm.graph.nodes if n.target in places]
    return [parse(text).drawing() for text in dict.fromkeys(texts)]


def elementwise_before_quantize(gm: fx.GraphModule) -> list[str]:
    """What is left elementwise right before a quantized input; nothing, if all of it was fused."""
    sources = [n.args[0] for n in gm.graph.find_nodes(op="call_function", target=ops.quantize)]
    return [str(x.target) for x in sources if operation(x) is not None and len(x.users) == 1]


class Two(nn.Module):
    """Two linears and what a test puts around them."""

    def __init__(self, around) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.around = around

    def forward(self, *inputs: Tensor):
        return self.around(self.first, self.second, *inputs)


def compare(around, *inputs: Tensor, monkeypatch: pytest.MonkeyPatch, **options) -> list[fx.GraphModule]:
    """Fused and unfused must agree in every output; -> the fused graphs."""
    graphs = run_as_aten(monkeypatch)
    results = []
    for fuse in (True, False):
        model = Two(around).to(torch.bfloat16).eval().requires_grad_(False)
        results.append(run(model, tuple(x.clone() for x in inputs), fuse=fuse, **options))
        if fuse:
            seen = list(graphs)
    assert results[0].shape == results[1].shape
    assert results[0].dtype == results[1].dtype
    assert relative_error(*results) < ROUNDING
    return seen


def tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (2, 24, WIDTH)), generator=generator).to(torch.bfloat16)
