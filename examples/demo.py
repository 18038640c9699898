"""The same emoji drawn in 16 bits and in three kinds of 4 bits, then with LoRA adapters, side by side on one HTML page.

    python examples/demo.py [--output demo.html] [--full] [--prompts 8] [--steps 12] [--open]

Without --full, --prompts and --steps it draws as much as fits into five minutes here (size.py). Each method starts from
a freshly loaded transformer, is calibrated on prompts that are not shown, and draws the same prompts from the same
noise. The 16-bit and the w4a8 pipeline then take two LoRA adapters, alone and mixed. Nothing is downloaded; the model
is in examples/emoji, the adapters are in examples/loras.
"""

import argparse
import platform
import sys
import time
import warnings
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor, nn

import svdq_compile as svdq
from svdq_compile.evaluation import weight_bytes
from svdq_compile.parameter import QuantizedWeight

try:
    if __name__ in ("__main__", "svdq_demo"):
        print("loading diffusers", flush=True)  # some ten seconds
    import diffusers
    import peft  # noqa: F401  diffusers needs it for adapters
    from lines import Lines
    from page import Adapted, Branch, Method, build_page, decibels, psnr, worst_psnr
    from size import FULL, LIMIT, LORA_PROMPTS, Size, largest_within
except ModuleNotFoundError as missing:
    raise SystemExit(f"The demo needs {missing.name}: pip install 'svdq-compile[demo]'") from None

if TYPE_CHECKING:
    from pipeline import EmojiPipeline

EMOJI = Path(__file__).resolve().parent / "emoji"
LORAS = Path(__file__).resolve().parent / "loras"
SEED, GUIDANCE = 0, 3.0
CALIBRATION_PROMPTS, CALIBRATION_STEPS = FULL.calibration_prompts, FULL.calibration_steps
LAYER = "transformer_blocks.2.attn.to_q"  # its input has the strongest outliers of all
ADAPTERS = ("flat", "night")
# Their strengths. Both are always active, at 0 where not wanted: then a change costs no graph, the first one apart.
MIXTURES = {"flat": (1.0, 0.0), "night": (0.0, 1.0), "both": (0.6, 0.6)}


@dataclass(frozen=True)
class Recipe:
    """A method: its name, what it is, and how to quantize for it (not at all without a config)."""

    name: str
    note: str
    config: svdq.Config | None = None


STOCK = Recipe("16-bit", "the stock pipeline, not compiled")
W4A8 = Recipe("w4a8 SVDQuant", "4-bit weights, 8-bit activations", svdq.Config("w4a8", progress=False))
INT4 = Recipe("int4 SVDQuant", "4-bit weights, 4-bit activations", svdq.Config("int4", progress=False))
NEAREST = Recipe(
    "int4 round-to-nearest",
    "no branch, no smoothing",
    svdq.Config("int4", rank=0, smooth=False, rotate=False, refine=0, error_budget=1.0, progress=False),
)
RECIPES = (STOCK, W4A8, INT4, NEAREST)


@dataclass(frozen=True)
class Job:
    """What every method draws, and what it is calibrated on."""

    prompts: list[str]
    calibration: list[str]
    steps: int
    device: str
    calibration_steps: int = CALIBRATION_STEPS
    lora: bool = True


class Line:
    """One method's line in the progress display, counting denoising steps; `whole` counts those of each picture."""

    def __init__(self, progress: Progress, name: str, steps: int, whole: TaskID | None = None) -> None:
        self._progress, self._name, self._whole = progress, name, whole
        self._task = progress.add_task("", total=steps)
        self.say("loading")

    def say(self, doing: str) -> None:
        description = f"{self._name:<24} [dim]{doing:<11}"
        self._progress.update(self._task, description=description, name=self._name, doing=doing or "done")

    def advance(self, pictures: int) -> None:
        self._progress.advance(self._task)
        if self._whole is not None:
            self._progress.advance(self._whole, pictures)


def progress_on(console: Console) -> Progress:
    """Bars on a terminal, lines in a file."""
    if not console.is_terminal:
        return Lines(console)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console)


def load_pipeline(device: str) -> "EmojiPipeline":
    """The emoji pipeline in bfloat16, fresh from its folder."""
    if str(EMOJI) not in sys.path:
        sys.path.insert(0, str(EMOJI))
    from pipeline import EmojiPipeline

    diffusers.utils.logging.disable_progress_bar()
    pipe = EmojiPipeline.from_pretrained(EMOJI, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: "EmojiPipeline", prompts: Sequence[str], steps: int, seed: int, line: Line) -> np.ndarray:
    """Pictures as an array [n, 64, 64, 3] in 0..1."""

    def after_step(*_: object) -> dict[str, Tensor]:
        line.advance(len(prompts))
        return {}

    return pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        seed=seed,
        output_type="np",
        callback_on_step_end=after_step,
    ).images


