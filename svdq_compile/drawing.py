"""Drawing with a diffusers pipeline: one prompt from one seed, and the latents after each step where it shows them."""

import difflib
import inspect
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .errors import FileRefused, NonFinitePicture, NotAModel, OptionError
from .reading import opened
from .replacing import replacing

# What of a pipeline's arguments is not the caller's to give.
_OURS = ("prompt", "generator", "seed", "output_type", "return_dict", "callback_on_step_end")


@dataclass(frozen=True)
class Drawing:
    """What one prompt and one seed gave.

    frames     [F, H, W, 3] uint8  the picture, or the pictures; of a video the first and the middle one
    latents    [S, ...]            after each step; S is 0 where the pipeline does not show them
    timesteps  [S]
    seconds    that it took
    """

    frames: Tensor
    latents: Tensor
    timesteps: tuple[float, ...]
    seconds: float

    @property
    def pixels(self) -> Tensor:
        """[F, 3, H, W] in 0..1."""
        return self.frames.movedim(-1, 1).float() / 255

    def save(self, path: Path) -> None:
        with replacing(path) as temporary:
            told = {"timesteps": json.dumps(self.timesteps), "seconds": json.dumps(self.seconds)}
            save_file({"frames": self.frames, "latents": self.latents}, temporary, told)

    @staticmethod
    def load(path: Path) -> "Drawing | None":
        """None where it was not drawn, or not written whole."""
        try:
            with opened(path) as file:
                timesteps = tuple(json.loads(file.metadata["timesteps"]))
                return Drawing(file.get("frames"), file.get("latents"), timesteps, json.loads(file.metadata["seconds"]))
        except (FileNotFoundError, FileRefused, KeyError, ValueError):
            return None


class Drawer:
    """A pipeline that draws one prompt at a time.

    pipe     anything that is called as diffusers' pipelines are
    options  further arguments of each call, as in {"num_inference_steps": 28}

    Raises NotAModel for what cannot be called, OptionError for arguments that it does not take.
    """

    def __init__(self, pipe: Any, options: Mapping[str, Any]) -> None:
        if not isinstance(options, Mapping):
            raise OptionError(f"call={options!r:.60}: must be a dict of arguments, as in {{'num_inference_steps': 28}}")
        self._pipe, self.options = pipe, dict(options)
        self._kind = type(pipe).__name__
        if not callable(pipe):
            raise NotAModel(f"{self._kind} is no pipeline: it cannot be called")
        taken = inspect.signature(pipe).parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        self._taken = list(taken)
        if not self._takes("prompt"):
            raise OptionError(f"{self._kind} takes no prompt, but {', '.join(self._taken)}: it cannot be evaluated")
        for name in options:
            if name in _OURS:
                raise OptionError(f"call: {name} is not to be given: each picture has its own")
            if not self._takes(name):
                near = difflib.get_close_matches(name, self._taken, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(self._taken)}"
                raise OptionError(f"call: {self._kind} takes no argument {name!r}: {hint}")

    def _takes(self, name: str) -> bool:
        return self._takes_all or name in self._taken

    def draw(self, prompt: str, seed: int, bits: int) -> Drawing:
        """bits: of the model, for what is said. Raises NonFinitePicture, and OptionError for a pipeline that gives no
        pictures.
        """
        latents: list[Tensor] = []
        timesteps: list[float] = []

        def after_step(_: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if isinstance(given.get("latents"), Tensor):
                latents.append(given["latents"].detach().cpu())
                timesteps.append(float(timestep))
            return given

        own = {"generator": torch.Generator().manual_seed(seed), "output_type": "np"}
        own |= {"callback_on_step_end": after_step}
        own |= {"seed": seed} if "generator" not in self._taken else {}
        named = {name: value for name, value in own.items() if name in self._taken}
        start = time.perf_counter()
        with nullcontext() if "generator" in named else _seeded(seed), torch.no_grad():
            result = self._pipe(prompt=prompt, **self.options, **named)
        frames = _frames(result, self._kind)
        seconds = time.perf_counter() - start
        are_alike = len({one.shape for one in latents}) == 1
        steps = torch.stack(latents) if are_alike else torch.empty(0)
        if not bool(np.isfinite(frames).all()) or not bool(steps.isfinite().all()):
            raise NonFinitePicture(prompt, seed, bits)
        bytes_ = torch.from_numpy(np.round(frames.clip(0, 1) * 255).astype(np.uint8, order="C"))
        return Drawing(bytes_, steps, tuple(timesteps[: len(steps)]), seconds)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Of a pipeline that takes no generator, torch's own are seeded, and put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _frames(result: Any, kind: str) -> np.ndarray:
    """[F, H, W, 3] in 0..1, of whatever a pipeline returns."""
    videos = getattr(result, "frames", None)
    try:
        images = videos[0] if videos is not None else getattr(result, "images", None)
        frames = np.stack([_picture(image) for image in (result[0] if images is None else images)])
    except (TypeError, ValueError, LookupError) as error:
        raise OptionError(f"{kind} gives no pictures that could be compared, but {result!r:.60} ({error})") from error
    return frames[sorted({0, len(frames) // 2})] if videos is not None else frames


def _picture(image: Any) -> np.ndarray:
    """[H, W, 3] of an image of PIL, or of an array or tensor of one, three or four channels."""
    if hasattr(image, "convert"):
        return np.asarray(image.convert("RGB"), np.float32) / 255
    array = np.asarray(image.detach().float().cpu() if isinstance(image, Tensor) else image, np.float32)
    if isinstance(image, Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"an array of {array.shape}")
    return np.repeat(array, 3, 2) if array.shape[2] == 1 else array[..., :3]
