"""What is quantized is decided once for a model: the same layers however it is compiled, cut up, called or calibrated.

The rewritten graphs run as they are; what Inductor makes of them is not the question here.
"""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor, nn

import svdq_compile as svdq
import zoo
from conftest import WIDTH, quiet, relative_error
from svdq_compile import undecided
from svdq_compile.errors import NothingToQuantize
from svdq_compile.layers import BETWEEN
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.passes.scope import OUTSIDE

pytestmark = pytest.mark.usefixtures("without_inductor")

BLOCKS = {f"blocks.{i}.{name}" for i in range(3) for name in ("norm_in", "first", "second")}
ADAPTER = "an adapter, which is small and may be swapped"
CONFIG = svdq.Config(**quiet(rank=16, refine=1))


def nothing(x: Tensor) -> Tensor:
    return x


def breaks(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


@torch.compiler.disable
def disabled(x: Tensor) -> Tensor:
    return x * 1.0


class Once:
    """Does something at its first call only, as models do that make a table of positions."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self.act = act
        self.is_done = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_done:
            return x
        x = self.act(x)
        self.is_done = True
        return x


def on_device(x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return x + torch.zeros(1)


class Block(nn.Module):
    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm_in = nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(self.first(self.norm_in(x)))
        return x + self.second(h)


class Model(nn.Module):
    """Embedder, blocks, final projection; `between` stands between these, `inside` in the middle of each block."""

    def __init__(self, between: Callable = nothing, inside: Callable = nothing) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(inside) for _ in range(3))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.embed(x))
        for block in self.blocks:
            x = block(x)
        return self.project(self.between(x))


def make(between: Callable = nothing, inside: Callable = nothing) -> Model:
    torch.manual_seed(0)
    return Model(between, inside).eval().requires_grad_(False)


X = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module) -> set[str]:
    return {n.removesuffix(".weight") for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)}


def reasons(model: nn.Module) -> dict[str, str]:
    return {row.name: row.reason for row in svdq.report(model) if row.reason}


def whole(model: nn.Module, **options) -> Callable:
    return torch.compile(model, backend="svdquant", options=quiet(rank=16, refine=1) | options)


def by_blocks(model: nn.Module, **options) -> Callable:
    for block in model.blocks:
        block.compile(backend="svdquant", options=quiet(rank=16, refine=1) | options)
    return model


def of_a_closure(model: nn.Module, **options) -> Callable:
    return torch.compile(lambda x: model(x), backend="svdquant", options=quiet(rank=16, refine=1) | options)


def of_a_list(model: nn.Module, **options) -> Callable:
    models = {"models": [model]}

    def step(x: Tensor) -> Tensor:
        return models["models"][0](x)

    return torch.compile(step, backend="svdquant", options=quiet(rank=16, refine=1) | options)


def by_its_method(model: nn.Module, **options) -> Callable:
    model.forward = torch.compile(model.forward, backend="svdquant", options=quiet(rank=16, refine=1) | options)
    return model


def in_a_thread(model: nn.Module, **options) -> Callable:
    run = whole(model, **options)

    def call(x: Tensor) -> Tensor:
        results: list[Tensor] = []

        def work() -> None:
            with torch.no_grad():
                results.append(run(x))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return results[0]

    return call


WAYS = (whole, by_blocks, of_a_closure, of_a_list, by_its_method, in_a_thread)
CUTS = {
    "uncut": lambda: {},
    "device_once": lambda: {"between": Once(on_device)},
    "break_once": lambda: {"between": Once(breaks)},
    "breaks_between": lambda: {"between": breaks},
    "breaks_inside": lambda: {"inside": breaks},
    "disabled_inside": lambda: {"inside": disabled},
    "breaks_everywhere": lambda: {"inside": breaks, "between": disabled},
}


@pytest.mark.parametrize(
    ("way", "cut"),
    [(whole, cut) for cut in CUTS] + [(way, "breaks_everywhere") for way in WAYS[1:]] + [(by_blocks, "device_once")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_same_layers_whichever_graphs_they_are_in(way: Callable, cut: str) -> None:
    model = make(**CUTS[cut]())
    reference = make()(X)
    run = way(model)
    for _ in range(4):
        output = run(X)
    assert quantized(model) == BLOCKS
    assert {p._svdq_name for p in model.parameters() if isinstance(p, QuantizedWeight)} == BLOCKS
    assert 0 < relative_error(output, reference) < 0.1
    assert reasons(model) == dict.fromkeys(("embed", "project"), OUTSIDE)


@pytest.mark.parametrize(("way", "cut"), [(whole, "uncut"), (by_blocks, "breaks_everywhere")], ids=["whole", "cut"])
@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("blocks.1.first", {"blocks.1.first"}),
        ("blocks.1", {name for name in BLOCKS if name.startswith("blocks.1.")}),
        ("blocks.[02]", {name for name in BLOCKS if name[7] in "02"}),
        ("*.second", {name for name in BLOCKS if name.endswith("second")}),
    ],
    ids=["layer", "block", "blocks", "pattern"],
)
def test_skip_takes_full_names(way: Callable, cut: str, skip: str, left: set[str]) -> None:
    model = make(**CUTS[cut]())
    run = way(model, skip=[skip])
    for _ in range(3):
        run(X)
    assert quantized(model) == BLOCKS - left
    assert {name for name, reason in reasons(model).items() if reason == "option skip"} == left


def test_a_graph_that_an_embedder_and_a_block_share() -> None:
    """Both are a Block, and each Block is compiled by itself; the embedder comes first, and is not quantized."""
    model = make()
    model.embed, model.project = Block(nothing), Block(nothing)
    model.requires_grad_(False)
    reference = model(X)
    for module in (model.embed, *model.blocks, model.project):
        module.compile(backend="svdquant", options=quiet(rank=16, refine=1))
    for _ in range(3):
        output = model(X)
    assert quantized(model) == BLOCKS
    assert 0 < relative_error(output, reference) < 0.1


def test_what_stays_16_bit_is_compiled_once_all_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo sees no change of class in such a block, and would go on calling what observes."""
    made: list[int] = []

    def counted(gm, inputs: list, mode: str | None, rewrite: Callable | None = None) -> Callable:
        made.append(len(inputs))
        return gm.forward

    monkeypatch.setattr(undecided, "compile_with_inductor", counted)
    model = make()
    run = by_blocks(model, skip=["blocks.1"])
    for _ in range(4):
        run(X)
    assert len(made) == 1
    run(torch.cat([X, X], 1))
    assert len(made) == 2, "another size"
    assert torch.equal(run(X), run(X))
    assert len(made) == 2


def test_a_second_model_with_the_graphs_of_the_first() -> None:
    """It stands in a wrapper, and is called while the first one's graphs still observe."""
    first, second = make(), make()
    holder = nn.ModuleDict({"inner": second})
    runs = [whole(model, calibration_steps=2) for model in (first, second)]
    for _ in range(3):
        outputs = [run(X) for run in runs]
    assert quantized(first) == quantized(second) == BLOCKS
    assert torch.equal(*outputs)
    assert quantized(holder) == {f"inner.{name}" for name in BLOCKS}


class Wrapper(nn.Module):
    """A pipeline that is a module: the model is one of its parts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.encoder(x))


def test_in_a_module_around_the_model() -> None:
    pipeline = Wrapper(make(between=breaks)).requires_grad_(False)
    pipeline.model = whole(pipeline.model, skip=["model.blocks.0"])
    for _ in range(3):
        pipeline(X)
    names = {name.replace("._orig_mod", "") for name in quantized(pipeline)}
    assert names == {f"model.{name}" for name in BLOCKS if not name.startswith("blocks.0")}
    assert reasons(pipeline)["model.embed"] == OUTSIDE


def test_weights_that_no_module_holds() -> None:
    """Then the graph is all there is to ask."""
    model = make()
    weights = {name: nn.Parameter(p.clone(), requires_grad=False) for name, p in model.named_parameters()}
    run = torch.compile(
        lambda weights, x: torch.func.functional_call(model, weights, (x,)), backend="svdquant", options=quiet(rank=16)
    )
    for _ in range(2):
        output = run(weights, X)
    kept = {name.removesuffix(".weight") for name, p in weights.items() if isinstance(p, QuantizedWeight)}
    assert kept == BLOCKS
    assert 0 < relative_error(output, model(X)) < 0.1


def test_the_model_that_quantize_is_given_is_the_root() -> None:
    """Also where the calibration calls what stands around it."""
    pipeline = Wrapper(make(between=breaks)).requires_grad_(False)
    config = svdq.Config(**quiet(rank=16, refine=1, skip=["blocks.0"]))
    svdq.quantize(pipeline.model, config, calibrate=lambda _: pipeline(X))
    assert quantized(pipeline.model) == {name for name in BLOCKS if not name.startswith("blocks.0")}
    names = {p._svdq_name for p in pipeline.parameters() if isinstance(p, QuantizedWeight)}
    assert names == quantized(pipeline.model)


def test_a_block_that_was_tried_alone_before() -> None:
    """It was observed, but not quantized yet, as a model of its own."""
    model = make()
    run = by_blocks(model, calibration_steps=3, skip=["blocks.0.first"])
    model.blocks[0](X)
    for _ in range(4):
        run(X)
    assert quantized(model) == BLOCKS - {"blocks.0.first"}


def test_a_block_that_is_put_into_the_model_later() -> None:
    model = make()
    run = by_blocks(model, skip=["blocks.3.first"])
    run(X)
    model.blocks.append(Block(nothing).requires_grad_(False))
    model.blocks[3].compile(backend="svdquant", options=quiet(rank=16, refine=1, skip=["blocks.3.first"]))
    for _ in range(2):
        run(X)
    assert quantized(model) == BLOCKS | {"blocks.3.norm_in", "blocks.3.second"}


class Tied(nn.Module):
    """Projects by the table that its embedding looks rows up in."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(breaks(self.layer(breaks(self.table(ids)))), self.table.weight)


def test_a_table_that_a_linear_reads_too() -> None:
    model, ids = Tied().requires_grad_(False), torch.arange(24)[None]
    reference = model(ids)
    run = whole(model)
    for _ in range(3):
        output = run(ids)
    assert quantized(model) == {"layer"}
    assert 0 < relative_error(output, reference) < 0.1


# A weight that is quantized is accepted wherever a graph holds it.


@pytest.mark.parametrize("cut", ["uncut", "device_once", "breaks_everywhere"])
@pytest.mark.parametrize("part", ["embed", "project"])
def test_an_embedder_that_was_quantized_by_itself(part: str, cut: str) -> None:
    model = make(**CUTS[cut]())
    svdq.quantize(model.get_submodule(part), CONFIG)
    run = whole(model)
    for _ in range(4):
        output = run(X)
    assert quantized(model) == BLOCKS | {part}
    assert 0 < relative_error(output, make()(X)) < 0.15


def test_an_embedder_that_was_compiled_by_itself() -> None:
    model = make()
    model.embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    alone = whole(model.embed)
    for _ in range(2):
        alone(X)
    run = whole(model)
    for _ in range(3):
        run(X)
    assert quantized(model) == BLOCKS | {"embed.0", "embed.1"}


# Ahead of time, and from a file.


@pytest.mark.parametrize(
    "given",
    [{"calibrate": lambda model: model(X)}, {"example_inputs": {"x": X}}, {}],
    ids=["calibrated", "traced", "by_weights"],
)
@pytest.mark.parametrize("cut", ["uncut", "breaks_everywhere"])
def test_ahead_of_time(given: dict, cut: str, tmp_path) -> None:
    model = make(**CUTS[cut]())
    svdq.quantize(model, CONFIG, **given)
    assert quantized(model) == BLOCKS
    svdq.save(model, tmp_path / "model.safetensors", progress=False)
    other = svdq.load(make(**CUTS[cut]()), tmp_path / "model.safetensors", progress=False)
    run = by_blocks(other)
    for _ in range(2):
        output = run(X)
    assert quantized(other) == BLOCKS
    assert reasons(other) == reasons(model) == dict.fromkeys(("embed", "project"), OUTSIDE)
    assert 0 < relative_error(output, make()(X)) < 0.1


# Repeated blocks.


class Attention(nn.Module):
    """A block with a norm, as most have."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.to_q, self.to_out = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out(torch.tanh(self.to_q(self.norm(x))))


def mlp(width: int = WIDTH, hidden: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))


class Tree(nn.Module):
    """Parts by name, run one after the other; lists element by element."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for element in part if isinstance(part, nn.ModuleList) else [part]:
                x = element(x)
        return x


def repeat(make_one: Callable[[], nn.Module], times: int) -> nn.ModuleList:
    return nn.ModuleList(make_one() for _ in range(times))


class Declaring(Tree):
    """Says what its blocks are, in diffusers' way."""

    _repeated_blocks = ("Attention",)


def linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def names(model: nn.Module, *parts: str) -> set[str]:
    return {name for name in linears(model) if name.startswith(parts)}


TREES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "guidance_beside_blocks": (
        lambda: Tree(guidance=Tree(layers=repeat(mlp, 5)), blocks=repeat(partial(Attention, 2 * WIDTH), 2)),
        ("blocks",),
    ),
    "guidance_of_width_of_the_blocks": (
        lambda: Tree(guide=repeat(mlp, 5), blocks=repeat(lambda: nn.Sequential(mlp(), Attention()), 2)),
        ("blocks",),
    ),
    "attention_and_mlps_apart": (
        lambda: Tree(embed=mlp(), attentions=repeat(Attention, 2), mlps=repeat(partial(mlp, WIDTH, 4 * WIDTH), 2)),
        ("attentions", "mlps"),
    ),
    "mlps_alone": (lambda: Tree(embed=nn.Linear(WIDTH, WIDTH), mlps=repeat(mlp, 3)), ("mlps",)),
    "no_blocks": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), ("",)),
    "one_block": (Attention, ("",)),
    "refiners_are_blocks": (
        lambda: Tree(refiners=repeat(Attention, 1), blocks=repeat(lambda: nn.Sequential(Attention(), mlp()), 3)),
        ("refiners", "blocks"),
    ),
    "levels_of_a_unet": (
        lambda: Tree(
            embed=mlp(),
            down=repeat(lambda: Tree(proj=nn.Linear(WIDTH, WIDTH), attentions=repeat(Attention, 2)), 2),
            mid=Tree(attentions=repeat(Attention, 1)),
        ),
        ("down", "mid.attentions"),
    ),
    "two_models_in_a_pipeline": (
        lambda: Tree(small=Tree(mlps=repeat(mlp, 2)), large=Tree(blocks=repeat(partial(Attention, 4 * WIDTH), 2))),
        ("small", "large"),
    ),
    "declared": (
        lambda: Declaring(guide=repeat(lambda: nn.Sequential(mlp(), mlp()), 5), blocks=repeat(Attention, 2)),
        ("blocks",),
    ),
    "declared_deep_inside": (
        lambda: Declaring(down=repeat(lambda: Tree(proj=mlp(), attentions=repeat(Attention, 2)), 2)),
        ("down.0.attentions", "down.1.attentions"),
    ),
    "declared_beside_another_model": (
        lambda: Tree(
            encoder=Tree(layers=repeat(Attention, 2), head=mlp()),
            denoiser=Declaring(embed=mlp(), blocks=repeat(Attention, 2)),
        ),
        ("encoder.layers", "denoiser.blocks"),
    ),
    "declared_but_not_there": (
        lambda: Declaring(embed=mlp(), blocks=repeat(lambda: nn.Sequential(mlp(), mlp()), 2)),
        ("blocks",),
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_repeated_blocks(tree: str) -> None:
    build, blocks = TREES[tree]
    model = build()
    assert names(model, *blocks) == {row.name for row in svdq.report(model) if row.reason != OUTSIDE}


@pytest.mark.parametrize("way", [whole, of_a_closure, of_a_list])
def test_a_graph_that_holds_all_does_not_decide_either(way: Callable) -> None:
    """By the names in it the embedders are blocks; no module's frame stands above a closure's."""
    build, blocks = TREES["guidance_of_width_of_the_blocks"]
    model = build().requires_grad_(False)
    run = way(model)
    for _ in range(2):
        run(X)
    assert quantized(model) == names(model, *blocks)


def test_blocks_are_the_same_with_adapters() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    build, blocks = TREES["guidance_beside_blocks"]
    model = build()
    expected = names(model, *blocks)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=r".*layers\.\d\.[02]|.*to_q"), model)
    rows = svdq.report(model)
    assert {row.name for row in rows if row.reason not in (OUTSIDE, ADAPTER)} == expected
    assert sum(row.reason == ADAPTER for row in rows) == 2 * (5 * 2 + 2)


