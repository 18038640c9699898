"""LoRA adapters on models of which each rank has a part: the output is that of one process with the same adapter,
nothing more is sent for it, and what one GPU can do with adapters works on all ranks, or is refused in a sentence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lora_testing
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.loaders import FluxLoraLoaderMixin, PeftAdapterMixin
from lora_testing import products_of_adapters
from peft import LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from ranks_testing import message, results_on_ranks
from safetensors.torch import load_file
from test_tensor_parallel import Model, inputs, model, quantized, split
from torch import Tensor, fx, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import svdq_compile as svdq
from conftest import quiet, relative_error
from svdq_compile.split_linear import become_split
from svdq_compile.splits import INPUTS, Part, Split
from zoo import make

# Of both kinds of split, the second with value and gate side by side in one block; and one linear that is whole.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "modulate"]
SAME = 1e-5  # what is left is the order of sums, where no value lies between two codes: so not as in w4a8, by groups

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Adapted(Model, PeftAdapterMixin):
    """With the calls of diffusers."""


class Pipeline(FluxLoraLoaderMixin):
    """As much of a pipeline as loads an adapter: a whole one takes long to import."""

    text_encoder, lora_scale, hf_device_map, components = None, 1.0, None, {}

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


def as_diffusers(whole: nn.Module) -> Any:
    whole.__class__ = Adapted
    whole._hf_peft_config_loaded = False
    return whole


def config(rank: int = 4, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS} | options)


def add(whole: nn.Module, name: str = "style", rank: int = 4, seed: int = 0, **options: Any) -> None:
    """The same values under the same seed, whatever part of the model a rank has."""
    inject_adapter_in_model(config(rank, **options), whole, name)
    generator = torch.Generator().manual_seed(seed)
    for key, value in whole.named_parameters():
        if f".{name}." in key and "lora_" in key:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    whole.eval().requires_grad_(False)


def scale(whole: nn.Module, **strengths: float) -> None:
    for layer in whole.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(strengths))
            for name, strength in strengths.items():
                layer.set_scale(name, strength)
    whole.requires_grad_(False)


def enable(whole: nn.Module, enabled: bool) -> None:
    for layer in whole.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(enabled)
    whole.requires_grad_(False)


# What follows runs in the processes, all of it in one run.


def together(folder: Path) -> dict[str, Any]:
    found = {}
    for step in STEPS:
        torch._dynamo.reset()
        found[step.__name__] = step(folder)
    return found


def eagerly(folder: Path) -> Any:
    """In 4 bits, and partly in 16; with a bias of its own; two at once: how far from one process, and what they do."""
    found = []
    for options in ({}, {"skip": ["blocks.0.*"]}):
        whole, parts = quantized("int4", **options), split(quantized("int4", **options))
        before = whole(*inputs())
        for one in (whole, parts):
            add(one)
            add(one, "other", 6, 1, lora_bias=True, target_modules=["to_v", "to_out.0", "net.2"])
            scale(one, style=0.7, other=-0.5)
        expected = whole(*inputs())
        found.append((relative_error(parts(*inputs()), expected), relative_error(before, expected)))
    return found


@contextmanager
def run_as_rewritten() -> Iterator[list[fx.GraphModule]]:
    """Within the context graphs run as they are, without Inductor; -> the list they are put in."""
    with pytest.MonkeyPatch.context() as patch:
        yield lora_testing.run_as_rewritten(patch)


def in_a_graph(folder: Path) -> Any:
    with run_as_rewritten() as graphs:
        return events(graphs)


def events(graphs: list[fx.GraphModule]) -> Any:
    """Of each: how far from one process, how many graphs it costs, what is sent there, and what is left of adapters."""
    whole, parts = quantized("int4"), split(quantized("int4"))
    parts.compile(backend="svdquant", fullgraph=True, options=quiet())
    before = parts(*inputs())
    found = []
    steps: dict[str, Callable] = {
        "loaded": lambda one: add(one),
        "scaled": lambda one: scale(one, style=0.5),
        "scaled again": lambda one: scale(one, style=0.25),
        "another": lambda one: add(one, "other", 8, 1),
        "both": lambda one: scale(one, style=0.4, other=0.6),
        "both again": lambda one: scale(one, style=0.1, other=0.9),
        "disabled": lambda one: enable(one, False),
        "enabled": lambda one: enable(one, True),
    }
    for name, event in steps.items():
        graphs.clear()
        for one in (whole, parts):
            event(one)
        error = relative_error(parts(*inputs()), whole(*inputs()))
        found.append((name, error, len(graphs), sums_in(graphs), sum(map(products_of_adapters, graphs))))
    for layer in list(parts.modules()):
        if isinstance(layer, BaseTunerLayer):
            for name in ("style", "other"):
                layer.delete_adapter(name)
    return found, torch.equal(parts(*inputs()), before)


def sums_in(graphs: list[fx.GraphModule]) -> int:
    """How often the ranks sum something."""
    return sum("all_reduce" in str(node.target) for gm in graphs for node in gm.graph.nodes)


def through_inductor(folder: Path) -> Any:
    """The block with a gate, the joined concatenations among what is compiled."""
    whole, parts = quantized("int4"), split(quantized("int4"))
    for one in (whole, parts):
        add(one, rank=20)
    parts.blocks[1].compile(backend="svdquant", fullgraph=True, options=quiet())  # type: ignore[union-attr, operator]
    return relative_error(parts(*inputs()), whole(*inputs()))


def by_diffusers(folder: Path) -> Any:
    """From a file, swapped for another, saved, removed."""
    files = {"small": state_of(4, 2), "large": state_of(8, 3)}
    whole, parts = (as_diffusers(one) for one in (quantized("w4a16"), split(quantized("w4a16"))))
    before, errors = parts(*inputs()), []
    for one in (whole, parts):
        one.enable_lora_hotswap(target_rank=8)
        one.load_lora_adapter(dict(files["small"]), prefix=None, adapter_name="style")
        one.requires_grad_(False)
    errors.append(relative_error(parts(*inputs()), whole(*inputs())))
    for one in (whole, parts):
        one.load_lora_adapter(dict(files["large"]), prefix=None, adapter_name="style", hotswap=True)
    errors.append(relative_error(parts(*inputs()), whole(*inputs())))
    mine = folder / f"saved {dist.get_rank()}"
    parts.save_lora_adapter(mine, "style")
    (saved,) = mine.iterdir()
    same = all(torch.equal(value, files["large"][key]) for key, value in load_file(saved).items())
    effect = relative_error(parts(*inputs()), before)
    parts.delete_adapters("style")
    gone = torch.equal(parts(*inputs()), before)
    parts.load_lora_adapter(dict(files["small"]), prefix=None, adapter_name="again")
    parts.unload_lora()
    return errors, effect, same, gone, torch.equal(parts(*inputs()), before)


def state_of(rank: int, seed: int) -> dict[str, Tensor]:
    """An adapter as a file holds it."""
    whole = model()
    add(whole, "x", rank, seed)
    return {key: value.clone() for key, value in get_peft_model_state_dict(whole, adapter_name="x").items()}


def flux(folder: Path) -> Any:
    """diffusers' own plan, whose rowwise linears of two blocks; its loader would enlarge linears that are too small."""
    one, given = make("flux")
    names = ["to_q", "add_k_proj", "to_out.0", "to_add_out", "ff.net.2", "proj_mlp", "proj_out", "norm1.linear"]
    add(one, "x", 4, 5, target_modules=names)
    state = get_peft_model_state_dict(one, adapter_name="x")
    file = {f"transformer.{key}": value.clone() for key, value in state.items()}
    models = []
    for is_split in (False, True):
        transformer, _ = make("flux")
        svdq.quantize(transformer, **quiet(refine=0, rank=16, precision="w4a16", group="alone"))
        models.append(split(transformer) if is_split else transformer)
    before = models[0](**given)[0]
    for transformer in models:
        Pipeline(transformer).load_lora_weights(dict(file), adapter_name="style")
        transformer.requires_grad_(False)
    expected = models[0](**given)[0]
    models[1].compile_repeated_blocks(backend="svdquant", fullgraph=True, options=quiet())
    with run_as_rewritten() as graphs:
        found = models[1](**given)[0]
    left = sum(map(products_of_adapters, graphs))
    return relative_error(found, expected), relative_error(before, expected), [sums_in([gm]) for gm in graphs], left


