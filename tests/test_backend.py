"""torch.compile(model, backend="svdquant"), from the first call to the last."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.torch_version import TorchVersion

import svdq_compile as svdq
from conftest import CHANNELS, FLIPPED_CODES, TOKENS, WIDTH, Net, compiled, inputs, net, quiet, relative_error
from svdq_compile.errors import GradientsNeeded, NonFiniteWeight, OptionError
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.lowering import inductor, ops, replay
from svdq_compile.parameter import QuantizedWeight


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)}


def storage_bytes(model: nn.Module) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return sum(p.untyped_storage().nbytes() for p in model.parameters())


class GraphCounter:
    """A backend that counts the graphs that Dynamo hands to svdquant."""

    def __init__(self, **options) -> None:
        self.options = quiet(**options)
        self.graphs = 0

    def __call__(self, gm, example_inputs):
        from svdq_compile.backend import svdquant

        self.graphs += 1
        return svdquant(gm, example_inputs, options=self.options)


@torch.compiler.nested_compile_region
def region(block, x, condition):
    return block(x, condition)


def test_entry_point_is_found_without_importing_the_package() -> None:
    code = (
        "import sys, torch\n"
        "assert 'svdquant' in torch._dynamo.list_backends()\n"
        "assert 'svdq_compile' not in sys.modules\n"
        "net = torch.nn.Sequential(torch.nn.Linear(64, 64)).requires_grad_(False)\n"
        "compiled = torch.compile(net, backend='svdquant', options={'progress': False, 'calibration_steps': 0})\n"
        "print(compiled(torch.ones(2, 8, 64)).shape, 'svdq_compile' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[0] == "torch.Size([2, 8, 64]) True", done.stderr


@pytest.mark.parametrize("precision", FORMATS)
def test_observes_exactly_then_quantizes(precision: str) -> None:
    model = net()
    x, condition = inputs()
    reference = model(x, condition)
    run = compiled(model, precision=precision, calibration_steps=2)
    for _ in range(2):
        assert torch.equal(run(x, condition), reference), "observed calls must be exact"
    first, second = run(x, condition), run(x, condition)
    assert torch.equal(first, second)
    most = {"w4a8": 0.06, "w4a16": 0.06, "int4": 0.12, "nvfp4": 0.12, "w8a8": 0.04}[precision]
    assert 0 < relative_error(first, reference) < most
    assert quantized_names(model) == {
        f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("modulate", "to_q", "to_k", "up", "down")
    }
    kinds = {row.name.split(".")[-1]: row.precision for row in svdq.report(model) if row.rank}
    assert kinds["modulate"] == "w4a16", "one row a sample: weights only"
    assert kinds["to_q"] == precision


def test_released_bytes_are_gone() -> None:
    model = net(dtype=torch.bfloat16)
    blocks = sum(p.nbytes for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2)
    before = storage_bytes(model)
    run = compiled(model, calibration_steps=0)
    run(*inputs(dtype=torch.bfloat16))
    assert storage_bytes(model) == before - blocks


def test_data_free() -> None:
    model = net()
    reference = model(*inputs())
    run = compiled(model, calibration_steps=0)
    eager, again = run(*inputs()), run(*inputs())
    assert 0 < relative_error(eager, reference) < 0.08
    assert relative_error(again, eager) < FLIPPED_CODES, "the first call runs the same arithmetic, only not compiled"


def test_whole_and_regional_agree() -> None:
    whole, regional = net(), net()
    run = compiled(whole)
    for block in regional.blocks:
        block.compile(backend="svdquant", fullgraph=True, options=quiet())
    for _ in range(2):
        a, b = run(*inputs()), regional(*inputs())
    assert quantized_names(whole) == quantized_names(regional)
    assert relative_error(a, b) < FLIPPED_CODES
    for (name, p), q in zip(whole.named_parameters(), regional.parameters(), strict=True):
        if isinstance(p, QuantizedWeight):
            assert torch.equal(svdq.packed(p).weight[0], svdq.packed(q).weight[0]), name


def test_regional_compiles_one_graph_for_all_blocks_and_models() -> None:
    counter = GraphCounter()
    model, other = net(blocks=4), net(seed=1, blocks=4)
    for block in (*model.blocks, *other.blocks):
        block.compile(backend=counter, fullgraph=True)
    model(*inputs())
    assert counter.graphs == 1, "one graph to observe"
    model(*inputs())
    assert counter.graphs == 2, "one graph in 4-bit"
    for _ in range(3):
        other(*inputs())
        model(*inputs())
    assert counter.graphs == 2, "a second instance of the model adds none"


def test_new_resolution_recompiles_and_requantizes_nothing() -> None:
    model = net()
    counter = GraphCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    run(*inputs())
    run(*inputs())
    packs = {name: svdq.packed(p) for name, p in model.named_parameters() if isinstance(p, QuantizedWeight)}
    graphs = counter.graphs
    reference = net()(*inputs(tokens=40))
    assert relative_error(run(*inputs(tokens=40)), reference) < 0.06
    assert relative_error(run(*inputs(tokens=56)), net()(*inputs(tokens=56))) < 0.06
    assert counter.graphs == graphs + 1, "one more graph, with a dynamic size"
    assert all(svdq.packed(p) is packs[name] for name, p in model.named_parameters() if name in packs)


def test_compiled_code_calls_operators_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites in the code for each call, of which each set of sizes has its own."""
    made: list[replay.Sites] = []
    monkeypatch.setattr(ops, "Sites", lambda operator: made.append(replay.Sites(operator)) or made[-1])
    model = net()
    run = torch.compile(model, backend="svdquant", fullgraph=True, options=quiet())
    for _ in range(2):
        fixed = run(*inputs())
    count = len(made)
    assert count > len(quantized_names(model)) > 0, "a product each, and what quantizes their inputs"
    with monkeypatch.context() as patch:
        patch.setattr(replay.Site, "__call__", lambda site, *operands: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*inputs())
    free, longer = (run(*inputs(tokens=tokens)) for tokens in (40, 48))
    assert len(made) == 2 * count
    assert {len(sites._sites) for sites in made[count:]} == {1, 2}, "what reads the condition still has fixed sizes"
    assert relative_error(longer, net()(*inputs(tokens=48))) < 0.06
    assert relative_error(free, net()(*inputs(tokens=40))) < 0.06
    assert relative_error(fixed, net()(*inputs())) < 0.06


