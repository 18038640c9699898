"""LoRA on quantized models, through the calls of diffusers and PEFT.

The rewritten graphs run as they are, without Inductor, except where a test is about what Inductor is given.
"""

from collections.abc import Callable

import pytest
import torch
from fusion_testing import run_as_aten
from lora_testing import SAME, Session, products_of_adapters, run_as_rewritten
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, fx, nn

import svdq_compile as svdq
from conftest import Net, inputs, logged, net, quiet, relative_error
from svdq_compile import passes
from svdq_compile.errors import WeightsReleased
from zoo import ZOO, make

MODELS = ("flux", "sd3", "sdxl", "wan", "qwen_image", "pixart")
# Of every kind: siblings that share an input, one row a sample, and one that stays 16-bit (proj_out of the model).
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"]
OTHERS = ["ff.net.0.proj", "ff.net.2", "ffn.net.2", "norm1.linear", "img_mod.1", "proj_mlp", "proj_out", "proj_in"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    return run_as_rewritten(monkeypatch)


def config(rank: int = 4, targets: list[str] | None = None, **options) -> LoraConfig:
    targets = targets or [*ATTENTION, *OTHERS]
    return LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=targets, **options)


def add(model: nn.Module, name: str, rank: int = 4, seed: int = 0, **options) -> None:
    """An adapter with random values, the same ones under the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config(rank, **options), model, name)
        for key, value in model.named_parameters():
            if f".lora_A.{name}." in key or f".lora_B.{name}." in key:
                value.copy_(
                    torch.randn(value.shape) * (0.25 * rank**-0.5 if "lora_B" in key else value[0].numel() ** -0.5)
                )
    model.eval().requires_grad_(False)


def mix(model: nn.Module, strengths: dict[str, float]) -> None:
    """What set_adapters does, for models without that method (PixArt) too."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(list(strengths))
            for name, strength in strengths.items():
                module.set_scale(name, strength)
    model.requires_grad_(False)


def state_of(rank: int, seed: int, name: str = "wan") -> dict[str, Tensor]:
    """An adapter as a file holds it."""
    model, _ = make(name)
    add(model, "x", rank, seed)
    state = get_peft_model_state_dict(model, adapter_name="x")
    return {f"transformer.{key}": value.clone() for key, value in state.items()}


CASES = [(name, False) for name in MODELS] + [(name, True) for name in MODELS if ZOO[name].regional]


@pytest.mark.parametrize(("name", "regional"), CASES)
def test_folded_is_what_it_would_be_beside(name: str, regional: bool, graphs: list, monkeypatch) -> None:
    """Two adapters of uneven ranks, one of them only on attention."""
    session = Session(name, regional=regional)
    add(session.model, "a", 4, 0)
    add(session.model, "b", 12, 1, targets=ATTENTION)
    mix(session.model, {"a": 0.8, "b": -0.5})
    graphs.clear()
    folded = session.run()
    session.check_nothing_was_quantized_again()
    left = sum(products_of_adapters(gm) for gm in graphs)

    monkeypatch.setattr(passes, "fold_adapters", lambda gm: 0)
    torch._dynamo.reset()
    graphs.clear()
    beside = session.run()
    assert left < 0.1 * sum(products_of_adapters(gm) for gm in graphs), "almost all sit on quantized layers"

    model, given = make(name)
    plain = model(**given)[0]
    add(model, "a", 4, 0)
    add(model, "b", 12, 1, targets=ATTENTION)
    mix(model, {"a": 0.8, "b": -0.5})
    exact = model(**given)[0]
    assert relative_error(folded, session.before) > 0.05, "the adapters do something"
    assert relative_error(folded, beside) < SAME
    # Of the whole: the adapters make another function of the model, which passes errors of its layers on differently.
    assert relative_error(folded, exact) < 1.5 * relative_error(session.before, plain)


