"""Published models at their real size, random weights: memory as `svdq doctor` predicts it, and a right forward.

    python bench/real_sizes.py --out bench/results/real-sizes-h200.json             # one H200, minutes
    python bench/real_sizes.py --tiny flux sdxl                                     # some, small, on any device

Each model runs in a process of its own: 16-bit forward, then `svdq.compile`, one observed call and two in 4 bits. A row
has GiB in 16 bits, GiB that doctor predicted, GiB that were allocated once it was quantized, and the output's error.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import step_models
import torch
from step_models import MODELS, Model, Randn, _common
from torch import Tensor

import svdq_compile as svdq
from record import write

GIB = 1 << 30
MARK = "ROW "


def _mask(batch: int, text: int) -> Tensor:
    return (torch.arange(text) < text - 7).expand(batch, -1)


def _pixels(channels: str = "in_channels", text_width: str = "", width: int = 0, mask: bool = False) -> Any:
    """Inputs of a model of images: latents [batch, channels, side, side] and a prompt of the width that `text_width`
    names in the configuration, or of `width`.
    """

    def inputs(randn: Randn, config: Any, side: int, text: int, batch: int) -> dict[str, Any]:
        call = _common(randn, batch, text, width or config[text_width], config[channels], side, side)
        return call | ({"encoder_attention_mask": _mask(batch, text)} if mask else {})

    return inputs


def _auraflow(randn: Randn, config: Any, **size: int) -> dict[str, Any]:
    call = _pixels(text_width="joint_attention_dim")(randn, config, **size)
    return call | {"timestep": torch.full((size["batch"],), 0.5, dtype=torch.bfloat16)}


def _lumina2(randn: Randn, config: Any, **size: int) -> dict[str, Any]:
    call = _pixels(text_width="cap_feat_dim", mask=True)(randn, config, **size)
    return call | {"timestep": torch.full((size["batch"],), 0.5, dtype=torch.bfloat16)}


def _sd15(randn: Randn, config: Any, **size: int) -> dict[str, Any]:
    call = _pixels(text_width="cross_attention_dim")(randn, config, **size)
    return call | {"sample": call.pop("hidden_states")}


def _chroma(randn: Randn, config: Any, side: int, text: int, batch: int) -> dict[str, Any]:
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    call = _common(randn, batch, text, config.joint_attention_dim, side * side, config.in_channels)
    return call | {
        "timestep": torch.full((batch,), 0.5, dtype=torch.bfloat16),
        "img_ids": ids.reshape(-1, 3).to(torch.bfloat16),
        "txt_ids": torch.zeros(text, 3, dtype=torch.bfloat16),
    }


def _z_image(randn: Randn, config: Any, side: int, text: int, batch: int) -> dict[str, Any]:
    return {
        "x": [randn(config.in_channels, 1, side, side) for _ in range(batch)],
        "t": torch.full((batch,), 0.5, dtype=torch.bfloat16),
        "cap_feats": [randn(text, config.cap_feat_dim) for _ in range(batch)],
        "return_dict": False,
    }


def _hunyuan_video(randn: Randn, config: Any, frames: int, height: int, width: int, text: int, batch: int) -> dict:
    call = _common(randn, batch, text, config.text_embed_dim, config.in_channels, frames, height, width)
    return call | {
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": _mask(batch, text),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
        "guidance": torch.full((batch,), 6000.0, dtype=torch.bfloat16),
    }


def _ltx(randn: Randn, config: Any, frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    call = _common(randn, batch, text, config.caption_channels, frames * height * width, config.in_channels)
    return call | {
        "encoder_attention_mask": _mask(batch, text).long(),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _cogvideox(randn: Randn, config: Any, frames: int, height: int, width: int, text: int, batch: int) -> dict:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    grid = (height // 2, width // 2)
    call = _common(randn, batch, text, config.text_embed_dim, frames, config.in_channels, height, width)
    return call | {"image_rotary_emb": get_3d_rotary_pos_embed(config.attention_head_dim, ((0, 0), grid), grid, frames)}


def _mochi(randn: Randn, config: Any, frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    call = _common(randn, batch, text, config.text_embed_dim, config.in_channels, frames, height, width)
    return call | {"encoder_attention_mask": _mask(batch, text)}


def _cogview4(randn: Randn, config: Any, **size: int) -> dict[str, Any]:
    picture = torch.tensor([[1024.0, 1024.0]] * size["batch"])
    conditions = {"original_size": picture, "target_size": picture, "crop_coords": torch.zeros_like(picture)}
    return _pixels(text_width="text_embed_dim")(randn, config, **size) | conditions


def _image(class_name: str, inputs: Any, side: int, text: int, blocks: str = "", **config: Any) -> Model:
    size = {"side": side, "text": text, "batch": 2}
    small = {"side": 16, "text": 24, "batch": 2}
    return Model(class_name, "", config, size, config, small, inputs, tuple(blocks.split()))


def _video(
    class_name: str, inputs: Any, shape: tuple[int, int, int], text: int, blocks: str = "", **config: Any
) -> Model:
    size = dict(zip(("frames", "height", "width"), shape, strict=True)) | {"text": text, "batch": 1}
    small = size | {"frames": 3, "height": 8, "width": 8}
    return Model(class_name, "", config, size, config, small, inputs, tuple(blocks.split()))


# Where nothing is said the class's defaults are the published configuration.
OTHERS = {
    "chroma": _image("ChromaTransformer2DModel", _chroma, 64, 512),
    "z-image": _image("ZImageTransformer2DModel", _z_image, 128, 256),
    "auraflow": _image(
        "AuraFlowTransformer2DModel", _auraflow, 128, 256,
        "AuraFlowSingleTransformerBlock AuraFlowJointTransformerBlock", pos_embed_max_size=9216,
    ),
    "lumina2": _image("Lumina2Transformer2DModel", _lumina2, 128, 256, "Lumina2TransformerBlock", cap_feat_dim=2304),
    "cogview4": _image("CogView4Transformer2DModel", _cogview4, 128, 224, "CogView4TransformerBlock"),
    "pixart-sigma": _image(
        "PixArtTransformer2DModel", _pixels(width=4096, mask=True), 128, 300, "BasicTransformerBlock",
        caption_channels=4096, interpolation_scale=2, use_additional_conditions=False,
    ),
    "sana-1.6b": _image(
        "SanaTransformer2DModel", _pixels(text_width="caption_channels", mask=True), 32, 300, "SanaTransformerBlock"
    ),
    "sd-1.5": _image("UNet2DConditionModel", _sd15, 64, 77, cross_attention_dim=768),
    "hunyuan-video": _video("HunyuanVideoTransformer3DModel", _hunyuan_video, (9, 60, 104), 256),
    "ltx-video": _video("LTXVideoTransformer3DModel", _ltx, (7, 16, 22), 128),
    "cogvideox-5b": _video(
        "CogVideoXTransformer3DModel", _cogvideox, (9, 60, 90), 226, "CogVideoXBlock",
        num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True,
    ),
    "mochi": _video("MochiTransformer3DModel", _mochi, (5, 60, 106), 256, "MochiTransformerBlock"),
}  # fmt: skip


def row(name: str, tiny: bool, device: torch.device) -> dict[str, Any]:
    """One model: its memory and its error. `tiny` calls models that have no small configuration with few tokens."""
    begin = time.perf_counter()
    model = step_models.build(name, tiny, device)
    call = step_models.inputs(name, tiny, model, device)
    with torch.no_grad():
        reference = _first_tensor(model(**call)).float()
    foreseen = svdq.doctor(model)
    before = _allocated(device, call, reference)
    if not model._repeated_blocks:
        model._repeated_blocks = None
    svdq.compile(model, calibration_steps=1)
    with torch.no_grad():
        for _ in range(3):
            output = _first_tensor(model(**call)).float()
    error = float((output - reference).norm() / reference.norm())
    del output
    after = _allocated(device, call, reference)
    report = svdq.report(model)
    return {
        "model": name,
        "class": type(model).__name__,
        "gib_16bit": round(before / GIB, 3),
        "gib_predicted": round(foreseen.bytes_after / GIB, 3),
        "gib": round(after / GIB, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if device.type == "cuda" else None,
        "layers": sum(not row.reason for row in report),
        "layers_predicted": len(foreseen.quantized),
        "rel_err": round(error, 4),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _allocated(device: torch.device, *others: Any) -> int:
    """Bytes in use, without those of `others`; 0 without a GPU."""
    gc.collect()
    leaves = torch.utils._pytree.tree_leaves(others)
    own = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda")
    return torch.cuda.memory_allocated() - own if device.type == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--processes", type=int, default=3, help="models at once on the GPU: 139 GiB take three")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.row:
        print(MARK + json.dumps(row(options.row, options.tiny, device)), flush=True)
        return

    def alone(name: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--row", name, *["--tiny"] * options.tiny]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"model": name, "error": f"no answer in {options.timeout:.0f} s"}
        found = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
        return json.loads(found[-1]) if found else {"model": name, "error": done.stderr[-700:]}

    rows = []
    with ThreadPoolExecutor(options.processes) as pool:
        for result in pool.map(alone, options.models or MODELS):
            rows.append(result)
            print(json.dumps(result), flush=True)
            if options.out:
                write(options.out, rows)


MODELS |= OTHERS

if __name__ == "__main__":
    main()