def test_no_rows() -> None:
    model = net()
    run = compiled(model)
    run(*inputs())
    assert run(*inputs(batch=0)).shape == (0, TOKENS, 16)
    assert run(*inputs(tokens=0)).shape == (2, 0, 16)


def test_blocks_packed_in_another_form_get_another_variant() -> None:
    model = net(blocks=3)
    svdq.quantize(model.blocks[0], svdq.Config(**quiet(rank=16)))
    svdq.quantize(
        model.blocks[1],
        svdq.Config(**quiet(rank=32)),
        calibrate=lambda b: b(torch.randn(1, 8, WIDTH), torch.randn(1, WIDTH)),
    )
    svdq.quantize(model.blocks[2], svdq.Config(**quiet(precision="int4")))
    twin = copy.deepcopy(model)
    counter = GraphCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    for block in twin.blocks:
        block.compile(backend=GraphCounter(), fullgraph=True)
    torch._dynamo.reset()
    alone = torch.cat([b(torch.ones(1, 8, WIDTH), torch.ones(1, WIDTH)) for b in twin.blocks])
    torch._dynamo.reset()
    together = torch.cat([b(torch.ones(1, 8, WIDTH), torch.ones(1, WIDTH)) for b in model.blocks])
    assert counter.graphs == 1
    assert relative_error(together, alone) < FLIPPED_CODES


def test_nested_compile_region() -> None:
    class Nested(Net):
        def forward(self, x, condition):
            x = self.embed(x)
            for block in self.blocks:
                x = region(block, x, condition)
            return self.project(x)

    torch.manual_seed(0)
    model = Nested(3).eval().requires_grad_(False)
    plain = net(blocks=3)
    plain.load_state_dict(model.state_dict())
    run, flat = compiled(model), compiled(plain)
    for _ in range(2):
        nested, expected = run(*inputs()), flat(*inputs())
    assert len(quantized_names(model)) == 15
    assert relative_error(nested, expected) < FLIPPED_CODES


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolutions_are_linears(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(128, 256, 1), nn.SiLU(), nn.Conv2d(256, 128, 1, bias=False), nn.Conv2d(128, 8, 3))
    model.eval().requires_grad_(False)
    x = torch.randn(2, 128, 6, 7).to(memory_format=memory_format)
    reference = model(x)
    run = compiled(model, precision="int4")
    for _ in range(2):
        output = run(x)
    assert quantized_names(model) == {"0.weight", "2.weight"}
    assert output.stride() == reference.stride()
    assert relative_error(output, reference) < 0.2