class Handmade(nn.Module):
    """A block whose linears are none of torch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.w_out = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, self.w_in)), self.w_out)


@pytest.mark.parametrize("cut", [nothing, breaks], ids=["uncut", "cut"])
def test_weights_of_handmade_linears(cut: Callable) -> None:
    model = make(between=cut)
    model.blocks = nn.ModuleList(Handmade() for _ in range(2))
    model.requires_grad_(False)
    run = whole(model, skip=["blocks.1.w_out"])
    for _ in range(3):
        run(X)
    assert quantized(model) == {"blocks.0.w_in", "blocks.0.w_out", "blocks.1.w_in"}


# Calibrating again and again.


def few_layers(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (make, len(BLOCKS)),
        (partial(make, inside=breaks), len(BLOCKS)),
        (lambda: few_layers(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))), 2),
        (lambda: few_layers(nn.Linear(WIDTH, WIDTH)), 1),
    ],
    ids=["model", "with_breaks", "sequential", "linear"],
)
@pytest.mark.parametrize("given", ["calibrate", "example_inputs"])
def test_any_number_of_instances_can_be_quantized(build: Callable, count: int, given: str) -> None:
    """Dynamo's limit is 8 graphs."""
    for _ in range(10):
        model = build()
        if given == "calibrate":
            svdq.quantize(model, CONFIG, calibrate=lambda model: model(X))
        else:
            svdq.quantize(model, CONFIG, example_inputs={"input" if count < 3 else "x": X})
        assert sum(isinstance(p, QuantizedWeight) for p in model.parameters()) == count
    assert all(p._svdq.shared.smooth.std() > 0 for p in model.parameters() if isinstance(p, QuantizedWeight))


