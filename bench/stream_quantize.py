"""Quantizing a folder that is larger than the memory: the FLUX.1-dev shape, 24 GB of random bfloat16 in shards.

    python bench/stream_quantize.py [--output bench/results/stream-quantize.json]     # one H200, 3 minutes
    python bench/stream_quantize.py --tiny                                            # small, on any device

Each way runs in a process of its own:
    quantize         what `svdq quantize FOLDER FILE` does: from shards to one file, no model in memory
    from_pretrained  svdq_compile.from_pretrained(FOLDER, device=...): the 4-bit model ends up on the device
    diffusers        Model.from_pretrained(FOLDER, quantization_config=SVDQuantConfig(), device_map=...)

Host memory is RssAnon + RssShmem of /proc/self/status, looked at 50 times a second: all but mapped files, whose pages
the system takes away when it wants them. `host_base_gib` is what the process has before it begins: Python, torch, CUDA.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from memory import DEV, TINY
from safetensors.torch import save_file

import svdq_compile as svdq
from record import RESULTS, write
from svdq_compile.streaming import quantize_file

GIB = 2**30
NAME = "diffusion_pytorch_model"
WAYS = ("quantize", "from_pretrained", "diffusers")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(folder: Path, config: dict[str, Any], shard: int) -> None:
    """A model folder with random weights, of which one shard at a time is in memory."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config).to(torch.bfloat16)
    model.save_config(folder)
    plan = list(_shards(model, shard))
    generator = torch.Generator(DEVICE).manual_seed(0)
    places = {}
    for number, names in enumerate(plan, 1):
        tensors = {}
        for name in names:
            shape = model.get_parameter(name).shape
            value = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) * 0.02
            tensors[name] = value.cpu()
        file = f"{NAME}-{number:05}-of-{len(plan):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index))


def _shards(model: torch.nn.Module, size: int) -> Iterator[list[str]]:
    """Names of Parameters, as many as take up to `size` bytes."""
    names, nbytes = [], 0
    for name, parameter in model.named_parameters():
        if names and nbytes + parameter.nbytes > size:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += parameter.nbytes
    yield names


class HostMemory:
    """The most that a process takes while this lasts."""

    def __enter__(self) -> "HostMemory":
        self.base = self.peak = _host()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, _host())


def _host() -> int:
    """Bytes that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def run(way: str, folder: Path, output: Path, config: svdq.Config) -> None:
    if way == "quantize":
        quantize_file(folder, output, config, DEVICE)
    elif way == "from_pretrained":
        svdq.from_pretrained(folder, config, device=DEVICE)
    else:
        options = {"precision": config.precision, "refine": config.refine}
        FluxTransformer2DModel.from_pretrained(
            folder,
            quantization_config=svdq.SVDQuantConfig(**options),
            device_map=str(DEVICE),
            torch_dtype=torch.bfloat16,
        )


def measure(way: str, folder: Path, output: Path, config: svdq.Config) -> dict[str, Any]:
    torch.zeros(1, device=DEVICE)
    begun = time.perf_counter()
    with HostMemory() as host:
        run(way, folder, output, config)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    on_gpu = DEVICE.type == "cuda"
    return {
        "way": way,
        "precision": config.precision,
        "folder_gib": round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GIB, 2),
        "shards": len(list(folder.glob("*.safetensors"))),
        "file_gib": round(output.stat().st_size / GIB, 2) if output.exists() else None,
        "seconds": round(seconds, 1),
        "host_base_gib": round(host.base / GIB, 2),
        "host_peak_gib": round(host.peak / GIB, 2),
        "gpu_peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if on_gpu else None,
        "gpu_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if on_gpu else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "stream-quantize.json")
    parser.add_argument("--folder", type=Path, help="where the folder is made; by default one that goes at the end")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--precision", default="w4a8")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        config = svdq.Config(precision=args.precision, refine=0 if args.tiny else svdq.Config.refine)
        row = measure(args.child, args.folder / "model", args.folder / f"{args.child}.safetensors", config)
        (args.folder / "row.json").write_text(json.dumps(row))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        begun = time.perf_counter()
        (Path(folder) / "model").mkdir()
        build(Path(folder) / "model", TINY if args.tiny else DEV, 2**22 if args.tiny else 2 * GIB)
        print(f"the folder was made in {time.perf_counter() - begun:.0f} s", flush=True)
        torch.cuda.empty_cache()
        for way in args.ways:
            command = [sys.executable, __file__, "--child", way, "--folder", folder, "--precision", args.precision]
            command += ["--tiny"] if args.tiny else []
            subprocess.run(command, check=True)
            rows.append(json.loads((Path(folder) / "row.json").read_text()))
            print(rows[-1], flush=True)
    write(args.output, rows)


if __name__ == "__main__":
    main()