def refused(folder: Path) -> Any:
    """What does not go with parts, and leaves the model as it was."""
    parts = split(quantized("int4"))
    before = parts(*inputs())
    kept = split(quantized("int4", weights="keep"))
    add(kept)
    with_adapter = quantized("int4")
    add(with_adapter)
    targets = ["to_q", "net.2"]
    told = {
        "LoKr": message(lambda: inject_adapter_in_model(LoKrConfig(target_modules=targets), parts)),
        "DoRA": message(lambda: inject_adapter_in_model(config(use_dora=True, target_modules=targets), parts)),
        "merging": message(lambda: next(m for m in kept.modules() if isinstance(m, BaseTunerLayer)).merge()),
        "merging safely": message(
            lambda: next(m for m in kept.modules() if isinstance(m, BaseTunerLayer)).merge(safe_merge=True)
        ),
        "before": message(lambda: split(with_adapter)),
    }
    return told, relative_error(parts(*inputs()), before)


def fusing(folder: Path) -> Any:
    """At a strength of its own, which diffusers would set first."""
    parts = as_diffusers(split(quantized("w4a16")))
    add(parts, target_modules=["to_q", "net.2"])
    scale(parts, style=0.7)
    before = parts(*inputs())
    return message(lambda: parts.fuse_lora(lora_scale=0.5)), torch.equal(parts(*inputs()), before)


