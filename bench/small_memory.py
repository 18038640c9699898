"""A step of the FLUX.1-dev-shaped transformer (random weights) where little GPU memory is left.

    python bench/small_memory.py [--models ours,16-bit] [--caps 16,12,8] [--out FILE]

Each model is made in a process of its own, and runs with its weights in one place after another. For each cap it is
held to so many GiB, what the driver takes for the process included, and so is the peak that is told: torch's reserved
memory and that of the driver. No one else may use the GPU. torch's allocator has expandable segments, as PyTorch
advises where memory is short. What is timed is checked: `error_vs_16bit` is against the output of the 16-bit model,
whole on the device and held to nothing, in a process before them, of which nothing is left in their memory. A cap that
is too small is a row without times.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import accelerate
import memory
import torch
from diffusers import FluxTransformer2DModel
from memory import GIB, relative_error
from step_methods import torchao_fp8

import svdq_compile as svdq
from record import results, write

Model = FluxTransformer2DModel
STEPS = 5
REFERENCE = "reference"
Place = Callable[[Model, torch.device], None]


def sixteen(model: Model, call: dict, device: torch.device) -> None:
    """As it is."""


def ours(model: Model, call: dict, device: torch.device) -> None:
    svdq.quantize(model, svdq.Config(progress=False), example_inputs=call, device=device)
    model.compile_repeated_blocks(backend="svdquant", options={"progress": False})


def torchao(model: Model, call: dict, device: torch.device) -> None:
    torchao_fp8(model, call)
    model.compile_repeated_blocks(dynamic=False)  # not as one graph: offloading's hooks break it


def sdnq_int4(model: Model, call: dict, device: torch.device) -> None:
    from sdnq import sdnq_post_load_quant

    sdnq_post_load_quant(model, weights_dtype="int4", use_quantized_matmul=True)


def resident(model: Model, device: torch.device) -> None:
    model.to(device)


def sequential(model: Model, device: torch.device) -> None:
    accelerate.cpu_offload(model, execution_device=device)


def group(model: Model, device: torch.device) -> None:
    """Each block by itself, the next one fetched while this one computes."""
    accelerate.hooks.remove_hook_from_submodules(model)
    model.to("cpu")
    ahead = device.type == "cuda"
    model.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=ahead,
        record_stream=ahead,
    )


@dataclass(frozen=True)
class Way:
    """How the model is made smaller, and where its weights are between steps."""

    prepare: Callable[[Model, dict, torch.device], None]
    places: tuple[Place, ...]


WAYS = {
    "16-bit": Way(sixteen, (sequential, group)),
    "ours": Way(ours, (resident, group)),
    "torchao-fp8": Way(torchao, (group,)),
    "sdnq-int4": Way(sdnq_int4, (group,)),
}


class Card:
    """The GPU, or the CPU, which is never held to anything."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._has_memory = self.device.type == "cuda"
        if self._has_memory:
            torch.zeros(1, device=self.device)
            free, self._total = torch.cuda.mem_get_info()
            self._driver = self._total - free - torch.cuda.memory_reserved()

    def hold_to(self, cap_gib: float) -> None:
        """Let torch take no more than is left of the cap, and begin to watch its peak."""
        if self._has_memory:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction((cap_gib * GIB - self._driver) / self._total)
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Since `hold_to`."""
        return (torch.cuda.max_memory_reserved() + self._driver) / GIB if self._has_memory else None

    def wait(self) -> None:
        if self._has_memory:
            torch.cuda.synchronize()


def built(tiny: bool, device: torch.device) -> tuple[Model, dict]:
    """The model, in CPU memory, and the call of a step."""
    model = memory.build(memory.TINY if tiny else memory.DEV, device)
    return model, memory.inputs(model, *((64, 16) if tiny else (4096, 512)), device)


def write_reference(tiny: bool, out: Path) -> None:
    device = Card().device
    model, call = built(tiny, device)
    torch.save(model.to(device)(**call)[0].cpu(), out)


def measure(name: str, caps: list[float], tiny: bool, reference: torch.Tensor) -> Iterator[dict]:
    """The rows of one way, for each place the largest cap first."""
    way, card = WAYS[name], Card()
    model, call = built(tiny, card.device)
    card.hold_to(max(caps))
    way.prepare(model, call, card.device)
    for place in way.places:
        place(model, card.device)
        for cap in sorted(caps, reverse=True):
            row = {"method": f"{name}-{place.__name__}", "cap_gib": cap}
            try:
                yield row | _row(model, call, card, cap, 1 if place is sequential else STEPS, reference)
            except torch.cuda.OutOfMemoryError as error:
                yield row | {"ms": None, "peak_gib": None, "error": f"out of memory: {error}"[:400]}


def _row(model: Model, call: dict, card: Card, cap: float, steps: int, reference: torch.Tensor) -> dict:
    card.hold_to(cap)
    for _ in range(min(steps, 2)):  # compiles; finds out the order of the groups
        output = model(**call)[0].cpu()
    card.hold_to(cap)
    times = [_timed(model, call, card) for _ in range(steps)]
    peak = card.peak_gib()
    return {
        "ms": round(statistics.median(times), 2),
        "peak_gib": peak and round(peak, 3),
        "times_ms": [round(t, 2) for t in times],
        "error_vs_16bit": round(relative_error(output, reference), 5),
    }


def _timed(model: Model, call: dict, card: Card) -> float:
    card.wait()
    begin = time.perf_counter()
    model(**call)
    card.wait()
    return 1e3 * (time.perf_counter() - begin)


def in_a_process(name: str, args: argparse.Namespace, folder: Path) -> list[dict]:
    """`measure` there; a row that says why where it does not end well or in time."""
    out = folder / name
    command = [sys.executable, __file__, "--one", name, "--out", str(out), "--caps", args.caps]
    command += ["--tiny"] if args.tiny else []
    reason = []
    try:
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        subprocess.run(command, check=True, timeout=args.limit, env=environment)
    except subprocess.TimeoutExpired:
        reason = [{"method": name, "error": f"stopped after the limit of {args.limit} s"}]
    except subprocess.CalledProcessError as error:
        reason = [{"method": name, "error": f"ended with {error.returncode}"}]
    return (json.loads(out.read_text()) if out.exists() and name != REFERENCE else []) + reason


def write_rows(rows: Iterator[dict], out: Path) -> None:
    """As they come: a process that is stopped leaves those that it has."""
    done: list[dict] = []
    for row in rows:
        print(row, flush=True)
        done.append(row)
        out.write_text(json.dumps(done))


def one(args: argparse.Namespace) -> None:
    """What a process is for."""
    if args.one == REFERENCE:
        write_reference(args.tiny, args.out)
    else:
        reference = torch.load(args.out.parent / REFERENCE)
        write_rows(measure(args.one, list(map(float, args.caps.split(","))), args.tiny, reference), args.out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(WAYS))
    parser.add_argument("--caps", default="16,12,8", help="GiB")
    parser.add_argument("--limit", type=float, default=240, help="seconds for each model")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--out", type=Path, default=results("small-memory"))
    parser.add_argument("--one", choices=[REFERENCE, *WAYS], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        with torch.no_grad():
            one(args)
        return
    names = args.models.split(",")
    for name in names:
        if name not in WAYS:
            parser.error(f"no model {name}; there are {', '.join(WAYS)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [REFERENCE, *names]:
            rows += in_a_process(name, args, Path(folder))
            write(args.out, rows)


if __name__ == "__main__":
    main()
