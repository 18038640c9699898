"""How faithful the demo model's 4-bit pictures are, by each way of quantizing, on prompts that calibrated nothing.

    python bench/quality.py [--pictures 256] [--formats w4a8,int4,nvfp4,w8a8] [--recipes today,all] [--ranks 32]

The quantized model runs eagerly, through the operators of compiled code; what has no kernel on this device runs as
torch's reference, nvfp4 on an H200 too. Calibration is a user's: four prompts, eight steps.

    rtn        rounded to nearest by clipped scales        lowrank   a branch by truncated SVD, no smoothing
    smooth     smoothing alone                           svdquant  the paper's: exponents of smoothing searched on the
    today      this program before rounding with                   observed outputs, SVD, rounded to nearest
               feedback and the code -8 of w4a8          all       as it is
    codes      today, with the code -8                   gptq      today, with feedback (which may take the code -8)
    search     today, with exponents of smoothing tried  rotate    today, with inputs rotated where that loses less

The code -8 of int4's activations is in the kernels, and so in all of these.

Intervals are 95 % over pictures; `gain_db` is the paired difference to "today" of the same format and rank. "layers"
has each linear's output error on inputs that calibrated nothing, and what bench/peers.py has put there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.progress import track
from torch import Tensor, nn

from record import RESULTS, environment

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo

import svdq_compile as svdq
from svdq_compile import feedback, input_transform, quantizer
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.input_transform import Transform
from svdq_compile.kernels.formats import FORMATS, groups, nibbles, w4a8
from svdq_compile.lowering import launch, ops, reference
from svdq_compile.lowrank import factorize
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.similarity import interval, psnr, ssim
from svdq_compile.whitening import Whitening

STEPS, FIRST_SEED, LAYER_PICTURES = 16, 1000, 16
GRID = 10  # steps of an exponent, as in the reference tool's "fast" configuration


@dataclass(frozen=True)
class Recipe:
    """options of Config, and what of this program is replaced: (module, name, by)."""

    options: dict[str, Any]
    changes: tuple[tuple[Any, str, Any], ...] = ()


def symmetric_codes(precision: str, w: Tensor, importance: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """`launch.round_weight` with w4a8 as it was: codes -7 to 7, and two sub-scales below the covering one."""
    if precision != "w4a8":
        return launch.round_weight(precision, w, importance)
    g = groups.split(w, w4a8.GROUP_SIZE)
    row = w4a8.row_scales(w)[:, None, None]
    cover = (groups.span(g) / 7 / row - 1e-4).ceil().clamp(1, w4a8.MAX_SUBSCALE)
    weights = None if importance is None else groups.split(importance, w4a8.GROUP_SIZE)

    def codes(v: Tensor, s: Tensor) -> Tensor:
        return (v / (s * row)).round_().clamp_(-7, 7)

    s = groups.best_of(
        g, ((cover - step).clamp_min(1) for step in range(3)), lambda v, s: codes(v, s) * (s * row), weights
    )
    tensors = nibbles.pack((codes(g, s) + 8).flatten(1)), s.squeeze(-1).to(torch.int8), row.flatten()
    return tensors, w4a8.dequantize_weight(*tensors)[:, : w.shape[1]]


def searched_smoothing(
    weights: Sequence[Tensor], statistics: InputStatistics, precision: str, config: svdq.Config
) -> Tensor:
    """The paper's: of span(x)^a / span(w)^b, b = 0 or 1 - a, whichever leaves the smallest error of the outputs."""
    form, k = FORMATS[precision], weights[0].shape[1]
    ones = torch.ones(k, device=weights[0].device)
    if form.quantize_activation is None or statistics.span is None:
        return ones
    rows, matrix = statistics.rows.float().to(ones), torch.cat([w.float() for w in weights])
    spans = statistics.span.to(ones), matrix.abs().amax(0)
    exponents = [(a / GRID, b) for a in range(1, GRID) for b in (0.0, 1 - a / GRID)]
    best, least = ones, torch.inf
    for a, b in [(0.0, 0.0), *exponents]:
        smooth = spans[0] ** a / spans[1] ** b
        if not bool((smooth.isfinite() & (smooth > 0)).all()):
            continue
        smooth = (smooth / smooth.log().mean().exp()).clamp(1e-3, 1e3).to(weights[0].dtype).float()
        qx, ascales, _ = reference.quantize(rows, smooth, rows[:0], precision, 0.0)
        read = form.dequantize_activation(qx, ascales)[:, :k]
        smoothed = matrix * smooth
        up, down, _ = factorize(smoothed, config.rank)
        rounded = symmetric_codes(precision, smoothed - up @ down, None)[1]
        wrong = float((read @ rounded.t() + (rows / smooth) @ (up @ down).t() - rows @ matrix.t()).norm())
        if wrong <= least:
            best, least = smooth, wrong
    return best


