"""The options, in one frozen dataclass; validating them happens here and nowhere else."""

import difflib
import numbers
import operator
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import OptionError
from .kernels.formats import FORMATS
from .passes import FUSING

PRECISIONS = ("auto", *FORMATS)
WEIGHTS = ("release", "offload", "keep")
ATTENTIONS = ("exact", "fp8", "int8")
MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FUSIONS = tuple(FUSING)
MAX_RANK = 256
PAPER = {"w4a4": "int4"}  # what the paper calls a precision
ELSEWHERE = {"int8": "w8a8"}  # what is nearer in meaning than in spelling
TORCH_ARGUMENTS = ("dynamic", "fullgraph")  # of torch.compile, no options
# Of bytes in text, in small letters.
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
WORLD, ALONE = "world", "alone"
OF_QUANTIZE = ("calibrate", "example_inputs", "statistics", "device")


@dataclass(frozen=True)
class Config:
    """How to quantize a model.

    precision          a name in kernels.formats.FORMATS, as "w4a8" (4-bit weights, int8 activations) or "int4" (W4A4),
                       or "auto": what the device runs fastest. A linear with few rows (one a sample, as in adaptive
                       norms) is always w4a16, but for a target: it waits for weight bytes, so rounding its input would
                       gain nothing. The paper's name "w4a4" is taken for "int4".
    rank               rank of the 16-bit branch of each linear, 0 to 256; 0 leaves the branch out
    smooth             move outliers of the input channels into the weights before rounding
    rotate             of int4 rotate an input's channels in blocks of 64 before rounding, where that loses less on the
                       observed rows; always if these are fewer than 64, or none. Nunchaku's kernels do not
    refine             rounds of refitting the branch to what rounding the rest has lost; of observed inputs the
                       last two correct each channel's error by the next ones (GPTQ). 0 rounds once, to nearest
    calibration_steps  calls of the model that run in exact 16-bit while inputs are observed; 0 quantizes at once, from
                       the weights alone
    error_budget       a layer whose own relative output error (or, without calibration, weight error) is larger than
                       this stays 16-bit
    target_bytes       what all linears may take together (`report`'s sum, with those that stay 16-bit): a number, or
                       text as "6.8 GiB". Each layer gets the format and the rank that keep the model's output nearest;
                       `rank` counts for nothing then, and `precision` is the 4-bit format of linears with many rows.
                       Only in `quantize` with calibrate
    target_error       instead: how far the model's output may be off, relative, as 0.02; the least bytes for it
    skip               layers to leave in 16-bit: their full names in the model, as `report` has them, or those of
                       modules that hold them, with * and ?: ("*.proj_out", "transformer_blocks.0")
    convolutions       keep in 4 bits the convolutions outside the repeated blocks too, larger than 1x1, as most of a
                       UNet's weights are; they are computed in 16 bits. Where blocks alone are compiled nothing comes
                       of it: compile the model whole, as svdq_compile.compile does then
    weights            what becomes of the 16-bit weights: "release" gives their memory back, "offload" keeps a copy in
                       CPU memory, "keep" leaves them in place
    fuse               compute what surrounds a linear elementwise (norms, activations, gates, residuals) in its
                       kernels, and linears of one input into one product, send q, k and v to other GPUs by one
                       exchange, run attention by the kernel that measures fastest, and make one operator, and on a GPU
                       one CUDA graph, of what follows one another: True, False, or a list of what to do ("epilogues",
                       "gates", "siblings", "heads", "rows", "prologues", "joins", "exchanges", "attention",
                       "sequences")
    attention          "exact"; or "fp8": q, k and v may be rounded to 8 bits where that is faster, which needs an sm_90
                       GPU and the package fa3-fwd; or "int8": q and k may, on any GPU that has kernels. An attention's
                       result is off by 5 % and by 2 % then, for random values; what has a mask stays exact
    mode               Inductor's mode, as in torch.compile(mode=...)
    progress           show a progress bar while quantizing, and say in one line what was done and what comes next
    fallback           where a layer cannot be quantized or a graph not be compiled, which would be a fault of this
                       package's or its surroundings', warn and go on: the layer in 16-bit, the graph eagerly. False:
                       raise. Mistakes and want of memory are raised in any case.
    group              the processes of torch.distributed that hold the same model, and quantize it together: "world",
                       all of them where it is initialized; a process group, a device mesh, or the ranks as a list;
                       "alone", this process only
    """

    precision: str = "auto"
    rank: int = 32
    smooth: bool = True
    rotate: bool = True
    refine: int = 10
    calibration_steps: int = 8
    error_budget: float = 0.3
    target_bytes: int | str | None = None
    target_error: float | None = None
    skip: tuple[str, ...] = ()
    convolutions: bool = False
    weights: str = "release"
    fuse: bool | tuple[str, ...] = True
    attention: str = "exact"
    mode: str | None = None
    progress: bool = True
    fallback: bool = True
    group: str | tuple[int, ...] = WORLD

    def __new__(cls, *args: Any, **options: Any) -> "Config":
        """Raises OptionError for an option that there is not, naming the nearest."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise OptionError(f"unknown option {name!r}: {_instead_of(str(name), known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", PAPER.get(str(self.precision).lower(), self.precision))
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("attention", self.attention, ATTENTIONS)
        _one_of("mode", self.mode, MODES)
        for name, most in (("rank", MAX_RANK), ("refine", 1000), ("calibration_steps", 1_000_000)):
            object.__setattr__(self, name, _whole(name, getattr(self, name), most))
        for name in ("smooth", "rotate", "convolutions", "progress", "fallback"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"option {name}={getattr(self, name)!r}: must be True or False")
        object.__setattr__(self, "error_budget", _share("error_budget", self.error_budget))
        if self.target_error is not None:
            object.__setattr__(self, "target_error", _share("target_error", self.target_error))
        if self.target_bytes is not None:
            object.__setattr__(self, "target_bytes", _bytes("target_bytes", self.target_bytes))
        if self.has_target and None not in (self.target_bytes, self.target_error):
            raise OptionError("options target_bytes and target_error: give one of them, the other one follows from it")
        if isinstance(self.skip, str):
            raise OptionError(f"option skip={self.skip!r}: must be a list, as in skip=[{self.skip!r}]")
        patterns = _iterable(self.skip)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise OptionError(
                f"option skip={self.skip!r:.60}: must be a list of layer-name patterns, as in skip=['*.proj_out']"
            )
        object.__setattr__(self, "skip", tuple(patterns))
        if not isinstance(self.fuse, bool):
            if isinstance(self.fuse, str):
                raise OptionError(f"option fuse={self.fuse!r}: must be True, False or a list of {', '.join(FUSIONS)}")
            fusions = _iterable(self.fuse)
            for fusion in fusions:
                _one_of("fuse", fusion, FUSIONS)
            object.__setattr__(self, "fuse", tuple(fusions))
        object.__setattr__(self, "group", _ranks(self.group))
        if self.attention != "exact" and "attention" not in self.fusions:
            raise OptionError(f"option attention={self.attention!r} needs 'attention' among fuse={self.fuse!r}")

    @property
    def has_target(self) -> bool:
        """Whether formats and ranks are chosen for each layer."""
        return self.target_bytes is not None or self.target_error is not None

    def refuse_target(self, why: str) -> None:
        """Raises OptionError for a target where none can be met, which `why` tells."""
        if self.has_target:
            name = "target_bytes" if self.target_error is None else "target_error"
            raise OptionError(
                f"option {name}={getattr(self, name)!r} {why}; the place for it is "
                f"svdq_compile.quantize(model, calibrate=lambda model: pipe('a dog'), {name}=...)"
            )

    @property
    def fusions(self) -> tuple[str, ...]:
        """The names of what to fuse."""
        return self.fuse if isinstance(self.fuse, tuple) else FUSIONS if self.fuse else ()

    @classmethod
    def of(cls, config: "Config | Mapping[str, Any] | None", options: Mapping[str, Any] | None = None) -> "Config":
        """From what a function was given: a Config or a dict, and options by name, which count more."""
        options = options or {}
        if config is None:
            return cls(**options)
        if isinstance(config, Config):
            return cls(**{**config.to_dict(), **options})
        if not isinstance(config, Mapping):
            raise OptionError(
                f"{config!r:.60} are no options: give them by name, as in precision='int4', rank=64; or a dict of them"
            )
        return cls(**{str(name): value for name, value in {**config, **options}.items()})

    @classmethod
    def from_options(cls, options: "Mapping[str, Any] | Config | None", mode: str | None = None) -> "Config":
        """From the `options=` and `mode=` of torch.compile."""
        config = cls.of(options)
        if mode is None:
            return config
        if config.mode not in (None, mode):
            raise OptionError(f"mode={mode!r} contradicts options['mode']={config.mode!r}: give one of them")
        return replace(config, mode=mode)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a file stores them."""
        return asdict(self)


