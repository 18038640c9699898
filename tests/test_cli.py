"""The command line, on a small Flux in the three forms that `svdq quantize` reads."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import svdq_compile as svdq
import zoo
from svdq_compile.cli import app
from svdq_compile.errors import FileRefused
from svdq_compile.header import read_header
from svdq_compile.layers import layers
from svdq_compile.model_files import opened_source
from svdq_compile.skeleton import skeleton

FAST = ("--rank", "8", "--refine", "0", "--device", "cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"

PIPELINE = """
from pathlib import Path
import torch
from diffusers import DiffusionPipeline

Path(__file__).with_name("ran").touch()  # beside the copy of this file that diffusers runs


class TinyPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps):
        (Path(self.config._name_or_path) / "drawn").open("a").write(f"{prompt} {num_inference_steps}\\n")
        inputs = torch.load(Path(self.config._name_or_path) / "inputs.pt", weights_only=True)
        for _ in range(num_inference_steps):
            self.transformer(**inputs)
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    """What a command prints; it must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """The one line a command fails with."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("svdq: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(autouse=True)
def _code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers loads the code of all folders as one module, in which classes of another test's folder may be."""
    monkeypatch.delitem(sys.modules, "diffusers_modules.local.pipeline", raising=False)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with its own pipeline.py, around a Flux stored in float32."""
    folder = tmp_path_factory.mktemp("pipeline")
    model, _ = zoo.make("flux")
    model.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    entries = {
        "transformer": ["diffusers", type(model).__name__],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "TinyPipeline"} | entries))
    (folder / "pipeline.py").write_text(PIPELINE)
    torch.save(zoo.make("flux", torch.bfloat16)[1], folder / "inputs.pt")
    return folder


@pytest.fixture(scope="module")
def quantized(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder in int4, apart from the layers of the first block."""
    output = tmp_path_factory.mktemp("quantized") / "flux.safetensors"
    ok("quantize", pipeline / "transformer", output, "--precision", "int4", "--skip", "transformer_blocks.0.*", *FAST)
    return output


def draw(file: Path) -> tuple[Tensor, Tensor]:
    """What a new model says with a quantized file loaded, and what the 16-bit one says."""
    model, inputs = zoo.make("flux", torch.bfloat16)
    with torch.no_grad():
        (expected,) = model(**inputs)
        with torch.device("meta"):
            empty = FluxTransformer2DModel.from_config(model.config)
        svdq.load(empty, file, device="cpu", progress=False)
        svdq.restore(empty, dequantize=True)
        (actual,) = empty(**inputs)
    return actual.float(), expected.float()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_a_model_folder_becomes_a_file_that_draws_the_same(quantized: Path) -> None:
    header = read_header(quantized)
    assert (header.model_class, header.config["rank"], header.config["refine"]) == ("FluxTransformer2DModel", 8, 0)
    assert {entry.precision for entry in header.layers} == {"int4"}
    assert {entry.dtype for entry in header.layers} == {"bfloat16"}  # it is stored in float32
    skipped = [name for name, reason in header.others.items() if reason == "option skip"]
    assert len(skipped) == 14
    assert all(name.startswith("transformer_blocks.0.") for name in skipped)
    # Measured 0.097; one ff.net.2 of zeros would make it 0.28.
    assert relative(*draw(quantized)) < 0.2


def test_the_summary_adds_up_and_says_what_comes_next(pipeline: Path, tmp_path: Path) -> None:
    output = tmp_path / "flux.safetensors"
    text = ok("quantize", pipeline, output, "--precision", "w4a16", *FAST)
    header = read_header(output)
    (row,) = [line for line in text.splitlines() if "w4a16" in line]
    assert f" {len(header.layers)} " in row
    assert f" {sum(entry.bytes_before for entry in header.layers) / 2**20:.2f} " in row
    assert f" {100 * max(entry.error for entry in header.layers):.2f} % " in row
    before, after = ([float(line.split("│")[i]) for line in text.splitlines() if "│" in line] for i in (3, 4))
    assert after[-1] == pytest.approx(output.stat().st_size / 2**20, abs=0.01)
    assert (sum(before[:-1]), sum(after[:-1])) == pytest.approx((before[-1], after[-1]), abs=0.02)
    assert text.splitlines()[-1] == (
        f'Next: svdq_compile.load(pipe.transformer, "{output}"); pipe.transformer.compile(backend="svdquant")'
    )


