"""`doctor` foretells what quantizing does: the same layers, the same reasons, the same bytes; and reads no weight."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from typer.testing import CliRunner

import svdq_compile as svdq
from conftest import Net, inputs, net
from svdq_compile.cli import app
from svdq_compile.errors import FileRefused, OptionError, SvdqError
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.kernels.runtime import target
from svdq_compile.model_files import empty_model
from zoo import make


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("rank", [0, 16])
def test_bytes_are_those_of_the_quantized_model(precision: str, rank: int) -> None:
    config = svdq.Config(precision=precision, rank=rank, refine=0, progress=False)
    foretold = svdq.doctor(net(dtype=torch.bfloat16), config)
    report = svdq.quantize(model := net(dtype=torch.bfloat16), config)
    assert {plan.name: plan.bytes_after for plan in foretold.plans} == {row.name: row.bytes_after for row in report}
    assert {plan.name: plan.reason for plan in foretold.plans} == {row.name: row.reason for row in report}
    assert foretold.bytes_before == sum(p.nbytes for p in net(dtype=torch.bfloat16).parameters())
    assert svdq.doctor(model, config).bytes_after == foretold.bytes_after  # and what is quantized stays told


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_layers_are_those_that_compiling_quantizes(name: str) -> None:
    config = svdq.Config(precision="w4a8", rank=16, refine=0, progress=False)
    model, _ = make(name, torch.bfloat16)
    foretold = {plan.name for plan in svdq.doctor(model, config).quantized}
    assert foretold == {row.name for row in svdq.quantize(model, config) if row.error is not None}


def test_reasons_are_counted() -> None:
    config = svdq.Config(skip=("*.to_q",), rank=16)
    reasons = svdq.doctor(net(blocks=3), config).reasons
    assert reasons["option skip"] == 3
    assert sum(count for reason, count in reasons.items() if "small" in reason) == 2  # embed and project


def test_a_large_rank_leaves_small_layers_alone() -> None:
    assert svdq.doctor(net(), svdq.Config(rank=128)).quantized == ()
    assert "not at all" in svdq.doctor(net(), svdq.Config(rank=128)).way


class Pipeline:
    def __init__(self, **components: nn.Module) -> None:
        self.__dict__.update(components)


def test_a_pipeline_is_its_denoiser() -> None:
    model = net()
    for pipe in (Pipeline(transformer=model), Pipeline(unet=model), Pipeline(unet=nn.Linear(8, 8), transformer=model)):
        assert svdq.doctor(pipe).model_class == "Net"
    with pytest.raises(SvdqError, match=r"Pipeline is a pipeline, not a model.*doctor\(pipe\.prior\)"):
        svdq.doctor(Pipeline(prior=model))


def test_a_compiled_model_is_looked_into() -> None:
    assert svdq.doctor(torch.compile(net())).model_class == "Net"


def test_blocks_and_the_way_to_compile() -> None:
    plain = svdq.doctor(net(blocks=3), svdq.Config(rank=16))
    assert [(b.path, b.kind, b.count, b.linears) for b in plain.blocks] == [("blocks", "Block", 3, 15)]
    namespace = {"model": (model := net(blocks=3))}
    exec(plain.way, namespace)  # what it says is Python that runs
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    assert svdq.doctor(make("flux")[0]).way == 'model.compile_repeated_blocks(backend="svdquant")'
    alone = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    assert svdq.doctor(alone).way == "svdq_compile.compile(model)"


class Broken(Net):
    """Reads a number in the middle, which Dynamo cannot."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            x = x / 2
        return super().forward(x, condition)


def test_graph_breaks_name_their_lines() -> None:
    x, condition = inputs()
    given = {"x": x, "condition": condition}
    assert svdq.doctor(net(), example_inputs=given).breaks == ()
    breaks = svdq.doctor(Broken().eval().requires_grad_(False), example_inputs=given).breaks
    assert breaks
    assert all("test_doctor.py:" in line for line in breaks)
    assert any("x.sum().item() > 1e9" in line for line in breaks)
    assert svdq.doctor(net()).breaks is None  # not looked for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline folder without weights."""
    model, _ = make("flux")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": type(model).__name__, **model.config})
    )
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", type(model).__name__]}))
    return tmp_path


def said(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_folders_need_no_weights(folder: Path) -> None:
    for source in (folder, folder / "transformer"):
        model = empty_model(str(source))
        assert isinstance(model, FluxTransformer2DModel)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    text = said(folder, "--rank", 16)
    assert "FluxTransformer2DModel" in text
    assert "transformer_blocks: 2 x FluxTransformerBlock" in text
    assert "compile_repeated_blocks" in text
    assert "transformer_blocks.1.attn.to_q" not in text
    assert "transformer_blocks.1.attn.to_q" in said(folder, "--layers")


def test_a_class_needs_no_folder(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    assert said("FluxTransformer2DModel", "--config", config) == said(folder / "transformer")
    assert sum(p.numel() for p in empty_model("FluxTransformer2DModel").parameters()) > 11e9  # the published size


def test_modules_that_stay_in_float32_are_counted_so() -> None:
    model = empty_model("WanTransformer3DModel")
    assert model.scale_shift_table.dtype == torch.float32
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


def test_what_is_no_model_is_refused(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        empty_model("./nowhere")
    with pytest.raises(FileRefused, match="no model class Nothing"):
        empty_model("Nothing")
    with pytest.raises(OptionError, match="--config goes with the name of a class"):
        empty_model(str(folder), config=folder / "transformer" / "config.json")
    with pytest.raises(OptionError, match="--component needs a pipeline"):
        empty_model(str(folder / "transformer"), component="unet")
    with pytest.raises(FileRefused, match="its models are: transformer"):
        empty_model(str(folder), component="unet")
    bad = folder / "bad.json"
    bad.write_text('{"num_layers": "two"}')
    with pytest.raises(SvdqError, match="makes no FluxTransformer2DModel"):
        empty_model("FluxTransformer2DModel", config=bad)


def test_it_says_which_kernels_a_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linears' format and the one of few rows, once for each kind of GPU."""
    words = {"w4a8": "quantize by reference, gemm by reference", "w4a16": "gemv by reference"}
    assert svdq.doctor(net(), precision="w4a8").kernels == {"the CPU": words}
    capabilities = [(8, 9), (9, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {capabilities[device.index][0]}")
    target.capability.cache_clear()
    found = svdq.doctor(net(), precision="w4a8")
    target.capability.cache_clear()
    assert found.kernels == {
        "GPU 8 (sm_89)": {
            "w4a8": "quantize by portable_quantize, gemm by ampere_gemm_w4a8",
            "w4a16": "gemv by portable_gemv",
        },
        "GPU 9 (sm_90)": {
            "w4a8": "quantize by hopper_quantize, gemm by hopper_gemm_w4a8",
            "w4a16": "gemv by portable_gemv",
        },
    }
    assert "w4a8 on GPU 8 (sm_89)" in str(found)
