"""Linears of one input as one product: the operator, the memory of the weights, the pass, and who reads the parts."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fusion_testing import count, run, run_as_aten
from kernel_testing import HALF, ROUNDING, error
from torch import Tensor, fx, nn

import svdq_compile as svdq
from conftest import WIDTH, quiet
from svdq_compile.config import FUSIONS
from svdq_compile.header import read_header
from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.kernels.operands import Gemm
from svdq_compile.lowering import launch, ops, reference
from svdq_compile.lowering.packed import PackedLinear, SharedInput, side_by_side
from svdq_compile.parameter import QuantizedWeight
from zoo import ZOO, make

APART = tuple(name for name in FUSIONS if name != "siblings")
HEADS = 2
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ** the operator **


def operands(precision: str, m: int, n: int, count: int, k: int, rank: int, bias: bool = True) -> dict:
    """Of `count` siblings of n features."""
    fmt = FORMATS[precision]
    qx, ascales = fmt.quantize_activation(torch.randn(m, k))
    wide = count * n
    return {
        "qx": qx,
        "ascales": ascales,
        "xd": torch.randn(m, count * rank + 16).to(HALF)[:, 8 : 8 + count * rank],
        "weight": fmt.quantize_weight(torch.randn(wide, k)),
        "up": torch.randn(wide, rank).to(HALF),
        "bias": torch.randn(wide).to(HALF) if bias else None,
        "offset": torch.randn(wide) if precision == "int4" else None,
    }


def one(siblings: dict, i: int, count: int) -> dict:
    """Member i."""
    n, rank = siblings["up"].shape[0] // count, siblings["up"].shape[1]
    features = slice(i * n, (i + 1) * n)
    cut = {name: siblings[name] if siblings[name] is None else siblings[name][features] for name in ("bias", "offset")}
    weight = tuple(t[features] for t in siblings["weight"])
    columns = siblings["xd"][:, i * rank : (i + 1) * rank]
    return siblings | cut | {"xd": columns, "weight": weight, "up": siblings["up"][features]}


@pytest.mark.parametrize(
    ("precision", "count", "rank"), [("w4a8", 2, 16), ("w4a8", 3, 40), ("int4", 3, 16), ("w8a8", 3, 16)]
)
def test_reference_is_the_siblings_one_by_one(precision: str, count: int, rank: int) -> None:
    together = operands(precision, 5, 24, count, 128, rank)
    y = reference.gemm(**together, precision=precision, out_dtype=torch.float32)
    parts = [reference.gemm(**one(together, i, count), precision=precision, out_dtype=HALF) for i in range(count)]
    assert error(y, torch.cat(parts, 1)) < ROUNDING
    if precision in ("w4a8", "w8a8"):  # integer sums are exact, whatever else a product computes
        assert torch.equal(y.to(HALF), torch.cat(parts, 1))


@pytest.mark.parametrize(("count", "bias"), [(1, True), (3, False)])
def test_a_librarys_integer_product_is_the_reference(count: int, bias: bool) -> None:
    gemm = Gemm(**operands("w8a8", 20, 24, count, 100, 16, bias), precision="w8a8", out_dtype=HALF).rows()
    assert launch._int8_why_not(gemm) is None
    assert torch.equal(launch._cublas_int8(gemm, None), reference.gemm(*gemm))


@pytest.mark.parametrize(("rows", "features"), [(16, 24), (20, 20)])
def test_what_a_librarys_integer_product_does_not_take(rows: int, features: int) -> None:
    gemm = Gemm(**operands("w8a8", rows, features, 1, 64, 16), precision="w8a8", out_dtype=HALF)
    reason = f"{rows} rows, {features} features, 64 channels: cuBLAS takes more than 16 rows, and multiples of 8"
    assert launch._int8_why_not(gemm) == reason


def test_what_are_no_siblings_is_refused() -> None:
    from svdq_compile.kernels.hopper import gemm_w4a8 as gluon_gemm
    from svdq_compile.kernels.portable import gemm as triton_gemm

    siblings = operands("w4a8", 4, 64, 2, 128, 16)
    with pytest.raises(ValueError, match="not so many equal parts"):
        reference.gemm(**siblings | {"xd": siblings["xd"][:, :24]}, precision="w4a8", out_dtype=HALF)
    kernel_order = siblings | {"weight": layout.to_kernel("w4a8", siblings["weight"])}
    with pytest.raises(ValueError, match="128 features of 2 siblings, expected a multiple of 128"):
        triton_gemm.gemm(Gemm(**kernel_order, precision="w4a8", out_dtype=HALF))
    with pytest.raises(ValueError, match="128 features of 2 siblings"):
        gluon_gemm.gemm(Gemm(**kernel_order, precision="w4a8", out_dtype=HALF))


# ** the memory of the weights **


def packs(*features: int, precision: str = "w4a8", rank: int = 16, kernel_order: bool = False) -> list[PackedLinear]:
    """Linears of one input."""
    fmt = FORMATS[precision]
    shared = SharedInput(precision, torch.rand(WIDTH) + 0.5, torch.randn(len(features) * rank, WIDTH).bfloat16())
    made = []
    for i, n in enumerate(features):
        weight = fmt.quantize_weight(torch.randn(n, WIDTH))
        weight = layout.to_kernel(precision, weight) if kernel_order else weight
        offset = torch.randn(n) if precision == "int4" else None
        made.append(PackedLinear(shared, weight, torch.randn(n, rank).bfloat16(), i * rank, offset))
    return made


def memory(linears: list[PackedLinear]) -> int:
    """Bytes that their own tensors keep alive."""
    storages = [t.untyped_storage() for packed in linears for t in packed.own_tensors().values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("kernel_order", [False, True])
@pytest.mark.parametrize("precision", [f.name for f in FORMATS.values() if f.siblings])
def test_weights_move_side_by_side_and_stay_what_they_were(precision: str, kernel_order: bool) -> None:
    linears = packs(128, 128, 128, precision=precision, kernel_order=kernel_order)
    before = [{name: t.clone() for name, t in packed.own_tensors().items()} for packed in linears]
    matrices, size = [packed.dequantize(torch.float32) for packed in linears], memory(linears)
    side_by_side(linears[::-1])
    side_by_side(linears)
    assert memory(linears) == size
    assert [packed.place for packed in linears] == [0, 1, 2]
    assert all(packed.siblings is linears[0].siblings for packed in linears)
    for packed, tensors, matrix in zip(linears, before, matrices, strict=True):
        assert all(torch.equal(t, tensors[name]) for name, t in packed.own_tensors().items())
        assert torch.equal(packed.dequantize(torch.float32), matrix)
        assert packed.nbytes() == sum(t.nbytes for t in tensors.values()) + packed.down.nbytes + 4 * WIDTH


def test_who_is_a_sibling() -> None:
    def places(linears: list[PackedLinear]) -> list[int | None]:
        side_by_side(linears)
        return [None if packed.siblings is None else packed.place for packed in linears]

    assert places(packs(128, 128, 256, 256)) == [0, 1, 0, 1]
    assert places(packs(256, 128, 128, 128)) == [None, 0, 1, 2]  # FLUX: proj_mlp and q, k, v
    assert places(packs(128, 256, 128)) == [None, None, None]  # their rows of `down` do not follow one another
    assert places(packs(192, 192)) == [None, None]
    assert places(packs(128, 128, rank=0)) == [0, 1]
    assert places(packs(128, 128, precision="nvfp4")) == [None, None]  # each has a scale of its own for the whole
    assert places(packs(128) + packs(128)) == [None, None]  # of two inputs
    q, k, v = packs(128, 128, 128)
    assert places([k, v]) == [0, 1]
    assert places([q, k, v]) == [None, 0, 1]  # graphs know the memory of k and v


@pytest.mark.parametrize("precision", [f.name for f in FORMATS.values() if f.siblings])
def test_who_lies_side_by_side_moves_so(precision: str) -> None:
    """One by one, as hooks move them, and back: in the memory of one, as graphs that were compiled for them want it."""
    linears = packs(128, 128, precision=precision, kernel_order=True)
    side_by_side(linears)
    moved = [packed.to(torch.device("meta"), packed.up.dtype) for packed in linears]
    assert moved[0].siblings is moved[1].siblings is not linears[0].siblings
    assert [packed.place for packed in moved] == [0, 1]
    assert moved[0].shared is moved[1].shared
    for packed, before in zip(moved, linears, strict=True):
        assert packed.device.type == "meta"
        here, there = ([(t.shape, t.stride(), t.dtype) for t in p.own_tensors().values()] for p in (before, packed))
        assert here == there
        for name, tensor in packed.own_tensors().items():
            assert tensor.untyped_storage()._cdata == packed.siblings.tensors[name].untyped_storage()._cdata
    assert moved[0].siblings.dims == linears[0].siblings.dims
    # Back in the memory that is still there.
    assert all(m.to(p.device, p.up.dtype).siblings is p.siblings for m, p in zip(moved, linears, strict=True))


# ** the pass **


def gemms(graphs: list[fx.GraphModule]) -> int:
    return count(graphs, ops.gemm) + count(graphs, ops.fused_gemm)


def copies(graphs: list[fx.GraphModule]) -> int:
    """Operators that copy, but for the biases'."""
    cats = [n for gm in graphs for n in gm.graph.find_nodes(op="call_function", target=aten.cat.default)]
    others = (aten.clone.default, aten.copy.default, aten.contiguous.default, aten._to_copy.default)
    return sum(n.meta["val"].dim() > 1 for n in cats) + sum(count(graphs, target) for target in others)


