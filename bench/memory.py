"""Memory and time of quantizing the FLUX.1-dev-shaped transformer (11.9 B parameters, random 16-bit weights).

    python bench/memory.py [--output bench/results/memory-h200.json]

Two ways from 16-bit to 4-bit, both checked against the 16-bit model's own output:
    from CPU    svdq_compile.quantize(model, example_inputs=..., device="cuda"): the weights stream to the GPU
    in place    the 16-bit model on the GPU, compiled by blocks; one observed step, then it quantizes itself
"""

import argparse
import gc
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import svdq_compile as svdq
from record import results, write

GIB = 2**30
DEV = {"guidance_embeds": True}  # the class's defaults are FLUX.1's: 19 + 38 blocks, width 3072
TINY = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 64,
}


def build(config: dict, fill: torch.device) -> FluxTransformer2DModel:
    """A model in CPU memory; its random values are drawn on `fill`, where that is quick."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator(fill).manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 1.0 if name.endswith("norm_q.weight") or name.endswith("norm_k.weight") else 0.02
        value = torch.randn(parameter.shape, generator=generator, device=fill, dtype=torch.bfloat16) * scale
        parameter.data.copy_(value)
    return model.requires_grad_(False).eval()


def inputs(model: FluxTransformer2DModel, tokens: int, text: int, device: torch.device) -> dict:
    """One step at 1024x1024 (4096 image tokens) with 512 text tokens, batch 1."""
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    side = int(tokens**0.5)
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] += torch.arange(side, device=device)[:, None]
    ids[..., 2] += torch.arange(side, device=device)[None, :]
    return {
        "hidden_states": randn(1, tokens, model.config.in_channels),
        "encoder_hidden_states": randn(1, text, model.config.joint_attention_dim),
        "pooled_projections": randn(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=device, dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device=device, dtype=torch.bfloat16) if model.config.guidance_embeds else None,
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def allocated(device: torch.device) -> float:
    gc.collect()
    return torch.cuda.memory_allocated() / GIB if device.type == "cuda" else float("nan")


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")


def start(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def seconds_since(begin: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=results("memory"))
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--precision", default="w4a8")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, text = (64, 16) if args.tiny else (4096, 512)

    model = build(TINY if args.tiny else DEV, device)
    call = inputs(model, tokens, text, device)
    held = allocated(device)
    model.to(device)
    before = allocated(device) - held
    reference = model(**call)[0]
    model.to("cpu")
    print(f"16-bit: {before:.2f} GiB resident", flush=True)

    rows = []

    def record(
        method: str, resident: float, top: float, seconds: float, step: float, error: float, precision: str
    ) -> None:
        row = {
            "model": "FLUX.1-dev shape, 1024x1024, batch 1" if not args.tiny else "tiny",
            "method": method,
            "precision": precision,
            "resident_before_gib": round(before, 3),
            "resident_after_gib": round(resident, 3),
            "peak_quantize_gib": round(top, 3),
            "seconds_quantize": round(seconds, 2),
            "seconds_step_after_compiling": round(step, 3),
            "rel_err_vs_16bit": round(error, 4),
        }
        rows.append(row)
        print(row, flush=True)

    def compiled_step() -> tuple[torch.Tensor, float]:
        model(**call)
        begin = start(device)
        return model(**call)[0], seconds_since(begin, device)

    config = svdq.Config(precision=args.precision)
    begin = start(device)
    svdq.quantize(model, config, example_inputs=call, device=device)
    seconds, top, resident = seconds_since(begin, device), peak(device) - held, allocated(device) - held
    model.compile_repeated_blocks(backend="svdquant", fullgraph=True)
    output, step = compiled_step()
    record(
        "quantize() from CPU weights, data-free",
        resident,
        top,
        seconds,
        step,
        relative_error(output, reference),
        args.precision,
    )

    del model
    torch._dynamo.reset()
    held = allocated(device)
    model = build(TINY if args.tiny else DEV, device)
    model.to(device)
    options = {"precision": args.precision, "calibration_steps": 1}
    model.compile_repeated_blocks(backend="svdquant", fullgraph=True, options=options)
    begin = start(device)
    model(**call)
    seconds, top, resident = seconds_since(begin, device), peak(device) - held, allocated(device) - held
    output, step = compiled_step()
    record(
        "compile_repeated_blocks, 1 observed step",
        resident,
        top,
        seconds,
        step,
        relative_error(output, reference),
        args.precision,
    )
    write(args.output, rows)


if __name__ == "__main__":
    main()
