"""`SVDQuantConfig`: diffusers' from_pretrained and save_pretrained in 4 bits, against `svdq_compile.quantize`."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PipelineQuantizationConfig,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from test_replacing import child, end_of
from test_stored import in_8_bits, sd3_of_its_authors
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import compiled
from svdq_compile import SVDQuantConfig
from svdq_compile.diffusers_quantizer import SVDQuantizer
from svdq_compile.errors import FileRefused, OptionError
from svdq_compile.header import VERSION
from svdq_compile.parameter import QuantizedWeight
from zoo import make

OPTIONS: dict[str, Any] = {"rank": 8, "refine": 1, "precision": "int4", "progress": False}
WEIGHTS = "diffusion_pytorch_model.safetensors"
BF16 = torch.bfloat16

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16: whole, in shards, as a variant; and in float32."""
    folder = tmp_path_factory.mktemp("flux")
    model, _ = make("flux", BF16)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="400KB")
    model.save_pretrained(folder / "variant", variant="bf16")
    model.save_pretrained(folder / "pickle", safe_serialization=False)
    make("flux")[0].save_pretrained(folder / "float32")
    return folder


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """What the loaded model becomes."""
    model, _ = make("flux", BF16)
    svdq.quantize(model, **OPTIONS)
    return model


@pytest.fixture(scope="module")
def saved(folder: Path, reference: nn.Module) -> Path:
    """In 4 bits, whole and in shards."""
    reference.save_pretrained(folder / "saved")  # type: ignore[operator]
    reference.save_pretrained(folder / "saved-shards", max_shard_size="200KB")  # type: ignore[operator]
    return folder


def load(folder: Path, *, like: type = FluxTransformer2DModel, **arguments: Any) -> Any:
    return like.from_pretrained(folder, **{"quantization_config": SVDQuantConfig(**OPTIONS)} | arguments)


def same(model: nn.Module, expected: nn.Module) -> None:
    """That two models hold the same bits."""
    mine, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    assert mine.keys() == theirs.keys()
    assert sum(isinstance(p, QuantizedWeight) for p in mine.values()) >= 40
    for name, weight in mine.items():
        other = theirs[name]
        assert type(weight) is type(other)
        assert (weight.dtype, weight.device) == (other.dtype, other.device)
        if isinstance(weight, QuantizedWeight):
            packs = (svdq.packed(w) for w in (weight, other))
            a, b = ({**p.plain_tensors(), "smooth": p.shared.smooth, "down": p.down} for p in packs)
            assert all(torch.equal(a[field], b[field]) for field in a.keys() | b.keys()), name
        else:
            assert torch.equal(weight, other), name


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("whole", {}),
    "shards": ("shards", {}),
    "a pickle": ("pickle", {"use_safetensors": False}),
    "a variant": ("variant", {"variant": "bf16"}),
    "of its dtype": ("whole", {"torch_dtype": BF16}),
    "dtype": ("whole", {"dtype": BF16}),
    "from float32": ("float32", {"dtype": BF16}),
    "a place": ("whole", {"device_map": "cpu"}),
    "a map": ("shards", {"device_map": {"": "cpu"}}),
    "auto": ("shards", {"device_map": "auto"}),
    "little memory": ("shards", {"low_cpu_mem_usage": True}),
    "no mapping": ("whole", {"disable_mmap": True}),
    "a dict": ("whole", {"quantization_config": {"quant_method": "svdquant", **OPTIONS}}),
}


@pytest.mark.parametrize("name", WAYS)
def test_from_pretrained_is_what_quantize_makes_of_the_loaded_model(
    name: str, folder: Path, reference: nn.Module
) -> None:
    source, arguments = WAYS[name]
    model = load(folder / source, **arguments)
    same(model, reference)
    assert not model.training