def test_a_state_dict_becomes_the_same_file_as_its_model(pipeline: Path, quantized: Path, tmp_path: Path) -> None:
    output = tmp_path / "flux.safetensors"
    source = pipeline / "transformer" / WEIGHTS
    ok("quantize", source, output, "--precision", "int4", "--skip", "transformer_blocks.0.*", *FAST)
    ours, theirs = read_header(output), read_header(quantized)
    assert {entry.weight: entry for entry in ours.layers}.keys() == {entry.weight for entry in theirs.layers}
    assert ours.others == theirs.others
    assert ours.checksums == theirs.checksums
    assert torch.equal(draw(output)[0], draw(quantized)[0])


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where diffusers copies code to before it runs it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "modules"


def test_a_folders_code_runs_only_if_trusted(pipeline: Path, tmp_path: Path, code_cache: Path) -> None:
    output = tmp_path / "flux.safetensors"
    command = ("quantize", pipeline, output, "--prompt", "a dog", "--prompt", "a cat", "--steps", "2", *FAST)
    assert "brings its own code (pipeline.py)" in refused(*command)
    assert not list(code_cache.rglob("ran"))
    assert not output.exists()

    ok(*command, "--trust-code")
    assert list(code_cache.rglob("ran"))
    assert (pipeline / "drawn").read_text() == "a dog 2\na cat 2\n"
    # Only running the model shows which layers share an input, and which read one row a sample.
    entries = {entry.name: entry for entry in read_header(output).layers}
    assert entries["transformer_blocks.0.norm1.linear"].precision == "w4a16"
    assert entries["transformer_blocks.0.attn.to_k"].shared == "transformer_blocks.0.attn.to_q.weight"


def test_a_target_is_met_by_what_is_drawn(pipeline: Path, tmp_path: Path, code_cache: Path) -> None:
    output = tmp_path / "flux.safetensors"
    command = ("quantize", pipeline, output, "--prompt", "a dog", "--steps", "1", "--refine", "0", "--trust-code")
    said = run(*command, "--target-bytes", "1 kB").stderr.splitlines()[-1]
    assert said.startswith("svdq: option target_bytes=1000: the linears of this FluxTransformer2DModel take")
    ok(*command, "--target-error", "0.05")
    header = read_header(output)
    effects = [entry.effect for entry in header.layers]
    assert header.config["target_error"] == 0.05
    assert 0 < sum(effect**2 for effect in effects if effect is not None) ** 0.5 <= 0.05


