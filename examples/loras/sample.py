"""Draw sample.png: the first prompts without an adapter, with each one, and with both, in float32.

    python sample.py [--output sample.png]

The prompts are lines 1-8 of ../emoji/prompts.txt.
"""

import argparse
import sys
from pathlib import Path

import torch

LORAS = Path(__file__).resolve().parent
EMOJI = LORAS.parent / "emoji"
sys.path.insert(0, str(EMOJI))

from pipeline import EmojiPipeline, contact_sheet, read_prompts  # noqa: E402

MIXTURES = {"flat": [1.0, 0.0], "night": [0.0, 1.0], "flat 0.6, night 0.6": [0.6, 0.6]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw prompts without adapters, with each one, and with both.")
    parser.add_argument("--output", type=Path, default=LORAS / "sample.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pipe = EmojiPipeline.from_pretrained(EMOJI, dtype=torch.float32).to(args.device)
    prompts = read_prompts(EMOJI / "prompts.txt")[:8]

    images, captions = pipe(prompts, seed=0).images, list(prompts)
    for name in ("flat", "night"):
        pipe.load_lora_weights(LORAS, weight_name=f"{name}.safetensors", adapter_name=name)
    for name, strengths in MIXTURES.items():
        pipe.set_adapters(["flat", "night"], strengths)
        images += pipe(prompts, seed=0).images
        captions += [name] * len(prompts)
    contact_sheet(images, captions, columns=len(prompts)).quantize(256).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