def test_dtypes(folder: Path) -> None:
    """As they are asked for; without, not diffusers' float32."""
    for dtype in (torch.float16, torch.float32):
        model = load(folder / "whole", dtype=dtype)
        expected = make("flux", BF16)[0].to(dtype)
        svdq.quantize(expected, **OPTIONS)
        same(model, expected)
    assert load(folder / "float32").dtype == BF16


def test_a_class_keeps_what_it_has_in_float32(tmp_path: Path) -> None:
    model, _ = make("wan", BF16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load(tmp_path, like=type(model), dtype=BF16)
    assert {name for name, p in loaded.named_parameters() if p.dtype == torch.float32} == kept
    loaded.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float16)  # type: ignore[attr-defined]
    dtypes = {name: p.dtype for name, p in again.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == kept
    assert set(dtypes.values()) == {torch.float32, torch.float16}


@pytest.mark.parametrize("name", ["saved", "saved-shards"])
def test_what_was_saved_loads(name: str, saved: Path, reference: nn.Module) -> None:
    told = json.loads((saved / name / "config.json").read_text())["quantization_config"]
    assert told == {"quant_method": "svdquant", "format_version": VERSION}
    same(FluxTransformer2DModel.from_pretrained(saved / name), reference)
    same(FluxTransformer2DModel.from_pretrained(saved / name, device_map="auto"), reference)
    with torch.device("meta"):
        empty = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(saved / name))
    same(svdq.load(empty, saved / name, progress=False), reference)
    assert (len(list((saved / name).glob("*.safetensors"))) > 3) == (name == "saved-shards")


def test_options_are_kept_by_a_folder(folder: Path, tmp_path: Path) -> None:
    load(folder / "whole").save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    kept = {name: value for name, value in OPTIONS.items() if name != "progress"}
    assert told == {"quant_method": "svdquant", "format_version": VERSION, **kept}
    model = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert model.hf_quantizer.quantization_config.to_dict() == {"quant_method": "svdquant", **kept}  # type: ignore[attr-defined]


def test_a_folder_is_saved_to_again(saved: Path, folder: Path, reference: nn.Module, tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(saved / "saved-shards")
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert not (tmp_path / WEIGHTS).exists()
    same(FluxTransformer2DModel.from_pretrained(tmp_path), reference)
    plain = FluxTransformer2DModel.from_pretrained(folder / "whole")
    plain.save_pretrained(tmp_path)  # type: ignore[operator]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    assert not any(
        isinstance(p, QuantizedWeight) for p in FluxTransformer2DModel.from_pretrained(tmp_path).parameters()
    )


def test_a_folder_of_an_older_version_is_saved_to(saved: Path, reference: nn.Module, tmp_path: Path) -> None:
    """It held its weights under a name that diffusers does not look for."""
    other, _ = make("flux", BF16, seed=1)
    svdq.quantize(other, **OPTIONS)
    svdq.save(other, tmp_path / "model.svdq.safetensors", progress=False)
    for size in ("200KB", "10GB"):
        reference.save_pretrained(tmp_path, max_shard_size=size)  # type: ignore[operator]
        same(svdq.from_pretrained(tmp_path), reference)
        same(FluxTransformer2DModel.from_pretrained(tmp_path), reference)
    assert not (tmp_path / "model.svdq.safetensors").exists()


@pytest.mark.parametrize("name", ["my-flux.safetensors", "diffusion_pytorch_model-rank4.safetensors"])
def test_somebodys_own_file_stays(name: str, saved: Path, reference: nn.Module, folder: Path, tmp_path: Path) -> None:
    svdq.save(reference, tmp_path / name, progress=False)
    before = (tmp_path / name).read_bytes()
    reference.save_pretrained(tmp_path, max_shard_size="200KB")  # type: ignore[operator]
    plain = FluxTransformer2DModel.from_pretrained(folder / "whole")
    plain.save_pretrained(tmp_path, is_main_process=False)  # type: ignore[operator]
    assert len(list(tmp_path.glob("diffusion_pytorch_model-0*"))) > 1, "the main process sees to these"
    plain.save_pretrained(tmp_path)  # type: ignore[operator]
    assert not list(tmp_path.glob("diffusion_pytorch_model-0*"))
    assert (tmp_path / name).read_bytes() == before


