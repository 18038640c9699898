"""FLUX with its text encoder in 4 bits too: python examples/text_encoder.py

It is no denoiser, so `svdq.compile(pipe)` leaves it alone; given by itself it is compiled as any other model. It reads
prompts, so it is calibrated on prompts.
"""

import torch
from diffusers import DiffusionPipeline

import svdq_compile as svdq

PROMPTS = ["a dog on a skateboard", "a cat in the rain", "an old street at night, in the style of an oil painting"]

pipe = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")


@torch.no_grad()
def encode(prompt: str) -> torch.Tensor:
    return pipe.encode_prompt(prompt, None)[0]


exact = encode("a dog in the rain")
svdq.quantize(pipe.text_encoder_2, calibrate=lambda _: [encode(prompt) for prompt in PROMPTS])
svdq.compile(pipe.text_encoder_2)
error = (encode("a dog in the rain") - exact).norm() / exact.norm()
print(f"the prompt's embedding is {error:.1%} from 16-bit")

svdq.compile(pipe)
pipe("a dog in the rain").images[0].save("dog.png")
