"""`evaluate`: how faithful a pipeline's own pictures are in 4 bits, as a page.

    in 16 bits   draw each picture (drawing.py); draw the first again, and record what the model reads (recording.py)
    then         quantize, in place: never are both models in memory
    in 4 bits    draw each picture from the same noise; hold the model and its linears against what was recorded
    the page     its numbers are in evaluation.py, its HTML in evaluation_page.py

What is done is kept beside the page until it is there (unfinished.py).
"""

import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .compile_model import compile as compile_model
from .config import Config
from .drawing import Drawer, Drawing
from .errors import NotAModel, NothingToQuantize, OptionError
from .evaluation import Evaluation, Picture, weight_bytes
from .evaluation_page import page
from .filling import without_memory
from .foreign import groups_of
from .given import denoisers
from .header import read_header
from .layers import layers
from .loading import load
from .nunchaku_file import is_nunchaku
from .parameter import QuantizedWeight, has_quantized, packed
from .progress import say, steps
from .quantize_model import quantize
from .quantizer import NUMERICS
from .reading import state_of
from .recording import Recorded, call_error, layer_errors, record
from .replacing import replacing
from .report import why_nothing
from .unfinished import unfinished_folder

RECORDED = 2  # pictures, the first ones: what a model reads differs more by timestep than by prompt


@dataclass(frozen=True)
class _Job:
    """What was asked for, checked.

    place        the attribute of the pipeline that holds the model
    shown        prompts and seeds of the pictures; calibration: of those to calibrate on, none by the weights alone
    quantized    a file to load instead of quantizing
    """

    pipe: Any
    place: str
    model: nn.Module
    device: torch.device
    drawer: Drawer
    shown: list[tuple[str, int]]
    calibration: list[tuple[str, int]]
    quantized: Path | None
    is_compiled: bool
    config: Config


def evaluate(
    pipe: Any,
    output: str | os.PathLike,
    *,
    prompts: Iterable[str],
    seeds: Iterable[int] = (0,),
    calibration: Iterable[str] = (),
    quantized: str | os.PathLike | None = None,
    component: str | None = None,
    call: Mapping[str, Any] | None = None,
    compile: bool | None = None,
    config: Config | Mapping[str, Any] | None = None,
    **options: Any,
) -> Evaluation:
    """Draw the same pictures in 16 bits and in 4, and write a page that compares them, with its numbers as JSON beside
    it. The model of the pipeline is in 4 bits afterwards.

        svdq.evaluate(pipe, "eval.html", prompts=["a dog", "a red apple"], seeds=[0, 1], calibration=["a cat"])

    pipe             a diffusers pipeline in 16 bits, or what is called like one and has a transformer or a unet
    output           the page, as in "eval.html"
    prompts, seeds   each prompt is drawn from each seed; what is given twice counts once
    calibration      other prompts, to calibrate on; without, the model is quantized by its weights alone
    quantized        a quantized file to load instead of quantizing
    component        which model of the pipeline; by default the transformer, else the unet
    call             further arguments of each call of the pipeline, as in {"num_inference_steps": 28}
    compile          run the 4-bit model compiled; by default on a GPU. The first picture of each series is not timed
    config, options  as in `quantize`

    What was done before an interruption is taken up by the next call with the same arguments and the same weights; with
    others it is begun anew. Raises NotAModel, OptionError, NonFinitePicture, OSError that names the page where it
    cannot be written, and what `quantize` and `load` raise.
    """
    place, model = _denoiser(pipe, component)
    shown, others, numbers = _texts("prompts", prompts), _texts("calibration", calibration), _seeds(seeds)
    if not shown:
        raise OptionError("prompts: there is none to draw")
    _check_overlap(shown, others)
    device = _device(pipe, place, model)
    job = _Job(
        pipe,
        place,
        model,
        device,
        Drawer(pipe, call or {}),
        [(prompt, seed) for prompt in shown for seed in numbers],
        [(prompt, max(numbers) + 1 + i) for i, prompt in enumerate(others)],  # from other noise too
        None if quantized is None else Path(quantized),
        device.type == "cuda" if compile is None else compile,
        Config.of(config, options),
    )
    _check_quantized(job)
    if not others:
        job.config.refuse_target("needs calibration prompts, as in calibration=['a cat']")
    target = checked_page(output)
    with unfinished_folder(target, _facts(job), "evaluating to") as folder, _quietly(pipe):
        result = _measured(job, folder)
        with replacing(target.with_suffix(".json")) as numbers_file, replacing(target) as page_file:
            numbers_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
            html = page(result, lambda i: (_kept(folder, 16, i).frames, _kept(folder, 4, i).frames))
            page_file.write_text(html, encoding="utf-8")
    say(f"svdquant: {result}; see {target}", job.config.progress)
    return result