def prepare(recipe: Recipe, job: Job, line: Line) -> "EmojiPipeline":
    """A pipeline whose transformer is quantized by the recipe, and compiled."""
    pipe = load_pipeline(job.device)
    if recipe.config is None:
        return pipe

    def calibrate(_: nn.Module) -> None:
        line.say("calibrating")
        draw(pipe, job.calibration, job.calibration_steps, SEED + len(job.prompts), line)
        line.say("quantizing")

    svdq.quantize(pipe.transformer, recipe.config, calibrate=calibrate)
    pipe.transformer.compile_repeated_blocks(backend="svdquant", fullgraph=True, options={"progress": False})
    line.say("compiling")
    return pipe


def measure(recipe: Recipe, pipe: "EmojiPipeline", job: Job, line: Line) -> Method:
    """Draw and time the pictures, after one step that compiles and is not timed."""
    draw(pipe, job.prompts, 1, SEED, line)
    line.say("drawing")
    start = time.perf_counter()
    pictures = draw(pipe, job.prompts, job.steps, SEED, line)
    seconds = (time.perf_counter() - start) / job.steps
    line.say("")
    return Method(recipe.name, recipe.note, pictures, weight_bytes(pipe.transformer), seconds)


def compare(job: Job, progress: Progress, whole: TaskID) -> tuple[list[Method], list[Adapted], Branch]:
    """Everything that the page shows; without adapters where the job leaves them out."""
    methods: dict[str, Method] = {}
    pipes: dict[str, EmojiPipeline] = {}
    for recipe in RECIPES:
        steps = (job.calibration_steps if recipe.config else 0) + 1 + job.steps
        line = Line(progress, recipe.name, steps, whole)
        pipes[recipe.name] = prepare(recipe, job, line)
        methods[recipe.name] = measure(recipe, pipes[recipe.name], job, line)
    weights = {name: pipe.transformer.get_submodule(LAYER).weight for name, pipe in pipes.items()}

    adapted: list[Adapted] = []
    if job.lora:
        drawn = (methods[recipe.name].pictures[:LORA_PROMPTS] for recipe in (STOCK, W4A8))
        line = Line(progress, f"{W4A8.name} with LoRA", 2 * len(MIXTURES) * job.steps, whole)
        adapted = [Adapted("no adapter", {}, *drawn, graphs=0, requantized=0)]
        adapted += draw_adapted(job, pipes[STOCK.name], pipes[W4A8.name], line)
    return list(methods.values()), adapted, branch(weights[STOCK.name], weights[INT4.name], weights[NEAREST.name])


def draw_adapted(job: Job, stock: "EmojiPipeline", quantized: "EmojiPipeline", line: Line) -> Iterator[Adapted]:
    """The first prompts with each of MIXTURES, by both pipelines, whose transformers keep the adapters."""
    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters, as intended
    packed = packed_weights(quantized.transformer)
    for pipe in (stock, quantized):
        for name in ADAPTERS:
            pipe.load_lora_weights(LORAS, weight_name=f"{name}.safetensors", adapter_name=name)
    for name, strengths in MIXTURES.items():
        graphs = compiled_graphs()
        pictures = []
        for pipe in (stock, quantized):
            line.say(name)
            pipe.set_adapters(list(ADAPTERS), list(strengths))
            pictures.append(draw(pipe, job.prompts[:LORA_PROMPTS], job.steps, SEED, line))
        changed = sum(map(differ, packed, packed_weights(quantized.transformer)))
        yield Adapted(name, dict(zip(ADAPTERS, strengths, strict=True)), *pictures, compiled_graphs() - graphs, changed)
    line.say("")


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def packed_weights(model: nn.Module) -> list[list[Tensor]]:
    """Copies of the 4-bit tensors of each quantized layer."""
    weights = [p for p in model.parameters() if isinstance(p, QuantizedWeight)]
    return [[t.clone() for t in svdq.packed(w).own_tensors().values()] for w in weights]


def differ(before: list[Tensor], after: list[Tensor]) -> bool:
    return not all(map(torch.equal, before, after))


@torch.no_grad()
def branch(stock: Tensor, with_branch: Tensor, without: Tensor) -> Branch:
    """What the page shows of LAYER, from its weight in three models."""
    packed = svdq.packed(with_branch)
    smooth = packed.shared.smooth
    weight = stock.float() * smooth
    low_rank = packed.up.float() @ (packed.down.float() * smooth)
    return Branch(
        layer=LAYER,
        rank=packed.rank,
        weight=weight.cpu().numpy(),
        residual=(weight - low_rank).cpu().numpy(),
        error=weight_error(stock, with_branch),
        error_without=weight_error(stock, without),
    )


def weight_error(stock: Tensor, quantized: Tensor) -> float:
    """How far a quantized weight is from the stock one, relative, each input channel counted by its smoothing."""
    packed = svdq.packed(quantized)
    smooth = packed.shared.smooth
    lost = (packed.dequantize(torch.float32) - stock.float()) * smooth
    return float(lost.norm() / (stock.float() * smooth).norm())


