"""Each pass: the graph before and after, the count, and its near misses. EXPECTTEST_ACCEPT=1 rewrites the graphs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from expecttest import TestCase
from torch import Tensor, fx, nn

from conftest import inputs, net
from svdq_compile.config import Config
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.lowering.torch_private import clone_dynamo_graph
from svdq_compile.passes.drop_replaced_weights import drop_replaced_weights
from svdq_compile.passes.linears import find_linears, group_by_input
from svdq_compile.passes.observe_linears import observe_linears
from svdq_compile.passes.quantize_linears import quantize_linears
from svdq_compile.passes.scope import clean, elements, outside_blocks, sibling_scope
from svdq_compile.passes.share_quantized_inputs import share_quantized_inputs
from svdq_compile.passes.subgraphs import placeholders
from svdq_compile.passes.weight_groups import weight_inputs
from svdq_compile.quantizer import quantize_group


def capture(model: nn.Module, *args: Tensor) -> tuple[fx.GraphModule, list]:
    """The graph and inputs that Dynamo hands to a backend."""
    caught: list = []

    def backend(gm: fx.GraphModule, example_inputs: list) -> Callable:
        caught.append((clone_dynamo_graph(gm), example_inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args)
    return caught[0]


def show(gm: fx.GraphModule) -> str:
    """One line a node: its name, what it does, and to what."""
    lines = []
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
        if node.op == "placeholder":
            lines.append(f"{short(node)} = input")
        elif node.op == "output":
            lines.append(f"return {text(node.args[0])}")
        else:
            lines.append(f"{short(node)} = {name}({', '.join(text(a) for a in node.args)})")
    return "\n".join(lines)


def short(node: fx.Node) -> str:
    return node.name.replace("l_self_modules_", "").replace("_parameters_", "_")


def text(value: object) -> str:
    if isinstance(value, fx.Node):
        return short(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(text(v) for v in value) + "]"
    return str(value)


class Siblings(nn.Module):
    """Two linears that read one tensor, one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(128, 128), nn.Linear(128, 64, bias=False), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.k(x) + self.o(F.gelu(self.q(x)))


def packs_for(gm: fx.GraphModule, example_inputs: list, precision: str = "w4a8") -> dict:
    """Each linear's weight quantized, siblings together."""
    known = {}
    number = {node: i for i, node in enumerate(placeholders(gm.graph))}
    for group in group_by_input(find_linears(gm).sites):
        weights = [example_inputs[number[site.weight]].detach().flatten(1) for site in group]
        names = [site.name for site in group]
        config = Config(rank=16, refine=0)
        results = quantize_group(weights, names, precision, config, InputStatistics(), group[0].shift)
        known |= {site.weight: result.packed for site, result in zip(group, results, strict=True)}
    return known


