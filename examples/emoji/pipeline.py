"""EmojiPipeline: a small text-to-image pipeline around diffusers' FluxTransformer2DModel.

The model works on 64x64 RGB pixels directly (no VAE): an image is packed into 16x16 patches of 4x4x3 = 48 values,
in the order that FluxPipeline packs its latents. Captions are split into words, looked up in a learned table and
given to the transformer as joint-attention tokens; their mean is the pooled projection.

    from pipeline import EmojiPipeline
    pipe = EmojiPipeline.from_pretrained("examples/emoji", dtype=torch.bfloat16)
    pipe(["dog face", "red apple"], seed=0).images[0].save("dog.png")

Nothing is ever downloaded. `python pipeline.py --help` draws a contact sheet.
"""

import argparse
import json
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

IMAGE_SIZE = 64
PATCH = 4
MAX_TOKENS = 12
PAD, UNK = 0, 1  # the first two entries of vocab.json


def words(caption: str) -> list[str]:
    """Lower-case, strip accents, keep runs of a-z and 0-9: 'Côte d'Ivoire Flag' -> cote, divoire, flag."""
    folded = unicodedata.normalize("NFKD", caption.lower()).replace("\u2019", "").replace("'", "")
    folded = "".join(c for c in folded if not unicodedata.combining(c))
    return re.findall(r"[a-z0-9]+", folded)