def facts(job: Job) -> list[str]:
    """Where, how and with what the page was made."""
    if job.device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    sentences = [
        f"Made by examples/demo.py on {where} with PyTorch {torch.__version__} and diffusers {diffusers.__version__}.",
        f"{job.steps} steps, guidance {GUIDANCE:g}, picture i from seed i; calibrated on {len(job.calibration)} other "
        f"prompts, {job.calibration_steps} steps. A step is one denoising step of all {len(job.prompts)} pictures.",
        "The pictures: Fluent Emoji (c) Microsoft, MIT licence, as redrawn by a model trained on them. The adapter "
        "flat was trained on Noto Emoji (c) Google, Apache License 2.0.",
    ]
    if job.device == "cpu":
        sentences.insert(2, "On a CPU the 4-bit arithmetic is emulated in PyTorch: look at the pictures, not the time.")
    return sentences


def table_of(first: str, *columns: str) -> Table:
    """An empty table: names, then numbers."""
    table = Table()
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def print_tables(console: Console, methods: Sequence[Method], adapted: Sequence[Adapted]) -> None:
    """The page's numbers in the terminal."""
    table = table_of("method", "PSNR", "worst picture", "weights", "a step")
    reference = methods[0].pictures
    for method in methods:
        table.add_row(
            method.name,
            decibels(psnr(method.pictures, reference)),
            decibels(worst_psnr(method.pictures, reference)),
            f"{method.nbytes / 1e6:.1f} MB",
            f"{method.seconds:.2f} s",
        )
    console.print(table)
    if not adapted:
        return
    table = table_of(f"{W4A8.name} with LoRA", "PSNR", "worst picture", "graphs compiled", "quantized again")
    for a in adapted:
        values = (decibels(psnr(a.pictures, a.reference)), decibels(worst_psnr(a.pictures, a.reference)))
        table.add_row(a.name, *values, str(a.graphs), str(a.requantized))
    console.print(table)


def left_out(size: Size) -> str:
    """A sentence on what this machine is too slow for, and how to see it all the same; "" where nothing is missing."""
    missing = size.without(FULL)
    return missing and f"This machine is slow, so {missing} were left out: make demo-full draws all of it."


def measure_pace(device: str, console: Console) -> float:
    """Seconds for a denoising step of one picture in 16-bit."""
    if not console.is_terminal:
        console.print("timing one step")
    with console.status("timing one step"), Progress(disable=True) as silent:
        pipe, line = load_pipeline(device), Line(silent, "", 2)
        draw(pipe, ["dog face"], 1, SEED, line)  # the first one is slower
        start = time.perf_counter()
        draw(pipe, ["dog face"], 1, SEED, line)
        return time.perf_counter() - start


def choose_size(args: argparse.Namespace, device: str, console: Console) -> Size:
    """What was asked for, or what this machine can do in five minutes; says so."""
    if args.full or args.prompts or args.steps or device == "cuda":
        return Size(args.prompts or FULL.prompts, args.steps or FULL.steps)
    pace = measure_pace(device, console)
    size = largest_within(LIMIT, pace)
    minutes = size.seconds(pace) / 60
    console.print(f"A step of one picture takes {pace:.2f} s here, the demo about {minutes:.1f} minutes.")
    if size is not FULL:
        console.print(f"{left_out(size)} It would take about {FULL.seconds(pace) / 60:.0f} minutes.")
    return size


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw emoji in 16 bits and in 4, side by side on one HTML page.")
    parser.add_argument("--output", type=Path, default=Path("demo.html"), help="the page (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="all of it, however long it takes")
    parser.add_argument("--prompts", type=int, help=f"how many emoji (in full: {FULL.prompts})")
    parser.add_argument("--steps", type=int, help=f"denoising steps (in full: {FULL.steps})")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    args = parser.parse_args(argv)
    if args.prompts is not None and not 1 <= args.prompts <= 24:
        parser.error(f"--prompts {args.prompts}: it can be 1 to 24")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps}: it must be 1 or more")
    if not args.output.resolve().parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.resolve().parent}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    console = Console()
    captions = (EMOJI / "prompts.txt").read_text(encoding="utf-8").splitlines()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = choose_size(args, device, console)
    shown, others = captions[: size.prompts], captions[size.prompts : size.prompts + size.calibration_prompts]
    job = Job(shown, others, size.steps, device, size.calibration_steps, size.lora)
    with progress_on(console) as progress:
        whole = progress.add_task(f"{'all of it':<36}", total=size.picture_steps)
        methods, adapted, part = compare(job, progress, whole)
    missing = "" if args.prompts or args.steps else left_out(size)
    text = build_page(shown, methods, adapted, part, facts(job), missing)
    args.output.write_text(text, encoding="utf-8")
    print_tables(console, methods, adapted)
    if missing:
        console.print(missing, highlight=False)
    console.print(f"The page: {args.output.resolve()}", soft_wrap=True, highlight=False)
    if args.open:
        webbrowser.open(args.output.resolve().as_uri())


if __name__ == "__main__":
    main()
