"""The command line: `svdq quantize`, `svdq observe`, `svdq eval`, `svdq inspect`, `svdq convert`, `svdq doctor`,
`svdq demo`.
"""

import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

import svdq_compile as svdq

from . import tables
from .config import PRECISIONS, Config
from .doctor import Plan
from .errors import OptionError, SvdqError
from .evaluate import checked_page
from .header import Header, LayerEntry, is_ours, read_header
from .kernels.formats import FORMATS
from .model_files import Pipeline, empty_model, model_of_config, open_pipeline, pipeline_folder
from .nunchaku_file import LITE, NunchakuFile, is_nunchaku, opened
from .nunchaku_keys import W4A4
from .streaming import quantize_file
from .tables import names

DEFAULT = Config()
PRECISION_HELP = "; ".join(
    ("auto: what the device runs fastest", *(f"{f.name}: {f.summary}" for f in FORMATS.values()))
)


OURS, NUNCHAKU, NUNCHAKU_LITE = _KINDS = ("svdq", "nunchaku", "nunchaku-lite")


class _Commands(TyperGroup):
    """Shows what a user can mend as one line, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output has seen enough
        except (SvdqError, OSError, ValueError) as error:
            _console(stderr=True).print(" ".join(f"svdq: {error}".split()), style="red", soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    help="SVDQuant: diffusion models in 4 bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    app(prog_name="svdq")


def _console(stderr: bool = False, names: Iterable[str] = ()) -> Console:
    """names  of layers, in a column of a table"""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream is not None and stream.isatty() else tables.width_for(names)
    return Console(file=stream, markup=False, emoji=False, highlight=False, width=width)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"svdq-compile {version('svdq-compile')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# Arguments and options that several commands take.
PipelineSource = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A diffusers pipeline folder, or its name on the hub.")
]
Precision = Annotated[str, typer.Option(metavar="|".join(PRECISIONS), help=PRECISION_HELP)]
Rank = Annotated[int, typer.Option(help="Of the 16-bit branch of each linear; 0 leaves it out.")]
Refine = Annotated[int, typer.Option(help="Rounds of refitting the branch to what rounding has lost.")]
Skip = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Layers to leave in 16-bit, with * and ?. Repeatable.")
]
Convolutions = Annotated[
    bool, typer.Option("--convolutions", help="A UNet's convolutions too, which are kept in 4 bits and run in 16.")
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps for each prompt.")]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda", help="Where the work is done; by default cuda if there is one.")
]
Component = Annotated[str | None, typer.Option(help="Which model of a pipeline; by default transformer, else unet.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the Python files that a pipeline folder brings.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite OUTPUT.")]


@app.command()
def quantize(
    source: Annotated[
        Path,
        typer.Argument(help="A diffusers pipeline folder, a diffusers model folder, or a single file with weights."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The .safetensors file to write.")],
    precision: Precision = DEFAULT.precision,
    rank: Rank = DEFAULT.rank,
    refine: Refine = DEFAULT.refine,
    skip: Skip = None,
    convolutions: Convolutions = DEFAULT.convolutions,
    error_budget: Annotated[
        float, typer.Option(help="A layer with a larger relative error stays 16-bit.")
    ] = DEFAULT.error_budget,
    target_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="What all linears may take, as 6.8GiB: each gets its format and rank by measuring. With --prompt.",
        ),
    ] = None,
    target_error: Annotated[
        float | None,
        typer.Option(help="Instead: how far the model's output may be off, as 0.02; the least bytes for it."),
    ] = None,
    no_smooth: Annotated[bool, typer.Option("--no-smooth", help="Do not move outliers into the weights.")] = False,
    no_rotate: Annotated[
        bool, typer.Option("--no-rotate", help="int4: do not rotate inputs, as for Nunchaku.")
    ] = False,
    device: Device = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Calibrate on drawing this; needs a pipeline folder. Repeatable. Without: by weights alone."),
    ] = None,
    steps: Steps = DEFAULT.calibration_steps,
    statistics: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Calibrate by what svdq observe has written. Repeatable: they are merged."),
    ] = None,
    component: Component = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Of a single file: its model's folder (config.json is enough) or class."),
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="With --prompt: run the Python files that a pipeline folder brings.")
    ] = False,
    force: Force = False,
) -> None:
    """Quantize a model to 4 bits and write it to one file. Models in float32 are taken as bfloat16.

    Without --prompt a layer at a time is read and quantized, so the model may be larger than the memory; cut off, the
    same command goes on where it was. With --statistics it is calibrated all the same. Under torchrun the processes
    share the work, and the first writes the file.
    """
    _check_output(source, output, force)
    config = Config(
        precision=precision,
        rank=rank,
        refine=refine,
        skip=tuple(skip or ()),
        convolutions=convolutions,
        error_budget=error_budget,
        target_bytes=target_bytes,
        target_error=target_error,
        smooth=not no_smooth,
        rotate=not no_rotate,
    )
    if not prompt and config.has_target:
        raise OptionError("--target-bytes and --target-error are met by measuring what is drawn: give --prompt")
    at = _device(device)
    for file in statistics or ():
        if file.exists() and output.exists() and output.samefile(file):
            raise OptionError(f"{output} is among the statistics: write to another file")
    if prompt and statistics:
        raise OptionError("--statistics are of a calibration that was done: leave out --prompt")
    is_first = _join_others(at, draws=bool(prompt))
    if prompt and model is not None:
        raise OptionError("--model is for a single file of weights, which draws nothing: leave out --prompt")
    if prompt:
        with _console(stderr=True).status(f"loading {source}"):
            pipeline = open_pipeline(source, at, component=component, trust_code=trust_code)
        svdq.quantize(pipeline.model, config, calibrate=_calibration(pipeline, prompt, steps), device=at)
        svdq.save(pipeline.model, output, config=config)
        place = pipeline.place
    else:
        known = svdq.Statistics.merge(*map(svdq.Statistics.load, statistics)) if statistics else None
        where = torch.device(at)
        place = quantize_file(source, output, config, where, model=model, component=component, statistics=known)
    if not is_first:
        return
    console = _console()
    console.print(_totals(read_header(output)))
    console.print(f'Next: svdq_compile.load({place}, "{output}"); {place}.compile(backend="svdquant")', soft_wrap=True)


def _join_others(device: str, draws: bool) -> bool:
    """Under torchrun, meet its other processes. Returns whether this is the first, or alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        return True
    if draws:
        raise OptionError("pictures are drawn by one process: leave out torchrun, or --prompt")
    if ":" in device:
        raise OptionError(f"--device {device} is one GPU, and torchrun's processes have one each: give cuda")
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return dist.get_rank() == 0


