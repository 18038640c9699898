"""Quantize once, then start from the file: python examples/saved_file.py, twice

The first run calibrates on a few prompts, quantizes, and writes flux.svdq.safetensors. The second fills a model without
memory from it: no 16-bit weight is read or made.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

import svdq_compile as svdq

MODEL = "black-forest-labs/FLUX.1-dev"
FILE = Path("flux.svdq.safetensors")
PROMPTS = ["a dog on a skateboard", "a cat in the rain", "a street at night"]

if FILE.exists():
    config = FluxTransformer2DModel.load_config(MODEL, subfolder="transformer")
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    svdq.load(transformer, FILE, device="cuda")
    pipe = DiffusionPipeline.from_pretrained(MODEL, transformer=transformer, dtype=torch.bfloat16).to("cuda")
else:
    pipe = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.bfloat16).to("cuda")
    svdq.quantize(pipe.transformer, calibrate=lambda _: [pipe(prompt, num_inference_steps=8) for prompt in PROMPTS])
    svdq.save(pipe.transformer, FILE)

svdq.compile(pipe)
pipe("a dog on a skateboard", generator=torch.Generator().manual_seed(0)).images[0].save("dog.png")
print("dog.png")
