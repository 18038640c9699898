"""What Nunchaku's files call the linears of a model, by architecture: a file's names -> modules of diffusers' class.

A file has its linears block by block. A rule says which linears one of its modules holds, and in which order their rows
lie. Names that no rule has are the same on both sides.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

W4A4, W4A16, SIXTEEN_BIT = "w4a4", "w4a16", "16-bit"


@dataclass(frozen=True)
class Rule:
    """One module of a file's block.

    names    it may have there, the one that is written first
    parts    the modules whose rows it holds, one under the other
    packing  how it is written; what is W4A4 may come in 16-bit as well
    chunks   its rows lie channel by channel, so many chunks of the part in turn
    ones     the chunks whose bias has 1 added
    shifted  in int4 its input is shifted to be non-negative, for unsigned codes
    writer   it holds only those columns of its part that read what this module writes
    padded   the rows of each part are padded, and not all together
    apart    in 16 bits its parts have their own names
    shape    nominal, of a 16-bit weight, where it is another than the part's
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    packing: str = W4A4
    chunks: int = 1
    ones: tuple[int, ...] = ()
    shifted: bool = False
    writer: str = ""
    padded: bool = False
    apart: bool = False
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A model that Nunchaku runs.

    stock    its class in diffusers
    engines  its classes in a file's metadata, the one that is written first
    legacy   whether a file is written with the old names of tensors (lora_down, smooth)
    blocks   pattern of a block's name -> its rules
    ignored  modules of a block that the stock class has not, and does not need
    optional pattern of blocks that may be 16-bit as a whole
    """

    title: str
    stock: str
    engines: tuple[str, ...]
    legacy: bool
    blocks: tuple[tuple[str, tuple[Rule, ...]], ...]
    ignored: tuple[str, ...] = ()
    optional: str = ""

    def rule(self, module: str) -> tuple[str, Rule] | None:
        """The block that a module of a file stands in, with its dot, and its rule."""
        for block, inner, rules in self._inside(module):
            for rule in rules:
                if inner in rule.names:
                    return block, rule
        return None

    def ignores(self, module: str) -> bool:
        """Whether a module of a file is passed over."""
        return any(inner in self.ignored for _, inner, _ in self._inside(module))

    def rules_of(self, modules: Iterable[str]) -> Iterator[tuple[str, Rule]]:
        """Each block of a stock model, with its dot, and each rule whose parts stand there."""
        names = set(modules)
        for name in modules:
            for block, inner, rules in self._inside(name):
                for rule in rules:
                    if inner == rule.parts[0] and all(block + part in names for part in rule.parts):
                        yield block, rule

    def _inside(self, module: str) -> Iterator[tuple[str, str, tuple[Rule, ...]]]:
        for pattern, rules in self.blocks:
            match = re.match(rf"{pattern}\.\d+\.", module)
            if match:
                yield match[0], module[match.end() :], rules


def _same(*names: str, chunks: int = 1) -> tuple[Rule, ...]:
    """Linears that a file has under their own names."""
    return tuple(Rule((name,), (name,), chunks=chunks) for name in names)


def _renamed(**names: str) -> tuple[Rule, ...]:
    """Modules that stay 16-bit, by a file's name."""
    return tuple(Rule((name,), (part,), SIXTEEN_BIT) for name, part in names.items())


