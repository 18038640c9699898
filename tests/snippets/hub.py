"""Tiny pipelines under the names of published ones, where diffusers and transformers look for what they downloaded.

    fill(folder)
    environment(folder)     # the variables under which a process looks there, and asks the network for nothing

So `from_pretrained("black-forest-labs/FLUX.1-dev")` is what it is for everybody, apart from the size. Weights are
random; layers have the widths of the zoo (tests/zoo), so what is quantized in the published models is quantized here.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from zoo import make

WORDS = ["<pad>", "<unk>", "</s>", "a", "an", "dog", "cat", "in", "on", "the", "skateboard", "rain", "style", "of"]
WIDTH = 128
REVISION = "0" * 40
CLIP = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": WIDTH,
    "eos_token_id": 2,
}
T5 = {"vocab_size": len(WORDS), "d_model": WIDTH, "d_kv": 64, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 2}


def fill(folder: Path) -> None:
    """Write all pipelines into a folder, laid out as Hugging Face's cache."""
    torch.manual_seed(0)
    for name, build in PIPELINES.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        build().save_pretrained(repository / "snapshots" / REVISION)


def environment(folder: Path) -> dict[str, str]:
    return {"HF_HUB_CACHE": str(folder), "HF_HUB_OFFLINE": "1"}


def snapshot(folder: Path, name: str) -> Path:
    """Where the pipeline of this name lies in a cache that `fill` has written."""
    return folder / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION


def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special)


def _autoencoder(latents: int) -> AutoencoderKL:
    """It makes of a latent 8 x 8 pixels, as the published ones do."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=latents,
        shift_factor=0.0,
    )


def _flux() -> DiffusionPipeline:
    # Dynamo takes seconds for each kind of block, least for this one.
    transformer, _ = make("flux", num_layers=0, num_single_layers=1)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(16),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
        tokenizer=_tokenizer(77),
        text_encoder_2=T5EncoderModel(T5Config(**T5)),
        tokenizer_2=_tokenizer(512),
        transformer=transformer,
    )


def _sdxl() -> DiffusionPipeline:
    unet, _ = make(
        "sdxl",
        block_out_channels=(WIDTH,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        transformer_layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=2 * WIDTH,
        sample_size=32,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=_autoencoder(4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)),
        tokenizer=_tokenizer(77),
        tokenizer_2=_tokenizer(77),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _wan() -> DiffusionPipeline:
    transformer, _ = make("wan", num_layers=1)
    autoencoder = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        tokenizer=_tokenizer(512),
        text_encoder=UMT5EncoderModel(UMT5Config(**T5)),
        vae=autoencoder,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )


PIPELINES = {
    "black-forest-labs/FLUX.1-dev": _flux,
    "stabilityai/stable-diffusion-xl-base-1.0": _sdxl,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan,
}
