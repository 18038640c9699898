"""How much the demo draws, so that it takes less than five minutes on a slow machine too.

A denoising step of one picture in 16-bit is timed first, and the largest of SIZES that fits is taken. Without AVX-512 a
CPU multiplies 16-bit numbers some ten times more slowly, and everything at once would take a quarter of an hour.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LIMIT = 270.0  # seconds; the rest of five minutes is for what the estimate does not know
METHODS, MIXTURES, LORA_PROMPTS = 4, 3, 3  # methods in all; mixtures of adapters, and the pictures for each
# Seconds to quantize and compile a method, and to compile the graphs with adapters, on 2 cores.
PREPARING, COMPILING_ADAPTERS = 20.0, 40.0


@dataclass(frozen=True)
class Size:
    """How many pictures, denoising steps, prompts and steps to calibrate on, and whether adapters are shown."""

    prompts: int
    steps: int
    calibration_prompts: int = 4
    calibration_steps: int = 8
    lora: bool = True

    @property
    def picture_steps(self) -> int:
        """Denoising steps of single pictures in the whole demo; a method draws one step more, while it compiles."""
        methods = METHODS * self.prompts * (self.steps + 1)
        calibration = (METHODS - 1) * self.calibration_prompts * self.calibration_steps
        return methods + calibration + self.lora * 2 * MIXTURES * min(self.prompts, LORA_PROMPTS) * self.steps

    def seconds(self, pace: float) -> float:
        """What it takes at `pace` seconds for a step of one picture; 4-bit is taken to be as fast as 16-bit."""
        compiling = (METHODS - 1) * PREPARING + self.lora * COMPILING_ADAPTERS
        return compiling + pace * self.picture_steps

    def without(self, full: "Size") -> str:
        """What a demo of this size leaves out of the full one, as the end of a sentence; "" for nothing."""
        parts = [
            f"{full.prompts - self.prompts} of {full.prompts} pictures" * (self.prompts < full.prompts),
            f"{full.steps - self.steps} of {full.steps} denoising steps" * (self.steps < full.steps),
            "three quarters of the calibration" * (self.calibration_steps < full.calibration_steps),
            "the LoRA adapters" * (full.lora and not self.lora),
        ]
        said = [part for part in parts if part]
        return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


FULL = Size(8, 12)
SIZES = (
    FULL,
    Size(8, 12, lora=False),
    Size(6, 10, 2, 4, False),
    Size(4, 8, 2, 4, False),
    Size(3, 8, 2, 4, False),
    Size(2, 6, 2, 4, False),
)


def largest_within(limit: float, pace: float, sizes: Sequence[Size] = SIZES) -> Size:
    """The first that takes no longer than `limit` seconds at this pace, or the last."""
    return next((size for size in sizes if size.seconds(pace) <= limit), sizes[-1])
