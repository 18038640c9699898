"""What an entry of the zoo is, the sizes it is called with, and how its weights are drawn."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 128
HEADS = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}


@dataclass(frozen=True)
class Size:
    """How much a model is given.

    rows, columns  tokens of an image; where a model has patches of 2, each is twice as much in pixels
    frames         of a video
    text           tokens of the prompt
    """

    batch: int
    rows: int
    columns: int
    frames: int
    text: int


ONE = Size(batch=1, rows=8, columns=6, frames=3, text=24)
THREE = Size(batch=3, rows=8, columns=8, frames=5, text=20)


class Draw:
    """Random inputs of one size. Each has its own generator, so an entry's inputs are the same at every call."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        self.batch, self.rows, self.columns, self.frames, self.text = (
            size.batch,
            size.rows,
            size.columns,
            size.frames,
            size.text,
        )
        self.tokens = size.rows * size.columns
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers of the model's dtype."""
        return torch.randn(*shape, generator=self._generator).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to high - 1."""
        return torch.randint(0, high, shape, generator=self._generator)

    def prompt(self, width: int = WIDTH) -> Tensor:
        """A text encoder's output: [batch, text, width]."""
        return self(self.batch, self.text, width)

    def mask(self) -> Tensor:
        """Which text tokens are real, a prefix of another length in each row: [batch, text] bool."""
        lengths = torch.tensor((17, 5, self.text)[: self.batch])
        return torch.arange(self.text) < lengths[:, None]

    def half(self) -> Tensor:
        """The middle of the noise schedule where a model counts from 0 to 1: [batch]."""
        return torch.full((self.batch,), 0.5, dtype=self.dtype)

    def image(self, channels: int, patch: int = 2) -> Tensor:
        """Latents of an image, [batch, channels, rows * patch, columns * patch]."""
        return self(self.batch, channels, patch * self.rows, patch * self.columns)

    def video(self, channels: int) -> Tensor:
        """Latents of a video, [batch, channels, frames, rows, columns]."""
        return self(self.batch, channels, self.frames, self.rows, self.columns)


def common(latents: Tensor, draw: Draw) -> dict[str, Any]:
    """What most transformers take. Timestep 500 is exact in bfloat16."""
    return {
        "hidden_states": latents,
        "encoder_hidden_states": draw.prompt(),
        "timestep": torch.full((draw.batch,), 500),
        "return_dict": False,
    }


def grid(*sizes: int) -> Tensor:
    """Positions of a row-major grid: [prod(sizes), len(sizes)] float32."""
    return torch.cartesian_prod(*(torch.arange(size, dtype=torch.float32) for size in sizes))


Inputs = Callable[[Draw], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One model in a small configuration.

    name    short, for ids and command lines
    title   of its class, for tables
    build   makes the model; keyword arguments change its configuration
    inputs  the keyword arguments of a call
    batch   of the call that `make` prepares: 1 where guidance is distilled into the model, 2 where it doubles the batch
    tolerance  times the error of the output that most models stay below (`check.py`)
    note    what is particular about it, for tables
    read_again  whether eager code reads layers of the blocks once more after the blocks have run: by blocks they are in
                4 bits by then, in the observed call too
    float32_on_cpu  whether a CPU has no 16-bit code for it, or takes ten times as long (convolutions)
    """

    name: str
    title: str
    build: Callable[..., nn.Module]
    inputs: Inputs
    batch: int = 2
    tolerance: float = 1.0
    note: str = ""
    float32_on_cpu: bool = False
    read_again: bool = False

    @property
    def regional(self) -> bool:
        """Whether its class names the blocks that `compile_repeated_blocks` compiles."""
        return bool(getattr(class_of(self.title), "_repeated_blocks", None))


def class_of(title: str) -> type | None:
    """The class of diffusers of this name, None if it has none."""
    import diffusers

    return getattr(diffusers, title, None)


def entry(
    name: str,
    title: str,
    inputs: Inputs,
    batch: int = 2,
    tolerance: float = 1.0,
    note: str = "",
    float32_on_cpu: bool = False,
    read_again: bool = False,
    **config: Any,
) -> Entry:
    """An entry for a class of diffusers, which is imported when it is built."""
    return Entry(
        name, title, partial(_build, title, **config), inputs, batch, tolerance, note, float32_on_cpu, read_again
    )


def _build(title: str, **config: Any) -> nn.Module:
    model_class = class_of(title)
    assert model_class is not None, f"this diffusers has no {title}"
    return model_class(**config)


def make(
    entry: Entry,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sizes: Iterable[Size] | None = None,
    **config: Any,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model, and its inputs in each size; `config` changes its configuration. Weights are drawn in float32 under
    `seed`, then cast; the global RNG does not move.
    """
    sizes = [replace(ONE, batch=entry.batch)] if sizes is None else sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = entry.build(**config).eval().requires_grad_(False)
        _own_memory(model)
        _draw_weights(model)
    _cast(model, dtype)
    return model, [entry.inputs(Draw(size, dtype)) for size in sizes]


def _own_memory(model: nn.Module) -> None:
    """Buffers that are views become copies: cast, one would keep a base of another dtype, which Dynamo cannot take."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer._base is not None:
                module._buffers[name] = buffer.clone()


def _draw_weights(model: nn.Module) -> None:
    """Redraw what would hide mistakes: linears that shrink their input, parameters that are zero or one throughout.

    nn.Linear's own draw has a third of this variance, and gates multiply the loss. Dropping the median block linear
    then moved the output by only 0.004% (auraflow) to 3%; with this draw it is 0.9% to 22%.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast as `from_pretrained(torch_dtype=dtype)` does: what the class keeps in float32 stays so (Wan's norms)."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.to(dtype)