@pytest.mark.parametrize("regional", [False, True])
def test_events_of_a_session(regional: bool, graphs: list) -> None:
    """How many graphs each change of the adapters costs: one for each kind of block, or none."""
    session = Session("wan", regional=regional)
    model = session.model

    def new_graphs(event: Callable = lambda: None) -> int:
        event()
        model.requires_grad_(False)
        graphs.clear()
        session.run()
        return len(graphs)

    assert new_graphs(lambda: model.add_adapter(config(4), "a")) == 1
    assert new_graphs(lambda: model.set_adapters("a", 0.5)) == 1, "a number becomes an input"
    assert [new_graphs(lambda s=s: model.set_adapters("a", s)) for s in (0.25, -3.0, 0.1)] == [0, 0, 0]
    assert new_graphs(model.disable_lora) <= 1
    assert new_graphs(model.enable_lora) == 0
    assert new_graphs(lambda: model.add_adapter(config(8), "b")) == 1
    assert new_graphs(lambda: model.set_adapters(["a", "b"], [0.7, 0.2])) == 1
    assert [new_graphs(lambda s=s: model.set_adapters(["a", "b"], [s, 1 - s])) for s in (0.6, 0.3)] == [0, 0]
    assert new_graphs(lambda: model.set_adapters("b", 0.9)) <= 1
    assert new_graphs(lambda: model.delete_adapters("a")) <= 1
    assert new_graphs(lambda: model.delete_adapters("b")) <= 1
    session.check_nothing_was_quantized_again()
    assert torch.equal(session.run(), session.before), "what is left is the model as it was"


def test_more_adapters_than_dynamo_would_allow(graphs: list) -> None:
    """Each name is a new graph; torch's limit of 8 would end in eager code. The same name again is none."""
    session = Session("wan", regional=True)
    for i in range(10):
        session.model.add_adapter(config(4, ["to_q"]), f"adapter{i}")
        session.model.requires_grad_(False)
        assert session.run().isfinite().all()
        session.model.delete_adapters(f"adapter{i}")
        graphs.clear()
    session.model.add_adapter(config(4, ["to_q"]), "adapter3")
    session.model.requires_grad_(False)
    session.run()
    assert not graphs


def test_strengths_reach_the_output_without_recompiling(graphs: list) -> None:
    session = Session("wan")
    add(session.model, "a")
    for strength in (1.0, 0.5):
        session.model.set_adapters("a", strength)
        session.run()
    graphs.clear()
    for strength in (0.3, 2.0):
        session.model.set_adapters("a", strength)
        output = session.run()
        assert not graphs
        model, given = make("wan")
        add(model, "a")
        model.set_adapters("a", strength)
        exact = model(**given)[0]
        assert relative_error(output, exact) < 0.1
        assert relative_error(session.before, exact) > relative_error(output, exact)


