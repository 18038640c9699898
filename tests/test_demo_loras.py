"""The adapters that the demo comes with (examples/loras), on the emoji model in 16 bits and quantized."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from lora_testing import products_of_adapters, run_as_rewritten
from safetensors.torch import load_file
from torch import Tensor

import svdq_compile as svdq
from conftest import quiet, relative_error
from svdq_compile.parameter import QuantizedWeight

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LORAS = EXAMPLES / "loras"
RANKS = {"flat": 12, "night": 8}
# Strengths, in the order of RANKS. Numbers that change become inputs of a graph, so the third needs no other.
MIXTURES = {"both": [0.6, 0.6], "flat": [1.0, 0.0], "night": [0.0, 1.0]}

sys.path.insert(0, str(EXAMPLES / "emoji"))


def pipeline() -> DiffusionPipeline:
    from pipeline import EmojiPipeline

    return EmojiPipeline.from_pretrained(EXAMPLES / "emoji", dtype=torch.float32)


@torch.no_grad()
def velocity(pipe: DiffusionPipeline) -> Tensor:
    """What the transformer says of noise, on the way to one picture."""
    from pipeline import image_ids

    embeds, pooled = pipe.encode_prompt(["dog face"], torch.device("cpu"), torch.float32)
    return pipe.transformer(
        hidden_states=torch.randn(1, 256, 48, generator=torch.Generator().manual_seed(0)),
        timestep=torch.tensor([0.9]),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        img_ids=image_ids(),
        txt_ids=torch.zeros(embeds.shape[1], 3),
        return_dict=False,
    )[0]


def with_adapters(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """The velocity without adapters, then with each of MIXTURES."""
    found = {"none": velocity(pipe)}
    for name in RANKS:
        pipe.load_lora_weights(LORAS, weight_name=f"{name}.safetensors", adapter_name=name)
    for name, strengths in MIXTURES.items():
        pipe.set_adapters(list(RANKS), strengths)
        found[name] = velocity(pipe)
    return found


@pytest.mark.parametrize("name", RANKS)
def test_files_are_small_and_named_as_diffusers_names_them(name: str) -> None:
    path = LORAS / f"{name}.safetensors"
    state = load_file(path)
    assert path.stat().st_size < 2e6
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert all(key.startswith("transformer.") for key in state)
    assert {value.shape[0] for key, value in state.items() if ".lora_A." in key} == {RANKS[name]}


def test_quantized_with_adapters_is_as_close_to_16_bit_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = with_adapters(pipeline())
    graphs = run_as_rewritten(monkeypatch)
    pipe = pipeline()
    pipe.transformer.compile_repeated_blocks(
        backend="svdquant", fullgraph=True, options=quiet(precision="w4a8", rank=16, refine=0)
    )
    velocity(pipe)  # quantizes
    velocity(pipe)  # from here on the weights stay where they are
    packed = packs(pipe)
    found = with_adapters(pipe)
    assert packs(pipe) == packed, "nothing is quantized again"
    assert [products_of_adapters(gm) for gm in graphs] == [0] * len(graphs), "all are folded"

    plain = relative_error(found["none"], exact["none"])
    for name in MIXTURES:
        assert relative_error(found[name], exact[name]) < 2 * plain
        assert relative_error(found["none"], exact[name]) > 3 * plain, "the adapter does something"


def packs(pipe: DiffusionPipeline) -> list[tuple[int, ...]]:
    """The packed tensors of each layer, by identity and address."""
    weights = [svdq.packed(p) for p in pipe.transformer.parameters() if isinstance(p, QuantizedWeight)]
    return [(id(w), *(t.data_ptr() for t in w.own_tensors().values())) for w in weights]
