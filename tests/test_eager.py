"""A quantized model called without torch.compile, and every way torch has of leaving compiled code: the same 4-bit
result as compiled, or torch's own kind of error.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import svdq_compile as svdq
from conftest import FLIPPED_CODES, Net, compiled, inputs, logged, net, quiet, relative_error
from svdq_compile import eager
from svdq_compile.errors import ExportRefused, GradientsNeeded, WeightsReleased
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.parameter import QuantizedWeight
from zoo import make


def quantized(dtype: torch.dtype = torch.float32, **options) -> Net:
    model = net(dtype=dtype)
    svdq.quantize(model, svdq.Config(**quiet(**options)))
    return model


def layer(kind: type[nn.Module] = nn.Linear, *sizes: int, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """One quantized layer, 128 -> 256 features, and no options of its own unless given."""
    torch.manual_seed(0)
    module = nn.Sequential(kind(128, 256, *sizes)).to(dtype).requires_grad_(False)
    svdq.quantize(module, svdq.Config(**quiet(**options)))
    assert isinstance(module[0].weight, QuantizedWeight)
    return module[0]


def dequantized(module: nn.Module) -> nn.Module:
    """The 16-bit layer with the values that the 4-bit form stands for."""
    plain = copy.deepcopy(module)
    svdq.restore(plain, dequantize=True)
    return plain


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_compiled(precision: str, dtype: torch.dtype) -> None:
    model, args = quantized(dtype, precision=precision), inputs(dtype=dtype)
    output = model(*args)
    assert output.dtype == dtype
    # In bfloat16 compiled code rounds at other places, and a code that flips is one of 16.
    bound = FLIPPED_CODES if dtype == torch.float32 else 0.1
    assert relative_error(output, compiled(model)(*args)) < bound
    assert relative_error(output, net(dtype=dtype)(*args)) > 2e-3, "4-bit"


def test_a_model_of_diffusers_as_compiled() -> None:
    model, args = make("wan")
    reference = model(**args)[0]
    svdq.quantize(model, svdq.Config(**quiet(rank=16, refine=0)))
    output = model(**args)[0]
    compiled = torch.compile(model, backend="svdquant", options=quiet())
    assert relative_error(output, compiled(**args)[0]) < FLIPPED_CODES
    assert 0 < relative_error(output, reference) < 0.25


def test_after_observing_siblings_share_an_input() -> None:
    model = net()
    run = compiled(model)
    run(*inputs())
    assert model.blocks[0].to_q.weight._svdq.shared is model.blocks[0].to_k.weight._svdq.shared
    assert relative_error(model(*inputs()), run(*inputs())) < FLIPPED_CODES
    assert relative_error(model(*inputs()), run(*inputs())) < FLIPPED_CODES, "now that siblings lie side by side"


def test_a_piece_of_a_model() -> None:
    model, (x, condition) = quantized(), inputs()
    x = model.embed(x)
    block = model.blocks[0]
    plain = dequantized(block)
    assert relative_error(block(x, condition), plain(x, condition)) < 0.03
    assert relative_error(block.up(x), plain.up(x)) < 0.02
    assert torch.equal(F.linear(x, block.up.weight, block.up.bias), block.up(x))
    assert torch.equal(F.linear(input=x, weight=block.up.weight, bias=block.up.bias), block.up(x))


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 5, 128), (0, 128), (2, 0, 128), (1, 2, 3, 128)])
def test_inputs_of_any_shape(precision: str, shape: tuple[int, ...]) -> None:
    module = layer(precision=precision)
    x = torch.randn(shape)
    expected = dequantized(module)(x)
    y = module(x)
    assert (y.shape, y.dtype, y.stride()) == (expected.shape, expected.dtype, expected.stride())
    if x.numel():
        assert relative_error(y, expected) < (0.3 if precision in ("int4", "nvfp4") else 0.02)


CONVOLUTIONS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d, (2, 128, 6)),
    "conv2d": (nn.Conv2d, (2, 128, 4, 6)),
    "conv3d": (nn.Conv3d, (2, 128, 3, 4, 2)),
    "unbatched conv2d": (nn.Conv2d, (128, 4, 6)),
    "nothing": (nn.Conv2d, (0, 128, 4, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_over_channels(name: str) -> None:
    kind, shape = CONVOLUTIONS[name]
    module, x = layer(kind, 1), torch.randn(shape)
    expected = dequantized(module)(x)
    y = module(x)
    assert y.shape == expected.shape
    if x.numel():
        assert y.stride() == expected.stride()
        assert relative_error(y, expected) < 0.02


def test_channels_last_stays_so() -> None:
    module, x = layer(nn.Conv2d, 1), torch.randn(2, 128, 4, 6).to(memory_format=torch.channels_last)
    expected = dequantized(module)(x)
    assert module(x).stride() == expected.stride()
    assert relative_error(module(x), expected) < 0.02


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"stride": (1, 2)}, {"padding": [0, 1]}])
def test_other_convolutions_expand_the_weight(options: dict) -> None:
    module, x = layer(nn.Conv2d, 1), torch.randn(1, 128, 4, 4)
    expected = F.conv2d(x, dequantized(module).weight, **options)
    assert relative_error(F.conv2d(x, module.weight, **options), expected) < 1e-5


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: torch.matmul(w, x.T),
        lambda x, w: F.linear(w, x),
        lambda x, w: F.linear(w, w),
        lambda x, w: torch.einsum("nk,mk->nm", x, w),
    ],
    ids=["matmul", "the input of a linear", "both of a linear", "einsum"],
)
def test_other_products_expand_the_weight(use: Callable) -> None:
    module, x = layer(), torch.randn(2, 128)
    assert relative_error(use(x, module.weight), use(x, dequantized(module).weight)) < 1e-5


@pytest.mark.parametrize(
    "use",
    [lambda x, w: x @ w.t(), lambda x, w: torch.addmm(torch.zeros(256), x, w.T), lambda x, w: x @ w[:64].mT],
    ids=["t", "T", "a slice"],
)
def test_what_hands_out_the_values_is_refused(use: Callable) -> None:
    with pytest.raises(WeightsReleased):
        use(torch.randn(2, 128), layer().weight)


BAD: dict[str, Callable[[nn.Module], Any]] = {
    "features": lambda m: m(torch.randn(2, 64)),
    "no dimension": lambda m: m(torch.randn(())),
    "dtype": lambda m: m(torch.randn(2, 128, dtype=torch.bfloat16)),
    "integers": lambda m: m(torch.ones(2, 128, dtype=torch.int64)),
    "bias": lambda m: F.linear(torch.randn(2, 128), m.weight, torch.zeros(3)),
    "bias of two rows": lambda m: F.linear(torch.randn(2, 128), m.weight, torch.zeros(2, 256)),
    "bias elsewhere": lambda m: F.linear(torch.randn(2, 128), m.weight, torch.zeros(256, device="meta")),
}


@pytest.mark.parametrize("bad", BAD)
def test_operands_that_do_not_fit_are_refused_as_torch_does(bad: str) -> None:
    module = layer()
    with pytest.raises(RuntimeError, match=r"linear: the shapes.*\[256, 128\]") as caught:
        BAD[bad](module)
    assert not isinstance(caught.value, svdq.SvdqError)


def test_convolutions_of_other_shapes_are_refused_as_torch_does() -> None:
    module = layer(nn.Conv2d, 1)
    for shape in [(2, 64, 4, 4), (128, 4), (1, 1, 128, 4, 4), ()]:
        with pytest.raises(RuntimeError, match=r"conv2d: the shapes.*\[256, 128, 1, 1\]"):
            module(torch.randn(shape))


@pytest.mark.parametrize("weights", ["keep", "offload"])
def test_originals_that_are_still_there_do_not_make_it_16_bit(weights: str) -> None:
    model, released = quantized(weights=weights), quantized()
    assert torch.equal(model(*inputs()), released(*inputs()))
    assert isinstance(model.blocks[0].up.weight, QuantizedWeight)
    assert torch.equal(model.blocks[0].up.weight.detach().clone(), net().blocks[0].up.weight), "readable all the same"


def test_values_written_to_count() -> None:
    model, reference = quantized(weights="keep"), net()
    for written in (model, reference):
        written.blocks[0].up.weight.mul_(-3)
    x = torch.randn(2, 128)
    assert torch.equal(model.blocks[0].up(x), reference.blocks[0].up(x))
    model = quantized(weights="keep")
    weight = model.blocks[0].up.weight
    weight.data.mul_(-3)
    assert torch.equal(model.blocks[0].up(x), reference.blocks[0].up(x))


@pytest.mark.parametrize("weights", ["release", "offload"])
def test_values_stay_out_of_reach(weights: str) -> None:
    model = quantized(weights=weights)
    model(*inputs())
    weight = model.blocks[0].up.weight
    assert isinstance(weight, QuantizedWeight)
    if weights == "release":
        with pytest.raises(WeightsReleased, match=r"clone\(\) needs"):
            weight.clone()


@pytest.mark.parametrize("kind", [torch.inference_mode, torch.no_grad])
def test_without_gradients(kind: Callable) -> None:
    model = net().requires_grad_(True)
    svdq.quantize(model, svdq.Config(**quiet()))
    with torch.enable_grad(), kind():
        assert torch.equal(model(*inputs()), quantized()(*inputs()))


@pytest.mark.parametrize("weights", ["release", "keep", "offload"])
@pytest.mark.parametrize("needing", ["input", "weight", "bias"])
def test_gradients_are_refused(weights: str, needing: str) -> None:
    module, x = layer(weights=weights), torch.randn(2, 128)
    with torch.enable_grad():
        module(x)
        {"input": x, "weight": module.weight, "bias": module.bias}[needing].requires_grad_(True)
        with pytest.raises(GradientsNeeded, match="inference only"):
            module(x)


@pytest.mark.parametrize("precision", FORMATS)
def test_autocast(precision: str) -> None:
    model = quantized(precision=precision)
    exact = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs())
        expected = net()(*inputs())
        mixed = model.blocks[0].up(torch.randn(2, 128, dtype=torch.bfloat16))
    assert output.dtype == expected.dtype == mixed.dtype == torch.bfloat16
    assert relative_error(output, exact) < 0.1


def test_meta_and_fake_inputs_have_their_shapes_worked_out() -> None:
    module = layer()
    y = module(torch.empty(2, 5, 128, device="meta"))
    assert (y.shape, y.is_meta) == ((2, 5, 256), True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(torch.empty(2, 5, 128)).shape == (2, 5, 256)


def test_deepcopy() -> None:
    model = quantized()
    twin = copy.deepcopy(model)
    expected = model(*inputs())
    del model
    assert torch.equal(twin(*inputs()), expected)


def test_adapters_beside_the_base_layer() -> None:
    model, plain = quantized(), quantized()
    svdq.restore(plain, dequantize=True)
    for each in (model, plain):
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules=["to_q", "up"], init_lora_weights=False)
        inject_adapter_in_model(config, each)
        each.requires_grad_(False)
    output = model(*inputs())
    assert relative_error(output, plain(*inputs())) < 0.03
    assert relative_error(output, quantized()(*inputs())) > 0.05, "the adapter shows"
    assert relative_error(output, compiled(model)(*inputs())) < FLIPPED_CODES


class Broken(nn.Module):
    """A model that Dynamo cannot keep in one graph."""

    def __init__(self, inner: Net, linear: Callable) -> None:
        super().__init__()
        self.inner, self.linear = inner, linear

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x = self.inner.embed(x)
        for block in self.inner.blocks:
            x = self.linear(block, block(x, condition))
        return x


@torch.compiler.disable
def disabled(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block.down(block.up(x))


def breaking(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = block.up(x)
    torch._dynamo.graph_break()
    return block.down(x)


@pytest.mark.parametrize("linear", [disabled, breaking])
def test_beside_compiled_graphs(linear: Callable) -> None:
    model = Broken(quantized(), linear)
    expected = model(*inputs())
    run = torch.compile(model, backend="svdquant", options=quiet())
    for _ in range(2):
        assert relative_error(run(*inputs()), expected) < FLIPPED_CODES


def test_force_eager() -> None:
    model = quantized()
    run = compiled(model)
    expected = run(*inputs())
    with torch.compiler.set_stance("force_eager"):
        assert relative_error(run(*inputs()), expected) < FLIPPED_CODES


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("weights", ["release", "offload", "keep"])
def test_other_backends_of_torch_run_the_operators(backend: str, weights: str) -> None:
    """They read kept values, which somebody may write to later; but torch 2.11's "eager" calls each weight's class."""
    model = quantized(weights=weights)
    reads_kept = weights == "keep" and (backend != "eager" or torch.__version__ >= (2, 12))
    expected = (net() if reads_kept else model)(*inputs())
    run = torch.compile(model, backend=backend, fullgraph=True)
    assert relative_error(run(*inputs()), expected) < FLIPPED_CODES
    assert isinstance(model.blocks[0].up.weight, QuantizedWeight)


def test_inductor_runs_the_operators() -> None:
    model = nn.Sequential(layer(), nn.GELU())
    x = torch.randn(2, 128)
    expected = model(x)
    run = torch.compile(model, fullgraph=True)
    assert relative_error(run(x), expected) < FLIPPED_CODES
    with pytest.raises(Exception, match=r"size|shape"):
        run(torch.randn(2, 64))


@pytest.mark.parametrize("weights", ["release", "keep"])
@pytest.mark.parametrize("strict", [True, False])
def test_export_is_refused(strict: bool, weights: str) -> None:
    model = quantized(weights=weights)
    with pytest.raises(
        ExportRefused, match=r"blocks\.0\.\w+, which is quantized.*in 16-bit, after svdq_compile\.restore"
    ):
        torch.export.export(model, inputs(), strict=strict)
    svdq.restore(model, dequantize=True)
    torch.export.export(model, inputs(), strict=strict)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_takes_the_operators_along() -> None:
    model = quantized()
    traced = torch.jit.trace(model, inputs())
    assert torch.equal(traced(*inputs()), model(*inputs()))


def test_the_faster_way_is_told_once() -> None:
    eager.advise.cache_clear()
    with logged("svdq_compile", logging.WARNING) as records:
        model = quantized()
        compiled(model)(*inputs())
        assert not records, "nothing to say of compiled code"
        model(*inputs())
        model(*inputs())
    (record,) = records
    assert (record.name, record.levelname) == ("svdq_compile", "WARNING")
    assert "svdq_compile.compile(model)" in record.getMessage()
