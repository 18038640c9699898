"""Models that are not of diffusers: a plain DiT, the text encoders of pipelines, and products written by hand."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import WIDTH, Draw, Entry

_CHANNELS = 16


class _Block(nn.Module):
    """Attention and a feed-forward network, each after a norm with scale, shift and gate (adaLN-zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(h)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiT(nn.Module):
    """A diffusion transformer as one writes it down: no base class, no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(_CHANNELS, WIDTH)
        self.condition = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.final = nn.Linear(WIDTH, _CHANNELS)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor]:
        x, condition = self.embed(x), self.condition(condition)
        for block in self.blocks:
            x = block(x, condition)
        return (self.final(x),)


class _Products(nn.Module):
    """Everything that multiplies by a weight, beside linears that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.einsum = nn.Parameter(torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        self.matmul = nn.Parameter(torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        self.addmm = nn.Parameter(torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * WIDTH**-0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = torch.einsum("btc,dc->btd", h, self.einsum) + h @ self.matmul
        h = h + torch.addmm(self.bias, h.flatten(0, 1), self.addmm).view_as(h)
        pair = h.flatten(0, 1).expand(2, -1, -1)
        h = self.norm(h + torch.baddbmm(self.bias, pair, self.experts).sum(0).view_as(h))
        h = self.norm(h + self.bilinear(h, h) / WIDTH**0.5)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(h)))


class Operators(nn.Module):
    """Blocks of `_Products` between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(_CHANNELS, WIDTH)
        self.blocks = nn.ModuleList(_Products() for _ in range(2))
        self.final = nn.Linear(WIDTH, _CHANNELS)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return (self.final(x),)


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=WIDTH,
            d_kv=WIDTH // 2,
            num_heads=2,
            d_ff=2 * WIDTH,
            num_layers=2,
            feed_forward_proj="gated-gelu",
        )
    )


def _clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_attention_heads=2,
            num_hidden_layers=2,
            eos_token_id=2,
        )
    )


_DECODER = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}


def _qwen_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    rope = {"type": "mrope", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    tokens = {"image_token_id": 61, "video_token_id": 62, "vision_start_token_id": 60, "vision_end_token_id": 63}
    text = _DECODER | {"rope_scaling": rope, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))


def _gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**_DECODER, head_dim=WIDTH // 2, query_pre_attn_scalar=WIDTH // 2))


def _prompt_ids(draw: Draw) -> dict[str, Any]:
    ids = draw.integers(57, draw.batch, draw.text) + 3  # no id that means something
    return {"input_ids": ids, "attention_mask": draw.mask().long(), "return_dict": False}


def _decoder_ids(draw: Draw) -> dict[str, Any]:
    return _prompt_ids(draw) | {"use_cache": False}


def _plain(draw: Draw) -> dict[str, Any]:
    return {"x": draw(draw.batch, draw.tokens, _CHANNELS), "condition": draw(draw.batch, WIDTH)}


ENTRIES = (
    Entry("plain_dit", "a plain DiT", PlainDiT, _plain),
    Entry("operators", "products by hand", Operators, lambda draw: {"x": draw(draw.batch, draw.tokens, _CHANNELS)}),
    # T5 does not divide its attention's scores by anything: random weights make it pick single tokens.
    Entry("t5", "T5EncoderModel", _t5, _prompt_ids, tolerance=1.6),
    Entry("clip", "CLIPTextModel", _clip, _prompt_ids),
    Entry("qwen_vl", "Qwen2_5_VLModel", _qwen_vl, _decoder_ids),
    Entry("gemma", "Gemma2Model", _gemma, _decoder_ids),
)