def test_siblings_share_one_quantized_input() -> None:
    model = net()
    compiled(model)(*inputs())
    block = model.blocks[0]
    assert svdq.packed(block.to_q.weight).shared is svdq.packed(block.to_k.weight).shared
    assert svdq.packed(block.to_q.weight).shared is not svdq.packed(block.up.weight).shared


def test_cross_attention_keys_of_two_blocks_do_not_share() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"k": nn.Linear(128, 128), "v": nn.Linear(128, 128)}) for _ in "ab"
            )

        def forward(self, text):
            return sum(block["k"](text) * block["v"](text) for block in self.blocks)

    model = Cross().requires_grad_(False)
    compiled(model)(torch.randn(1, 20, 128))
    first, second = (block["k"].weight for block in model.blocks)
    assert svdq.packed(first).shared is not svdq.packed(second).shared


def test_tied_weights_are_quantized_once_and_stay_tied() -> None:
    model = net()
    model.blocks[1].to_q.weight = model.blocks[0].to_q.weight
    run = compiled(model)
    for _ in range(2):
        output = run(*inputs())
    assert model.blocks[1].to_q.weight is model.blocks[0].to_q.weight
    assert isinstance(model.blocks[0].to_q.weight, QuantizedWeight)
    expected = net()
    expected.blocks[1].to_q.weight = expected.blocks[0].to_q.weight
    assert relative_error(output, expected(*inputs())) < 0.06


def test_views_of_one_storage_keep_their_values() -> None:
    """Releasing one weight must not take the memory of another that is cut from the same storage."""
    model = net()
    fused = torch.randn(2 * WIDTH, WIDTH) / 11
    model.blocks[0].to_q.weight = nn.Parameter(fused[:WIDTH], requires_grad=False)
    model.blocks[0].to_k.weight = nn.Parameter(fused[WIDTH:], requires_grad=False)
    saved = fused.clone()
    reference = model(*inputs())
    run = compiled(model)
    for _ in range(2):
        output = run(*inputs())
    assert torch.equal(fused, saved)
    assert relative_error(output, reference) < 0.06


