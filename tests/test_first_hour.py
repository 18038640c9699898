"""Each wrong call that a person could think of in the first hour: one short message that names what to do, of a class
that the person would catch, and nothing is half done.
"""

import io
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from rich.console import Console
from safetensors import safe_open
from test_compile import Pipeline, count
from torch import Tensor, nn
from typer.testing import CliRunner

import svdq_compile as svdq
from conftest import Net, inputs, logged, net, quiet, relative_error
from svdq_compile.cli import app
from svdq_compile.errors import (
    ExportRefused,
    FileRefused,
    GradientsNeeded,
    NonFiniteWeight,
    NotAModel,
    NothingToQuantize,
    OptionError,
    UnsupportedDevice,
    WeightsReleased,
)
from svdq_compile.header import is_ours, read_header
from zoo import make

pytestmark = pytest.mark.usefixtures("without_inductor")

LONGEST = 330  # characters of a message: two sentences

Call = Callable[[Any, Path], object]
Wrong = dict[str, tuple[Call, type[Exception], str]]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refused(call: Callable[[], object], kind: type[Exception], words: str) -> None:
    """Raises one short message of this class with these words, that is not torch's or Python's own."""
    with pytest.raises(kind) as raised:
        call()
    told = str(raised.value)
    assert words in told
    assert len(told) <= LONGEST, told
    assert "\n" not in told
    assert isinstance(raised.value, svdq.SvdqError | OSError)


# Options.

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelled option": ({"rnak": 3}, "unknown option 'rnak': did you mean 'rank'?"),
    "an option of no kind": ({"bits": 4}, "unknown option 'bits': the options are precision, rank,"),
    "an argument of torch.compile": ({"dynamic": True}, "an argument of torch.compile, as in model.compile("),
    "a misspelled precision": ({"precision": "w4a9"}, "option precision='w4a9': did you mean"),
    "another's name for a precision": ({"precision": "int8"}, "did you mean 'w8a8'? it can be 'auto', 'w4a8'"),
    "a number for a precision": ({"precision": 4}, "option precision=4: it can be 'auto', 'w4a8', 'int4'"),
    "a rank in quotes": ({"rank": "32"}, "option rank='32': must be a whole number from 0 to 256"),
    "a rank with a point": ({"rank": 32.0}, "option rank=32.0: must be a whole number from 0 to 256"),
    "a rank too large": ({"rank": 1000}, "option rank=1000: must be a whole number from 0 to 256"),
    "steps below zero": ({"calibration_steps": -1}, "option calibration_steps=-1: must be a whole number"),
    "a budget in percent": ({"error_budget": 30}, "at most 1, as 0.3 for an error of 30 %"),
    "skip as a string": ({"skip": "*.proj_out"}, "must be a list, as in skip=['*.proj_out']"),
    "skip of numbers": ({"skip": [3]}, "a list of layer-name patterns, as in skip=['*.proj_out']"),
    "weights misspelled": ({"weights": "ofload"}, "did you mean 'offload'? it can be 'release', 'offload', 'keep'"),
    "fuse as a string": ({"fuse": "all"}, "option fuse='all': must be True, False or a list of"),
    "a fusion misspelled": ({"fuse": ["sibling"]}, "option fuse='sibling': did you mean 'siblings'?"),
    "a mode misspelled": ({"mode": "max_autotune"}, "did you mean 'max-autotune'?"),
    "progress in words": ({"progress": "no"}, "option progress='no': must be True or False"),
}