def _check_output(source: Path, output: Path, force: bool) -> None:
    """What would go wrong after the work is better said before it."""
    if output.is_dir():
        raise OptionError(f"{output} is a folder; OUTPUT is the file to write")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: there is no such folder to write {output.name} to")
    if output.exists() and source.exists() and output.samefile(source):
        raise OptionError(f"{output} is SOURCE itself: write to another file")
    is_inside = output.exists() and source.is_dir() and output.resolve().is_relative_to(source.resolve())
    if is_inside and not is_ours(output):
        raise OptionError(f"{output} is a part of SOURCE: write to another file")
    if output.exists() and not force:
        raise OptionError(f"{output} exists already; --force overwrites it")


def _device(name: str | None) -> str:
    has_cuda = torch.cuda.is_available()
    if name is None:
        return "cuda" if has_cuda else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise OptionError(f"option device={name!r}: it can be 'cpu' or 'cuda'")
    if name != "cpu" and not has_cuda:
        raise OptionError(f"option device={name!r}: this PyTorch sees no CUDA GPU; leave it out to use the CPU")
    return name


def _calibration(pipeline: Pipeline, prompts: list[str], steps: int) -> Callable[[Any], None]:
    """Draws the prompts one by one: a batch of all could need more memory than the model ever will."""

    def calibrate(model: Any) -> None:
        for prompt in prompts:
            pipeline.draw(prompt=prompt, num_inference_steps=steps)

    return calibrate