def test_bfloat16_and_autocast() -> None:
    model = net(dtype=torch.bfloat16)
    run = compiled(model)
    for _ in range(2):
        output = run(*inputs(dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert relative_error(output, net()(*inputs())) < 0.06

    model = net()
    run = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        reference = model(*inputs())
        for _ in range(2):
            output = run(*inputs())
    assert output.dtype == reference.dtype == torch.bfloat16
    assert relative_error(output, reference) < 0.06


def test_quantizing_under_autocast_is_done_in_full_precision() -> None:
    model, expected = net(), net()
    with torch.autocast("cpu", torch.bfloat16):
        compiled(model, calibration_steps=0)(*inputs())
    compiled(expected, calibration_steps=0)(*inputs())
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        if isinstance(p, QuantizedWeight):
            assert torch.equal(svdq.packed(p).weight[0], svdq.packed(q).weight[0]), name


def test_reading_a_weight_beside_its_linear_keeps_it() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x):
            return self.b(self.a(x)) + self.a.weight.norm()

    model = Reads().requires_grad_(False)
    x = torch.randn(2, 8, 128)
    reference = model(x)
    run = compiled(model)
    for _ in range(2):
        output = run(x)
    assert quantized_names(model) == {"b.weight"}
    assert relative_error(output, reference) < 0.06
    rows = {row.name: row.reason for row in svdq.report(model)}
    assert rows["a"] == "something other than a linear reads its weight"


def test_at_the_recompile_limit_it_runs_eagerly_in_4_bit() -> None:
    model = net()
    run = torch.compile(model, backend="svdquant", dynamic=False, options=quiet())
    run(*inputs())
    run(*inputs())
    with torch._dynamo.config.patch(recompile_limit=3):
        for tokens in (8, 10, 12, 8):
            args = inputs(tokens=tokens)
            output = run(*args)
            assert 0 < relative_error(output, net()(*args)) < 0.06
            assert relative_error(output, model(*args)) < FLIPPED_CODES


def test_gradients_are_refused() -> None:
    model = net().requires_grad_(True).train()
    with torch.enable_grad(), pytest.raises(Exception, match=r"inference only.*no_grad") as caught:
        compiled(model)(*inputs())
    assert isinstance(caught.value, GradientsNeeded) or "GradientsNeeded" in str(caught.value)
    with torch.no_grad():
        compiled(model)(*inputs())
    assert quantized_names(model)


@pytest.mark.parametrize(("bad", "message"), [(float("nan"), "1 NaN or Inf"), (float("inf"), "1 NaN or Inf")])
def test_non_finite_weights_are_named(bad: float, message: str) -> None:
    model = net()
    model.blocks[1].up.weight[3, 5] = bad
    with pytest.raises(NonFiniteWeight, match=rf"blocks\.1\.up holds {message}"):
        compiled(model)(*inputs())
    model = net()
    model.blocks[1].up.weight[3, 5] = bad
    compiled(model, skip=["*.up"])(*inputs())
    assert not isinstance(model.blocks[1].up.weight, QuantizedWeight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).to(dtype).requires_grad_(False)
    x = torch.randn(4, 9, 128).to(dtype)
    reference = model(x)
    run = compiled(model)
    for _ in range(2):
        output = run(x)
    assert not quantized_names(model)
    torch.testing.assert_close(output, reference)
    assert all("its weight is torch." in row.reason for row in svdq.report(model))


def test_nothing_to_quantize_just_compiles() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).requires_grad_(False)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(compiled(model)(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precison": "int4"}, "did you mean 'precision'"),
        ({"precision": "int5"}, "did you mean 'int4'"),
        ({"rank": -1}, "rank=-1: must be a whole number"),
        ({"rank": 512}, "from 0 to 256"),
        ({"rank": 16.0}, "must be a whole number"),
        ({"skip": "*.up"}, "must be a list"),
        ({"weights": "drop"}, "'release', 'offload', 'keep'"),
        ({"mode": "quality"}, "option mode='quality'"),
        ({"error_budget": 0}, "above 0"),
        ({"smooth": 1}, "True or False"),
        ({"fuse": "prologues"}, "a list of epilogues"),
        ({"fuse": ["prologs"]}, "did you mean 'prologues'"),
    ],
)
def test_bad_options_name_the_option_and_what_it_can_be(options: dict, message: str) -> None:
    run = torch.compile(net(), backend="svdquant", options=options)
    with pytest.raises(Exception, match=message) as caught:
        run(*inputs())
    assert isinstance(caught.value, OptionError) or "OptionError" in str(caught.value)


def test_mode_is_inductors() -> None:
    model = net()
    run = torch.compile(model, backend="svdquant", mode="default")
    run(*inputs())
    other = net()
    options = torch.compile(other, backend="svdquant", options=quiet(mode="max-autotune-no-cudagraphs"))
    for _ in range(2):
        output = options(*inputs())
    assert relative_error(output, net()(*inputs())) < 0.06


def test_rank_zero_and_rank_above_the_matrix() -> None:
    model = net()
    compiled(model, rank=0)(*inputs())
    assert all(svdq.packed(p).rank == 0 for p in model.parameters() if isinstance(p, QuantizedWeight))
    model = net()
    reference = model(*inputs())
    run = compiled(model, rank=256, precision="int4")
    for _ in range(2):
        output = run(*inputs())
    rows = {row.name: row.reason for row in svdq.report(model)}
    assert "a branch of rank 256 would be half as large" in rows["blocks.0.to_q"]
    assert relative_error(output, reference) < 0.1


def test_error_budget_keeps_bad_layers_in_16_bit() -> None:
    model = net()
    compiled(model, precision="int4", rank=0, error_budget=0.02)(*inputs())
    reasons = {row.name: row.reason for row in svdq.report(model)}
    assert "above error_budget" in reasons["blocks.0.up"]


def test_skip_matches_in_blocks_and_in_the_whole() -> None:
    whole, regional = net(), net()
    compiled(whole, skip=["*.to_q"])(*inputs())
    for block in regional.blocks:
        block.compile(backend="svdquant", options=quiet(skip=["*.to_q"]))
    regional(*inputs())
    assert quantized_names(whole) == quantized_names(regional)
    assert not any("to_q" in name for name in quantized_names(whole))


def test_summary_tells_what_was_done(capsys: pytest.CaptureFixture) -> None:
    run = compiled(net(), progress=True, skip=["*.to_q"])
    run(*inputs())
    assert "linears quantized" not in capsys.readouterr().err
    run(*inputs())
    line = capsys.readouterr().err.splitlines()[0]
    assert "8 linears quantized (2 w4a16, 6 w4a8)" in line
    assert "2 option skip" in line
    assert "MiB" in line