def test_the_code_of_a_component_must_be_trusted_too(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "block.py").touch()
    index = {"_class_name": "FluxPipeline", "transformer": ["block", "Model"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert "(transformer/block.py)" in refused("quantize", folder, tmp_path / "out", "--prompt", "a dog", *FAST)


def test_an_existing_file_is_overwritten_only_with_force(pipeline: Path, tmp_path: Path) -> None:
    output = tmp_path / "flux.safetensors"
    output.write_text("precious")
    assert "--force" in refused("quantize", pipeline, output, *FAST)
    assert output.read_text() == "precious"
    ok("quantize", pipeline, output, "--force", *FAST)
    assert read_header(output).layers


def test_every_option_reaches_the_config(pipeline: Path, tmp_path: Path) -> None:
    options = (
        "--rank",
        4,
        "--refine",
        1,
        "--skip",
        "a*",
        "--skip",
        "b?",
        "--error-budget",
        0.9,
        "--no-smooth",
        "--no-rotate",
        "--convolutions",
    )
    ok("quantize", pipeline, tmp_path / "out", "--precision", "nvfp4", "--device", "cpu", *options)
    config = svdq.Config(
        precision="nvfp4",
        rank=4,
        refine=1,
        skip=("a*", "b?"),
        convolutions=True,
        error_budget=0.9,
        smooth=False,
        rotate=False,
    )
    assert read_header(tmp_path / "out").config == json.loads(json.dumps(config.to_dict()))


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "weights.safetensors"
    save_file({"a.weight": torch.randn(128, 128)}, source)
    before = source.read_bytes()
    assert "is SOURCE itself" in refused("quantize", source, tmp_path / "." / source.name, "--force", *FAST)
    assert "is a part of SOURCE" in refused("quantize", tmp_path, source, "--force", *FAST)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int5"), "option precision='int5': did you mean 'int4'?"),
        (("--rank", "300"), "option rank=300"),
        (("--error-budget", "0"), "option error_budget=0"),
        (("--target-error", "2"), "option target_error=2.0"),
        (("--target-bytes", "6.8GiB"), "give --prompt"),
        (("--device", "tpu"), "option device='tpu': it can be 'cpu' or 'cuda'"),
        (("--device", "cuda"), "option device='cuda': this PyTorch sees no CUDA GPU"),
        (("--component", "vae"), "this pipeline has no vae; its models are: transformer"),
    ],
)
def test_options_are_checked(
    options: tuple, message: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refused("quantize", pipeline, tmp_path / "out.safetensors", *options)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_no_models(pipeline: Path, quantized: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"

    def says(source: Path, *options: str) -> str:
        return refused("quantize", source, output, *options, *FAST)

    assert "no such file or folder" in says(tmp_path / "missing")
    assert "no model_index.json" in says(pipeline / "scheduler")
    assert "--prompt needs a pipeline folder" in says(pipeline / "transformer", "--prompt", "a dog")
    assert "quantized already" in says(quantized)
    assert "not a whole safetensors file" in says(pipeline / "pipeline.py")
    assert "no such folder" in refused("quantize", pipeline, tmp_path / "missing" / "out.safetensors")
    assert "is a folder" in refused("quantize", pipeline, tmp_path)

    config = tmp_path / "config.json"
    config.write_text('{"_class_name": "NoSuchModel"}')
    assert "has no model class NoSuchModel" in says(tmp_path)
    config.write_text('{"_class_name": "DDPMScheduler"}')
    assert "has no model class DDPMScheduler" in says(tmp_path)
    config.write_text("{}")
    assert "names no _class_name" in says(tmp_path)
    config.write_text("{")
    assert "is no JSON" in says(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "unet": ["diffusers", "X"]}')
    (tmp_path / "unet").mkdir()
    assert "there is no pipeline.py" in says(tmp_path, "--prompt", "a dog")

    save_file({"small.weight": torch.randn(8, 8)}, small := tmp_path / "small.safetensors")
    assert "no linear layer" in says(small)
    assert not output.exists()


def test_a_skeleton_has_the_layers_that_names_tell() -> None:
    tensors = {
        "blocks.0.attn.qkv.weight": torch.randn(192, 64),
        "blocks.0.attn.qkv.bias": torch.randn(192),
        "blocks.0.attn.qkv.scale": torch.randn(3),
        "blocks.0.proj.weight": torch.randn(64, 64, 1, 1),
        "blocks.0.conv.weight": torch.randn(64, 64, 3, 3),
        "blocks.0.norm.weight": torch.randn(64),
        "blocks.0.norm.bias": torch.randn(64),
        "table.weight": torch.randn(100, 64),
        "codes.weight": torch.zeros(64, 64, dtype=torch.int8),
        "position": torch.randn(1, 64),
    }
    model = skeleton(tensors)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    qkv, proj = model.get_submodule("blocks.0.attn.qkv"), model.get_submodule("blocks.0.proj")
    assert (type(qkv), qkv.in_features, qkv.out_features) == (nn.Linear, 64, 192)
    assert torch.equal(qkv(torch.zeros(64)), tensors["blocks.0.attn.qkv.bias"])
    assert torch.equal(proj(x := torch.randn(1, 64, 2, 2)), nn.functional.conv2d(x, tensors["blocks.0.proj.weight"]))
    reasons = {layer.name: layer.reason for layer in layers(model)}
    assert reasons.keys() == {"blocks.0.attn.qkv", "blocks.0.proj", "table", "codes"}
    assert reasons["blocks.0.attn.qkv"] is None
    assert "outside the repeated blocks" in reasons["table"]


def model_in(file: Path) -> nn.Module:
    with opened_source(file) as source:
        return source.model


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def test_the_layers_of_a_state_dict_come_in_the_models_order(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({f"blocks.{i}.to_q.weight": torch.zeros(4, 4) for i in range(12)}, file)
    assert [layer.name for layer in layers(model_in(file))] == [f"blocks.{i}.to_q" for i in range(12)]


def test_a_state_dict_keeps_its_dtypes_unless_it_is_float32(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    tensors = {"a.weight": torch.randn(64, 64), "steps": torch.arange(4)}
    save_file(tensors, file)
    model = model_in(file)
    assert dtypes_of(model) == {"a.weight": torch.bfloat16, "steps": torch.int64}
    save_file({"a.weight": tensors["a.weight"].half(), "a.bias": torch.randn(64)}, file)
    model = model_in(file)
    assert dtypes_of(model) == {"a.weight": torch.float16, "a.bias": torch.float32}


@pytest.mark.parametrize("names", [("a", "a.weight"), ("a..weight", "b"), ("forward", "b")])
def test_names_that_no_module_has_are_refused(names: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({name: torch.zeros(4, 4) for name in names}, file)
    with pytest.raises(FileRefused, match="not those of a model's state dict"):
        model_in(file)


def test_inspect_reads_metadata_alone(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.safe_open.get_tensor", None, raising=False)
    text, header = ok("inspect", quantized), read_header(quantized)
    facts = dict(line.split("  ", 1) for line in text.splitlines()[:4])
    assert facts["file"].split() == [str(quantized), f"({header.nbytes / 2**20:.2f}", "MiB)"]
    assert facts["format version"].strip() == str(header.version)
    assert facts["model class"].strip() == "FluxTransformer2DModel"
    assert "precision=int4, rank=8" in facts["config"]
    assert "14: option skip" in text


def test_inspect_lists_layers(quantized: Path) -> None:
    text, header = ok("inspect", quantized, "--layers"), read_header(quantized)
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    for entry in header.layers:
        assert f"{entry.shape[0]} x {entry.shape[1]}" in rows[entry.name]
        assert f"{100 * entry.error:.2f} %" in rows[entry.name]
    for name, reason in header.others.items():
        assert reason in rows[name]


def test_inspect_refuses_foreign_files(pipeline: Path, quantized: Path, tmp_path: Path) -> None:
    assert "did not write it" in refused("inspect", pipeline / "transformer" / WEIGHTS)
    assert "no such file" in refused("inspect", tmp_path / "missing")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(quantized.read_bytes()[:-100])
    assert "not a whole safetensors file" in refused("inspect", cut)


def test_demo_gets_the_remaining_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svdq, "__file__", str(tmp_path / "svdq_compile" / "__init__.py"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "svdq_demo", None)
    assert 'pip install -e ".[demo]"' in refused("demo")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a_neighbour.py").write_text("def show(argv): print(argv)\n")
    (tmp_path / "examples" / "demo.py").write_text(
        "from a_neighbour import show\ndef main(argv):\n    show(argv)\n    return 3 if '--fail' in argv else None\n"
    )
    assert ok("demo", "--", "--prompts", "2", "--help").strip() == "['--prompts', '2', '--help']"
    assert ok("demo", "--open").strip() == "['--open']"
    assert run("demo", "--fail").exit_code == 3


def test_version() -> None:
    assert ok("--version").startswith("svdq-compile 0.")


def test_a_mistake_in_the_package_is_not_hidden(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("svdq_compile.cli.read_header", broken)
    assert isinstance(run("inspect", quantized).exception, ZeroDivisionError)