WAYS: dict[str, Callable[[Any, dict[str, Any]], object]] = {
    "Config": lambda m, options: svdq.Config(**options),
    "quantize by name": lambda m, options: svdq.quantize(m, **options),
    "quantize with a dict": lambda m, options: svdq.quantize(m, options),
    "compile by name": lambda m, options: svdq.compile(m, **options),
    "doctor with a dict": lambda m, options: svdq.doctor(m, options),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(name: str, way: str) -> None:
    options, words = OPTIONS[name]
    model = net()
    refused(lambda: WAYS[way](model, options), OptionError, words)
    assert unchanged(model)


def unchanged(model: nn.Module) -> bool:
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    plain = net().state_dict()
    return not is_compiled and all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_wrong_options_of_torch_compile() -> None:
    for options, words in list(OPTIONS.values())[::6]:
        run = torch.compile(model := net(), backend="svdquant", options=options)
        with pytest.raises(Exception, match="option") as raised:
            run(*inputs())
        assert words in str(raised.value)
        assert unchanged(model)


# Options in every form that means something.


@pytest.mark.parametrize(
    "call",
    [
        lambda m: svdq.quantize(m, {"precision": "w4a4", "rank": 8, "refine": 0, "progress": False}),
        lambda m: svdq.quantize(m, precision="w4a4", rank=8, refine=0, progress=False),
        lambda m: svdq.quantize(m, svdq.Config(precision="int4", refine=0, progress=False), rank=8),
        lambda m: svdq.quantize(m, {"precision": "W4A4", "rank": 64, "progress": False}, rank=8, refine=0),
    ],
    ids=["a dict", "by name", "a Config and by name", "a dict and by name"],
)
def test_options_in_every_form(call: Callable[[nn.Module], svdq.SvdqError]) -> None:
    call(model := net())  # type: ignore[arg-type]
    packed = svdq.packed(model.blocks[0].up.weight)
    assert (packed.precision, packed.rank) == ("int4", 8)


def test_w4a4_is_int4_everywhere(tmp_path: Path) -> None:
    assert svdq.Config(precision="w4a4") == svdq.Config(precision="int4")
    assert svdq.doctor(net(), precision="w4a4").precision == "int4"
    model = net()
    torch.compile(model, backend="svdquant", options=quiet(precision="w4a4", calibration_steps=0))(*inputs())
    assert svdq.packed(model.blocks[0].up.weight).precision == "int4"
    (tmp_path / "small.json").write_text('{"num_layers": 1, "num_single_layers": 1}')
    small = ["--config", str(tmp_path / "small.json")]
    told = CliRunner().invoke(app, ["doctor", "FluxTransformer2DModel", *small, "--precision", "w4a4"])
    assert "MiB in int4" in told.output


def test_a_config_for_torch_compile() -> None:
    model = net()
    torch.compile(model, backend="svdquant", options=svdq.Config(**quiet(calibration_steps=0, rank=8)))(*inputs())
    assert svdq.packed(model.blocks[0].up.weight).rank == 8


# Calls on a 16-bit model.


def with_nan(model: Net) -> Net:
    model.blocks[0].up.weight[0, 0] = torch.nan
    return model


PLAIN: Wrong = {
    "options that are none": (
        lambda m, d: svdq.quantize(m, "int4"),
        OptionError,
        "give them by name, as in precision=",
    ),
    "calibrate in options' place": (lambda m, d: svdq.quantize(m, lambda m: m), OptionError, "give them by name"),
    "a pipeline": (
        lambda m, d: svdq.quantize(Pipeline(transformer=m, vae=nn.Linear(2, 2))),
        TypeError,
        "Pipeline is a pipeline, not a model: give the model in it, as in svdq_compile.quantize(pipe.transformer)",
    ),
    "a pipeline of two": (
        lambda m, d: svdq.quantize(Pipeline(transformer=m, transformer_2=net())),
        NotAModel,
        "quantize(pipe.transformer) or svdq_compile.quantize(pipe.transformer_2)",
    ),
    "a pipeline to report": (lambda m, d: svdq.report(Pipeline(unet=m)), NotAModel, "svdq_compile.report(pipe.unet)"),
    "a pipeline to restore": (
        lambda m, d: svdq.restore(Pipeline(unet=m)),
        NotAModel,
        "svdq_compile.restore(pipe.unet)",
    ),
    "a pipeline to save": (lambda m, d: svdq.save(Pipeline(unet=m), d / "f"), NotAModel, "save(pipe.unet)"),
    "a pipeline to load": (lambda m, d: svdq.load(Pipeline(unet=m), d / "f"), NotAModel, "load(pipe.unet)"),
    "a pipeline without its model": (
        lambda m, d: svdq.quantize(Pipeline(transformer=None)),
        NotAModel,
        "the transformer of this Pipeline is None, not a model: load the pipeline with it",
    ),
    "a path for a model": (
        lambda m, d: svdq.quantize("black-forest-labs/FLUX.1-dev"),
        NotAModel,
        "'black-forest-labs/FLUX.1-dev' is a path, not a model: load it first, with from_pretrained",
    ),
    "a class for a model": (lambda m, d: svdq.quantize(Net), NotAModel, "Net is a class, not a model: give"),
    "a state dict for a model": (
        lambda m, d: svdq.quantize(m.state_dict()),
        NotAModel,
        "OrderedDict is not a model: give svdq_compile.quantize the nn.Module",
    ),
    "nothing for a model": (lambda m, d: svdq.quantize(None), NotAModel, "None is not a model"),
    "the picture for calibrate": (
        lambda m, d: svdq.quantize(m, calibrate=m(*inputs())),
        OptionError,
        "is no function of the model: give one that runs it, as in calibrate=lambda model: pipe('a dog')",
    ),
    "a prompt for calibrate": (
        lambda m, d: svdq.quantize(m, calibrate="a dog"),
        OptionError,
        "calibrate='a dog' is no",
    ),
    "calibrate without an argument": (
        lambda m, d: svdq.quantize(m, calibrate=lambda: m(*inputs())),
        OptionError,
        "as in calibrate=lambda model:",
    ),
    "calibrate that runs nothing": (
        lambda m, d: svdq.quantize(m, calibrate=lambda m: None),
        NothingToQuantize,
        "calibrate never ran a linear of this Net: does it call the model?",
    ),
    "calibrate and example_inputs": (
        lambda m, d: svdq.quantize(m, calibrate=lambda m: None, example_inputs={}),
        ValueError,
        "give calibrate or example_inputs, not both",
    ),
    "example_inputs as a tuple": (
        lambda m, d: svdq.quantize(m, example_inputs=inputs()),
        OptionError,
        "example_inputs is a tuple: give a dict of the arguments of Net.forward(x, condition)",
    ),
    "example_inputs by wrong names": (
        lambda m, d: svdq.quantize(m, example_inputs={"image": 1}),
        OptionError,
        "example_inputs has image, which does not fit Net.forward(x, condition)",
    ),
    "cuda without a GPU": (
        lambda m, d: svdq.quantize(m, device="cuda"),
        OptionError,
        "device='cuda': this PyTorch sees no CUDA GPU; give device='cpu'",
    ),
    "a second GPU": (lambda m, d: svdq.quantize(m, device="cuda:1"), OptionError, "sees no CUDA GPU"),
    "a device of no kind": (
        lambda m, d: svdq.quantize(m, device="gpu"),
        OptionError,
        "device='gpu' is no device: give 'cpu', 'cuda' or 'cuda:1'",
    ),
    "a model without linears": (
        lambda m, d: svdq.quantize(nn.Sequential(nn.ReLU())),
        NothingToQuantize,
        "Sequential has no linear layer that can be quantized: it has no nn.Linear",
    ),
    "a model on the meta device": (
        lambda m, d: svdq.quantize(net().to("meta"), progress=False),
        UnsupportedDevice,
        "is on device 'meta'",
    ),
    "a weight with NaN": (
        lambda m, d: svdq.quantize(with_nan(net()), progress=False),
        NonFiniteWeight,
        "the weight of blocks.0.up holds 1 NaN or Inf values",
    ),
    "saving what is 16-bit": (
        lambda m, d: svdq.save(m, d / "file"),
        NothingToQuantize,
        "no weight of this Net is quantized: run the compiled model, or svdq_compile.quantize it",
    ),
    "the wrong order for save": (
        lambda m, d: svdq.save(d / "file", m),
        OptionError,
        "the model comes first, then the file",
    ),
    "the wrong order for load": (lambda m, d: svdq.load("file", m), OptionError, "svdq_compile.load(model, path)"),
    "a file that is not there": (
        lambda m, d: svdq.load(m, d / "none.safetensors"),
        FileNotFoundError,
        "none.safetensors: there is no such file",
    ),
    "a folder to load": (lambda m, d: svdq.load(m, d), FileRefused, "give the file that svdq_compile.save wrote"),
    "a 16-bit file": (
        lambda m, d: svdq.load(m, sixteen_bit(d)),
        FileRefused,
        "svdq_compile.save did not write it; load 16-bit weights into the model as ever",
    ),
    "a file that is none": (lambda m, d: svdq.load(m, text(d)), FileRefused, "not a whole safetensors file"),
    "another model's file": (
        lambda m, d: svdq.load(nn.Sequential(nn.Linear(8, 8)), four_bit(d)),
        FileRefused,
        "(the file is of a Net, the model a Sequential)",
    ),
    "loading to a GPU that is not there": (
        lambda m, d: svdq.load(m, four_bit(d), device="cuda"),
        OptionError,
        "device='cuda': this PyTorch sees no CUDA GPU",
    ),
    "a path for a state dict": (
        lambda m, d: svdq.restore(m, "flux.safetensors"),
        OptionError,
        "state_dict='flux.safetensors' is no state dict: give the tensors by name",
    ),
    "packed of a plain weight": (
        lambda m, d: raised_as_ours(lambda: svdq.packed(m.blocks[0].up.weight)),
        NotAModel,
        "this weight is not quantized: svdq_compile.report(model) says which are",
    ),
}


def raised_as_ours(call: Callable[[], object]) -> None:
    """For a plain TypeError with a message of ours."""
    try:
        call()
    except TypeError as error:
        raise NotAModel(str(error)) from error


def sixteen_bit(folder: Path) -> Path:
    safetensors.torch.save_file(net().state_dict(), folder / "plain.safetensors")
    return folder / "plain.safetensors"


def text(folder: Path) -> Path:
    (folder / "text").write_text("a few words")
    return folder / "text"


def four_bit(folder: Path) -> Path:
    svdq.save(quantized(), folder / "four", progress=False)
    return folder / "four"


def quantized(**options: Any) -> Net:
    model = net()
    svdq.quantize(model, **quiet(**options))
    return model


@pytest.mark.parametrize("name", PLAIN)
def test_wrong_calls(name: str, tmp_path: Path) -> None:
    call, kind, words = PLAIN[name]
    model = net()
    refused(lambda: call(model, tmp_path), kind, words)
    assert unchanged(model)


# Calls on a quantized model.


def with_gradients(model: nn.Module) -> object:
    with torch.enable_grad():
        return model.requires_grad_(True)(*inputs())


OFFLOAD = 'Quantize with weights="offload", which keeps a copy of it in CPU memory.'
SAVE = "Write the 4-bit model with svdq_compile.save(model, path)."
QUANTIZED: Wrong = {
    "torch.save of the model": (lambda m, d: torch.save(m, io.BytesIO()), WeightsReleased, SAVE),
    "torch.save of the state dict": (lambda m, d: torch.save(m.state_dict(), io.BytesIO()), WeightsReleased, SAVE),
    "a safetensors file": (
        lambda m, d: safetensors.torch.save_file(m.state_dict(), d / "file"),
        WeightsReleased,
        SAVE,
    ),
    "pickle": (lambda m, d: pickle.dumps(m), WeightsReleased, SAVE),
    "restoring from nothing": (
        lambda m, d: svdq.restore(m),
        WeightsReleased,
        "Give restore a state_dict that holds it, or dequantize=True",
    ),
    "restoring from a part": (
        lambda m, d: svdq.restore(m, {"blocks.0.modulate.weight": m.blocks[0].modulate.weight.new_zeros(256, 128)}),
        WeightsReleased,
        "blocks.0.to_q",
    ),
    "restoring another shape": (
        lambda m, d: svdq.restore(m, net().state_dict() | {"blocks.0.up.weight": torch.zeros(2, 2)}),
        ValueError,
        "blocks.0.up.weight: state_dict has shape (2, 2), not (256, 128)",
    ),
    "arithmetic": (lambda m, d: m.blocks[0].up.weight + 1, WeightsReleased, OFFLOAD),
    "a norm": (
        lambda m, d: m.blocks[0].up.weight.norm(),
        WeightsReleased,
        "norm() needs the 16-bit weight of blocks.0.up",
    ),
    "numpy": (lambda m, d: m.blocks[0].up.weight.numpy(), WeightsReleased, OFFLOAD),
    "a clone": (lambda m, d: m.blocks[0].up.weight.clone(), WeightsReleased, OFFLOAD),
    "into a plain weight": (
        lambda m, d: net().blocks[0].up.weight.copy_(m.blocks[0].up.weight),
        WeightsReleased,
        OFFLOAD,
    ),
    "into whole numbers": (
        lambda m, d: m.blocks[0].up.weight.to(torch.int8),
        WeightsReleased,
        "Turn the model back to 16-bit first, with svdq_compile.restore(model, state_dict).",
    ),
    "training": (lambda m, d: with_gradients(m), GradientsNeeded, "svdquant is for inference only"),
    "export": (
        lambda m, d: torch.export.export(m, inputs()),
        ExportRefused,
        "Export the model in 16-bit, after svdq_compile.restore(model, state_dict).",
    ),
    "saving to a folder": (lambda m, d: svdq.save(m, d), OptionError, "is a folder: give the file to write"),
    "saving into a folder that is not there": (
        lambda m, d: svdq.save(m, d / "none" / "file"),
        FileNotFoundError,
        "none: there is no such folder to write file to",
    ),
    "saving to a number": (
        lambda m, d: svdq.save(m, 3),
        OptionError,
        "path=3 is no path: svdq_compile.save(model, path)",
    ),
    "saving with wrong options": (
        lambda m, d: svdq.save(m, d / "file", config={"rnak": 3}),
        OptionError,
        "did you mean 'rank'?",
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_wrong_calls_on_a_quantized_model(name: str, tmp_path: Path) -> None:
    call, kind, words = QUANTIZED[name]
    model = quantized()
    expected = model(*inputs())
    refused(lambda: call(model, tmp_path), kind, words)
    assert count(model) == 10
    assert torch.equal(model(*inputs()), expected)
    assert not list(tmp_path.iterdir()), "nothing was written"


def flux(**options: Any) -> FluxTransformer2DModel:
    model, _ = make("flux")
    svdq.quantize(model, rank=16, refine=0, progress=False, **options)
    return model


def adapter(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["to_q"], **options)


def fused(model: FluxTransformer2DModel) -> None:
    model.add_adapter(adapter(), "a")
    model.fuse_lora()


DIFFUSERS: Wrong = {
    "fuse_lora": (
        lambda m, d: fused(m),
        WeightsReleased,
        "fusing an adapter needs the 16-bit weight of transformer_blocks.0.attn.to_q, which was released when the "
        "layer was quantized. A LoRA need not be fused: ",
    ),
    "DoRA": (
        lambda m, d: m.add_adapter(adapter(use_dora=True), "a"),
        WeightsReleased,
        "a DoRA adapter needs the 16-bit weight of transformer_blocks.0.attn.to_q, which was released when the layer "
        "was quantized. Fuse it into the 16-bit model, then quantize what comes out.",
    ),
    "save_pretrained by pickle": (
        lambda m, d: m.save_pretrained(d / "x", safe_serialization=False),
        OptionError,
        "save_pretrained of a model in 4 bits cannot take safe_serialization=False: leave it out",
    ),
    "save_pretrained to a hub": (
        lambda m, d: m.save_pretrained(d / "x", push_to_hub=True),
        OptionError,
        "cannot take push_to_hub=True: leave it out",
    ),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_wrong_calls_through_diffusers(name: str, tmp_path: Path) -> None:
    call, kind, words = DIFFUSERS[name]
    model = flux()
    refused(lambda: call(model, tmp_path), kind, words)
    assert count(model) == 40
    assert not list(tmp_path.iterdir()), "nothing was written"


# What used to be refused, or half done, and works.


@pytest.mark.parametrize("weights", ["release", "offload"])
def test_save_pretrained_leads_to_a_file_that_loads(weights: str, tmp_path: Path) -> None:
    model, args = flux(weights=weights), make("flux")[1]
    expected = model(**args)[0]
    model.save_pretrained(tmp_path / "folder")
    assert sorted(f.name for f in (tmp_path / "folder").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert count(model) == 40, "still in 4 bits"
    config = FluxTransformer2DModel.load_config(tmp_path / "folder")
    with torch.device("meta"):
        empty = FluxTransformer2DModel.from_config(config)
    assert empty.training
    loaded = svdq.load(empty, tmp_path / "folder", progress=False)
    assert not loaded.training
    assert relative_error(loaded(**args)[0], expected) < 1e-5  # its tensors lie otherwise in memory


def test_save_pretrained_after_loading(tmp_path: Path) -> None:
    svdq.save(flux(), tmp_path / "file", progress=False)
    model = svdq.load(make("flux")[0], tmp_path / "file", progress=False)
    model.save_pretrained(tmp_path / "folder")  # type: ignore[operator]
    assert read_header(tmp_path / "folder").model_class == "FluxTransformer2DModel"


def test_save_pretrained_of_a_16_bit_model_is_diffusers_own(tmp_path: Path) -> None:
    flux()
    model, _ = make("flux")
    model.save_pretrained(tmp_path / "folder")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


# What a file and a report say.

CALIBRATED = {
    "observed": ({"calibrate": lambda m: m(*inputs())}, "calibrated, on inputs that were observed"),
    "shapes alone": (
        {"example_inputs": dict(zip(("x", "condition"), inputs(), strict=True))},
        "by the weights alone",
    ),
    "weights alone": ({}, "by the weights alone"),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_inspect_tells_a_calibrated_file(name: str, tmp_path: Path) -> None:
    how, told = CALIBRATED[name]
    svdq.quantize(model := net(), **quiet(), **how)
    for _ in range(2):  # and one that was loaded and saved again, cast in between
        svdq.save(model, tmp_path / "file", progress=False)
        assert told in CliRunner().invoke(app, ["inspect", str(tmp_path / "file")]).output
        model = svdq.load(net(seed=1), tmp_path / "file", progress=False).half().float()


def test_inspect_of_an_older_file(tmp_path: Path) -> None:
    svdq.save(quantized(), tmp_path / "file", progress=False)
    with safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata() | {"format_version": "1"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert not any(json.loads(metadata.pop("calibrated")).values())
    del metadata["digest"]
    safetensors.torch.save_file(tensors, tmp_path / "older", metadata)
    assert "unknown: the file does not say" in CliRunner().invoke(app, ["inspect", str(tmp_path / "older")]).output
    assert count(svdq.load(net(), tmp_path / "older", progress=False)) == 10


class Half(Net):
    """Its second block does not run."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.project(self.blocks[0](self.embed(x), condition))


def test_inspect_of_a_file_of_both_kinds(tmp_path: Path) -> None:
    svdq.quantize(model := Half(), **quiet(), calibrate=lambda m: m(*inputs()))
    svdq.save(model, tmp_path / "file", progress=False)
    told = read_header(tmp_path / "file").calibration
    assert told == "5 layers calibrated, on inputs that were observed; 5 layers by the weights alone"


class Long(nn.Module):
    """Layers with names of 130 characters, in a tree."""

    def __init__(self) -> None:
        super().__init__()
        self.a_module_with_a_name_as_long_as_names_of_modules_can_become = nn.ModuleDict(
            {"x" * 40: nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)) for _ in range(2))}
        )


@pytest.mark.parametrize("terminal", [40, 80, 200])
def test_reports_never_cut_a_name(terminal: int) -> None:
    model = Long()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    report = svdq.report(model)
    assert all(f" {name} " in str(report) for name in names)
    shown = io.StringIO()
    Console(file=shown, width=terminal).print(report)
    columns = [line.split("│")[1].strip() for line in shown.getvalue().splitlines() if line.count("│") > 2]
    assert all(name in "".join(columns) for name in names)


def test_tables_of_the_command_line_never_cut_a_name(tmp_path: Path) -> None:
    model = Long()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    svdq.quantize(model, skip=names[:1], rank=8, refine=0, progress=False)
    svdq.save(model, tmp_path / "file", progress=False)
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "file"), "--layers"]).output
    assert all(f" {name} " in told for name in names)


def test_reports_say_why_not_yet() -> None:
    model = net(blocks=3)
    reasons = lambda: {row.name: row.reason for row in svdq.report(model)}  # noqa: E731
    assert reasons()["blocks.0.up"] == "not reached yet"
    for block in model.blocks[:2]:
        block.compile(backend="svdquant", options=quiet(calibration_steps=3))
    assert reasons()["blocks.0.up"] == "not reached yet"
    assert reasons()["blocks.2.up"] == "not compiled: it stands outside the modules that were"
    for _ in range(2):
        model(*inputs())
    assert {reasons()[f"blocks.{i}.{name}"] for i in (0, 1) for name in ("to_q", "to_k", "up", "modulate")} == {
        "observed in 2 of 3 calls"
    }
    assert reasons()["embed"] == "it is small (128 x 16)"
    model(*inputs())
    assert reasons()["blocks.0.up"] == ""
    assert reasons()["blocks.2.up"] == "not compiled: it stands outside the modules that were"


def test_the_package_recommends_compiling_in_place() -> None:
    assert svdq.__doc__ is not None
    assert ".compile(backend=" in svdq.__doc__
    assert "= torch.compile(" not in svdq.__doc__


def test_options_may_be_generators() -> None:
    config = svdq.Config(skip=(f"*.{name}" for name in ("up", "down")), fuse=(name for name in ("heads", "rows")))
    assert (config.skip, config.fuse) == (("*.up", "*.down"), ("heads", "rows"))


def test_options_for_a_model_that_is_quantized_already() -> None:
    model = net()
    svdq.quantize(model, quiet())
    with logged("svdq_compile") as records:
        svdq.quantize(model, quiet(precision="int4"))
    (told,) = [record.getMessage() for record in records if record.levelno == logging.WARNING]
    assert "quantized already" in told
    assert "restore" in told


def test_inspect_takes_the_folder_of_save_pretrained(tmp_path: Path) -> None:
    model, _ = make("flux")
    svdq.quantize(model, quiet(precision="int4"))
    model.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0
    assert "int4" in result.output
    assert "precision=auto" not in result.output, "options that nobody told"


def test_one_folder_holds_one_form(tmp_path: Path) -> None:
    model, _ = make("flux")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    svdq.quantize(model, quiet())
    model.save_pretrained(tmp_path)
    svdq.restore(model, state, progress=False)
    model.save_pretrained(tmp_path)
    assert not any(is_ours(file) for file in tmp_path.glob("*.safetensors")), "it would be loaded instead"
    svdq.quantize(model, quiet())
    with pytest.raises(svdq.SvdqError, match="a folder of its own"):
        model.save_pretrained(tmp_path)