def _instead_of(name: str, known: list[str]) -> str:
    if name == "backend":
        return "svdq_compile.compile takes no other backend than its own"
    if name in OF_QUANTIZE:
        return f"it is an argument of quantize, as in svdq_compile.quantize(model, {name}=...)"
    if name in TORCH_ARGUMENTS:
        return f"it is an argument of torch.compile, as in model.compile(backend='svdquant', {name}=...)"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}."


def _one_of(name: str, value: object, known: tuple) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value).lower(), [str(k) for k in known], n=1)
        near = [ELSEWHERE[str(value)]] if str(value) in ELSEWHERE else near
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"option {name}={value!r:.60}: {hint}it can be {', '.join(map(repr, known))}")


def _whole(name: str, value: Any, most: int) -> int:
    """As Python's own, NumPy's too."""
    number = -1
    if not isinstance(value, bool):
        with suppress(TypeError):
            number = operator.index(value)
    if not 0 <= number <= most:
        raise OptionError(f"option {name}={value!r}: must be a whole number from 0 to {most}")
    return number


def _share(name: str, value: float) -> float:
    """A relative error, as Python's own number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= 1:
        raise OptionError(
            f"option {name}={value!r:.60}: must be a number above 0 and at most 1, as 0.3 for an error of 30 %"
        )
    return float(value)


def _bytes(name: str, value: Any) -> int:
    """A number of bytes, or text: the same, or with a unit."""
    number = -1
    if isinstance(value, str):
        text = re.fullmatch(r"\s*(\d+|\d+\.\d*(?=\s*[a-z]))\s*([a-z]*)\s*", value, re.ASCII | re.IGNORECASE)
        if text is not None:
            with suppress(OverflowError):
                number = int(float(text[1]) * UNITS.get(text[2].lower(), -1))
    elif not isinstance(value, bool):
        with suppress(TypeError):
            number = operator.index(value)
    if not 0 < number < 2**63:
        raise OptionError(
            f"option {name}={value!r:.60}: must be a whole number of bytes above 0, or text with a unit of "
            "kB, MB, GB, KiB, MiB, GiB, as '6.8 GiB'"
        )
    return number


def _ranks(group: Any) -> str | tuple[int, ...]:
    """The ranks of a process group or a mesh, plain numbers that options can be stored and compared with."""
    if isinstance(group, str):
        _one_of("group", group, (WORLD, ALONE))
        return group
    with suppress(ImportError):  # a torch without torch.distributed
        from torch.distributed import ProcessGroup, get_process_group_ranks
        from torch.distributed.device_mesh import DeviceMesh

        group = get_process_group_ranks(group) if isinstance(group, ProcessGroup) else group
        group = group.mesh.flatten().tolist() if isinstance(group, DeviceMesh) else group
    with suppress(TypeError):
        ranks = sorted({_whole("group", rank, 2**31) for rank in group})
        if ranks:
            return tuple(ranks)
    raise OptionError(
        f"option group={group!r:.60}: can be {WORLD!r}, {ALONE!r}, a process group or a device mesh of "
        "torch.distributed that this process belongs to, or a list of ranks"
    )


def _iterable(value: object) -> list:
    try:
        return list(value)  # type: ignore[call-overload]
    except TypeError:
        return [None]
