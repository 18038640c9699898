"""The tensors of files that other programs wrote: nothing is read before it is needed, and then it is right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import svdq_compile as svdq
from svdq_compile.cli import app
from svdq_compile.deferred import Deferred
from svdq_compile.errors import FileRefused
from svdq_compile.model_files import opened_source
from svdq_compile.reading import TensorFile
from svdq_compile.stored import stored
from zoo import make

BF16 = torch.bfloat16
OPTIONS: dict[str, Any] = {"rank": 8, "refine": 0, "precision": "int4", "progress": False}

# Stable Diffusion 3, diffusers' names and its authors', in a block and outside.
IN_BLOCKS = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
TOGETHER = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}


def sd3_of_its_authors(model: Any) -> dict[str, Tensor]:
    """A state dict as Stability AI name it: q, k and v in one, and two modulations with their halves the other way."""
    state, last = dict(model.state_dict()), model.config.num_layers - 1
    prefix = "model.diffusion_model."
    found = {f"{prefix}pos_embed": state.pop("pos_embed.pos_embed")}

    def swapped(tensor: Tensor) -> Tensor:
        scale, shift = tensor.chunk(2)
        return torch.cat([shift, scale])

    for leaf in ("weight", "bias"):
        for i in range(last + 1):
            for theirs, ours in TOGETHER.items():
                names = [f"transformer_blocks.{i}.{name}.{leaf}" for name in ours]
                if names[0] in state:
                    found[f"{prefix}joint_blocks.{i}.{theirs}.{leaf}"] = torch.cat([state.pop(n) for n in names])
            for name, theirs in IN_BLOCKS.items():
                tensor = state.pop(f"transformer_blocks.{i}.{name}.{leaf}", None)
                if tensor is not None:
                    is_swapped = i == last and name == "norm1_context.linear"
                    found[f"{prefix}joint_blocks.{i}.{theirs}.{leaf}"] = swapped(tensor) if is_swapped else tensor
        for name, theirs in OUTSIDE.items():
            found[f"{prefix}{theirs}.{leaf}"] = state.pop(f"{name}.{leaf}")
        found[f"{prefix}final_layer.adaLN_modulation.1.{leaf}"] = swapped(state.pop(f"norm_out.linear.{leaf}"))
    assert not state
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, and a file under the authors' names."""
    folder = tmp_path_factory.mktemp("sd3")
    model, _ = make("sd3", BF16)
    model.save_config(folder)  # type: ignore[operator]
    save_file(sd3_of_its_authors(model), folder / "sd3.safetensors")
    return folder


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor; of quantized weights what they stand for."""
    svdq.restore(model, dequantize=True, progress=False)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(model: nn.Module, expected: nn.Module) -> bool:
    mine, theirs = dequantized(model), dequantized(expected)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# ** tensors that are not read yet **

HERE = torch.arange(24.0).reshape(6, 4)

MADE: dict[str, Callable[[Any], Any]] = {
    "chunk": lambda t: t.chunk(3)[1],
    "split": lambda t: torch.split(t, [1, 3, 2])[2],
    "cat": lambda t: torch.cat([t[3:], t[:3]]),
    "a view": lambda t: t.view(3, 2, 4).permute(1, 0, 2).reshape(6, 4)[:, 1:],
    "a cast": lambda t: t.to(torch.float16),
    "no cast": lambda t: t.to(torch.float32),
    "arithmetic": lambda t: (t + 1) * t.t().contiguous().t() / 2,
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_a_tensor_is_made_when_it_is_read(name: str) -> None:
    reads = 0

    def read() -> Tensor:
        nonlocal reads
        reads += 1
        return HERE.clone()

    deferred, expected = MADE[name](Deferred.of((6, 4), torch.float32, read)), MADE[name](HERE)
    assert isinstance(deferred, Deferred)
    assert (deferred.shape, deferred.dtype, reads) == (expected.shape, expected.dtype, 0)
    assert torch.equal(deferred.now(), expected)
    assert reads > 0


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.add_(1),
        lambda t: t.__setitem__(0, 1.0),
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: t.numpy(),
        lambda t: bool((t > 1).all()),
    ],
)
def test_what_needs_its_values_is_refused(write: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)):
        write(Deferred.of((6, 4), torch.float32, HERE.clone))


# ** single files **


def test_diffusers_converters_read_nothing(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    get = TensorFile.get
    monkeypatch.setattr(TensorFile, "get", lambda self, name: reads.append(name) or get(self, name))  # type: ignore[func-returns-value]
    state = make("sd3", BF16)[0].state_dict()
    with opened_source(sd3 / "sd3.safetensors", model=str(sd3)) as source:
        assert not reads
        assert source.tensors.keys() == state.keys()
        assert all(torch.equal(source.tensors[name].now(), tensor) for name, tensor in state.items())
    assert reads


@pytest.mark.parametrize("model", ["the folder", "the class"])
def test_a_single_file_is_what_diffusers_loads(model: str, sd3: Path, tmp_path: Path) -> None:
    expected = SD3Transformer2DModel.from_single_file(str(sd3 / "sd3.safetensors"), config=str(sd3), dtype=BF16)
    svdq.quantize(expected, **OPTIONS)
    if model == "the folder":
        found = svdq.from_pretrained(sd3 / "sd3.safetensors", model=sd3, **OPTIONS)
        assert equal(found, expected)
    else:  # whose defaults are another size
        with pytest.raises(FileRefused, match="a SD3Transformer2DModel of its config"):
            svdq.from_pretrained(sd3 / "sd3.safetensors", model="SD3Transformer2DModel", **OPTIONS)


def test_the_command_line(sd3: Path, tmp_path: Path) -> None:
    options = ["--rank", "8", "--refine", "0", "--precision", "int4", "--device", "cpu"]
    file, output = str(sd3 / "sd3.safetensors"), tmp_path / "out.safetensors"
    result = CliRunner().invoke(app, ["quantize", file, str(output), "--model", str(sd3), *options])
    assert result.exit_code == 0, result.output
    model = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(sd3))
    svdq.load(model, output, progress=False)
    assert equal(model, svdq.from_pretrained(sd3 / "sd3.safetensors", model=sd3, **OPTIONS))


def test_a_checkpoint_of_another_model(sd3: Path, tmp_path: Path) -> None:
    make("flux")[0].save_config(tmp_path / "flux")  # type: ignore[operator]
    with pytest.raises(FileRefused, match="diffusers makes no FluxTransformer2DModel of it"):
        svdq.from_pretrained(sd3 / "sd3.safetensors", model=tmp_path / "flux", **OPTIONS)
    make("allegro")[0].save_config(tmp_path / "allegro")  # type: ignore[operator]
    with pytest.raises(FileRefused, match="diffusers converts none"):
        svdq.from_pretrained(sd3 / "sd3.safetensors", model=tmp_path / "allegro", **OPTIONS)


# ** 8 bits and less **


def in_8_bits(tensors: dict[str, Tensor], scaled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of linears in fp8, with a scale a row or without; and what they stand for."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        stored[name] = meant[name] = tensor
        if tensor.dim() == 2:
            scale = tensor.float().abs().amax(1) / 448 if scaled else torch.ones(tensor.shape[0])
            stored[name] = (tensor.float() / scale[:, None]).to(torch.float8_e4m3fn)
            meant[name] = stored[name].float() * scale[:, None]
            if scaled:
                stored[f"{name}_scale"] = scale
                stored[f"{name.removesuffix('weight')}input_scale"] = torch.ones(())
    return stored, meant


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8(scaled: bool, sd3: Path, tmp_path: Path) -> None:
    given, meant = in_8_bits(dict(make("sd3", BF16)[0].state_dict()), scaled)
    save_file(given, tmp_path / "fp8.safetensors")
    expected, _ = make("sd3", BF16)
    expected.load_state_dict(meant)
    svdq.quantize(expected, **OPTIONS)
    assert equal(svdq.from_pretrained(tmp_path / "fp8.safetensors", model=sd3, **OPTIONS), expected)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale_2", "weight_scale"])
def test_scales_that_are_not_known_are_not_left_out(name: str, sd3: Path, tmp_path: Path) -> None:
    given, _ = in_8_bits(dict(make("sd3", BF16)[0].state_dict()), False)
    save_file(given | {f"proj_out.{name}": torch.ones(())}, tmp_path / "fp8.safetensors")
    with pytest.raises(FileRefused, match=f"proj_out.{name} says that its weights are scaled"):
        svdq.from_pretrained(tmp_path / "fp8.safetensors", model=sd3, **OPTIONS)


def test_gguf(sd3: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer = gguf.GGUFWriter(tmp_path / "sd3.gguf", "sd3")
    for name, tensor in make("sd3")[0].state_dict().items():
        is_linear = tensor.dim() == 2 and "blocks" in name
        kind = gguf.GGMLQuantizationType.Q8_0 if is_linear else None
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind) if is_linear else tensor.numpy(), None, kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    expected = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "sd3.gguf"), config=str(sd3), quantization_config=GGUFQuantizationConfig(BF16), dtype=BF16
    )
    expected.dequantize()
    expected, loaded = make("sd3", BF16)[0], expected
    expected.load_state_dict(loaded.state_dict())
    svdq.quantize(expected, **OPTIONS)
    assert equal(svdq.from_pretrained(tmp_path / "sd3.gguf", model=sd3, **OPTIONS), expected)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "sd3.gguf").read_bytes()[:100_000])
    with pytest.raises(FileRefused, match="not a whole GGUF file"):
        svdq.from_pretrained(tmp_path / "cut.gguf", model=sd3, **OPTIONS)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(3), "b": nn.Linear(2, 2)}, tmp_path / "x.bin")
    with pytest.raises(FileRefused, match="weights_only=True"), stored(tmp_path, [tmp_path / "x.bin"]):
        pass


@pytest.mark.parametrize("content", [[torch.ones(3)], {"state_dict": 3}], ids=["a list", "a number"])
def test_pickles_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(FileRefused, match="not tensors by name"), stored(tmp_path, [tmp_path / "x.bin"]):
        pass
    torch.save({1: torch.ones(3), "a": torch.ones(2)}, tmp_path / "x.bin")
    with stored(tmp_path, [tmp_path / "x.bin"]) as tensors:
        assert list(tensors) == ["a"]


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"weight": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    with pytest.raises(FileRefused, match="tensor weight is in two of its files"), stored(tmp_path, files):
        pass
