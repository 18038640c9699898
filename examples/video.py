"""A video by Wan 2.1 14B in 4 bits: python examples/video.py

The first 8 calls of the model (4 steps, since guidance takes two each) run in 16-bit and are watched.
"""

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif

import svdq_compile as svdq

pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers", dtype=torch.bfloat16).to("cuda")
svdq.compile(pipe)

frames = pipe(
    "a dog on a skateboard, in the rain",
    height=480,
    width=832,
    num_frames=81,
    num_inference_steps=30,
    output_type="pil",
).frames[0]
export_to_gif(frames, "dog.gif", fps=16)  # export_to_video writes an .mp4, with imageio
print(f"dog.gif: {len(frames)} frames")
