"""`svdq.compile` does for a model or a pipeline what a person would look up."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn

import svdq_compile as svdq
from conftest import inputs, logged, net, quiet, relative_error
from svdq_compile.errors import AlreadyWrapped, NotAModel, NothingToQuantize, OptionError
from svdq_compile.parameter import QuantizedWeight
from zoo import make

pytestmark = pytest.mark.usefixtures("without_inductor")


class Pipeline:
    """As diffusers': its parts are attributes, and listed."""

    def __init__(self, **components: object) -> None:
        self.__dict__.update(components)
        self.components = components


def compiled_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._compiled_call_impl is not None]


def count(model: nn.Module) -> int:
    return sum(isinstance(p, QuantizedWeight) for p in model.parameters())


def flux() -> FluxPipeline:
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=make("flux")[0], **nothing)


BLOCKS = [f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in (0, 1)]


@pytest.mark.parametrize("given", ["pipeline", "model"])
def test_by_blocks_where_the_class_names_them(given: str, capsys: pytest.CaptureFixture) -> None:
    pipe = flux()
    args = make("flux")[1]
    reference = pipe.transformer(**args)[0]
    what = pipe if given == "pipeline" else pipe.transformer
    assert svdq.compile(what, rank=16, refine=0, calibration_steps=1, fallback=False) is what
    assert compiled_modules(pipe.transformer) == BLOCKS
    (line,) = capsys.readouterr().err.strip().split("\n")
    name = "transformer" if given == "pipeline" else "FluxTransformer2DModel"
    assert f"svdquant: {name} compiled by its blocks (2 FluxTransformerBlock, 2 FluxSingleTransformerBlock)" in line
    assert torch.equal(pipe.transformer(**args)[0], reference)
    assert 0 < relative_error(pipe.transformer(**args)[0], reference) < 0.25
    assert count(pipe.transformer) == 40


def test_whole_where_it_names_none(capsys: pytest.CaptureFixture) -> None:
    model, args = make("sd3")
    svdq.compile(Pipeline(transformer=model, vae=net(seed=1)), {"calibration_steps": 1}, rank=16, refine=0)
    assert compiled_modules(model) == [""]
    assert "transformer compiled as a whole" in capsys.readouterr().err
    model(**args)
    assert count(model) > 20


def test_blocks_that_a_model_of_the_class_has_not() -> None:
    class Named(type(net())):  # type: ignore[misc]
        _repeated_blocks = ("OtherBlock",)

    model = Named()
    svdq.compile(model, progress=False)
    assert compiled_modules(model) == [""]


def test_every_denoiser_and_nothing_else(capsys: pytest.CaptureFixture) -> None:
    parts = {name: net() for name in ("transformer", "transformer_2", "unet", "vae", "text_encoder")}
    svdq.compile(Pipeline(**parts))
    assert {name for name, part in parts.items() if compiled_modules(part)} == {"transformer", "transformer_2", "unet"}
    assert capsys.readouterr().err.count("\n") == 1
    second = {"transformer": net(), "transformer_2": None}
    svdq.compile(Pipeline(**second), progress=False)  # pipelines of one denoiser leave the other's place empty
    assert compiled_modules(second["transformer"]) == [""]  # type: ignore[arg-type]


def test_compiling_anew_takes_the_place_of_what_was() -> None:
    model = net()
    model.blocks[0].compile(backend="eager")
    svdq.compile(model, progress=False)
    assert compiled_modules(model) == [""]
    svdq.compile(model, **quiet())
    model(*inputs())
    assert count(model) == 10


def test_a_quantized_model_compiles_at_once(capsys: pytest.CaptureFixture) -> None:
    model = net()
    svdq.quantize(model, svdq.Config(**quiet()))
    expected = model(*inputs())
    svdq.compile(model)
    assert "quantized already" in capsys.readouterr().err
    assert relative_error(model(*inputs()), expected) < 1e-3


WRONG: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "a pipeline without a denoiser": (
        lambda m: svdq.compile(Pipeline(prior=m, vae=nn.Linear(2, 2))),
        NotAModel,
        r"Pipeline is a pipeline, not a model: .*compile\(pipe\.prior\) or svdq_compile\.compile\(pipe\.vae\)",
    ),
    "an empty pipeline": (
        lambda m: svdq.compile(Pipeline(transformer=None)),
        NotAModel,
        "the transformer of this Pipeline is None, not a model",
    ),
    "no model": (lambda m: svdq.compile(3), TypeError, "3 is not a model: give svdq_compile.compile an nn.Module"),
    "an unknown option": (lambda m: svdq.compile(m, rnak=3), OptionError, "unknown option 'rnak': did you mean 'rank'"),
    "torch's argument": (lambda m: svdq.compile(m, dynamic=True), OptionError, "argument of torch.compile, as in"),
    "no options": (lambda m: svdq.compile(m, "int4"), OptionError, "give them by name, as in precision='int4'"),
    "a wrapper": (
        lambda m: svdq.compile(torch.compile(m, backend="svdquant")),
        AlreadyWrapped,
        r"take it off with `model = model\._orig_mod`",
    ),
    "a pipeline with a wrapper": (
        lambda m: svdq.compile(Pipeline(unet=torch.compile(m), transformer=m)),
        AlreadyWrapped,
        r"`pipe\.unet = pipe\.unet\._orig_mod`",
    ),
    "nothing to quantize": (
        lambda m: svdq.compile(Pipeline(transformer=m, unet=nn.ReLU())),
        NothingToQuantize,
        "ReLU has no linear layer that can be quantized",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_change_nothing(name: str) -> None:
    call, kind, words = WRONG[name]
    model = net()
    with pytest.raises(kind, match=words):
        call(model)
    assert not compiled_modules(model)
    assert count(model) == 0


def test_a_layer_to_skip_that_is_not_there() -> None:
    model = net()
    with logged("svdq_compile") as records:
        svdq.compile(model, skip=["block.0.to_q", "*.to_k", "blocks.1"], progress=False)
    warnings = [record.getMessage() for record in records if record.levelname == "WARNING"]
    assert warnings == [
        "svdquant: option skip: 'block.0.to_q' names no layer of Net; the nearest is 'blocks.0.to_q'",
    ]


def test_torchs_own_modules() -> None:
    """Dynamo by itself would not look into them."""
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval().requires_grad_(False)
    svdq.compile(model, quiet())
    for _ in range(2):
        model(torch.randn(2, 24, 128))
    assert all(isinstance(model[i].weight, QuantizedWeight) for i in (0, 2))