def beginnings(folder: Path) -> Any:
    """What adding an adapter raises, by `init_lora_weights`, and how many linears have one then."""
    found = {}
    for initial in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "mica", "lora_ga", *SERVED):
        parts = split(quantized("int4", weights="keep"))
        told = message(partial(inject_adapter_in_model, begun(initial), parts))
        found[initial] = told, sum(isinstance(m, BaseTunerLayer) for m in parts.modules())
    return found


SERVED = (True, False, "gaussian", "orthogonal", "eva")


def begun(initial: Any) -> LoraConfig:
    """Past the checks of the config, which know other models than ours."""
    made = config(target_modules=["to_q", "net.2"])
    made.init_lora_weights = initial
    return made


STEPS = (eagerly, in_a_graph, through_inductor, by_diffusers, flux, refused, fusing, beginnings)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return results_on_ranks(2, together, folder, folder)


def test_eagerly(results: list[dict]) -> None:
    for result in results:
        for error, effect in result["eagerly"]:
            assert error < SAME
            assert effect > 0.05


def test_folded_in_the_graph(results: list[dict]) -> None:
    for result in results:
        found, same = result["in_a_graph"]
        assert same
        for name, error, graphs, sent, left in found:
            assert error < SAME, name
            assert graphs <= (0 if name in ("scaled again", "both again", "enabled") else 1), name
            assert sent == 4 * graphs, "nothing more is sent than without adapters"
            assert left == 0, name


def test_through_inductor(results: list[dict]) -> None:
    assert all(result["through_inductor"] < SAME for result in results)


def test_calls_of_diffusers(results: list[dict]) -> None:
    for result in results:
        errors, effect, same, gone, unloaded = result["by_diffusers"]
        assert max(errors) < SAME
        assert effect > 0.05
        assert same
        assert gone
        assert unloaded


def test_flux_by_its_own_plan(results: list[dict]) -> None:
    for result in results:
        error, effect, sums, left = result["flux"]
        assert error < SAME
        assert effect > 0.05
        assert set(sums) == {4, 1}, "of a double and of a single block, as without adapters"
        assert left == 0


def test_what_is_refused(results: list[dict]) -> None:
    for result in results:
        told, error = result["refused"]
        assert error < SAME
        for step, text in told.items():
            assert text.startswith("SplitRefused: "), (step, text)
        assert "lokr.Linear" in told["LoKr"]
        assert "DoraLinearVariant" in told["DoRA"]
        assert "2 ranks" in told["merging"]
        assert "delete_adapters, split the model, and load the adapter into that" in told["before"]


def test_a_refused_fusing_leaves_strengths(results: list[dict]) -> None:
    for result in results:
        told, same = result["fusing"]
        assert told.startswith("SplitRefused: fusing an adapter needs whole linears")
        assert same