@app.command()
def observe(
    source: PipelineSource,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The file of statistics to write.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Observe drawing this. Repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Observe these too: a text file with a prompt in each line.")
    ] = None,
    convolutions: Convolutions = DEFAULT.convolutions,
    steps: Steps = DEFAULT.calibration_steps,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="Where it is drawn; by default cuda if there is one.")
    ] = None,
    component: Component = None,
    trust_code: TrustCode = False,
    force: Force = False,
) -> None:
    """Watch what a model reads while it draws, and write it to a file, for svdq quantize --statistics."""
    shown = _to_draw(prompt, prompts)
    folder = pipeline_folder(source)
    _check_output(folder, output, force)
    at = _device(device)
    _join_others(at, draws=True)
    with _console(stderr=True).status(f"loading {source}"):
        pipeline = open_pipeline(folder, at, component=component, trust_code=trust_code)
    found = svdq.observe(pipeline.model, _calibration(pipeline, shown, steps), convolutions=convolutions)
    found.save(output)
    _console().print(repr(found), soft_wrap=True)


@app.command("eval")
def evaluate(
    source: PipelineSource,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The .html file to write; .json comes beside it.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Draw this. Repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw these too: a text file with a prompt in each line.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Draw each prompt from this. Repeatable; by default 0.")
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(metavar="PROMPT", help="Calibrate on drawing this, which is not shown. Repeatable."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Calibrate on these too: a text file, likewise.")
    ] = None,
    quantized: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Load this quantized file instead of quantizing.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; by default the pipeline's own.")] = None,
    call: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="An argument of the pipeline's call, as guidance_scale=3.5. Repeatable."
        ),
    ] = None,
    precision: Precision = DEFAULT.precision,
    rank: Rank = DEFAULT.rank,
    refine: Refine = DEFAULT.refine,
    skip: Skip = None,
    convolutions: Convolutions = DEFAULT.convolutions,
    device: Device = None,
    component: Component = None,
    compile: Annotated[
        bool | None, typer.Option(help="Run the 4-bit model compiled, or not; by default on a GPU.")
    ] = None,
    trust_code: TrustCode = False,
    force: Force = False,
) -> None:
    """Draw a pipeline's pictures in 16 bits and in 4, and write a page that compares them, with its numbers.

    Cut off, the same command goes on where it was.
    """
    shown, others = _to_draw(prompt, prompts), _lines(calibrate, calibration)
    checked_page(output)
    folder = pipeline_folder(source)
    for written in (output, output.with_suffix(".json")):
        _check_output(folder, written, force)
    at = _device(device)
    with _console(stderr=True).status(f"loading {source}"):
        pipeline = open_pipeline(folder, at, component=component, trust_code=trust_code)
    result = svdq.evaluate(
        pipeline.draw,
        output,
        prompts=shown,
        seeds=seed or [0],
        calibration=others,
        quantized=quantized,
        component=component,
        call=({} if steps is None else {"num_inference_steps": steps}) | dict(map(_argument, call or ())),
        compile=compile,
        config=Config(precision=precision, rank=rank, refine=refine, skip=tuple(skip or ()), convolutions=convolutions),
    )
    _console().print(str(result), soft_wrap=True)


def _to_draw(given: list[str] | None, file: Path | None) -> list[str]:
    """As `_lines`, where there must be some."""
    found = _lines(given, file)
    if not found:
        raise OptionError("there is no prompt to draw: give --prompt or --prompts")
    return found


def _lines(given: list[str] | None, file: Path | None) -> list[str]:
    """Prompts that were given one by one, and those of a text file."""
    try:
        more = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} is no text file in UTF-8 ({error})") from error
    found = [line for line in [*(given or ()), *more] if line.strip()]
    if file is not None and not found:
        raise OptionError(f"{file}: there is no prompt in it")
    return found