def _modulation(name: str, chunks: int) -> Rule:
    """Shifts, scales and gates; the scales, second and last but one, are written as factors: with 1 added."""
    return Rule((name,), (name,), W4A16, chunks, tuple(sorted({1, chunks - 2})))


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_FLUX_DOUBLE = (
    Rule(("qkv_proj", "attn.to_qkv"), _QKV),
    Rule(("qkv_proj_context", "attn.add_qkv_proj"), _ADDED_QKV),
    Rule(("out_proj", "attn.to_out.0"), ("attn.to_out.0",)),
    Rule(("out_proj_context", "attn.to_add_out"), ("attn.to_add_out",)),
    Rule(("mlp_fc1", "ff.net.0.proj"), ("ff.net.0.proj",)),
    Rule(("mlp_fc2", "ff.net.2"), ("ff.net.2",), shifted=True),
    Rule(("mlp_context_fc1", "ff_context.net.0.proj"), ("ff_context.net.0.proj",)),
    Rule(("mlp_context_fc2", "ff_context.net.2"), ("ff_context.net.2",), shifted=True),
    _modulation("norm1.linear", 6),
    _modulation("norm1_context.linear", 6),
    *_renamed(
        norm_q="attn.norm_q",
        norm_k="attn.norm_k",
        norm_added_q="attn.norm_added_q",
        norm_added_k="attn.norm_added_k",
    ),
)
_FLUX_SINGLE = (
    Rule(("qkv_proj", "attn.to_qkv"), _QKV),
    Rule(("mlp_fc1", "proj_mlp"), ("proj_mlp",)),
    Rule(("out_proj", "attn.to_out"), ("proj_out",), writer="attn.to_v"),
    Rule(("mlp_fc2",), ("proj_out",), shifted=True, writer="proj_mlp"),
    _modulation("norm.linear", 3),
    *_renamed(norm_q="attn.norm_q", norm_k="attn.norm_k"),
)
_QWEN = (
    Rule(("attn.to_qkv",), _QKV),
    Rule(("attn.add_qkv_proj",), _ADDED_QKV),
    *_same("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj"),
    Rule(("img_mlp.net.2",), ("img_mlp.net.2",), shifted=True),
    Rule(("txt_mlp.net.2",), ("txt_mlp.net.2",), shifted=True),
    _modulation("img_mod.1", 6),
    _modulation("txt_mod.1", 6),
)
_Z_IMAGE = (
    Rule(("attention.to_qkv",), ("attention.to_q", "attention.to_k", "attention.to_v"), apart=True),
    *_same("attention.to_out.0"),
    # A gated unit whose second half is the gate; in the stock class w1 is.
    Rule(("feed_forward.net.0.proj",), ("feed_forward.w3", "feed_forward.w1")),
    Rule(("feed_forward.net.2",), ("feed_forward.w2",)),
)
_SDXL = (
    Rule(("attn1.to_qkv",), ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    *_same("attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"),
)
_SANA = (
    Rule(("attn.qkv_proj",), ("attn1.to_q", "attn1.to_k", "attn1.to_v"), padded=True),
    Rule(("attn.out_proj",), ("attn1.to_out.0",)),
    Rule(("cross_attn.q_linear",), ("attn2.to_q",)),
    Rule(("cross_attn.kv_linear",), ("attn2.to_k", "attn2.to_v"), SIXTEEN_BIT),
    Rule(("cross_attn.out_proj",), ("attn2.to_out.0",)),
    # The kernel that multiplies by the gate reads value and gate side by side, channel by channel.
    Rule(("ff.inverted_conv",), ("ff.conv_inverted",), chunks=2),
    Rule(("ff.depth_conv",), ("ff.conv_depth",), SIXTEEN_BIT, chunks=2, shape=(-1, 3, 3, 1)),
    Rule(("ff.point_conv",), ("ff.conv_point",)),
)

ARCHITECTURES = (
    Architecture(
        "FLUX",
        "FluxTransformer2DModel",
        ("NunchakuFluxTransformer2dModel", "NunchakuFluxTransformer2DModelV2"),
        True,
        (("transformer_blocks", _FLUX_DOUBLE), ("single_transformer_blocks", _FLUX_SINGLE)),
    ),
    Architecture(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        ("NunchakuQwenImageTransformer2DModel",),
        False,
        (("transformer_blocks", _QWEN),),
    ),
    Architecture(
        "Z-Image",
        "ZImageTransformer2DModel",
        ("NunchakuZImageTransformer2DModel",),
        False,
        (("(?:layers|noise_refiner|context_refiner)", _Z_IMAGE),),
        optional=r"(?:noise|context)_refiner\.",
    ),
    Architecture(
        "SDXL",
        "UNet2DConditionModel",
        ("NunchakuSDXLUNet2DConditionModel",),
        True,
        ((r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks", _SDXL),),
    ),
    Architecture(
        "SANA",
        "SanaTransformer2DModel",
        ("NunchakuSanaTransformer2DModel",),
        True,
        (("transformer_blocks", _SANA),),
        ignored=("attn.pag_to_v",),
    ),
)