class PassTests(TestCase):
    def siblings(self) -> tuple[fx.GraphModule, list]:
        torch.manual_seed(0)
        return capture(Siblings().requires_grad_(False), torch.randn(2, 20, 128))

    def test_observe_linears(self) -> None:
        gm, _ = self.siblings()
        self.assertExpectedInline(
            show(gm),
            """\
k_weight_ = input
l_x_ = input
q_weight_ = input
q_bias_ = input
o_weight_ = input
o_bias_ = input
linear = linear(l_x_, k_weight_, None)
linear_1 = linear(l_x_, q_weight_, q_bias_)
gelu = gelu(linear_1)
linear_2 = linear(gelu, o_weight_, o_bias_)
add = add(linear, linear_2)
return [add]""",
        )

        def observe(x: Tensor, weights: tuple, channel_dim: int) -> None: ...

        def run(kind: str, channel_dim: int, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return getattr(F, kind)(x, weight, bias)

        self.assertEqual(observe_linears(gm, observe=observe, run=run), 3)
        self.assertExpectedInline(
            show(gm),
            """\
k_weight_ = input
l_x_ = input
q_weight_ = input
q_bias_ = input
o_weight_ = input
o_bias_ = input
observe = observe(l_x_, [k_weight_, q_weight_], -1)
linear = run(linear, -1, l_x_, k_weight_, None)
linear_1 = run(linear, -1, l_x_, q_weight_, q_bias_)
gelu = gelu(linear_1)
observe_1 = observe(gelu, [o_weight_], -1)
linear_2 = run(linear, -1, gelu, o_weight_, o_bias_)
add = add(linear, linear_2)
return [add]""",
        )
        self.assertEqual(observe_linears(gm, observe=observe, run=run), 0, "nothing is watched twice")

    def test_quantize_linears(self) -> None:
        gm, example_inputs = self.siblings()
        packs = packs_for(gm, example_inputs)
        self.assertEqual(quantize_linears(gm, packs), 3)
        self.assertExpectedInline(
            show(gm),
            """\
k_weight_ = input
l_x_ = input
q_weight_ = input
q_bias_ = input
o_weight_ = input
o_bias_ = input
k_weight__qweight = input
k_weight__subscales = input
k_weight__wscales = input
k_weight__smooth = input
k_weight__down = input
k_weight__up = input
q_weight__qweight = input
q_weight__subscales = input
q_weight__wscales = input
q_weight__up = input
o_weight__qweight = input
o_weight__subscales = input
o_weight__wscales = input
o_weight__smooth = input
o_weight__down = input
o_weight__up = input
quantize_default = quantize(l_x_, k_weight__smooth, k_weight__down, w4a8, 0.0, False)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
getitem_2 = getitem(quantize_default, 2)
getitem_3 = getitem(getitem_2, [Ellipsis, slice(0, 16, None)])
gemm_default = gemm(getitem, getitem_1, getitem_3, [k_weight__qweight, k_weight__subscales, k_weight__wscales], k_weight__up, None, None, w4a8, torch.float32)
quantize_default_1 = quantize(l_x_, k_weight__smooth, k_weight__down, w4a8, 0.0, False)
getitem_4 = getitem(quantize_default_1, 0)
getitem_5 = getitem(quantize_default_1, 1)
getitem_6 = getitem(quantize_default_1, 2)
getitem_7 = getitem(getitem_6, [Ellipsis, slice(16, 32, None)])
gemm_default_1 = gemm(getitem_4, getitem_5, getitem_7, [q_weight__qweight, q_weight__subscales, q_weight__wscales], q_weight__up, q_bias_, None, w4a8, torch.float32)
gelu = gelu(gemm_default_1)
quantize_default_2 = quantize(gelu, o_weight__smooth, o_weight__down, w4a8, 0.0, False)
getitem_8 = getitem(quantize_default_2, 0)
getitem_9 = getitem(quantize_default_2, 1)
getitem_10 = getitem(quantize_default_2, 2)
gemm_default_2 = gemm(getitem_8, getitem_9, getitem_10, [o_weight__qweight, o_weight__subscales, o_weight__wscales], o_weight__up, o_bias_, None, w4a8, torch.float32)
add = add(gemm_default, gemm_default_2)
return [add]""",
        )
        self.assertEqual(quantize_linears(gm, packs), 0)
        self.assertEqual(share_quantized_inputs(gm), 1)
        self.assertEqual(share_quantized_inputs(gm), 0)
        self.assertEqual(drop_replaced_weights(gm, list(packs)), 3)
        self.assertExpectedInline(
            show(gm),
            """\
l_x_ = input
q_bias_ = input
o_bias_ = input
k_weight__qweight = input
k_weight__subscales = input
k_weight__wscales = input
k_weight__smooth = input
k_weight__down = input
k_weight__up = input
q_weight__qweight = input
q_weight__subscales = input
q_weight__wscales = input
q_weight__up = input
o_weight__qweight = input
o_weight__subscales = input
o_weight__wscales = input
o_weight__smooth = input
o_weight__down = input
o_weight__up = input
quantize_default = quantize(l_x_, k_weight__smooth, k_weight__down, w4a8, 0.0, False)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
getitem_2 = getitem(quantize_default, 2)
getitem_3 = getitem(getitem_2, [Ellipsis, slice(0, 16, None)])
gemm_default = gemm(getitem, getitem_1, getitem_3, [k_weight__qweight, k_weight__subscales, k_weight__wscales], k_weight__up, None, None, w4a8, torch.float32)
getitem_7 = getitem(getitem_2, [Ellipsis, slice(16, 32, None)])
gemm_default_1 = gemm(getitem, getitem_1, getitem_7, [q_weight__qweight, q_weight__subscales, q_weight__wscales], q_weight__up, q_bias_, None, w4a8, torch.float32)
gelu = gelu(gemm_default_1)
quantize_default_2 = quantize(gelu, o_weight__smooth, o_weight__down, w4a8, 0.0, False)
getitem_8 = getitem(quantize_default_2, 0)
getitem_9 = getitem(quantize_default_2, 1)
getitem_10 = getitem(quantize_default_2, 2)
gemm_default_2 = gemm(getitem_8, getitem_9, getitem_10, [o_weight__qweight, o_weight__subscales, o_weight__wscales], o_weight__up, o_bias_, None, w4a8, torch.float32)
add = add(gemm_default, gemm_default_2)
return [add]""",
        )

    def test_quantize_linears_with_16_bit_activations(self) -> None:
        gm, example_inputs = self.siblings()
        packs = packs_for(gm, example_inputs, "w4a16")
        self.assertEqual(quantize_linears(gm, packs), 3)
        self.assertEqual(share_quantized_inputs(gm), 1, "q and k share the branch's first product")
        self.assertEqual(drop_replaced_weights(gm, list(packs)), 3)
        self.assertExpectedInline(
            show(gm),
            """\
l_x_ = input
q_bias_ = input
o_bias_ = input
k_weight__qweight = input
k_weight__wscales = input
k_weight__wzeros = input
k_weight__down = input
k_weight__up = input
q_weight__qweight = input
q_weight__wscales = input
q_weight__wzeros = input
q_weight__up = input
o_weight__qweight = input
o_weight__wscales = input
o_weight__wzeros = input
o_weight__down = input
o_weight__up = input
linear_3 = linear(l_x_, k_weight__down)
getitem = getitem(linear_3, [Ellipsis, slice(0, 16, None)])
gemv_default = gemv(l_x_, getitem, [k_weight__qweight, k_weight__wscales, k_weight__wzeros], k_weight__up, None, w4a16, torch.float32)
getitem_1 = getitem(linear_3, [Ellipsis, slice(16, 32, None)])
gemv_default_1 = gemv(l_x_, getitem_1, [q_weight__qweight, q_weight__wscales, q_weight__wzeros], q_weight__up, q_bias_, w4a16, torch.float32)
gelu = gelu(gemv_default_1)
linear_5 = linear(gelu, o_weight__down)
gemv_default_2 = gemv(gelu, linear_5, [o_weight__qweight, o_weight__wscales, o_weight__wzeros], o_weight__up, o_bias_, w4a16, torch.float32)
add = add(gemv_default, gemv_default_2)
return [add]""",
        )

    def test_pointwise_convolution(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(64, 64, 1)).requires_grad_(False)
        gm, example_inputs = capture(model, torch.randn(1, 64, 4, 5))
        packs = packs_for(gm, example_inputs)
        self.assertEqual(quantize_linears(gm, packs), 1)
        drop_replaced_weights(gm, list(packs))
        self.assertExpectedInline(
            show(gm),
            """\
l_fn_modules_0_bias_ = input
l_args_0_ = input
l_fn_modules_0_weight__qweight = input
l_fn_modules_0_weight__subscales = input
l_fn_modules_0_weight__wscales = input
l_fn_modules_0_weight__smooth = input
l_fn_modules_0_weight__down = input
l_fn_modules_0_weight__up = input
movedim = movedim(l_args_0_, 1, -1)
quantize_default = quantize(movedim, l_fn_modules_0_weight__smooth, l_fn_modules_0_weight__down, w4a8, 0.0, False)
getitem = getitem(quantize_default, 0)
getitem_1 = getitem(quantize_default, 1)
getitem_2 = getitem(quantize_default, 2)
gemm_default = gemm(getitem, getitem_1, getitem_2, [l_fn_modules_0_weight__qweight, l_fn_modules_0_weight__subscales, l_fn_modules_0_weight__wscales], l_fn_modules_0_weight__up, l_fn_modules_0_bias_, None, w4a8, torch.float32)
movedim_1 = movedim(gemm_default, -1, 1)
contiguous = contiguous(movedim_1)
return [contiguous]""",
        )

    def test_only_what_is_packed_is_replaced(self) -> None:
        gm, example_inputs = self.siblings()
        packs = packs_for(gm, example_inputs)
        first = next(iter(packs))
        self.assertEqual(quantize_linears(gm, {first: packs[first]}), 1)
        self.assertEqual(share_quantized_inputs(gm), 0)
        self.assertEqual(len(find_linears(gm).sites), 2)

    def test_own_smoothing_factors_are_not_shared(self) -> None:
        gm, example_inputs = self.siblings()
        number = {node: i for i, node in enumerate(placeholders(gm.graph))}
        packs = {}
        for site in find_linears(gm).sites:
            weight = example_inputs[number[site.weight]].detach()
            packs[site.weight] = quantize_group([weight], [site.name], "w4a8", Config(rank=16), InputStatistics())[
                0
            ].packed
        quantize_linears(gm, packs)
        self.assertEqual(share_quantized_inputs(gm), 0)

    def test_results_agree_with_the_reference(self) -> None:
        gm, example_inputs = self.siblings()
        packs = packs_for(gm, example_inputs)
        number = {node: i for i, node in enumerate(placeholders(gm.graph))}
        dense = list(example_inputs)
        for node, packed in packs.items():
            dense[number[node]] = packed.dequantize(torch.float32)
        expected = gm(*dense)[0]
        quantize_linears(gm, packs)
        share_quantized_inputs(gm)
        gm.recompile()
        originals = {i: packs[node] for node, i in number.items() if node in packs}
        values = [
            node.meta["packed_input"].value(originals[node.meta["packed_input"].index])
            if "packed_input" in node.meta
            else example_inputs[number[node]]
            for node in placeholders(gm.graph)
        ]
        error = (gm(*values)[0] - expected).norm() / expected.norm()
        self.assertLess(float(error), 0.02, "what is left is the rounding of activations to 8 bits")


class FindTests(TestCase):
    def rejected(self, model: nn.Module, *args: Tensor) -> dict[str, str]:
        gm, _ = capture(model.requires_grad_(False), *args)
        return {name: reason for _, name, reason in weight_inputs(gm).rejected}

    def test_groups_of_a_whole_model(self) -> None:
        gm, _ = capture(net(), *inputs())
        groups = [(group.names, group.few_rows, group.shift) for group in weight_inputs(gm).groups]
        self.assertEqual(
            groups[:4],
            [
                (("blocks.0.modulate",), True, 0.28125),
                (("blocks.0.to_q", "blocks.0.to_k"), False, 0.0),
                (("blocks.0.up",), False, 0.0),
                (("blocks.0.down",), False, 0.171875),
            ],
        )
        self.assertEqual(len(groups), 8)
        self.assertEqual({n for _, n, _ in weight_inputs(gm).rejected}, {"embed", "project"})

    def test_groups_of_a_block_are_the_same(self) -> None:
        gm, _ = capture(net().blocks[0], torch.randn(2, 24, 128), torch.randn(2, 128))
        names = [group.names for group in weight_inputs(gm).groups]
        self.assertEqual(names, [("modulate",), ("to_q", "to_k"), ("up",), ("down",)])

    def test_reasons(self) -> None:
        self.assertIn("small", self.rejected(nn.Sequential(nn.Linear(128, 32)), torch.randn(2, 128))["0"])
        double = nn.Sequential(nn.Linear(128, 128)).double()
        self.assertIn("float64", self.rejected(double, torch.randn(2, 128).double())["0"])

        class Transposed(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, self.weight) @ self.weight

        model = nn.Sequential(Transposed(128, 128, bias=False))
        self.assertIn("something other", self.rejected(model, torch.randn(2, 128))["0"])

    def test_spatial_convolutions_are_no_linears(self) -> None:
        for conv in (
            nn.Conv2d(64, 64, 3),
            nn.Conv2d(64, 64, 1, stride=2),
            nn.Conv2d(64, 64, 1, padding=1),
            nn.Conv2d(64, 64, 1, groups=2),
        ):
            gm, _ = capture(nn.Sequential(conv).requires_grad_(False), torch.randn(1, 64, 8, 8))
            self.assertEqual(weight_inputs(gm).groups, [])

    def test_dynamic_sizes(self) -> None:
        caught: list = []

        def backend(gm: fx.GraphModule, example_inputs: list) -> Callable:
            caught.append(weight_inputs(gm))
            return gm.forward

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(Siblings().requires_grad_(False), backend=backend, dynamic=True)(torch.randn(3, 20, 128))
        self.assertEqual([group.few_rows for group in caught[0].groups], [False, False])

    def test_input_shift_needs_dropout_to_be_off(self) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 64)).requires_grad_(False)
        for training, shift in ((False, 0.171875), (True, 0.0)):
            gm, _ = capture(model.train(training), torch.randn(2, 20, 64))
            self.assertEqual(weight_inputs(gm).groups[1].shift, shift)