def _argument(text: str) -> tuple[str, Any]:
    """An argument of a pipeline's call: NAME=VALUE, a value in JSON or else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OptionError(f"option call={text!r}: must be NAME=VALUE, as in guidance_scale=3.5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A file that svdq quantize or svdq_compile.save wrote, or Nunchaku's."),
    ],
    layers: Annotated[bool, typer.Option("--layers", help="Every linear, in a table.")] = False,
) -> None:
    """Show what is in a quantized file, from its metadata alone."""
    if is_nunchaku(file):
        with opened(file) as theirs:
            _inspect_nunchaku(theirs, layers)
        return
    header = read_header(file)
    console = _console(names=[*(entry.name for entry in header.layers), *header.others] if layers else ())
    facts = Table.grid(padding=(0, 2))
    facts.add_row("file", f"{file} ({_mib(header.nbytes)} MiB)")
    facts.add_row("format version", str(header.version))
    facts.add_row("model class", header.model_class)
    if header.config:
        facts.add_row("config", ", ".join(f"{name}={value}" for name, value in header.config.items()))
    facts.add_row("quantized", header.calibration)
    for reason, count in Counter(header.others.values()).most_common():
        facts.add_row("16-bit linears", f"{count}: {reason}")
    console.print(facts)
    if layers:
        console.print(_quantized_table(header, console.width))
        console.print(_others_table(header, console.width))
    console.print(_totals(header))


def _inspect_nunchaku(file: NunchakuFile, layers: bool) -> None:
    console = _console(names=[piece.name for piece in file.pieces] if layers else ())
    many = sum(piece.packing == W4A4 for piece in file.pieces)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("file", f"{file.path} ({_mib(file.nbytes)} MiB)")
    facts.add_row("format", LITE if file.packaging == LITE else f"Nunchaku, {file.packaging}")
    facts.add_row("model class", file.stock_class or "unknown: it does not say")
    facts.add_row("quantized", f"{many} modules, {file.precision}, rank {file.rank}" if many else "none in W4A4")
    facts.add_row("weights only", f"{len(file.pieces) - many} modules, int4 with zero points")
    facts.add_row("16-bit tensors", str(len(file.plain)))
    console.print(facts)
    if layers:
        table = Table(names("module", [piece.name for piece in file.pieces], console.width), "packing", "holds")
        for piece in file.pieces:
            kind = file.precision if piece.packing == W4A4 else piece.packing
            table.add_row(piece.name, kind, ", ".join(piece.rule.parts))
        console.print(table)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A quantized file: one of ours, or a file or folder of Nunchaku's.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="What to write: a file, or a folder for nunchaku-lite.")
    ],
    to: Annotated[str, typer.Option(metavar="|".join(_KINDS), help="The format of OUTPUT.")] = OURS,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model's folder (config.json is enough) or class, for files of ours, which do not say it.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="w4a8", help="Of Nunchaku's: code its 4-bit linears anew. Without: as they are."),
    ] = None,
    force: Force = False,
) -> None:
    """Turn a quantized file into another format; integers and scales stay as they are."""
    if to not in _KINDS:
        raise OptionError(f"option to={to!r}: it can be {', '.join(_KINDS)}")
    if to == NUNCHAKU and output.suffix != ".safetensors":
        raise OptionError(f"{output}: a single file of Nunchaku's has a name that ends in .safetensors")
    if to == NUNCHAKU_LITE and output.suffix == ".safetensors":
        raise OptionError(f"{output}: {LITE} is a folder, and this is the name of a file")
    if to != NUNCHAKU_LITE or not output.is_dir():
        _check_output(source, output, force)
    empty = _model_for(source) if model is None else empty_model(model)
    svdq.load(empty, source, precision=precision)
    if to == OURS:
        svdq.save(empty, output)
    else:
        svdq.export_nunchaku(empty, output)


def _model_for(source: Path) -> Any:
    """A model without weights, as a file of Nunchaku's describes it."""
    if is_nunchaku(source):
        with opened(source) as theirs:
            config, name = theirs.config, theirs.stock_class
        if config:
            return model_of_config(source, name, config)
    raise OptionError(f"{source} does not say how its model is built: give --model, a folder with its config.json")


