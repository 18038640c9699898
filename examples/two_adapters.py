"""Two LoRA files on one model in 4 bits, alone and mixed.

    python examples/two_adapters.py style.safetensors night.safetensors

The model is quantized once. Each set of adapters is compiled once; their strengths are free.
"""

import sys

import torch
from diffusers import DiffusionPipeline

import svdq_compile as svdq

style, night = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
svdq.compile(pipe)


def draw(name: str) -> None:
    pipe("a dog", generator=torch.Generator().manual_seed(0)).images[0].save(f"{name}.png")
    print(f"{name}.png")


draw("none")
pipe.load_lora_weights(style, adapter_name="style")
pipe.load_lora_weights(night, adapter_name="night")
for name, adapters, strengths in [
    ("style", ["style"], [1.0]),
    ("night", ["night"], [1.0]),
    ("both", ["style", "night"], [0.6, 0.6]),
    ("more-night", ["style", "night"], [0.4, 0.9]),
]:
    pipe.set_adapters(adapters, strengths)
    draw(name)