class ScopeTests(TestCase):
    def test_clean(self) -> None:
        self.assertEqual(clean("L['self']"), "")
        self.assertEqual(clean("L['self'].blocks.0.fc1"), "blocks.0.fc1")
        path = "L['self'].__dict__['_modules']['transformer_blocks'].0.attn.to_q"
        self.assertEqual(clean(path), "transformer_blocks.0.attn.to_q")
        self.assertEqual(clean("L['self']._modules['blocks']._modules['3'].proj"), "blocks.3.proj")
        self.assertEqual(clean("getattr(getattr(G['model'].blocks, '3').ff.net, '0')"), "blocks.3.ff.net.0")

    def test_elements(self) -> None:
        self.assertEqual(
            elements("down_blocks.1.attentions.0.to_out.0"), ["down_blocks.1", "down_blocks.1.attentions.0"]
        )
        self.assertEqual(sibling_scope("blocks.3.ff.net.0.proj"), "blocks.3.ff.net.0")
        self.assertEqual(sibling_scope("attn.to_q"), "")

    def test_outside_blocks(self) -> None:
        names = ["x_embedder", "blocks.0.q", "blocks.0.k", "blocks.0.ff.net.0.proj", "norm_out.linear", "heads.0.proj"]
        self.assertEqual(outside_blocks(names), {"x_embedder", "norm_out.linear", "heads.0.proj"})
        self.assertEqual(outside_blocks(["attn.to_q", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]), set())