def test_a_kill_while_shards_are_saved_over_others(saved: Path, reference: nn.Module, tmp_path: Path) -> None:
    """What is there then is the old model or the new one, or is refused."""
    new, _ = make("flux", BF16, seed=1)
    svdq.quantize(new, **OPTIONS)
    name = "transformer_blocks.0.attn.to_q.weight"
    codes = svdq.packed(new.get_parameter(name)).weight[0]
    target, refusals = tmp_path / "x", []

    def save() -> None:
        new.save_pretrained(target, max_shard_size="200KB")  # type: ignore[operator]

    begun = time.monotonic()
    save()
    lasts = time.monotonic() - begun
    for moment in range(20):
        shutil.rmtree(target)
        shutil.copytree(saved / "saved-shards", target)
        pid = child(save)
        time.sleep(lasts * (0.5 + moment / 20))
        os.kill(pid, signal.SIGKILL)
        end_of(pid)
        try:
            loaded = FluxTransformer2DModel.from_pretrained(target)
        except FileRefused as error:
            refusals.append(str(error))
        else:
            is_new = torch.equal(svdq.packed(loaded.get_parameter(name)).weight[0], codes)
            same(loaded, new if is_new else reference)
    assert all("its shards are not of one model" in refusal for refusal in refusals)
    save()
    same(FluxTransformer2DModel.from_pretrained(target), new)
    assert not [file.name for file in target.iterdir() if file.name.endswith(".partial")], "of those that were killed"


def test_equal_models_are_equal_files(saved: Path, reference: nn.Module, tmp_path: Path) -> None:
    svdq.save(reference, tmp_path / "file", progress=False)
    assert (tmp_path / "file").read_bytes() == (saved / "saved" / WEIGHTS).read_bytes()


WITHOUT = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def test_pipelines(reference: nn.Module, tmp_path: Path) -> None:
    scheduler, model = FlowMatchEulerDiscreteScheduler(), make("flux", BF16)[0]
    FluxPipeline(scheduler=scheduler, transformer=model, **WITHOUT).save_pretrained(tmp_path / "16-bit")  # type: ignore[arg-type]
    quantization = PipelineQuantizationConfig(quant_mapping={"transformer": SVDQuantConfig(**OPTIONS)})
    arguments: dict[str, Any] = {"dtype": BF16, **WITHOUT}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "16-bit", quantization_config=quantization, **arguments)
    same(pipe.transformer, reference)
    pipe.save_pretrained(tmp_path / "4-bit")
    again = DiffusionPipeline.from_pretrained(tmp_path / "4-bit", **arguments)
    same(again.transformer, reference)
    again.to(torch.float16)
    assert again.transformer.dtype == torch.float16, "a cast keeps the 4 bits"
    assert type(again.transformer.proj_out.weight) is nn.Parameter
    again = DiffusionPipeline.from_pretrained(tmp_path / "4-bit", device_map="balanced", **arguments)
    same(again.transformer, reference)


@pytest.mark.parametrize("precision", ["w4a8", "w8a8"])
def test_accelerate_spreads_a_model_by_what_it_takes(precision: str) -> None:
    """Never more than a device has, and not so much less that it stays empty."""
    from accelerate.utils.modeling import compute_module_sizes

    heads: dict[str, Any] = {"attention_head_dim": 128, "num_attention_heads": 12, "axes_dims_rope": (32, 48, 48)}
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, joint_attention_dim=64, pooled_projection_dim=64, **heads
    ).to(BF16)
    svdq.quantize(model, precision=precision, refine=0)
    quantizer = SVDQuantizer(SVDQuantConfig())
    counted = compute_module_sizes(model, BF16, special_dtypes=quantizer.get_special_dtypes_update(model, BF16))[""]
    share = quantizer.adjust_max_memory({0: 1000.5, "cpu": "1GB"})[0] / 1000
    taken = sum(p._svdq.nbytes() if isinstance(p, QuantizedWeight) else p.nbytes for p in model.parameters())
    assert taken <= counted / share <= 1.4 * taken