def paper_transform(
    weights: Sequence[Tensor], span: Tensor, precision: str, config: svdq.Config, shift: float, known: InputStatistics
) -> Transform:
    """In place of `input_transform.choose`; known: what `quantizer._trial` gives it."""
    codes = FORMATS[precision].codes
    shift = shift if codes is not None and codes.unsigned else 0.0
    return Transform(searched_smoothing(weights, known, precision, config), shift, rotate=False)


PAPER = (quantizer, "choose", paper_transform), (quantizer, "_trial", lambda weights, known, precision, rank: known)
BEFORE = ((quantizer, "round_weight", symmetric_codes), (feedback, "round_weight", symmetric_codes))
NO_FEEDBACK = (quantizer, "FEEDBACK_ROUNDS", 0)
BY_WEIGHT = (quantizer, "Whitening", lambda rows: Whitening(None))
ONE = (input_transform, "EXPONENTS", input_transform.EXPONENTS[:1])
PLAIN = {"rotate": False}
RECIPES = {
    "rtn": Recipe(PLAIN | {"rank": 0, "smooth": False, "refine": 0}, BEFORE),
    "smooth": Recipe(PLAIN | {"rank": 0, "refine": 0}, (*BEFORE, ONE)),
    "lowrank": Recipe(PLAIN | {"smooth": False, "refine": 0}, (*BEFORE, BY_WEIGHT)),
    "svdquant": Recipe(PLAIN | {"refine": 0}, (*BEFORE, BY_WEIGHT, *PAPER)),
    "today": Recipe(PLAIN, (*BEFORE, NO_FEEDBACK, ONE)),
    "codes": Recipe(PLAIN, (NO_FEEDBACK, ONE)),
    "gptq": Recipe(PLAIN, (*BEFORE, ONE)),
    "search": Recipe(PLAIN, (*BEFORE, NO_FEEDBACK)),
    "rotate": Recipe({}, (*BEFORE, NO_FEEDBACK, ONE)),
    "all": Recipe({}),
}


@contextmanager
def changed(recipe: Recipe) -> Iterator[None]:
    with ExitStack() as stack:
        for module, name, by in recipe.changes:
            stack.enter_context(patch.object(module, name, by))
        yield


@dataclass(frozen=True)
class Job:
    """What is drawn and what is calibrated on; `steps` also of the drawing."""

    shown: list[str]
    calibration: list[str]
    steps: int
    batch: int
    device: str


