"""Convolutions kept in 4 bits: what they take, what they lose, and what they cost.

    python bench/convolutions.py [--steps 200] [--out bench/results/convolutions.json]
    python bench/convolutions.py --gpu [--out bench/results/convolutions-h200.json]

Without a GPU: bytes of the UNets of SD 1.5 and SDXL (nothing is computed for them), and the errors of a small UNet that
is trained here on drawn shapes, on other pictures than those that calibrated it. A branch of rank 4 takes the share of
its convolutions' bytes that one of rank 32 takes of SDXL's.

With --gpu: a convolution by stored codes beside the plain one, both by Inductor and replayed as a CUDA graph, medians
with a cold L2, at the sizes of SDXL and SD 1.5.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from gemm import microseconds, relative_error
from step_models import MODELS
from torch import Tensor, nn

import record
import svdq_compile as svdq
from svdq_compile.input_statistics import MOMENT_ROWS, InputStatistics
from svdq_compile.lowering.packed import as_matrix
from svdq_compile.passes.linears import is_over_channels
from svdq_compile.patches import patches
from svdq_compile.quantizer import quantize_group

SIDE, BATCH = 16, 8
RANKS = (0, 4, 16, 32)
SMALL = {
    "sample_size": SIDE,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
}
# Channels in and out, and the side of the latent, at batch 2.
SHAPES = [
    ("sdxl", 320, 320, 128), ("sdxl", 640, 640, 64), ("sdxl", 1280, 1280, 32), ("sdxl", 2560, 1280, 32),
    ("sd1.5", 320, 320, 64), ("sd1.5", 1280, 1280, 16), ("sd1.5", 2560, 1280, 8),
]  # fmt: skip


def bytes_of(name: str) -> dict[str, Any]:
    """What the weights of a UNet take in bf16, and in 4 bits with its convolutions and without."""
    with torch.device("meta"):
        model = getattr(diffusers, MODELS[name].class_name)(**MODELS[name].config).bfloat16()
    row: dict[str, Any] = {"model": name}
    for method, convolutions in (("linears", False), ("linears and convolutions", True)):
        found = svdq.doctor(model, precision="w4a8", convolutions=convolutions)
        row |= {"16-bit": found.bytes_before, method: found.bytes_after}
    print(row, flush=True)
    return row


def shapes(count: int) -> Tensor:
    """Pictures [count, 3, SIDE, SIDE]: three discs or boxes each, before a gradient."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, SIDE) for _ in range(2)), indexing="ij")
    drawn = []
    for _ in range(count):
        picture = torch.rand(3, 1, 1) * 2 - 1 + 0.3 * (torch.rand(3, 1, 1) - 0.5) * x
        for _ in range(3):
            (cx, cy), r, colour = torch.rand(2) * 1.6 - 0.8, torch.rand(()) * 0.5 + 0.1, torch.rand(3, 1, 1) * 2 - 1
            disc = (x - cx) ** 2 + (y - cy) ** 2 < r * r
            box = ((x - cx).abs() < r) & ((y - cy).abs() < 0.7 * r)
            picture = torch.where(disc if torch.rand(()) < 0.5 else box, colour, picture)
        drawn.append(picture)
    return torch.stack(drawn)


def noisy(count: int) -> tuple[dict[str, Any], Tensor]:
    """A call of the model at times of its own, and the velocity that it should give."""
    clean, t = shapes(count), torch.rand(count)
    noise, share = torch.randn_like(clean), t.view(-1, 1, 1, 1)
    return {"sample": (1 - share) * clean + share * noise, "timestep": 1000 * t}, noise - clean