def test_adapters_made_from_whole_weights_are_refused(results: list[dict]) -> None:
    for result in results:
        for initial, (told, adapted) in result["beginnings"].items():
            if initial in SERVED:
                assert (told, adapted) == ("", 4), initial
            else:
                assert told.startswith(f"SplitRefused: init_lora_weights={initial!r} makes"), (initial, told)
                assert adapted == 0


class Summed(nn.Module):
    """A linear whose product is summed over ranks, and an adapter around it, as a case has them."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.linear = case, nn.Linear(128, 128, bias=False)
        self.bias, self.a, self.b = (nn.Parameter(torch.randn(size) * 0.1) for size in ((128,), (4, 256), (128, 4)))

    def forward(self, x: Tensor) -> Tensor:
        own = self.a[:, 128:]
        inner = F.linear(x, own)
        y = self.linear(x)
        if self.case != "the product alone is whole":
            y = over_ranks(y, "max" if self.case == "the largest is taken" else "sum")
        if self.case == "after a gate":
            y = y * self.bias
        if self.case != "the adapter's alone is whole":
            inner = over_ranks(inner)
        y = y + self.bias + F.linear(inner, self.b) * 0.5
        if self.case == "the sum is read":
            return y, inner
        return y * own.sum() if self.case == "the matrix is read" else y


def over_ranks(x: Tensor, kind: str = "sum") -> Tensor:
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x, kind, "0"))


@pytest.fixture
def first_of_two() -> Iterator[None]:
    """The other one is not there: a sum is what this rank has."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize(
    ("case", "sums", "left"),
    [
        ("folded", 1, 1),  # down x
        ("the sum is read", 2, 2),
        ("the product alone is whole", 1, 3),
        ("the adapter's alone is whole", 1, 3),
        ("the largest is taken", 2, 3),
        ("after a gate", 2, 3),
        ("the matrix is read", 2, 3),
    ],
)
def test_what_is_folded(case: str, sums: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    whole, x = Summed(case).eval().requires_grad_(False), torch.randn(3, 128)
    svdq.quantize(whole, **quiet(refine=0, precision="w4a16", group="alone"))
    expected = whole(x)
    graphs = lora_testing.run_as_rewritten(monkeypatch)
    found = torch.compile(whole, backend="svdquant", fullgraph=True, options=quiet(group="alone"))(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert sums_in(graphs) == sums
    assert sum(node.target is F.linear for node in graphs[0].graph.nodes) == left


class Nested(nn.Module):
    """A row-parallel linear of which this rank has half, in a region of its own or not."""

    def __init__(self, region: bool) -> None:
        super().__init__()
        self.down, self.region = nn.Linear(128, 128), region

    @torch.compiler.nested_compile_region
    def in_a_region(self, x: Tensor) -> Tensor:
        return self.down(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.in_a_region(x) if self.region else self.down(x)


def fails(*_: Any) -> Any:
    raise RuntimeError("no compiler")


@pytest.mark.usefixtures("first_of_two")
@pytest.mark.parametrize("region", [False, True])
@pytest.mark.parametrize("stage", ["compiling a graph", "the first call of a compiled graph"])
def test_a_rank_that_cannot_compile_does_not_send_alone(
    stage: str, region: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is compiled an adapter's sum is part of the linear's; without adapters there is nothing to spare."""
    whole, x = Nested(region).eval().requires_grad_(False), torch.randn(3, 128)
    svdq.quantize(whole, **quiet(refine=0, precision="w4a16", group="alone"))
    become_split(whole.down, Part(Split(INPUTS, (256,)), 0, 2), "0")
    whole.down.in_features = 256
    inductor = fails if stage == "compiling a graph" else lambda *_: fails
    monkeypatch.setattr("svdq_compile.compiled.compile_with_inductor", inductor)
    whole.compile(backend="svdquant", fullgraph=True, options=quiet(group="alone", fallback=True))
    whole(x)
    add(whole, target_modules=["down"])
    for _ in range(2):
        text = message(lambda: whole(x))
        assert f"{stage} failed" in text
        assert "RuntimeError: no compiler. Mend that, or remove the adapters" in text
        assert "'fuse'" not in text