VIEWS = (aten.slice.Tensor, aten.view.default, aten.permute.default, aten.unsqueeze.default)


def check_views(gm: fx.GraphModule) -> None:
    """What the graph says of the parts and of their views is so: strides, and that all are in the product's memory."""
    of_products = set(gm.graph.find_nodes(op="call_function", target=ops.gemm))
    for node in gm.graph.nodes:
        if node.target in VIEWS and node.args[0] in of_products:
            of_products.add(node)
            source, value = node.args[0].meta["val"], node.meta["val"]
            assert value.untyped_storage()._cdata == source.untyped_storage()._cdata, node
            assert value.stride() == node.target(source, *node.args[1:]).stride(), node


def together_and_apart(once: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    """Both graphs of a model; the outputs must be equal bit for bit, and nothing copied for it."""
    graphs = run_as_aten(monkeypatch)
    outputs = [once(FUSIONS)]
    together = list(graphs)
    outputs.append(once(APART))
    apart = graphs[len(together) :]
    assert torch.equal(*outputs)
    assert copies(together) == copies(apart)
    for gm in together:
        check_views(gm)
    return together, apart


@pytest.mark.parametrize(
    ("name", "apart", "together"),
    [
        ("flux", 17, 11),  # q, k, v of text, of images, and of the single block, where proj_mlp has an epilogue
        ("sd3", 13, 7),
        ("wan", 10, 7),  # q, k, v; and k, v of the text
        ("sdxl", 10, 7),
    ],
)
def test_a_model_is_the_same_bit_for_bit(name: str, apart: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(fuse: tuple[str, ...]) -> Tensor:
        model, inputs = make(name, torch.bfloat16, **({"num_layers": 1} if name == "sd3" else {}))
        return run(own_buffers(model), inputs, ZOO[name].regional, fuse=fuse, refine=0)

    graphs = together_and_apart(once, monkeypatch)
    assert (gemms(graphs[1]), gemms(graphs[0])) == (apart, together)


def own_buffers(model: nn.Module) -> nn.Module:
    """SD3's position table is a view of an fp32 tensor after the cast, which Dynamo cannot take in."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())
    return model


class Attention(nn.Module):
    """q, k and v; what is between them and attention comes from a test."""

    def __init__(self, around: Callable, biases: tuple = (True, True, True), features: tuple = (WIDTH,) * 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=b) for n, b in zip(features, biases, strict=True))
        self.around = around

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.around(self.q, self.k, self.v, x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def interleaved(q: nn.Linear, k: nn.Linear, v: nn.Linear, x: Tensor) -> Tensor:
    """Each is used before the next one is computed."""
    a = F.layer_norm(q(x), (WIDTH,))
    b = F.layer_norm(k(x), (WIDTH,))
    return attend(a, b, v(x))


def turned(q: nn.Linear, k: nn.Linear, v: nn.Linear, x: Tensor) -> Tensor:
    """Readers that copy in any case, and reductions."""
    return F.softmax(q(x).transpose(0, 1).flatten(1), -1) * k(x).mean() + v(x).amax()


def of_gelu(q: nn.Linear, k: nn.Linear, v: nn.Linear, x: Tensor) -> Tensor:
    """An input that int4 shifts."""
    x = F.gelu(x)
    return attend(q(x), k(x), v(x))


def tokens() -> Tensor:
    return torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize(
    ("around", "more", "left"),
    [
        (lambda q, k, v, x: attend(q(x), k(x), v(x)), {}, 1),
        (interleaved, {}, 1),
        (turned, {"biases": (False,) * 3}, 1),
        # One with a bias, one of another size, two sizes that no tile divides.
        (lambda q, k, v, x: attend(q(x), k(x), v(x)), {"biases": (True, False, False)}, 2),
        (lambda q, k, v, x: attend(q(x), k(x), v(x)[..., :WIDTH]), {"features": (128, 128, 256)}, 2),
        (lambda q, k, v, x: attend(q(x), k(x), v(x)), {"features": (192,) * 3}, 3),
        # Epilogues: an activation, a gate, a residual. The others are still siblings if they are neighbours.
        (lambda q, k, v, x: attend(q(x), k(x), F.silu(v(x))), {}, 2),
        (lambda q, k, v, x: attend(q(x), k(x) + x, v(x)), {}, 3),
        (lambda q, k, v, x: F.silu(q(x)) * k(x), {}, 2),
        # A result that goes out, as it is or as a view; rows that must be neighbours.
        (lambda q, k, v, x: (q(x), k(x).mean(1)), {}, 2),
        (lambda q, k, v, x: (q(x).mean(1), k(x).unflatten(-1, (HEADS, -1))), {}, 2),
        (lambda q, k, v, x: q(x).view(2, -1).softmax(-1) + k(x).view(2, -1).softmax(-1), {}, 2),
        # Two inputs; one linear twice.
        (lambda q, k, v, x: attend(q(x), k(y := x.flip(1)), v(y)), {}, 2),
        (lambda q, k, v, x: attend(q(x), q(x), k(x)), {}, 2),
    ],
)  # fmt: skip
def test_near_misses(around: Callable, more: dict, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(fuse: tuple[str, ...]) -> Tensor:
        model = Attention(around, **more).bfloat16().eval().requires_grad_(False)
        return run(model, (tokens(),), fuse=fuse, refine=0)

    together, _ = together_and_apart(once, monkeypatch)
    assert gemms(together) == left


def test_dynamic_sizes_of_int4(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    outputs = []
    for fuse in (FUSIONS, APART):
        torch._dynamo.reset()
        model = Attention(of_gelu).bfloat16().requires_grad_(False)
        options = quiet(rank=16, refine=0, precision="int4", fuse=fuse)
        call = torch.compile(model, backend="svdquant", dynamic=True, options=options)
        outputs += [call(tokens()[:, :n]) for n in (24, 24, 7)][1:]
    assert gemms(graphs[:1]) == 1
    assert all(error(a, b) < 1e-2 for a, b in zip(outputs[:2], outputs[2:], strict=True))


@pytest.mark.parametrize("precision", ["w4a8", "nvfp4", "w8a8"])
def test_the_format_says_who_merges(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of nvfp4 has a scale of its own for the whole of it."""
    graphs = run_as_aten(monkeypatch)
    model = Attention(of_gelu).bfloat16().requires_grad_(False)
    run(model, (tokens(),), precision=precision, refine=0)
    assert gemms(graphs) == (3 if precision == "nvfp4" else 1)


def attention() -> Attention:
    model = Attention(lambda q, k, v, x: attend(q(x), k(x), v(x))).bfloat16().eval().requires_grad_(False)
    svdq.quantize(model, svdq.Config(**quiet(rank=16, refine=0)), example_inputs={"x": tokens()})
    return model


def compiled_once(model: nn.Module, **options: object) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="svdquant", options=quiet(rank=16, refine=0) | options)


def weights_of(model: nn.Module) -> list[PackedLinear]:
    return [p._svdq for p in model.parameters() if isinstance(p, QuantizedWeight)]


def test_files_are_the_same_and_memory_is_not_doubled(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as_aten(monkeypatch)
    model = attention()
    size = memory(weights_of(model))
    svdq.save(model, tmp_path / "apart", progress=False)
    y = compiled_once(model)(tokens())
    gc.collect()
    assert weights_of(model)[2].place == 2
    assert memory(weights_of(model)) == size
    svdq.save(model, tmp_path / "together", progress=False)
    files = [read_header(tmp_path / name) for name in ("apart", "together")]
    assert files[0].checksums == files[1].checksums
    assert abs(files[0].nbytes - files[1].nbytes) < 64  # the header's padding
    again = svdq.load(attention(), tmp_path / "together", progress=False)
    assert torch.equal(compiled_once(again)(tokens()), y)


def test_other_models_and_graphs_of_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph made before the weights moved goes on; one that keeps them apart reads them where they are; a copy of the
    model shares their memory.
    """
    graphs = run_as_aten(monkeypatch)
    model, x = attention(), tokens()
    apart = compiled_once(model, fuse=APART)
    y = apart(x)
    assert torch.equal(compiled_once(model)(x), y)
    assert torch.equal(apart(x), y)
    assert torch.equal(compiled_once(model, fuse=False)(x), y)
    twin = copy.deepcopy(model)
    assert torch.equal(compiled_once(twin)(x), y)
    assert memory(weights_of(model)) == memory(weights_of(model) + weights_of(twin))
    assert [gemms([gm]) for gm in graphs] == [3, 1, 3]
    eager = attend(
        *(
            ops.linear(x, packed, f.bias, x.dtype)
            for f, packed in zip((model.q, model.k, model.v), weights_of(model), strict=True)
        )
    )
    assert torch.equal(eager, y)


def test_a_weight_that_is_replaced_leaves_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = run_as_aten(monkeypatch)
    model, x = attention(), tokens()
    compiled_once(model)(x)
    torch.manual_seed(7)
    model.q.load_state_dict({"weight": torch.randn(WIDTH, WIDTH).bfloat16() * 0.1, "bias": torch.zeros(WIDTH)})
    svdq.quantize(model, svdq.Config(**quiet(rank=16, refine=0)))
    y = compiled_once(model)(x)
    assert [packed.siblings is not None for packed in weights_of(model)] == [False, True, True]
    assert gemms(graphs[-1:]) == 2
    assert torch.equal(compiled_once(model, fuse=APART)(x), y)


@pytest.mark.parametrize(("targets", "left"), [(("q", "k", "v"), 1), (("q",), 2), (("k", "v"), 2), (("k",), 3)])
def test_adapters_make_ranks_uneven(targets: tuple[str, ...], left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters on all the branches' second matrices are put together, with new values at the next call too."""
    peft = pytest.importorskip("peft")
    graphs = run_as_aten(monkeypatch)
    model, x = attention(), tokens()
    adapters = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=list(targets))
    peft.inject_adapter_in_model(adapters, model)
    model.requires_grad_(False)
    together, apart = compiled_once(model), compiled_once(model, fuse=APART)
    y = together(x)
    assert torch.equal(apart(x), y)
    assert [gemms([gm]) for gm in graphs] == [left, 3]
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            value.data = value * 2
    z = together(x)
    assert torch.equal(apart(x), z)
    assert error(z, y) > 1e-2
