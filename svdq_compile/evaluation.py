"""The numbers of an evaluation: how far a model's 4-bit pictures are from its 16-bit ones, and where from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .drawing import Drawing
from .kernels.formats import FORMATS
from .report import report
from .similarity import interval, psnr, relative_error, ssim


@dataclass(frozen=True)
class Mean:
    """Of several pictures; ci95: half the 95 % confidence interval, None of a single one."""

    mean: float
    ci95: float | None

    @staticmethod
    def of(values: Sequence[float]) -> "Mean":
        tensor = torch.tensor(values, dtype=torch.float64)
        return Mean(round(float(tensor.mean()), 5), round(interval(tensor), 5) if len(values) > 1 else None)


@dataclass(frozen=True)
class Picture:
    """One picture in 4 bits, against the one in 16.

    psnr_db, ssim  of a video's two frames the mean
    step_errors    relative, of the latents after each step; none where the pipeline does not show them
    seconds        in 16 bits, in 4
    """

    prompt: str
    seed: int
    psnr_db: float
    ssim: float
    step_errors: tuple[float, ...]
    seconds: tuple[float, float]

    @staticmethod
    def of(prompt: str, seed: int, truth: Drawing, drawn: Drawing) -> "Picture":
        pairs = zip(drawn.latents, truth.latents, strict=False)
        return Picture(
            prompt,
            seed,
            round(float(psnr(drawn.pixels, truth.pixels).mean()), 3),
            round(float(ssim(drawn.pixels, truth.pixels).mean()), 5),
            tuple(round(relative_error(a, b), 6) for a, b in pairs),
            (round(truth.seconds, 3), round(drawn.seconds, 3)),
        )


@dataclass(frozen=True)
class StepError:
    """After a step of the pipeline, or of the model's calls for a timestep."""

    timestep: float | None
    error: Mean


@dataclass(frozen=True)
class LayerError:
    """error: of its output, on inputs of the first pictures."""

    layer: str
    precision: str
    rank: int
    error: float


@dataclass(frozen=True)
class Evaluation:
    """All that the page shows but the pictures themselves.

    model                  its class
    facts                  where, how and with what it was made, in sentences
    bytes_16bit            of the whole model; bytes_4bit: likewise
    seconds_16bit          the median for a picture; seconds_4bit: likewise
    psnr_db, ssim          over all pictures
    steps                  relative error of the latents after each step, from the same noise
    timesteps              relative error of the model's output, given the same input
    layers                 the quantized linears, the worst first
    """

    model: str
    facts: tuple[str, ...]
    bytes_16bit: int
    bytes_4bit: int
    seconds_16bit: float
    seconds_4bit: float
    psnr_db: Mean
    ssim: Mean
    pictures: tuple[Picture, ...]
    steps: tuple[StepError, ...]
    timesteps: tuple[StepError, ...]
    layers: tuple[LayerError, ...]

    @staticmethod
    def of(
        model: nn.Module,
        facts: Iterable[str],
        nbytes: tuple[int, int],
        pictures: Sequence[Picture],
        timesteps: Sequence[float],
        calls: Iterable[tuple[float | None, float]],
        layers: Mapping[str, float],
    ) -> "Evaluation":
        """timesteps: of the latents; calls: the timestep and error of each; layers: errors by name."""
        seconds = torch.tensor([picture.seconds for picture in pictures]).median(0).values.tolist()
        rows = {row.name: row for row in report(model) if row.precision in FORMATS}
        found = [LayerError(n, rows[n].precision, rows[n].rank, round(e, 6)) for n, e in layers.items() if n in rows]
        by_step = zip(*(picture.step_errors for picture in pictures), strict=False)
        by_timestep: dict[float | None, list[float]] = {}
        for timestep, error in calls:
            by_timestep.setdefault(timestep, []).append(error)
        return Evaluation(
            model=type(model).__name__,
            facts=tuple(facts),
            bytes_16bit=nbytes[0],
            bytes_4bit=nbytes[1],
            seconds_16bit=round(seconds[0], 3),
            seconds_4bit=round(seconds[1], 3),
            psnr_db=Mean.of([picture.psnr_db for picture in pictures]),
            ssim=Mean.of([picture.ssim for picture in pictures]),
            pictures=tuple(pictures),
            steps=tuple(StepError(t, Mean.of(own)) for t, own in zip(timesteps, by_step, strict=False)),
            timesteps=tuple(StepError(t, Mean.of(own)) for t, own in by_timestep.items()),
            layers=tuple(sorted(found, key=lambda layer: -layer.error)),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.model}: PSNR {with_interval(self.psnr_db, 1)} dB, SSIM {with_interval(self.ssim, 3)} over "
            f"{len(self.pictures)} pictures, {self.bytes_16bit / 2**20:.1f} -> {self.bytes_4bit / 2**20:.1f} MiB, "
            f"{self.seconds_16bit:.2f} -> {self.seconds_4bit:.2f} s a picture"
        )


def with_interval(value: Mean, digits: int) -> str:
    return f"{value.mean:.{digits}f}" + ("" if value.ci95 is None else f" ± {value.ci95:.{digits}f}")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, counting a quantized one as what it takes now."""
    linears = report(model)
    return sum(p.numel() * p.element_size() for p in model.parameters()) - linears.bytes_before + linears.bytes_after
