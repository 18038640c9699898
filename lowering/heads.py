"""svdq::head_region: what makes q or k out of a linear's result, in one kernel or in torch.

    y = head_region([x, cos, sin], "heads(x, a0: BTD, a1: BTD); ...")      [B, T, H, D] -> [B, T, H, D]

The text may have several parts; then the list holds the operands of all, and the results stand one after the other
along T, as text and image tokens do in joint attention. The result is contiguous, or lies as [B, H, T, D] in memory.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from torch import Tensor

from . import launch
from .kernel_table import NoKernel
from .region import PARTS, Part, Region, parse


def parts(text: str) -> list[Region]:
    """The regions in a text."""
    return [parse(part) for part in text.split(PARTS)]


def with_values(operands: Sequence[Tensor], text: str) -> list[Part]:
    """The regions in a text, each with its own of the operands."""
    waiting = iter(operands)
    return [(part, part.named(islice(waiting, len(part.operands)))) for part in parts(text)]


def head_region(operands: list[Tensor], region: str, heads_first: bool = False) -> Tensor:
    """Run all parts of the text."""
    return run(with_values(operands, region), heads_first)


def run(made_of: Sequence[Part], heads_first: bool = False) -> Tensor:
    """Run all parts."""
    y = _empty(made_of, heads_first)
    start = 0
    for part, values in made_of:
        tokens = values["x"].shape[1]
        _run(part, values, y.narrow(1, start, tokens))
        start += tokens
    return y


def empty_result(operands: list[Tensor], region: str, heads_first: bool = False) -> Tensor:
    """A tensor for the result; also the operator's shape function."""
    return _empty(with_values(operands, region), heads_first)


def _empty(made_of: Sequence[Part], heads_first: bool) -> Tensor:
    blocks = [values["x"] for _, values in made_of]
    samples, _, heads, channels = blocks[0].shape
    tokens = sum(x.shape[1] for x in blocks)
    if heads_first:
        return blocks[0].new_empty(samples, heads, tokens, channels).transpose(1, 2)
    return blocks[0].new_empty(samples, tokens, heads, channels)


def _run(part: Region, values: dict[str, Tensor], y: Tensor) -> None:
    x = values["x"]
    if launch.takes_heads(x):
        from . import generate_heads

        functions = generate_heads.bind(part, values, x.shape)
        with suppress(NoKernel):
            launch.heads(x, y, functions, generate_heads.is_interleaved(part))
            return
    y.copy_(part.evaluate(values))