@pytest.mark.parametrize("name", ["whole", "saved"])
def test_a_loaded_model_runs_eagerly_and_compiled(name: str, saved: Path, reference: nn.Module) -> None:
    model = load(saved / name) if name == "whole" else FluxTransformer2DModel.from_pretrained(saved / name)
    inputs = make("flux", BF16)[1]
    assert torch.equal(model(**inputs)[0], reference(**inputs)[0])
    assert torch.equal(compiled(model)(**inputs)[0], compiled(copy.deepcopy(reference))(**inputs)[0])


def test_dequantize(saved: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(saved / "saved")
    model.dequantize()
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_single_file(tmp_path: Path) -> None:
    model, _ = make("sd3", BF16)
    model.save_config(tmp_path)  # type: ignore[operator]
    save_file(sd3_of_its_authors(model), file := tmp_path / "sd3.safetensors")
    arguments: dict[str, Any] = {"config": str(tmp_path), "dtype": BF16}
    plain = SD3Transformer2DModel.from_single_file(str(file), **arguments)
    loaded = SD3Transformer2DModel.from_single_file(
        str(file), quantization_config=SVDQuantConfig(**OPTIONS), **arguments
    )
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in plain.named_parameters())
    svdq.quantize(plain, **OPTIONS)
    same(loaded, plain)


def test_a_single_file_in_fp8_with_scales(tmp_path: Path) -> None:
    """diffusers' converters know of no scales."""
    model, _ = make("sd3", BF16)
    model.save_config(tmp_path)  # type: ignore[operator]
    given, _ = in_8_bits(sd3_of_its_authors(model), True)
    save_file(given, file := tmp_path / "sd3.safetensors")
    svdq.quantize(model, **OPTIONS)
    loaded = SD3Transformer2DModel.from_single_file(
        str(file), config=str(tmp_path), dtype=BF16, quantization_config=SVDQuantConfig(**OPTIONS)
    )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedWeight):
            here, there = (svdq.packed(m.get_parameter(name)).dequantize(torch.float32) for m in (loaded, model))
            assert (here - there).norm() < 0.2 * there.norm(), name


# ** in a new process **

FRESH = """
import {first}
import {second}
from diffusers import FluxTransformer2DModel
model = FluxTransformer2DModel.from_pretrained({folder!r})
kinds = [type(p).__name__ for p in model.parameters()]
print(model.dtype, kinds.count("QuantizedWeight"))
"""


@pytest.mark.parametrize(("first", "second"), [("svdq_compile", "json"), ("diffusers", "svdq_compile")])
def test_importing_is_enough(first: str, second: str, saved: Path) -> None:
    code = FRESH.format(first=first, second=second, folder=str(saved / "saved"))
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["torch.bfloat16", "40"]


def test_importing_does_not_import_diffusers() -> None:
    code = "import sys, svdq_compile; print('diffusers' in sys.modules, 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


def test_a_diffusers_that_does_not_fit_works_without_us() -> None:
    code = "import sys, svdq_compile; sys.modules['svdq_compile.diffusers_quantizer'] = None\n"
    code += "from diffusers.quantizers import auto; print('svdquant' in auto.AUTO_QUANTIZER_MAPPING)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False"]
    assert "this diffusers does not know SVDQuantConfig" in told.stderr