def pack(images: Tensor) -> Tensor:
    """(B, 3, 64, 64) -> (B, 256, 48), channel-major inside a patch, as FluxPipeline._pack_latents does."""
    b, c, h, w = images.shape
    x = images.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor) -> Tensor:
    """(B, 256, 48) -> (B, 3, 64, 64), the inverse of `pack`."""
    n = IMAGE_SIZE // PATCH
    x = tokens.view(tokens.shape[0], n, n, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(tokens.shape[0], 3, IMAGE_SIZE, IMAGE_SIZE)


def image_ids(device: torch.device | str | None = None) -> Tensor:
    """(256, 3) rotary position ids: (0, row, column), as in FluxPipeline."""
    n = IMAGE_SIZE // PATCH
    ids = torch.zeros(n, n, 3)
    ids[..., 1] += torch.arange(n)[:, None]
    ids[..., 2] += torch.arange(n)[None, :]
    return ids.reshape(n * n, 3).to(device)


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The captions of a text file, one a line; empty lines are left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


class EmojiTextEncoder(torch.nn.Module):
    """A word table plus learned positions: enough text encoder for emoji names."""

    def __init__(self, vocab: Sequence[str], dim: int = 256) -> None:
        super().__init__()
        self.vocab = list(vocab)
        self.index = {word: i for i, word in enumerate(self.vocab)}
        self.token = torch.nn.Embedding(len(self.vocab), dim)
        self.position = torch.nn.Embedding(MAX_TOKENS, dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.token.weight.dtype

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, 12) rows of the word table, cut or padded to 12 words."""
        ids = torch.full((len(captions), MAX_TOKENS), PAD, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            for i, word in enumerate(words(caption)[:MAX_TOKENS]):
                row[i] = self.index.get(word, UNK)
        return ids

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 12) ids -> (B, 12, dim) tokens and their (B, dim) mean over the real words."""
        table = self.token(ids)
        real = (ids != PAD).unsqueeze(-1).to(table.dtype)
        pooled = (table * real).sum(1) / real.sum(1).clamp(min=1)
        return table + self.position.weight, pooled

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "EmojiTextEncoder":
        """Read vocab.json and text_embedding.safetensors, in the dtype they were stored in."""
        vocab = json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8"))
        weights = load_file(Path(folder, "text_embedding.safetensors"))
        encoder = cls(vocab, weights["token.weight"].shape[1])
        encoder.load_state_dict(weights)
        return encoder.to(weights["token.weight"].dtype).eval().requires_grad_(False)

    def save_folder(self, folder: str | os.PathLike[str]) -> None:
        """Write what `from_folder` reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "vocab.json").write_text(json.dumps(self.vocab, indent=0), encoding="utf-8")
        weights = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        save_file(weights, Path(folder, "text_embedding.safetensors"), metadata={"format": "pt"})


class EmojiPipeline(DiffusionPipeline, FluxLoraLoaderMixin):
    """Draws 64x64 emoji from their names; see `__call__`. Takes LoRA adapters as FluxPipeline does."""

    model_cpu_offload_seq = "transformer"
    text_encoder = None  # adapters are for the transformer; the word table takes none
    _lora_loadable_modules = ("transformer",)

    def __init__(self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._text: EmojiTextEncoder | None = None

    @property
    def text(self) -> EmojiTextEncoder:
        """The word table. It sits beside model_index.json and is read on first use from wherever the pipeline came
        from, so that stock `DiffusionPipeline.from_pretrained(folder, custom_pipeline=...)` works too."""
        if self._text is None:
            self._text = EmojiTextEncoder.from_folder(self.config._name_or_path)
        return self._text

    @text.setter
    def text(self, encoder: EmojiTextEncoder) -> None:
        self._text = encoder

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> "EmojiPipeline":
        pipe = super().from_pretrained(str(folder), local_files_only=True, **kwargs)
        pipe.text = EmojiTextEncoder.from_folder(folder)
        return pipe

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)
        self.text.save_folder(folder)

    @classmethod
    def load_lora_into_text_encoder(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: there is none."""

    def encode_prompt(self, prompt: Sequence[str], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Captions -> (B, 12, 256) token embeddings and (B, 256) pooled embeddings."""
        encoder = self.text.to(device)
        tokens, pooled = encoder(encoder.tokenize(prompt).to(device))
        return tokens.to(dtype), pooled.to(dtype)

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """Packed latents as pictures of one of `__call__`'s output types."""
        if output_type == "latent":
            return latents
        images = (unpack(latents) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 24,
        guidance_scale: float = 3.0,
        negative_prompt: str = "",
        seed: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
    ) -> Any:
        """Draw one image per caption; ImagePipelineOutput, or with return_dict=False a tuple of the images alone.

        seed: image i starts from noise seeded with seed + i (on the CPU, so every device draws the same noise).
        generator / latents: as in other diffusers pipelines; latents is packed noise (B, 256, 48).
        guidance_scale: classifier-free guidance; 1 or less runs the conditional branch alone.
        output_type: 'pil', 'np' (B, 64, 64, 3 in 0..1), 'pt' (B, 3, 64, 64 in 0..1) or 'latent' (packed, -1..1).
        callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}); may return other latents.
        """
        prompt = [prompt] if isinstance(prompt, str) else list(prompt)
        device, dtype, batch = self._execution_device, self.transformer.dtype, len(prompt)

        guided = guidance_scale > 1
        embeds, pooled = self.encode_prompt(prompt + [negative_prompt] * batch if guided else prompt, device, dtype)
        txt_ids = torch.zeros(embeds.shape[1], 3, device=device)
        img_ids = image_ids(device)

        if latents is None:
            if seed is not None:
                generator = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
            shape = (batch, img_ids.shape[0], self.transformer.config.in_channels)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)

        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                x = torch.cat([latents, latents]) if guided else latents
                velocity = self.transformer(
                    hidden_states=x.to(dtype),
                    timestep=(t / 1000).expand(x.shape[0]).to(dtype),
                    encoder_hidden_states=embeds,
                    pooled_projections=pooled,
                    img_ids=img_ids,
                    txt_ids=txt_ids,
                    return_dict=False,
                )[0].float()
                if guided:
                    cond, uncond = velocity.chunk(2)
                    velocity = uncond + guidance_scale * (cond - uncond)
                latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)
                bar.update()

        images = self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 6, scale: int = 2
) -> Image.Image:
    """Images and their captions on one white sheet."""
    cell, text = IMAGE_SIZE * scale, 14
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + 8), rows * (cell + text + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = (i % columns) * (cell + 8) + 4, (i // columns) * (cell + text + 8) + 4
        sheet.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        draw.text((x + 2, y + cell), caption[: cell // 6], fill="black")
    return sheet


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Draw a contact sheet of emoji.")
    parser.add_argument("prompts", nargs="*", help="captions; without any, the first 24 lines of prompts.txt")
    parser.add_argument("--model", default=here, type=Path, help="the model folder")
    parser.add_argument("--output", default="sheet.png")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    prompts = args.prompts or read_prompts(args.model / "prompts.txt")[:24]
    pipe = EmojiPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    images = pipe(prompts, num_inference_steps=args.steps, guidance_scale=args.guidance, seed=args.seed).images
    contact_sheet(images, prompts).save(args.output)


if __name__ == "__main__":
    main()