def test_inference_mode_then_no_grad() -> None:
    model = net()
    run = compiled(model)
    with torch.inference_mode():
        run(*inputs())
        a = run(*inputs())
    assert relative_error(run(*inputs()), a) < FLIPPED_CODES


def test_graphs_are_dumped(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDQ_DUMP", str(tmp_path))
    run = compiled(net())
    for _ in range(2):
        run(*inputs())
    graphs = [path for path in sorted(tmp_path.iterdir()) if path.suffix == ".py"]
    assert [path.name.split(".", 1)[1] for path in graphs] == [
        "before.py",
        "after_observe_linears.py",
        "before.py",
        "after_quantize_linears.py",
        "after_share_quantized_inputs.py",
        "after_drop_replaced_weights.py",
    ]
    assert "svdq.gemm" in graphs[-1].read_text()


def test_gelu_marks_an_unsigned_input() -> None:
    model = net()
    compiled(model, precision="int4")(*inputs())
    assert svdq.packed(model.blocks[0].down.weight).shared.shift == 0.171875
    assert svdq.packed(model.blocks[0].down.weight).offset is not None
    assert svdq.packed(model.blocks[0].up.weight).shared.shift == 0
    assert F.gelu(torch.linspace(-3, 0, 1000), approximate="tanh").min() + 0.171875 > 0


@pytest.mark.parametrize("blocks", [1, 3])
def test_switches_to_4_bit_where_dynamo_skips_unchanged_modules(blocks: int) -> None:
    """The defaults of torch 2.11. With them, a block compiled before would go on observing for ever."""
    names = ("skip_tensor_guards_with_matching_dict_tags", "use_recursive_dict_tags_for_guards")
    counter = GraphCounter()
    model = net(blocks=blocks)
    with torch._dynamo.config.patch({name: True for name in names if hasattr(torch._dynamo.config, name)}):
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        for _ in range(4):
            model(*inputs())
    assert counter.graphs == 2


class BreaksAtFirst(Net):
    """As Z-Image does: the first trace ends at a context manager that the second one does not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.widen = nn.Linear(WIDTH, WIDTH)
        self.table: Tensor | None = None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.widen(self.embed(x))
        if self.table is None:
            torch._dynamo.graph_break()
            self.table = torch.ones(WIDTH)
        x = x * self.table
        for block in self.blocks:
            x = block(x, condition)
        return self.project(x)


def test_an_embedder_that_is_traced_alone_stays_16_bit() -> None:
    """At first a graph break stands between it and the blocks, later none does."""
    torch.manual_seed(0)
    model = BreaksAtFirst().eval().requires_grad_(False)
    expected = model(*inputs())
    model.table = None
    call = torch.compile(model, backend="svdquant", options=quiet())
    for _ in range(4):
        out = call(*inputs())
    assert quantized_names(model) == {n for n in model.state_dict() if n.startswith("blocks.") and n.endswith("weight")}
    assert relative_error(out, expected) < 0.1


def test_sizes_that_torch_2_11_cannot_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fx.symbolic_trace(nn.Identity())
    monkeypatch.setattr(inductor, "compile_fx", lambda gm, inputs, config_patches: config_patches)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    always = {"size_asserts": False, "alignment_asserts": False}
    other = {"triton.coalesce_tiling_analysis": False}
    assert inductor.compile_with_inductor(gm, [3, torch.ones(3)], None) == always | other
    assert inductor.compile_with_inductor(gm, [torch.ones(3)], None) == always
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    assert inductor.compile_with_inductor(gm, [3, torch.ones(3)], None) == always


class HandsOn(nn.Module):
    """A Parameter that wants gradients lives on over a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Parameter(torch.randn(24, 128)), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self.table.to(x.dtype)
        y = self.linear(x)
        torch._dynamo.graph_break()
        return y + table


def test_a_parameter_that_is_handed_on_records_nothing() -> None:
    model, x = HandsOn().eval(), torch.randn(2, 24, 128)
    run = torch.compile(model, backend="svdquant", options=quiet())
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            assert relative_error(run(x), expected) < 0.2
    with torch.enable_grad(), pytest.raises(Exception, match="inference only"):
        torch.compile(HandsOn(), backend="svdquant", options=quiet())(x)