def test_strengths_stay_inputs_in_what_inductor_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A symbol that AOTAutograd could not turn into a tensor would cost a graph for each value."""
    aten = run_as_aten(monkeypatch)
    session = Session("flux", regional=True)
    add(session.model, "a")
    outputs = []
    for scale in (1.0, 0.5, 0.3, 0.2, 0.0):
        if scale == 0.3:
            aten.clear()
        outputs.append(session.run(joint_attention_kwargs={"scale": scale}))
    assert not aten
    assert relative_error(outputs[-1], session.before) < SAME, "no strength, no adapter"
    assert relative_error(outputs[0], session.before) > relative_error(outputs[2], session.before) > 0.01


@pytest.mark.parametrize("rank", [4, 16])
def test_hotswap_costs_no_graph(rank: int, graphs: list) -> None:
    session = Session("wan", regional=True)
    session.model.enable_lora_hotswap(target_rank=16)
    session.model.load_lora_adapter(state_of(4, 0), adapter_name="a")
    session.model.requires_grad_(False)
    session.run()
    session.run()
    graphs.clear()
    session.model.load_lora_adapter(state_of(rank, 1), adapter_name="a", hotswap=True)
    swapped = session.run()
    assert not graphs
    session.check_nothing_was_quantized_again()

    fresh = Session("wan", regional=True)
    fresh.model.load_lora_adapter(state_of(rank, 1), adapter_name="a")
    fresh.model.requires_grad_(False)
    assert relative_error(swapped, fresh.run()) < SAME
    assert relative_error(swapped, session.before) > 0.05


@pytest.mark.parametrize(("of_model", "of_adapter"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_adapters_of_another_dtype(of_model: torch.dtype, of_adapter: torch.dtype, graphs: list) -> None:
    session = Session("wan", of_model)
    add(session.model, "a")
    for name, p in session.model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(of_adapter)
    output = session.run()
    model, given = make("wan")
    add(model, "a")
    exact = model(**given)[0]
    assert output.dtype == session.before.dtype
    assert relative_error(output, exact) < 0.1 < relative_error(session.before, exact)
    session.check_nothing_was_quantized_again()


def test_rank_above_the_limit(graphs: list) -> None:
    """More columns than the kernel takes: the library multiplies by them."""
    session = Session("wan")
    add(session.model, "a", 128)
    output = session.run()
    assert products_of_adapters(graphs[-1]) == 2, "only that of the final projection"
    model, given = make("wan")
    add(model, "a", 128)
    assert relative_error(output, model(**given)[0]) < 0.1


def test_nan_in_an_adapter_shows(graphs: list) -> None:
    session = Session("wan")
    add(session.model, "a")
    session.model.blocks[0].attn1.to_q.lora_A["a"].weight[0, 0] = float("nan")
    assert session.run().isnan().any()
    session.model.delete_adapters("a")
    assert torch.equal(session.run(), session.before)


def test_wrong_shapes_and_unknown_targets_are_refused_and_change_nothing(graphs: list) -> None:
    session = Session("wan")
    wrong = {key: torch.zeros(3, 5) if "to_q.lora_A" in key else value for key, value in state_of(4, 0).items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks\.0\.attn1\.to_q\.lora_A"):
        session.model.load_lora_adapter(wrong, adapter_name="a")
    with pytest.raises(ValueError, match="to_nowhere"):
        session.model.add_adapter(config(4, ["to_nowhere"]), "b")
    session.check_nothing_was_quantized_again()
    assert relative_error(session.run(), session.before) < SAME


def test_fusing_names_the_remedy_and_leaves_the_adapter_in_place(graphs: list) -> None:
    session = Session("wan")
    add(session.model, "a")
    before = session.run()
    with pytest.raises(WeightsReleased, match=r"blocks\.0\.attn1\.to_q, .*set_adapters"):
        session.model.fuse_lora()
    session.model.unfuse_lora()
    assert relative_error(session.run(), before) < SAME
    session.check_nothing_was_quantized_again()


@pytest.mark.parametrize("weights", ["offload", "keep"])
def test_fusing_into_originals_quantizes_the_sum(weights: str, graphs: list) -> None:
    session = Session("wan", weights=weights)
    add(session.model, "a", targets=["to_q", "to_k"])
    apart = session.run()
    session.model.fuse_lora()
    for _ in range(3):
        fused = session.run()
    assert relative_error(fused, apart) < 0.1


def test_dora_needs_the_weight_and_says_so(graphs: list) -> None:
    session = Session("wan")
    with pytest.raises(WeightsReleased, match=r"blocks\.0\.attn1\.to_\w"):
        session.model.add_adapter(config(4, use_dora=True), "a")


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig, OFTConfig])
def test_other_methods_run_beside_the_base(kind: type, graphs: list) -> None:
    options = {"oft_block_size": 8} if kind is OFTConfig else {"r": 4, "alpha": 32}
    outputs = []
    for quantize in (False, True):
        model = net()
        call = torch.compile(model, backend="svdquant", options=quiet(rank=16)) if quantize else model
        before = [call(*inputs()) for _ in range(2)][-1]
        torch.manual_seed(0)
        inject_adapter_in_model(kind(target_modules=["to_q", "up", "modulate"], init_weights=False, **options), model)
        model.requires_grad_(False)
        outputs.append(call(*inputs()))
    assert relative_error(before, outputs[0]) > 2 * relative_error(outputs[1], outputs[0])
    assert relative_error(outputs[1], outputs[0]) < 0.1


def adapted(model: Net, **options) -> Net:
    torch.manual_seed(0)
    inject_adapter_in_model(config(4, ["to_q", "modulate", "up"], **options), model, "a")
    return model.requires_grad_(False)


def test_an_adapter_with_a_bias_stays_beside_and_is_reported(graphs: list) -> None:
    model = net()
    call = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet(rank=16))
    call(*inputs())
    adapted(model, lora_bias=True)
    with logged("svdq_compile.passes") as records:
        output = call(*inputs())
    assert any("not folded: blocks.0.to_q.lora_A.a" in record.getMessage() for record in records)
    assert relative_error(output, adapted(net(), lora_bias=True)(*inputs())) < 0.1


@pytest.mark.parametrize("by_blocks", [False, True])
def test_adapters_loaded_first_change_nothing_in_what_is_quantized(by_blocks: bool, graphs: list) -> None:
    model, plain = adapted(net()), net()
    exact = model(*inputs())
    for each in (model, plain):
        if by_blocks:
            for block in each.blocks:
                block.compile(backend="svdquant", fullgraph=True, options=quiet(rank=16))
        else:
            each.compile(backend="svdquant", fullgraph=True, options=quiet(rank=16))
        outputs = [each(*inputs()) for _ in range(2)]
        if each is model:
            assert 0 < relative_error(outputs[-1], exact) < 0.1
    reports = [
        {row.name: row.precision for row in svdq.report(each) if ".lora_" not in row.name} for each in (model, plain)
    ]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(("precision", "most"), [("w4a8", 0.07), ("w8a8", 0.02)])
def test_pointwise_convolutions(precision: str, most: float, graphs: list) -> None:
    def convolutions() -> nn.Sequential:
        torch.manual_seed(0)
        layers = (nn.Conv2d(128, 256, 1), nn.SiLU(), nn.Conv2d(256, 128, 1, bias=False), nn.Conv2d(128, 8, 3))
        return nn.Sequential(*layers).eval().requires_grad_(False)

    x = torch.randn(2, 128, 6, 7)
    model = convolutions()
    call = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet(rank=16, precision=precision))
    call(x)
    for each in (model, exact := convolutions()):
        torch.manual_seed(1)
        inject_adapter_in_model(config(4, ["0", "2", "3"]), each, "a")
        each.requires_grad_(False)
    graphs.clear()
    output = call(x)
    assert products_of_adapters(graphs[-1]) == 2, "only those of the 3x3 convolution"
    assert relative_error(output, exact(x)) < most


def test_nested_regions(graphs: list) -> None:
    @torch.compiler.nested_compile_region
    def region(block, x, condition):
        return block(x, condition)

    class Nested(Net):
        def forward(self, x, condition):
            x = self.embed(x)
            for block in self.blocks:
                x = region(block, x, condition)
            return self.project(x)

    outputs = []
    for kind in (Nested, Net):
        torch.manual_seed(0)
        model = kind(3).eval().requires_grad_(False)
        call = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet(rank=16))
        call(*inputs())
        adapted(model)
        outputs.append(call(*inputs()))
    assert relative_error(outputs[0], outputs[1]) < SAME


def test_saving_leaves_adapters_out(graphs: list, tmp_path) -> None:
    """What is saved is the model that PEFT found; it loads with or without adapters around it."""
    session = Session("wan", regional=True)
    add(session.model, "a")
    with_adapter = session.run()
    svdq.save(session.model, tmp_path / "model", progress=False)
    fresh, given = make("wan")
    for adapted in (False, True):
        if adapted:
            add(fresh, "a")
        svdq.load(fresh, tmp_path / "model", progress=False)
        fresh.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=quiet())
        assert relative_error(fresh(**given)[0], with_adapter if adapted else session.before) < SAME


def test_concatenations_are_one_operator_which_inductor_takes() -> None:
    """So that they are one kernel on a GPU, not one for each linear."""
    outputs, made = [], []
    for through_inductor in (False, True):
        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch:
            if not through_inductor:
                made = run_as_rewritten(patch)
            model = net()
            call = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet(rank=16))
            call(*inputs())
            adapted(model)
            outputs.append(call(*inputs()))
    nodes = [node for node in made[-1].graph.nodes if node.target in (torch.cat, torch._foreach_mul)]
    assert [node.target for node in nodes].count(torch._foreach_mul) == 1
    assert all(list(node.users) == [nodes[-1]] for node in nodes[:-1])
    assert relative_error(*outputs) < SAME