@torch.enable_grad()
def trained(steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        call, velocity = noisy(BATCH)
        loss = F.mse_loss(model(**call).sample, velocity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"training, step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval().requires_grad_(False)


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Those that the option takes."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        name: conv
        for name, conv in found.items()
        if min(conv.in_channels, conv.out_channels) >= 64 and not is_over_channels(conv.kernel_size, 1, 0, 1)
    }


def observed(model: nn.Module, calls: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of each convolution rows of what it multiplies."""
    rows: dict[str, list[Tensor]] = {}
    hooks = []
    for name, conv in convolutions(model).items():
        sizes = conv.kernel_size, conv.stride, conv.padding, conv.dilation

        def keep(module: nn.Module, given: tuple, name: str = name, sizes: tuple = sizes) -> None:
            rows.setdefault(name, []).append(patches(given[0], *sizes, MOMENT_ROWS // len(calls)))

        hooks.append(conv.register_forward_pre_hook(keep))
    for call in calls:
        model(**call)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def by_layers(model: nn.Module, calibration: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict]:
    """The mean error of the convolutions' outputs by rank, with what was observed and without."""
    seen, unseen = observed(model, calibration), observed(model, others)
    result = []
    for rank in RANKS:
        errors: dict[str, list[float]] = {"alone": [], "observed": []}
        nbytes = 0
        for name, conv in convolutions(model).items():
            weight = as_matrix(conv.weight)
            truth = unseen[name] @ weight.t()
            for way, own in errors.items():
                statistics = InputStatistics()
                if way == "observed":
                    statistics.observe(seen[name])
                (made,) = quantize_group([weight.bfloat16()], [name], "w4a16", svdq.Config(rank=rank), statistics)
                own.append(relative_error(unseen[name] @ made.packed.dequantize(torch.float32).t(), truth.double()))
            nbytes += made.packed.nbytes()
        means = {f"error_{way}": sum(own) / len(own) for way, own in errors.items()}
        result.append({"rank": rank, "bytes": nbytes, **means})
        print(result[-1], flush=True)
    return result


def whole(model: nn.Module, calibration: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """The error of the model's output with nothing but its convolutions in 4 bits."""
    left = [layer.name for layer in svdq.report(model) if layer.name not in convolutions(model)]
    exact = [model(**call).sample for call in others]
    row: dict[str, Any] = {"model": "small UNet"}
    for way in ("alone", "observed"):
        other = copy.deepcopy(model)
        calibrate = {"calibrate": lambda model: [model(**call) for call in calibration]} if way == "observed" else {}
        svdq.quantize(other, convolutions=True, skip=left, progress=False, **calibrate)
        result = [other(**call).sample for call in others]
        row[f"error_{way}"] = relative_error(torch.cat(result), torch.cat(exact).double())
    print(row, flush=True)
    return row


@torch.no_grad()
def on_gpu(name: str, channels: int, out: int, side: int) -> dict[str, Any]:
    """Microseconds of one convolution, plain and by stored codes."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, 3, padding=1).to("cuda", torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, channels, side, side, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)  # as what comes before leaves it
    stored = copy.deepcopy(conv)
    svdq.quantize(stored, progress=False)
    expected = F.conv2d(x.double(), stored.weight._svdq.values(stored.weight).double(), conv.bias.double(), padding=1)
    row = {"model": name, "channels": channels, "out": out, "side": side, "batch": 2}
    ways = {"plain": torch.compile(conv), "stored": torch.compile(stored, backend="svdquant")}
    for way, run in ways.items():
        for _ in range(3):
            y = run(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(x)
        row[f"scratch_mib_{way}"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(x)
        row[f"us_{way}"] = microseconds(graph.replay)
    row |= {"ratio": row["us_stored"] / row["us_plain"], "rel_err": relative_error(y, expected)}
    row |= {"mib_plain": conv.weight.nbytes / 2**20, "mib_stored": stored.weight._svdq.nbytes() / 2**20}
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    assert row["rel_err"] < 1e-2, "bf16 rounds to 2e-3"
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.gpu:
        rows = [on_gpu(*shape) for shape in SHAPES]
    else:
        rows = [bytes_of(name) for name in ("sd1.5", "sdxl")]
        model = trained(options.steps)
        torch.manual_seed(1)
        with torch.no_grad():
            calibration, others = ([noisy(BATCH)[0] for _ in range(4)] for _ in range(2))
            rows += by_layers(model, calibration, others)
            rows.append(whole(model, calibration, others))
    if options.out:
        record.write(options.out, rows)


if __name__ == "__main__":
    main()
