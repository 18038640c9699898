"""Train a LoRA adapter for the emoji model, on a GPU or in half an hour on two CPU cores.

    python train_lora.py --style flat --images emoji-datasource-google-16.0.0.tgz --names emoji.json --output loras
    python train_lora.py --style night --images lobehub-fluent-emoji-3d-1.1.0.tgz --names emoji.json --output loras

--images is an npm package: for `flat` emoji-datasource-google, whose 64-pixel pictures are Google's Noto emoji; for
`night` @lobehub/fluent-emoji-3d, the pictures that the model itself was trained on, seen by moonlight (`by_night`).
--names is emoji.json of emoji-datasource-google. The result is OUTPUT/STYLE.safetensors, which
`pipe.load_lora_weights` reads, and OUTPUT/STYLE_log.json, the settings and the loss.

The objective is the one that the model was trained with, ../emoji/train.py; what is trained are PEFT's matrices on the
linears of the picture's tokens. Flags are left out: they look the same in every style.

`night` changes all pictures in one way and learns it from all of them. Noto draws each thing in a way of its own, so
`flat` is taught the plain pictures at the head of prompts.txt, through the modulations too, which know the caption.
"""

import argparse
import io
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageFilter

EMOJI = Path(__file__).resolve().parents[1] / "emoji"
sys.path.insert(0, str(EMOJI))

from pipeline import EmojiPipeline, read_prompts  # noqa: E402
from train import Emoji, Trainer, augment, build, caption_table, decode, load_data, read_pictures  # noqa: E402

PICTURE = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]
MODULATION = ["norm1.linear", "norm.linear"]
SKY = np.array([(8, 10, 38), (38, 44, 110)]) / 255  # its top and its bottom
MOON = np.array((120, 150, 255)) / 255
SHADES = np.array([(10, 8, 60), (60, 60, 170), (120, 160, 255), (230, 245, 255)]) / 255  # dark to bright


def by_night(data: bytes) -> np.ndarray:
    """A picture with alpha -> 256x256 RGB under a blue sky: colours dimmed and drawn to blue, a glow around them."""
    image = Image.open(io.BytesIO(data)).convert("RGBA").resize((256, 256))
    rgb, alpha = np.split(np.asarray(image) / 255, [3], axis=-1)
    glow = np.asarray(image.getchannel("A").filter(ImageFilter.GaussianBlur(14)))[..., None] / 255
    height = np.linspace(0, 1, 256)[:, None, None]
    sky = SKY[0] * (1 - height) + SKY[1] * height + 0.45 * glow * MOON
    luminance = rgb @ (0.3, 0.59, 0.11)
    shade = np.stack([np.interp(luminance, np.linspace(0, 1, 4), channel) for channel in SHADES.T], axis=-1)
    lit = 0.85 * rgb * (0.55, 0.6, 0.85) + 0.25 * shade
    return np.round(np.clip(sky * (1 - alpha) + lit * alpha, 0, 1) * 255).astype(np.uint8)


class Style(NamedTuple):
    """One adapter.

    files       of the package, which are the pictures
    render      how one is shown to the model
    lines       of prompts.txt, which say what is learned from; None: all pictures
    sigma_mean  of the logarithm of the odds of sigma: shapes are decided above it, details below
    rank        of the adapter, on the linears named by `targets`
    """

    files: str
    render: Callable[[bytes], np.ndarray]
    lines: int | None
    sigma_mean: float
    rank: int
    targets: list[str]


STYLES = {
    "flat": Style("*/img/google/64/*.png", decode, 24, 0.8, 12, [*PICTURE, *MODULATION]),
    "night": Style("*.webp", by_night, None, 0.4, 8, PICTURE),
}


def choose(emoji: list[Emoji], lines: int | None) -> list[int]:
    """The rows of pictures to learn from."""
    captions = set(read_prompts(EMOJI / "prompts.txt")[:lines])
    return [i for i, e in enumerate(emoji) if e.category != "Flags" and (lines is None or e.captions[0] in captions)]


def add_adapter(model: FluxTransformer2DModel, name: str) -> None:
    """An adapter of strength 1, the only part of the model that is trained."""
    style = STYLES[name]
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=style.rank, lora_alpha=style.rank, target_modules=style.targets), name)


def save_adapter(model: FluxTransformer2DModel, name: str, folder: Path) -> None:
    """Write FOLDER/NAME.safetensors in bfloat16, named as diffusers names the adapters of FluxPipeline."""
    state = get_peft_model_state_dict(model, adapter_name=name)
    stored = {key: value.to("cpu", torch.bfloat16).contiguous() for key, value in state.items()}
    EmojiPipeline.save_lora_weights(folder, transformer_lora_layers=stored, weight_name=f"{name}.safetensors")


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Train a LoRA adapter for the emoji model.")
    p.add_argument("--style", required=True, choices=list(STYLES))
    p.add_argument("--images", required=True, help="the npm package of the pictures, a .tgz")
    p.add_argument("--names", required=True, help="emoji.json of emoji-datasource-google")
    p.add_argument("--output", required=True, type=Path, help="the folder of the adapter")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--max-steps", type=int, default=500)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=20, help="steps")
    p.add_argument("--ema", type=float, default=0.98)
    p.add_argument("--sigma-std", type=float, default=1.1)
    p.add_argument("--drop", type=float, default=0.1, help="share of captions dropped")
    p.add_argument("--log-every", type=int, default=25, help="steps")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(seconds=float("inf"), weight_decay=0.0, variants=1)
    return p.parse_args()


def main() -> None:
    args = parse_args()
    style = STYLES[args.style]
    args.sigma_mean = style.sigma_mean
    torch.manual_seed(args.seed)
    emoji, pictures = load_data(read_pictures(args.images, style.files), args.names, style.render)
    kept = choose(emoji, style.lines)
    emoji, pictures = [emoji[i] for i in kept], pictures[kept]
    print(f"{len(emoji)} pictures", flush=True)
    data = augment(pictures, emoji, args.variants, args.device)

    text, model = build(emoji, str(EMOJI))
    captions = caption_table(emoji, text).to(args.device)
    text.requires_grad_(False)
    add_adapter(model, args.style)
    trainer = Trainer(args, model.to(args.device), text.to(args.device), data, captions)
    steps, log = trainer.run()

    args.output.mkdir(parents=True, exist_ok=True)
    save_adapter(trainer.averaged, args.style, args.output)
    unsaid = ("images", "names", "output", "device", "seconds")
    summary = {
        "settings": {k: v for k, v in vars(args).items() if k not in unsaid} | {"rank": style.rank},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine() + " CPU",
        "steps": steps,
        "pictures": len(emoji),
        "log": log,
    }
    (args.output / f"{args.style}_log.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