def job(pictures: int, steps: int, device: str) -> Job:
    """Prompts spread over all captions that the model was trained on, but for those that calibrate."""
    calibration = (demo.EMOJI / "prompts.txt").read_text(encoding="utf-8").splitlines()[8:12]
    captions = (demo.EMOJI / "captions.txt").read_text(encoding="utf-8").splitlines()
    others = [caption for caption in captions if caption not in calibration]
    shown = [others[i * len(others) // pictures] for i in range(pictures)]
    return Job(shown, calibration, steps, 256 if device == "cuda" else 8, device)


def draw(pipe: Any, todo: Job) -> Tensor:
    """Final latents [n, 256, 48], in -1..1 mostly."""
    parts = []
    for start in range(0, len(todo.shown), todo.batch):
        prompts = todo.shown[start : start + todo.batch]
        parts.append(
            pipe(prompts, num_inference_steps=todo.steps, seed=FIRST_SEED + start, output_type="latent").images.cpu()
        )
    return torch.cat(parts)


def quantized(recipe: Recipe, precision: str, rank: int, todo: Job) -> tuple[Any, float]:
    """A pipeline, not compiled, and the seconds that observing and quantizing took."""
    pipe = demo.load_pipeline(todo.device)
    options = {"rank": rank, "error_budget": 1.0, "progress": False} | recipe.options

    def calibrate(_: nn.Module) -> None:
        pipe(todo.calibration, num_inference_steps=demo.CALIBRATION_STEPS, seed=FIRST_SEED - 100, output_type="latent")

    start = time.perf_counter()
    with changed(recipe):
        svdq.quantize(pipe.transformer, svdq.Config(precision, **options), calibrate=calibrate)
    return pipe, time.perf_counter() - start


def layer_inputs(pipe: Any, todo: Job) -> dict[str, Tensor]:
    """By linear: 512 rows of its input at most, evenly over the steps of pictures that calibrated nothing."""
    seen: dict[str, InputStatistics] = {}

    def watch(name: str) -> Callable:
        return lambda _, args: seen.setdefault(name, InputStatistics()).observe(args[0])

    linears = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    prompts = todo.shown[:LAYER_PICTURES]
    pipe(prompts, num_inference_steps=todo.steps, seed=FIRST_SEED, output_type="latent")
    for hook in hooks:
        hook.remove()
    return {name: known.rows for name, known in seen.items()}


def layer_errors(model: nn.Module, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, float]:
    """|y - x W^T| / |x W^T| of each quantized linear."""
    errors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, QuantizedWeight):
            x = inputs[name]
            truth = x.float() @ weights[name].float().t()
            y = ops.linear(x, svdq.packed(module.weight), None, torch.float32)
            errors[name] = round(float((y - truth).norm() / truth.norm()), 5)
    return errors


def measure(
    todo: Job, formats: Sequence[str], recipes: Sequence[str], ranks: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """-> rows, layers."""
    stock = demo.load_pipeline(todo.device)
    truth = draw(stock, todo)
    pictures = stock.decode(truth, "pt")
    inputs = layer_inputs(stock, todo)
    weights = {name: m.weight.detach() for name, m in stock.transformer.named_modules() if isinstance(m, nn.Linear)}
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    cases = [
        (precision, rank, name)
        for precision in formats
        for rank in ranks
        for name in recipes
        if rank == ranks[0] or "rank" not in RECIPES[name].options  # those without a branch, once
    ]
    today: dict[tuple[str, int], Tensor] = {}
    for precision, rank, name in track(cases, "quantizing and drawing"):
        pipe, seconds = quantized(RECIPES[name], precision, rank, todo)
        latents = draw(pipe, todo)
        drawn = stock.decode(latents, "pt")
        decibels = psnr(drawn, pictures)
        row = {
            "model": "emoji-dit",
            "format": precision,
            "recipe": name,
            "rank": RECIPES[name].options.get("rank", rank),
            "pictures": len(decibels),
            "psnr_db": round(float(decibels.mean()), 3),
            "ci95_db": round(interval(decibels), 3),
            "ssim": round(float(ssim(drawn, pictures).mean()), 4),
            "latent_error": round(float((latents - truth).norm() / truth.norm()), 4),
            "bytes": demo.weight_bytes(pipe.transformer),
            "seconds": round(seconds, 1),
        }
        if name == "today":
            today[precision, rank] = decibels
        elif (precision, rank) in today:
            gain = decibels - today[precision, rank]
            row |= {"gain_db": round(float(gain.mean()), 3), "gain_ci95_db": round(interval(gain), 3)}
        rows.append(row)
        errors = layer_errors(pipe.transformer, weights, inputs)
        layers += [
            {"layer": layer, "format": precision, "recipe": name, "rank": row["rank"], "ours": error, "modelopt": None}
            for layer, error in errors.items()
        ]
        print({key: value for key, value in row.items() if key != "model"}, flush=True)
    return rows, layers


def of_peers(path: Path) -> list[dict[str, Any]]:
    """The layers that bench/peers.py has put into a file that is there already."""
    layers = json.loads(path.read_text())["layers"] if path.exists() else []
    return [layer for layer in layers if layer["recipe"] == "peers"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--formats", default="w4a8,int4,nvfp4,w8a8")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--ranks", default="32")
    args = parser.parse_args(arguments)
    recipes = args.recipes.split(",")
    unknown = [name for name in recipes if name not in RECIPES]
    if unknown:
        parser.error(f"no recipe {unknown[0]}; there are {', '.join(RECIPES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    todo = job(args.pictures, args.steps, device)
    with torch.no_grad():
        rows, layers = measure(todo, args.formats.split(","), recipes, [int(r) for r in args.ranks.split(",")])
    layers += of_peers(args.output)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(environment() | {"rows": rows, "layers": layers}, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
