"""A step of the FLUX.1-dev-shaped transformer (random weights) where little GPU memory is left.

    python bench/small_memory.py [--methods ours-resident,ours-group] [--caps 16,12,8] [--out FILE]

Each method is a process of its own. For each cap it is held to so many GiB, what the driver takes for the process
included, and so is the peak that is told: torch's reserved memory and that of the driver. No one else may use the GPU.
What is timed is checked: `error_vs_16bit` is against the output of the 16-bit model, whole on the device and held to
nothing, in a process before the others. A cap that is too small is a row without times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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

REFERENCE = "reference"
Model = FluxTransformer2DModel


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
class Method:
    """How the model is made smaller, where its weights are between steps, how many steps are timed at each cap."""

    prepare: Callable[[Model, dict, torch.device], None]
    place: Callable[[Model, torch.device], None]
    steps: int = 5


METHODS = {
    "16-bit-sequential": Method(sixteen, sequential, steps=1),
    "16-bit-group": Method(sixteen, group),
    "ours-resident": Method(ours, resident),
    "ours-group": Method(ours, group),
    "torchao-fp8-group": Method(torchao, group),
    "sdnq-int4-group": Method(sdnq_int4, group),
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


def prepared(tiny: bool, device: torch.device) -> tuple[Model, dict]:
    model = memory.build(memory.TINY if tiny else memory.DEV, device)
    return model, memory.inputs(model, *((64, 16) if tiny else (4096, 512)), device)


def write_reference(tiny: bool, path: Path) -> None:
    device = Card().device
    model, call = prepared(tiny, device)
    torch.save(model.to(device)(**call)[0].cpu(), path)


def measure(name: str, caps: list[float], tiny: bool, reference: Path) -> list[dict]:
    """The rows of one method, the largest cap first."""
    method, card = METHODS[name], Card()
    model, call = prepared(tiny, card.device)
    rows: list[dict] = []
    for cap in sorted(caps, reverse=True):
        card.hold_to(cap)
        row: dict = {"method": name, "cap_gib": cap, "ms": None, "peak_gib": None}
        rows.append(row)
        try:
            if len(rows) == 1:
                method.prepare(model, call, card.device)
                method.place(model, card.device)
            for _ in range(2 if method.steps > 1 else 1):  # compiles; finds out the order of the groups
                output = model(**call)[0].cpu()
            card.hold_to(cap)
            times = [_timed(model, call, card) for _ in range(method.steps)]
        except torch.cuda.OutOfMemoryError:
            row["error"] = "out of memory"
            break  # a smaller cap is no better
        peak = card.peak_gib()
        row |= {"ms": round(statistics.median(times), 2), "peak_gib": peak and round(peak, 3), "steps": method.steps}
        row["error_vs_16bit"] = round(relative_error(output, torch.load(reference)), 5)
    return rows


def _timed(model: Model, call: dict, card: Card) -> float:
    card.wait()
    begin = time.perf_counter()
    model(**call)
    card.wait()
    return 1e3 * (time.perf_counter() - begin)


def start(name: str, args: argparse.Namespace, folder: Path, out: Path) -> None:
    command = [sys.executable, __file__, "--one", name, "--out", str(out), "--caps", args.caps]
    command += ["--reference", str(folder / "reference.pt"), *(["--tiny"] if args.tiny else [])]
    subprocess.run(command, check=True, timeout=args.limit)


def in_a_process(name: str, args: argparse.Namespace, folder: Path) -> list[dict]:
    """`measure` there; a row that says why where it does not end well or in time."""
    out = folder / f"{name}.json"
    try:
        start(name, args, folder, out)
        return json.loads(out.read_text())
    except subprocess.TimeoutExpired:
        reason = f"stopped after the limit of {args.limit} s"
    except subprocess.CalledProcessError as error:
        reason = f"ended with {error.returncode}"
    return [{"method": name, "cap_gib": None, "ms": None, "peak_gib": None, "error": reason}]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--caps", default="16,12,8", help="GiB")
    parser.add_argument("--limit", type=float, default=150, help="seconds for each method")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--out", type=Path, default=results("small-memory"))
    parser.add_argument("--one", choices=[REFERENCE, *METHODS], help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        with torch.no_grad():
            if args.one == REFERENCE:
                write_reference(args.tiny, args.reference)
            else:
                rows = measure(args.one, [float(cap) for cap in args.caps.split(",")], args.tiny, args.reference)
                args.out.write_text(json.dumps(rows))
        return
    names = args.methods.split(",")
    for name in names:
        if name not in METHODS:
            parser.error(f"no method {name}; there are {', '.join(METHODS)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start(REFERENCE, args, Path(folder), args.out)
        for name in names:
            rows += in_a_process(name, args, Path(folder))
            print(*rows[-1:], flush=True)
            write(args.out, rows)


if __name__ == "__main__":
    main()