def _totals(header: Header) -> Table:
    """One row a precision, and one for the rest of the file."""
    table = Table("precision", *_right("layers", "MiB before", "MiB after"), "largest error")
    for precision in sorted({entry.precision for entry in header.layers}):
        table.add_row(precision, *_sums([entry for entry in header.layers if entry.precision == precision]))
    before, after = (sum(getattr(e, field) for e in header.layers) for field in ("bytes_before", "bytes_after"))
    rest = header.nbytes - after
    table.add_row("everything else", "", _mib(rest), _mib(rest), "")
    table.add_section()
    table.add_row("the file", str(len(header.layers)), _mib(before + rest), _mib(header.nbytes), "")
    return table


def _sums(entries: list[LayerEntry]) -> tuple[str, ...]:
    worst = max(entries, key=lambda entry: entry.error)
    before, after = sum(e.bytes_before for e in entries), sum(e.bytes_after for e in entries)
    return str(len(entries)), _mib(before), _mib(after), f"{_percent(worst.error)} ({worst.name})"


def _quantized_table(header: Header, width: int) -> Table:
    layer = names("quantized layer", [entry.name for entry in header.layers], width)
    table = Table(layer, "precision", *_right("shape", "rank", "MiB before", "MiB after", "error"))
    for entry in header.layers:
        shape, sizes = " x ".join(map(str, entry.shape)), (_mib(entry.bytes_before), _mib(entry.bytes_after))
        table.add_row(entry.name, entry.precision, shape, str(entry.rank), *sizes, _percent(entry.error))
    return table


def _others_table(header: Header, width: int) -> Table:
    table = Table(names("16-bit layer", header.others, width), "why")
    for name, reason in header.others.items():
        table.add_row(name, reason)
    return table


def _right(*headings: str) -> list[Column]:
    return [Column(heading, justify="right") for heading in headings]


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"


def _percent(error: float) -> str:
    return f"{100 * error:.2f} %"


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A diffusers pipeline or model folder (config.json is enough), or a class of diffusers.",
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="With a class: what its constructor takes. Without: its defaults."),
    ] = None,
    component: Component = None,
    precision: Precision = DEFAULT.precision,
    rank: Rank = DEFAULT.rank,
    skip: Skip = None,
    convolutions: Convolutions = DEFAULT.convolutions,
    layers: Annotated[bool, typer.Option("--layers", help="Every linear, in a table.")] = False,
) -> None:
    """Say what would be quantized, what not and why, and how much memory it would take. No weight is read."""
    chosen = Config(precision=precision, rank=rank, skip=tuple(skip or ()), convolutions=convolutions)
    found = svdq.doctor(empty_model(model, config=config, component=component), chosen)
    console = _console(names=[plan.name for plan in found.plans] if layers else ())
    if layers:
        console.print(_plans_table(found.plans, console.width))
    console.print(found)


def _plans_table(plans: Sequence[Plan], width: int) -> Table:
    table = Table(
        names("linear", [plan.name for plan in plans], width), *_right("shape", "MiB before", "MiB after"), "why 16-bit"
    )
    for plan in plans:
        table.add_row(
            plan.name, " x ".join(map(str, plan.shape)), _mib(plan.bytes_before), _mib(plan.bytes_after), plan.reason
        )
    return table


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Run the demo of a source checkout. What follows goes to it: `svdq demo -- --help` lists its options."""
    script = Path(svdq.__file__).parents[1] / "examples" / "demo.py"
    if not script.is_file():
        raise SvdqError(
            "the demo and its model come with the source, not with the installed package: "
            'get a checkout of svdq-compile, run pip install -e ".[demo]" in it, then svdq demo again'
        )
    raise typer.Exit(_run_main(script, context.args) or 0)


def _run_main(script: Path, arguments: list[str]) -> int | None:
    """Call main(arguments) of a script, which may import its neighbours."""
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location("svdq_demo", script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)
