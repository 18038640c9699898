"""A writer of Nunchaku's checkpoints that shares nothing with the reader: each formula as it is documented, element by
element, and each model's names spelled out.

A linear is made up of random numbers (`Truth`), written, and later compared with what the reader has made of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SHIFT = 0.171875
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


# ** places in memory **


def code_place(n: int, k: int, groups: int) -> tuple[int, int]:
    """The 32-bit word and the nibble in it. groups: K / 64."""
    nt, a, p, lane = n // 128, (n % 128) // 16, (n % 16) // 8, n % 8
    kt, q, m, e = k // 64, (k % 64) // 32, (k % 32) // 8, k % 8
    return ((((nt * groups + kt) * 8 + a) * 8 + lane) * 4 + m) * 4 + p * 2 + q, e


def scale_place(n: int, g: int, groups: int) -> int:
    """groups: K / 64; a vector is one group."""
    nt, a, b, c, d = n // 128, (n % 128) // 16, (n % 16) // 8, (n % 8) // 2, n % 2
    return (nt * groups + g) * 128 + a * 16 + c * 4 + b * 2 + d


def fp8_scale_place(n: int, g: int, groups: int) -> int:
    """groups: K / 16."""
    kt, j, nt, s, q, lane = g // 4, g % 4, n // 128, (n % 128) // 32, (n % 32) // 8, n % 8
    return ((nt * (groups // 4) + kt) * 128 + lane * 16 + q * 4 + s) * 4 + j


def down_place(r: int, k: int, rank: int) -> int:
    cp, rp, p, lane = k // 16, r // 16, (r % 16) // 8, r % 8
    q, m, e = (k % 16) // 8, (k % 8) // 2, k % 2
    return (((cp * (rank // 16) + rp) * 8 + lane) * 4 + m) * 8 + p * 4 + q * 2 + e


def up_place(n: int, r: int, rank: int) -> int:
    cp, rp, p, lane = n // 16, r // 16, (n % 16) // 8, n % 8
    q, m, e = (r % 16) // 8, (r % 8) // 2, r % 2
    return (((cp * (rank // 16) + rp) * 8 + lane) * 4 + m) * 8 + p * 4 + q * 2 + e


def awq_place(n: int, k: int, groups: int) -> tuple[int, int]:
    """The 16-bit word and the nibble in it. groups: K / 64."""
    word = (((n // 4) * groups + k // 64) * 4 + n % 4) * 16 + ((k % 64) // 32) * 8 + k % 8
    return word, (k % 32) // 8


# Of whole matrices: the functions above take arrays of indices as well as numbers.


def indices(*shape: int) -> tuple[np.ndarray, ...]:
    return tuple(np.indices(shape, dtype=np.int64))


def put_codes(codes: np.ndarray) -> Tensor:
    """[N, K] of 0..15."""
    n, k = indices(*codes.shape)
    word, nibble = code_place(n, k, codes.shape[1] // 64)
    words = np.zeros(codes.size // 8, np.uint32)
    np.bitwise_or.at(words, word.ravel(), (codes.astype(np.uint32) << (4 * nibble).astype(np.uint32)).ravel())
    return torch.from_numpy(words.view(np.int8).reshape(codes.shape[0], codes.shape[1] // 2))


def put(matrix: Tensor, place: np.ndarray, *nominal: int) -> Tensor:
    """Elements to their places."""
    flat = matrix.new_empty(matrix.numel())
    flat[torch.from_numpy(place.ravel())] = matrix.reshape(-1)
    return flat.reshape(nominal)


def put_scales(scales: Tensor) -> Tensor:
    n, g = indices(*scales.shape)
    return put(scales, scale_place(n, g, scales.shape[1]), scales.shape[1], scales.shape[0])


def put_vector(vector: Tensor) -> Tensor:
    return put(vector, scale_place(np.arange(len(vector)), 0, 1), len(vector))


def put_fp8_scales(scales: Tensor) -> Tensor:
    n, g = indices(*scales.shape)
    raw = put(scales.view(torch.uint8), fp8_scale_place(n, g, scales.shape[1]), scales.shape[1], scales.shape[0])
    return raw.view(torch.float8_e4m3fn)


def put_down(down: Tensor) -> Tensor:
    r, k = indices(*down.shape)
    return put(down, down_place(r, k, down.shape[0]), down.shape[1], down.shape[0])


def put_up(up: Tensor) -> Tensor:
    n, r = indices(*up.shape)
    return put(up, up_place(n, r, up.shape[1]), *up.shape)


def put_awq_codes(codes: np.ndarray) -> Tensor:
    n, k = indices(*codes.shape)
    word, nibble = awq_place(n, k, codes.shape[1] // 64)
    words = np.zeros(codes.size // 4, np.uint16)
    np.bitwise_or.at(words, word.ravel(), (codes.astype(np.uint16) << (4 * nibble).astype(np.uint16)).ravel())
    return torch.from_numpy(words.view(np.int32).reshape(codes.shape[0] // 4, codes.shape[1] // 2))


# ** linears **


@dataclass
class Truth:
    """A linear of random numbers.

    q        [N, K]      int, or e2m1 codes of 0..15
    scales   [N, groups] above: [N] of nvfp4, what multiplies them
    """

    precision: str
    q: Tensor
    scales: Tensor
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor
    above: Tensor | None = None

    def values(self) -> Tensor:
        """[N, K] fp64, smoothed."""
        group = 64 if self.precision == "int4" else 16
        scales = self.scales.double().repeat_interleave(group, 1)[:, : self.q.shape[1]]
        if self.precision == "int4":
            return self.q.double() * scales
        table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
        assert self.above is not None
        return table[self.q] * scales * self.above.double()[:, None]

    def weight(self) -> Tensor:
        """[N, K] fp64: the whole of it."""
        return self.values() / self.smooth.double() + self.up.double() @ self.down.double()

    def brought(self) -> Tensor:
        """[N] fp64: what a shift of the input adds to the 4-bit product."""
        return (self.values() / self.smooth.double()).sum(1) * SHIFT


def truth(n: int, k: int, precision: str, rank: int, h: torch.dtype, alone: bool) -> Truth:
    """alone: nvfp4 has one scale for the whole tensor above the others, else one for each row."""
    smooth, down, up = torch.rand(k) + 0.5, torch.randn(rank, k) / k, torch.randn(n, rank) / 8
    common = [t.to(h) for t in (smooth, down, up, torch.randn(n))]
    if precision == "int4":
        q = torch.randint(-7, 8, (n, k))
        return Truth("int4", q, (torch.rand(n, -(-k // 64)) / k + 1e-3).to(h), *common)
    above = (torch.rand(1).expand(n) if alone else torch.rand(n)) / k + 1e-3
    scales = (torch.rand(n, -(-k // 16)) * 200 + 1).to(torch.float8_e4m3fn)
    return Truth("nvfp4", torch.randint(0, 16, (n, k)), scales, *common, above.to(h))


def stacked(parts: Sequence[Truth]) -> Truth:
    """Linears with one input, under one another; they share smooth and down."""
    rows = {name: torch.cat([_raw(getattr(p, name)) for p in parts]) for name in ("q", "scales", "up", "bias")}
    rows["scales"] = rows["scales"].view(parts[0].scales.dtype)
    above = None if parts[0].above is None else torch.cat([p.above for p in parts])
    return Truth(parts[0].precision, smooth=parts[0].smooth, down=parts[0].down, above=above, **rows)


def _raw(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def _grown(t: Tensor, shape: Sequence[int], value: float) -> Tensor:
    """Padded at the end of each dimension."""
    full = torch.full(tuple(shape), value).to(t.dtype)
    raw = _raw(full)
    raw[tuple(slice(size) for size in t.shape)] = _raw(t)
    return full


def up_to(size: int, step: int) -> int:
    return -(-size // step) * step


def w4a4(t: Truth, *, padding: int = 128, always_bias: bool = True, both: bool = False) -> dict[str, Tensor]:
    """By the new names. padding: what K is rounded up to; both: nvfp4 with wtscale and wcscales at once."""
    (n, k), rank, h = t.q.shape, t.up.shape[1], t.smooth.dtype
    big_n, big_k = up_to(n, 128), up_to(k, padding)
    codes = np.zeros((big_n, big_k), np.int64)
    codes[:n, :k] = t.q.numpy() & 15
    tensors = {"qweight": put_codes(codes)}
    group = 64 if t.precision == "int4" else 16
    scales = _grown(t.scales, (big_n, big_k // group), 1)
    tensors["wscales"] = put_scales(scales) if t.precision == "int4" else put_fp8_scales(scales)
    if t.above is not None:
        alone = bool((t.above == t.above[0]).all())
        if alone or both:
            tensors["wtscale"] = t.above[:1].clone() if alone else torch.ones(1, dtype=h)
        if not alone or both:
            tensors["wcscales"] = put_vector(_grown(torch.ones_like(t.above) if alone else t.above, (big_n,), 1))
    if always_bias:
        tensors["bias"] = put_vector(_grown(t.bias, (big_n,), 1))
    tensors["smooth_factor"] = put_vector(_grown(t.smooth, (up_to(k, 128),), 1))
    tensors["smooth_factor_orig"] = torch.ones(up_to(k, 128), dtype=h)
    if rank:
        tensors["proj_down"] = put_down(_grown(t.down, (rank, big_k), 0))
        tensors["proj_up"] = put_up(_grown(t.up, (big_n, rank), 0))
    return tensors


@dataclass
class AwqTruth:
    """A weight-only linear, its rows in the stock order: w = q scale + zero."""

    q: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor

    def weight(self) -> Tensor:
        scales, zeros = (t.double().repeat_interleave(64, 1) for t in (self.scales, self.zeros))
        return self.q.double() * scales + zeros


def awq_truth(n: int, k: int, h: torch.dtype) -> AwqTruth:
    scales = (torch.rand(n, k // 64) / k + 1e-3).to(h)
    return AwqTruth(torch.randint(0, 15, (n, k)), scales, (-7 * scales).to(h), torch.randn(n).to(h))


def awq(t: AwqTruth, chunks: int = 1, groups: int = 0) -> dict[str, Tensor]:
    """chunks: of an adaptive norm, whose rows are interleaved, with 1 in the bias of its scales. groups: padded to."""
    n, k = t.q.shape
    order = torch.tensor([s * (n // chunks) + i for i in range(n // chunks) for s in range(chunks)])
    bias = t.bias.clone()
    if chunks > 1:
        for s in {1, chunks - 2}:
            bias[s * (n // chunks) : (s + 1) * (n // chunks)] += 1
    size = (max(groups, k // 64), n)
    return {
        "qweight": put_awq_codes(t.q[order].numpy()),
        "wscales": _grown(t.scales[order].t(), size, 0),
        "wzeros": _grown(t.zeros[order].t(), size, 0),
        "bias": bias[order],
    }


# ** models **


OLD = {
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
    "proj_down": "lora_down",
    "proj_up": "lora_up",
}


class Writer:
    """Collects the tensors of a file of `model`, and what its linears are to be.

    weights, biases  by the stock module's name, fp64
    truths           by the file's module
    """

    def __init__(self, model: nn.Module, precision: str, rank: int = 32, h: torch.dtype = torch.bfloat16) -> None:
        self.model, self.precision, self.rank, self.h = model, precision, rank, h
        self.old = False
        self.both = False
        self.padding = 128  # of K, as the engine wants it; the converter pads nvfp4 to 64
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.truths: dict[str, Truth | AwqTruth] = {}
        self.used: set[str] = set()

    def shape(self, name: str) -> tuple[int, int]:
        n, k, *_ = self.model.get_submodule(name).weight.shape
        return n, k

    def has_bias(self, name: str) -> bool:
        return self.model.get_submodule(name).bias is not None

    def add(self, module: str, tensors: dict[str, Tensor]) -> None:
        for field, tensor in tensors.items():
            self.tensors[f"{module}.{OLD.get(field, field) if self.old else field}"] = tensor.contiguous()

    def linear(
        self,
        module: str,
        *parts: str,
        always_bias: bool = True,
        unsigned: bool = False,
        apart: bool = False,
        gated=False,
    ) -> None:
        """Stock modules as one 4-bit module. apart: each part padded by itself; gated: two halves interleaved."""
        shapes = [self.shape(part) for part in parts]
        truths = [truth(n, k, self.precision, self.rank, self.h, len(parts) == 1) for n, k in shapes]
        for t in truths[1:]:
            t.smooth, t.down = truths[0].smooth, truths[0].down
        for part, t in zip(parts, truths, strict=True):
            if not self.has_bias(part):
                t.bias.zero_()
            self.done(part, t.weight(), t.bias.double() + (t.brought() if unsigned and t.precision == "int4" else 0))
        if apart:
            truths = [self._padded(t) for t in truths]
        whole = stacked(truths)
        if gated:
            half = len(whole.q) // 2
            order = torch.tensor([s * half + i for i in range(half) for s in range(2)])
            whole.q, whole.up, whole.bias = whole.q[order], whole.up[order], whole.bias[order]
            whole.scales = _raw(whole.scales)[order].view(whole.scales.dtype)
            whole.above = None if whole.above is None else whole.above[order]
        self.truths[module] = whole
        self.add(module, w4a4(whole, padding=self.padding, always_bias=always_bias, both=self.both))

    def _padded(self, t: Truth) -> Truth:
        n = up_to(len(t.q), 128)
        grown = {"q": 0, "scales": 1, "up": 0, "bias": 1}
        values = {name: _grown(getattr(t, name), (n, *getattr(t, name).shape[1:]), v) for name, v in grown.items()}
        above = None if t.above is None else _grown(t.above, (n,), 1)
        return Truth(t.precision, smooth=t.smooth, down=t.down, above=above, **values)

    def split(self, part: str, first: str, second: str, width: int) -> None:
        """FLUX's single block: the columns of one linear as two modules, the second after GELU, with the bias."""
        n, k = self.shape(part)
        left = truth(n, width, self.precision, self.rank, self.h, True)
        right = truth(n, k - width, self.precision, self.rank, self.h, True)
        left.bias.zero_()
        brought = right.brought() if self.precision == "int4" else 0
        self.done(part, torch.cat((left.weight(), right.weight()), 1), right.bias.double() + brought)
        for module, t in ((first, left), (second, right)):
            self.truths[module] = t
            self.add(module, w4a4(t, padding=self.padding, both=self.both))

    def modulation(self, module: str, chunks: int, groups: int = 0) -> None:
        t = awq_truth(*self.shape(module), self.h)
        self.truths[module] = t
        self.add(module, awq(t, chunks, groups))
        ones = torch.zeros(chunks, len(t.q) // chunks, dtype=torch.float64)
        ones[[1, chunks - 2]] = 1
        stored = (t.bias + ones.flatten().to(self.h)).double()  # added in 16 bits
        self.done(module, t.weight(), stored - ones.flatten())

    def done(self, part: str, weight: Tensor, bias: Tensor) -> None:
        self.weights[part], self.biases[part] = weight, bias
        self.used |= {f"{part}.weight", f"{part}.bias"}

    def plain(self, name: str, *parts: str, gated: bool = False, shape: tuple[int, ...] = ()) -> None:
        """16-bit modules under another name, or as one."""
        for leaf in ("weight", "bias"):
            own = [f"{part}.{leaf}" for part in parts]
            tensors = [t for n, t in self.model.state_dict().items() if n in own]
            if tensors:
                joined = torch.cat([self.model.state_dict()[n] for n in own])
                if gated:
                    joined = torch.stack(joined.chunk(2), 1).flatten(0, 1)
                if shape and leaf == "weight":
                    joined = joined.reshape(shape)
                self.tensors[f"{name}.{leaf}"] = joined.to(self.h).contiguous()
                self.used |= set(own)

    def rest(self) -> None:
        """Everything else, under its own name."""
        for name, tensor in self.model.state_dict().items():
            if name not in self.used:
                self.tensors[name] = tensor.to(self.h).contiguous()

    def metadata(self, model_class: str) -> dict[str, str]:
        fp4 = self.precision == "nvfp4"
        dtype, group = ("fp4_e2m1_all", 16) if fp4 else ("int4", 64)
        told = {
            "method": "svdquant",
            "weight": {"dtype": dtype, "scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None, "group_size": group},
            "activation": {"dtype": dtype, "scale_dtype": "fp8_e4m3_nan" if fp4 else None, "group_size": group},
            "rank": self.rank,
        }
        config = json.dumps({**self.model.config, "_class_name": model_class}, default=list)
        return {
            "config": config,
            "comfy_config": "{}",
            "model_class": model_class,
            "quantization_config": json.dumps(told),
        }


def flux(w: Writer, old: bool = True) -> str:
    w.old = old
    for i in range(len(w.model.transformer_blocks)):
        b = f"transformer_blocks.{i}"
        a = f"{b}.attn"
        names = {
            "qkv": "qkv_proj", "add": "qkv_proj_context", "out": "out_proj", "add_out": "out_proj_context",
            "fc1": "mlp_fc1", "fc2": "mlp_fc2", "cfc1": "mlp_context_fc1", "cfc2": "mlp_context_fc2", "norm": "",
        } if old else {
            "qkv": "attn.to_qkv", "add": "attn.add_qkv_proj", "out": "attn.to_out.0", "add_out": "attn.to_add_out",
            "fc1": "ff.net.0.proj", "fc2": "ff.net.2", "cfc1": "ff_context.net.0.proj", "cfc2": "ff_context.net.2",
            "norm": "attn.",
        }  # fmt: skip
        w.linear(f"{b}.{names['qkv']}", f"{a}.to_q", f"{a}.to_k", f"{a}.to_v")
        w.linear(f"{b}.{names['add']}", f"{a}.add_q_proj", f"{a}.add_k_proj", f"{a}.add_v_proj")
        w.linear(f"{b}.{names['out']}", f"{a}.to_out.0")
        w.linear(f"{b}.{names['add_out']}", f"{a}.to_add_out")
        w.linear(f"{b}.{names['fc1']}", f"{b}.ff.net.0.proj")
        w.linear(f"{b}.{names['fc2']}", f"{b}.ff.net.2", unsigned=True)
        w.linear(f"{b}.{names['cfc1']}", f"{b}.ff_context.net.0.proj")
        w.linear(f"{b}.{names['cfc2']}", f"{b}.ff_context.net.2", unsigned=True)
        w.modulation(f"{b}.norm1.linear", 6, groups=16)
        w.modulation(f"{b}.norm1_context.linear", 6)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            w.plain(f"{b}.{names['norm']}{norm}", f"{a}.{norm}")
    for i in range(len(w.model.single_transformer_blocks)):
        b = f"single_transformer_blocks.{i}"
        inner, _ = w.shape(f"{b}.attn.to_v")
        w.linear(f"{b}.{'qkv_proj' if old else 'attn.to_qkv'}", *(f"{b}.attn.to_{x}" for x in "qkv"))
        w.linear(f"{b}.mlp_fc1", f"{b}.proj_mlp")
        w.split(f"{b}.proj_out", f"{b}.{'out_proj' if old else 'attn.to_out'}", f"{b}.mlp_fc2", inner)
        w.modulation(f"{b}.norm.linear", 3)
        for norm in ("norm_q", "norm_k"):
            w.plain(f"{b}.{'' if old else 'attn.'}{norm}", f"{b}.attn.{norm}")
    w.rest()
    return "NunchakuFluxTransformer2dModel"


def qwen(w: Writer) -> str:
    for i in range(len(w.model.transformer_blocks)):
        b = f"transformer_blocks.{i}"
        a = f"{b}.attn"
        w.linear(f"{a}.to_qkv", f"{a}.to_q", f"{a}.to_k", f"{a}.to_v")
        w.linear(f"{a}.add_qkv_proj", f"{a}.add_q_proj", f"{a}.add_k_proj", f"{a}.add_v_proj")
        w.linear(f"{a}.to_out.0", f"{a}.to_out.0")
        w.linear(f"{a}.to_add_out", f"{a}.to_add_out")
        for stream in ("img", "txt"):
            w.linear(f"{b}.{stream}_mlp.net.0.proj", f"{b}.{stream}_mlp.net.0.proj")
            w.linear(f"{b}.{stream}_mlp.net.2", f"{b}.{stream}_mlp.net.2", unsigned=True)
            w.modulation(f"{b}.{stream}_mod.1", 6)
    w.rest()
    return "NunchakuQwenImageTransformer2DModel"


def z_image(w: Writer, skip_refiners: bool = False) -> str:
    for name in ("layers", "noise_refiner", "context_refiner"):
        for i in range(len(getattr(w.model, name))):
            b = f"{name}.{i}"
            if skip_refiners and name != "layers":
                w.plain(f"{b}.feed_forward.net.0.proj", f"{b}.feed_forward.w3", f"{b}.feed_forward.w1")
                w.plain(f"{b}.feed_forward.net.2", f"{b}.feed_forward.w2")
                continue
            w.linear(f"{b}.attention.to_qkv", *(f"{b}.attention.to_{x}" for x in "qkv"), always_bias=False)
            w.linear(f"{b}.attention.to_out.0", f"{b}.attention.to_out.0", always_bias=False)
            halves = f"{b}.feed_forward.w3", f"{b}.feed_forward.w1"
            w.linear(f"{b}.feed_forward.net.0.proj", *halves, always_bias=False)
            w.linear(f"{b}.feed_forward.net.2", f"{b}.feed_forward.w2", always_bias=False)
    w.rest()
    return "NunchakuZImageTransformer2DModel"


def sdxl(w: Writer) -> str:
    w.old = True
    for name, block in w.model.named_modules():
        if type(block).__name__ == "BasicTransformerBlock":
            w.linear(f"{name}.attn1.to_qkv", *(f"{name}.attn1.to_{x}" for x in "qkv"))
            for linear in ("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"):
                w.linear(f"{name}.{linear}", f"{name}.{linear}")
    w.rest()
    return "NunchakuSDXLUNet2DConditionModel"


def sana(w: Writer) -> str:
    w.old = True
    for i in range(len(w.model.transformer_blocks)):
        b = f"transformer_blocks.{i}"
        w.linear(f"{b}.attn.qkv_proj", *(f"{b}.attn1.to_{x}" for x in "qkv"), apart=True)
        w.linear(f"{b}.attn.out_proj", f"{b}.attn1.to_out.0")
        w.linear(f"{b}.cross_attn.q_linear", f"{b}.attn2.to_q")
        w.plain(f"{b}.cross_attn.kv_linear", f"{b}.attn2.to_k", f"{b}.attn2.to_v")
        w.linear(f"{b}.cross_attn.out_proj", f"{b}.attn2.to_out.0")
        w.linear(f"{b}.ff.inverted_conv", f"{b}.ff.conv_inverted", gated=True)
        w.plain(f"{b}.ff.depth_conv", f"{b}.ff.conv_depth", gated=True, shape=(-1, 3, 3, 1))
        w.linear(f"{b}.ff.point_conv", f"{b}.ff.conv_point")
    w.rest()
    return "NunchakuSanaTransformer2DModel"


def lite(w: Writer, targets: Sequence[str], awq_targets: Sequence[str]) -> dict:
    """diffusers' nunchaku_lite: the stock names and order -> the quantization_config."""
    w.both = w.precision == "nvfp4"
    for name in targets:
        w.linear(name, name, always_bias=w.has_bias(name))
        del w.tensors[f"{name}.smooth_factor_orig"]
    for name in awq_targets:
        t = awq_truth(*w.shape(name), w.h)
        w.truths[name] = t
        w.add(name, awq(t))
        w.done(name, t.weight(), t.bias.double())
    w.rest()
    return {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "bfloat16",
        "svdq_w4a4": {
            "precision": w.precision,
            "group_size": 64 if w.precision == "int4" else 16,
            "rank": w.rank,
            "targets": list(targets),
        },
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": list(awq_targets)},
    }


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path