def _denoiser(pipe: Any, component: str | None) -> tuple[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        raise NotAModel(f"{type(pipe).__name__} is a model: give svdq_compile.evaluate the pipeline that draws with it")
    found = denoisers(pipe, "evaluate")
    place = component or next(iter(found))
    model = getattr(pipe, place, None)
    if not isinstance(model, nn.Module):
        raise OptionError(f"component={component!r}: this {type(pipe).__name__} has {', '.join(found)}")
    if has_quantized(model):
        raise OptionError(f"{place} is quantized already: give the pipeline as it is loaded, in 16 bits")
    if not any(layer.reason is None for layer in layers(model)):
        raise NothingToQuantize(why_nothing(model))
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise OptionError(f"{place} is compiled: give the pipeline as it is loaded, its 4-bit model is compiled here")
    return place, model


def _device(pipe: Any, place: str, model: nn.Module) -> torch.device:
    """Where the model runs; one that is offloaded as a whole is elsewhere between its calls. Weights that move during a
    call cannot be replaced by those of a file, nor read layer by layer.
    """
    if groups_of(model) or any(parameter.is_meta for parameter in model.parameters()):
        raise OptionError(
            f"{place} is offloaded by parts (group or sequential offloading), whose 4-bit form cannot be evaluated: "
            "load the pipeline anew, and give it pipe.enable_model_cpu_offload() where memory is short"
        )
    return torch.device(getattr(pipe, "_execution_device", next(model.parameters()).device))


def _texts(name: str, given: Iterable[str]) -> list[str]:
    """Those that say something, each once."""
    if isinstance(given, str):
        raise OptionError(f"{name}={given!r:.60}: must be a list, as in {name}=[{given!r:.60}]")
    texts = list(given)
    for text in texts:
        if not isinstance(text, str):
            raise OptionError(f"{name}: {text!r:.60} is no text")
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _seeds(given: Iterable[int]) -> list[int]:
    seeds = list(dict.fromkeys(given))
    if not seeds or not all(type(seed) is int and 0 <= seed < 2**62 for seed in seeds):
        raise OptionError(f"seeds={seeds!r:.60}: must be whole numbers from 0, as in seeds=[0, 1]")
    return seeds


def _check_overlap(shown: list[str], calibration: list[str]) -> None:
    """What calibrated says nothing of what did not."""
    words = {" ".join(re.findall(r"\w+", prompt.casefold())) for prompt in shown}
    for prompt in calibration:
        if " ".join(re.findall(r"\w+", prompt.casefold())) in words:
            raise OptionError(
                f"calibration: {prompt!r:.80} is among the prompts that are evaluated, which would make the result "
                "look better than it is: calibrate on others"
            )


def _check_quantized(job: _Job) -> None:
    """That a file fits the model, before hours of drawing."""
    if job.quantized is None:
        return
    if job.calibration or job.config != Config(progress=job.config.progress):
        raise OptionError(f"{job.quantized} is quantized already: leave out calibration and the options of quantizing")
    if not is_nunchaku(job.quantized):
        checkpoint.check_fit(job.model, read_header(job.quantized), job.quantized)


def checked_page(output: str | os.PathLike) -> Path:
    """Where the page is to be written. Raises OptionError, FileNotFoundError."""
    target = Path(output)
    if target.is_dir():
        raise OptionError(f"{target} is a folder: give the page to write, as in {target / 'eval.html'}")
    if target.suffix not in (".html", ".htm"):
        raise OptionError(f"{target}: the page to write has a name that ends in .html")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: there is no such folder to write {target.name} to")
    return target


def _facts(job: _Job) -> dict[str, Any]:
    """All that the result depends on."""
    options = {k: v for k, v in job.config.to_dict().items() if k not in ("progress", "fallback", "group")}
    parts = {name: part for name, part in getattr(job.pipe, "__dict__", {}).items() if isinstance(part, nn.Module)}
    scheduler = getattr(job.pipe, "scheduler", None)
    return {
        "versions": [
            version("svdq-compile"),
            NUMERICS,
            torch.__version__,
            getattr(sys.modules.get("diffusers"), "__version__", ""),
        ],
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else job.device.type,
        "pipeline": f"{type(job.pipe).__qualname__}, {job.place}",
        "weights": {name: _fingerprint(part) for name, part in parts.items()},
        "scheduler": f"{type(scheduler).__qualname__} {getattr(scheduler, 'config', '')}",
        "prompts or seeds": job.shown,
        "calibration": job.calibration,
        "arguments of the call": {name: _told(value) for name, value in job.drawer.options.items()},
        "options": options,
        "compilation": job.is_compiled,
        "quantized file": job.quantized and [os.path.realpath(job.quantized), *state_of(job.quantized)],
    }


def _told(value: Any) -> Any:
    """An argument in words: of a tensor, an array or an image, of which repr shows a part or none, a digest."""
    if isinstance(value, list | tuple):
        return [_told(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): _told(one) for name, one in value.items()}
    if getattr(value, "mode", "") in ("P", "PA"):  # an image whose bytes mean something by its palette
        value = value.convert("RGBA")
    if isinstance(value, Tensor):
        kind, content = f"{value.dtype} {tuple(value.shape)}", _bytes_of(value).cpu().numpy().tobytes()
    elif hasattr(value, "tobytes"):
        of_its_kind = (str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size"))
        kind, content = " ".join(of_its_kind), value.tobytes()
    else:
        return repr(value)
    return f"{type(value).__qualname__} {kind} {hashlib.sha256(content).hexdigest()}"


def _fingerprint(model: nn.Module) -> str:
    """Another one for other weights: of each tensor the name, shape, dtype, class, the sum of its bytes and some of
    them; of another library's class no bytes.
    """
    seen = 0
    for name, value in model.state_dict().items():
        told = f"{name} {getattr(value, 'shape', '')} {getattr(value, 'dtype', '')} {type(value).__qualname__}"
        for tensor in _plain(value):
            own = _bytes_of(tensor)
            some = torch.linspace(0, len(own) - 1, 64, dtype=torch.float64, device=own.device).long()
            told += f" {int(own.sum(dtype=torch.int64))} {own[some].tolist()}"
        seen = zlib.crc32(told.encode(), seen)
    return f"{seen:08x}"


def _plain(value: Any) -> list[Tensor]:
    """The tensors that hold what a state dict has, where they can be read."""
    found = [value] if type(value) in (Tensor, nn.Parameter) else []
    if isinstance(value, QuantizedWeight):
        pack = packed(value)
        found = [*pack.own_tensors().values(), pack.shared.smooth, pack.shared.down]
    return [tensor for tensor in found if tensor.numel() and not tensor.is_meta]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def _quietly(pipe: Any) -> Iterator[None]:
    """Without a diffusers pipeline's own bars, beside which nothing else can be shown."""
    before = getattr(pipe, "_progress_bar_config", {})
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(**before)


def _measured(job: _Job, folder: Path) -> Evaluation:
    before = weight_bytes(job.model)
    _draw(job, folder, 16)
    recorded = _recorded(job, folder)
    _quantize(job, folder / "quantized.safetensors")
    after = weight_bytes(job.model)
    if job.is_compiled:
        compile_model(job.model, job.config)
    _draw(job, folder, 4)
    calls = steps(recorded.calls, "comparing calls of the model", job.config.progress)
    return Evaluation.of(
        job.model,
        facts=_sentences(job),
        nbytes=(before, after),
        pictures=[Picture.of(*one, _kept(folder, 16, i), _kept(folder, 4, i)) for i, one in enumerate(job.shown)],
        timesteps=_kept(folder, 16, 0).timesteps,
        calls=[call_error(job.model, call, job.device) for call in calls],
        layers=layer_errors(job.model, recorded.layers),
    )


def _draw(job: _Job, folder: Path, bits: int) -> None:
    """Each picture that is not there yet; the first of them once more, before it counts how long one takes: what comes
    first compiles, chooses kernels, fills caches.
    """
    missing = [i for i in range(len(job.shown)) if Drawing.load(_place(folder, bits, i)) is None]
    for n, i in enumerate(steps([*missing[:1], *missing], f"drawing in {bits}-bit", job.config.progress)):
        drawing = job.drawer.draw(*job.shown[i], bits=bits)
        if n:
            drawing.save(_place(folder, bits, i))


def _place(folder: Path, bits: int, number: int) -> Path:
    return folder / f"{bits}-bit-{number:05}.safetensors"


def _kept(folder: Path, bits: int, number: int) -> Drawing:
    drawing = Drawing.load(_place(folder, bits, number))
    assert drawing is not None, "all of them were drawn"
    return drawing


def _recorded(job: _Job, folder: Path) -> Recorded:
    """What the first pictures read, inputs that calibrate nothing."""

    def draw() -> None:
        for one in steps(job.shown[:RECORDED], "recording inputs", job.config.progress):
            job.drawer.draw(*one, bits=16)

    path = folder / "recorded.pt"
    if not path.exists():
        record(job.model, draw).save(path)
    return Recorded.load(path)


def _quantize(job: _Job, kept: Path) -> None:
    """By the file that was given, or kept when it was done before."""

    def calibrate(_: nn.Module) -> None:
        for one in steps(job.calibration, "calibrating", job.config.progress):
            job.drawer.draw(*one, bits=16)

    file = job.quantized or (kept if kept.exists() else None)
    if file is None:
        elsewhere = next(job.model.parameters()).device != job.device  # offloaded
        quantize(
            job.model,
            job.config,
            calibrate=calibrate if job.calibration else None,
            device=job.device if elsewhere else None,
        )
        checkpoint.save(job.model, kept, progress=job.config.progress)
    else:
        without_memory(job.model)
        load(job.model, file, job.device, progress=job.config.progress)


def _sentences(job: _Job) -> Iterator[str]:
    """Where, how and with what the page was made."""
    where = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "a CPU"
    yield f"Made by svdq-compile {version('svdq-compile')} on {where} with PyTorch {torch.__version__}."
    given = ", ".join(f"{name}={value!r:.40}" for name, value in job.drawer.options.items())
    yield f"{type(job.pipe).__name__}, its {job.place}; each call with {given or 'its own defaults'}."
    if job.quantized is not None:
        yield f"Loaded from {job.quantized.name}, which does not say what it was calibrated on."
    elif job.calibration:
        prompts = ", ".join(prompt for prompt, _ in job.calibration)
        yield f"Calibrated on {len(job.calibration)} other prompts, from other noise: {prompts}."
    else:
        yield "Quantized by its weights alone: calibration on other prompts would make it better."
    for place in denoisers(job.pipe, "evaluate").keys() - {job.place}:
        yield f"Its {place} stayed in 16 bits."
    if not job.is_compiled:
        yield "The 4-bit model ran eagerly, an operator at a time: compiled code is faster."
    if job.device.type == "cpu":
        yield "On a CPU the 4-bit arithmetic is emulated: look at the pictures, not the time."