# ** what is refused **

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"ranc": 8}, "unknown option 'ranc': did you mean 'rank'?"),
    "a value": ({"precision": "int5"}, "option precision='int5': did you mean 'int4'?"),
    "an option of compiling": ({"fuse": False}, "option fuse does not go with loading"),
    "another method": ({"quant_method": "torchao"}, "SVDQuantConfig is for 'svdquant'"),
    "a later version": ({"format_version": VERSION + 1}, "update it"),
    "a version that is none": ({"format_version": "new"}, "update it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_are_none(name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(OptionError) as raised:
        SVDQuantConfig(**options)
    assert message in str(raised.value)


def told_in_config(folder: Path, **told: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= told
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"ranc": 8}, "unknown option 'ranc': did you mean 'rank'?"),
        ({"format_version": VERSION + 1}, f"format_version={VERSION + 1}; this svdq-compile reads up to {VERSION}"),
    ],
)
def test_a_configuration_of_a_later_version(told: dict[str, Any], message: str, saved: Path, tmp_path: Path) -> None:
    FluxTransformer2DModel.from_pretrained(saved / "saved").save_pretrained(tmp_path)
    told_in_config(tmp_path, **told)
    with pytest.raises(OptionError) as raised:
        FluxTransformer2DModel.from_pretrained(tmp_path)
    assert message in str(raised.value)


def test_a_configuration_that_lies(folder: Path, saved: Path, tmp_path: Path) -> None:
    FluxTransformer2DModel.from_pretrained(saved / "saved").save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((folder / "whole" / WEIGHTS).read_bytes())
    with pytest.raises(FileRefused, match="says that it is in 4 bits, and it holds other weights"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


def test_shards_of_two_models(saved: Path, tmp_path: Path) -> None:
    FluxTransformer2DModel.from_pretrained(saved / "saved").save_pretrained(tmp_path, max_shard_size="200KB")
    other, _ = make("flux", BF16, seed=1)
    svdq.quantize(other, **OPTIONS)
    other.save_pretrained(tmp_path / "other", max_shard_size="200KB")  # type: ignore[operator]
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(FileRefused, match="its shards are not of one model"):
        FluxTransformer2DModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "whole" / WEIGHTS)
    (tmp_path / "config.json").write_bytes((folder / "whole" / "config.json").read_bytes())
    name = "single_transformer_blocks.1.proj_out.weight"

    def says(**changed: Tensor | None) -> str:
        changed = {n.replace("__", "."): t for n, t in changed.items()}
        kept = {n: t for n, t in (tensors | changed).items() if t is not None}
        save_file(kept, tmp_path / WEIGHTS)
        with pytest.raises(FileRefused) as raised:
            load(tmp_path)
        assert str(tmp_path) in str(raised.value)
        return str(raised.value)

    assert f"tensor {name} is missing" in says(**{name: None})
    assert f"{name} is (3, 3) in the file, (128, 640) in the model" in says(**{name: torch.ones(3, 3)})
    assert f"{name} is torch.int32 in the file" in says(**{name: torch.ones(128, 640, dtype=torch.int32)})
    assert "has no tensor more" in says(more=torch.ones(3))


def test_a_single_file_that_is_in_4_bits(folder: Path, saved: Path) -> None:
    with pytest.raises(OptionError, match="this checkpoint is in 4 bits already"):
        FluxTransformer2DModel.from_single_file(
            str(saved / "saved" / WEIGHTS), config=str(folder / "whole"), quantization_config=SVDQuantConfig()
        )


def test_kept_values_are_not_there(folder: Path) -> None:
    with pytest.raises(OptionError, match="option weights='keep' does not go with loading in 4 bits"):
        load(folder / "whole", quantization_config=SVDQuantConfig(**OPTIONS, weights="keep"))
    model = load(folder / "whole", quantization_config=SVDQuantConfig(**OPTIONS, weights="offload"))
    svdq.restore(model, progress=False)
    expected = load_file(folder / "whole" / WEIGHTS)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_places_where_they_cannot_be(folder: Path) -> None:
    with pytest.raises(OptionError, match="device_map: 4-bit weights are not offloaded to the disk"):
        load(folder / "whole", device_map={"": "disk"})