def test_sizes_beyond_dynamos_limit_are_observed() -> None:
    model = make()

    def calibrate(model: nn.Module) -> None:
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            for tokens in range(20, 32):
                x = torch.zeros(1, tokens, WIDTH)
                x[..., tokens] = 100.0  # of each size another channel is loud
                model(x)

    report = svdq.quantize(model, svdq.Config(**quiet(calibration_steps=8)), calibrate=calibrate)
    assert quantized(model) == BLOCKS
    assert all(row.error is not None for row in report if row.name in BLOCKS)


@pytest.mark.parametrize(
    "given", [{}, {"calibrate": lambda model: model(X[..., :16])}], ids=["by_weights", "calibrated"]
)
def test_layers_that_are_too_small_are_named_as_such(given: dict) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).requires_grad_(False)
    with pytest.raises(NothingToQuantize, match=r"2 linears; 2 of them: it is small \(16 x 16\)"):
        svdq.quantize(model, CONFIG, **given)


def test_a_calibration_that_never_calls_the_model_is_named_as_such() -> None:
    with pytest.raises(NothingToQuantize, match="calibrate never ran a linear of this Model: does it call the model"):
        svdq.quantize(make(), CONFIG, calibrate=lambda model: make()(X))


# Rows.


class TextBlock(nn.Module):
    """Reads tokens of an image, of a text, and one row a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.modulate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        scores = self.to_q(x) @ self.to_k(text).transpose(1, 2) / WIDTH
        return x * self.modulate(condition)[:, None] + scores.softmax(-1) @ self.to_v(text)


class TextModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TextBlock() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text, condition)
        return x


def call(model: Callable, tokens: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return model(*(torch.randn(batch, *lead, WIDTH, generator=generator) for lead in ((30,), (tokens,), ())))


def ahead(model: nn.Module, tokens: tuple[int, ...]) -> None:
    svdq.quantize(model, CONFIG, calibrate=lambda model: [call(model, n) for n in tokens])


def on_the_fly(way: Callable, model: nn.Module, tokens: tuple[int, ...]) -> None:
    run = way(model, calibration_steps=len(tokens))
    for n in (*tokens, *tokens):
        call(run, n)


@pytest.mark.parametrize("tokens", [(60, 6), (6, 60), (6, 60, 6), (6, 5)], ids=str)
@pytest.mark.parametrize(
    "quantize",
    [ahead, partial(on_the_fly, whole), partial(on_the_fly, by_blocks)],
    ids=["ahead", "whole", "by_blocks"],
)
def test_a_short_prompt_does_not_decide_alone(quantize: Callable, tokens: tuple[int, ...]) -> None:
    """A linear has few rows if it has few in all calls that were observed; one row a sample is few, however many."""
    torch.manual_seed(0)
    model = TextModel().eval().requires_grad_(False)
    quantize(model, tokens)
    precisions = {row.name.rpartition(".")[2]: row.precision for row in svdq.report(model)}
    text = "w4a8" if 60 in tokens else "w4a16"
    assert precisions == {"to_q": "w4a8", "to_k": text, "to_v": text, "modulate": "w4a16"}


def test_many_samples_read_one_row_each() -> None:
    torch.manual_seed(0)
    model = TextModel().eval().requires_grad_(False)
    svdq.quantize(model, CONFIG, calibrate=lambda model: call(model, 6, batch=20))
    precisions = {row.name.rpartition(".")[2]: row.precision for row in svdq.report(model)}
    assert precisions == {"to_q": "w4a8", "to_k": "w4a8", "to_v": "w4a8", "modulate": "w4a16"}


# Models of diffusers.


def chroma() -> tuple[nn.Module, dict]:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChromaTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(16, 24, 24),
            approximator_hidden_dim=WIDTH,
        )
    inputs = {
        "hidden_states": torch.randn(1, 24, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 24, WIDTH, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(24, 3),
        "return_dict": False,
    }
    return model.eval().requires_grad_(False), inputs


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "by_blocks"])
def test_chroma(regional: bool) -> None:
    """Its guidance layer is a list of five pairs of linears."""
    model, inputs = chroma()
    reference = model(**inputs)[0]
    run = model
    if regional:
        model.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=quiet(rank=16, refine=1))
    else:
        run = whole(model)
    for _ in range(3):
        output = run(**inputs)[0]
    assert len(quantized(model)) == 34
    assert quantized(model) == names(model, "transformer_blocks", "single_transformer_blocks")
    assert 0 < relative_error(output, reference) < 0.2


def test_a_unets_blocks_are_the_inner_ones() -> None:
    model, _ = zoo.make("sdxl")
    inside = {
        row.name for row in svdq.report(model) if row.reason not in (OUTSIDE, BETWEEN) and "small" not in row.reason
    }
    assert inside == {name for name in linears(model) if ".transformer_blocks." in name}


def test_a_refiner_that_stands_there_once_is_looked_into() -> None:
    model, _ = zoo.make("hunyuan_video")
    outside = {row.name for row in svdq.report(model) if row.reason == OUTSIDE}
    assert "context_embedder.proj_in" in outside
    assert not any("refiner_blocks" in name for name in outside)
