"""A region over attention heads as a Triton function for kernels/portable/heads.py, or several, for the parts that
kernels/portable/attention_codes.py makes q, k and v of.

A value that has D channels is two variables, its halves: the even and the odd channels, or the lower and the upper
ones if the region takes D apart in the middle. Half a value, one for each head, and a number are one variable. So
`even`, `odd` and `pair` only rename, and are free.

The functions' `sample`, `token` and `head` broadcast against [tokens, D / 2]. Their `extra` is, for each operand

    BTD, BT   pointer, strides of B and T    BTHD, BTH   pointer, strides of B, T and H    HD, D, 1   pointer

Where there are several, all of a part's operands follow those of the part before, and its x is the first of them, a
pointer and the strides of B, T and H.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.portable import heads as triton_heads
from .generate import expression, load, python_file
from .region import IN_THE_MIDDLE, Part, Region

if TYPE_CHECKING:
    from ..kernels.portable.attention_codes import GeneratedParts


def is_interleaved(*regions: Region) -> bool:
    """Whether the halves are even and odd channels."""
    return not any(step.operation in IN_THE_MIDDLE for region in regions for step in region.steps)


def bind(region: Region, values: dict[str, Tensor], block: torch.Size) -> triton_heads.GeneratedHeads:
    """The functions of a region, its operands laid out for a block [B, T, H, D]."""
    module = _module(region)
    return triton_heads.GeneratedHeads(module.load, module.fused, tuple(_operands(region, values, block)))


def bind_parts(regions: Sequence[Region], values: Sequence[dict[str, Tensor]]) -> "GeneratedParts":
    """The functions of several regions, and what they read. values: of each region all operands by name, x with a
    head's channels side by side.
    """
    from ..kernels.portable.attention_codes import GeneratedParts

    extra: list[Any] = []
    for region, named in zip(regions, values, strict=True):
        x = named["x"]
        extra += [x, *x.stride()[:3], *_operands(region, named, x.shape)]
    module = _module_of_parts(tuple(regions))
    return GeneratedParts(module.start, module.load, module.fused, tuple(extra), is_interleaved(*regions))


def bind_heads(heads: Sequence[Sequence[Part]]) -> "tuple[list[list[Tensor]], GeneratedParts]":
    """What makes q, k and so on, some parts each, not all of them empty -> the x of each, and `bind_parts` of all."""
    parts = [[_side_by_side(*part) for part in each if part[1]["x"].numel()] for each in heads]
    regions, values = zip(*(part for each in parts for part in each), strict=True)
    return [[named["x"] for _, named in each] for each in parts], bind_parts(regions, values)


def _side_by_side(region: Region, values: dict[str, Tensor]) -> Part:
    """A part, the channels of its heads one beside another."""
    x = values["x"]
    return region, values if x.stride(3) == 1 else values | {"x": x.contiguous()}


def _operands(region: Region, values: dict[str, Tensor], block: torch.Size) -> list[Any]:
    """All but x."""
    extra: list[Any] = []
    for name, axes in region.operands:
        if name == "x":
            continue
        value = values[name]
        if axes in _STRIDES:
            value = value.expand([n if axis in axes else 1 for axis, n in zip("BTHD", block, strict=True)])
            value = value if value.stride(3) == 1 or "D" not in axes else value.contiguous()
            # Of a dimension of 1 any stride would do, and Triton compiles in what divides it: T's would, of one sample.
            strides = [0 if size == 1 else n for size, n in zip(value.shape, value.stride(), strict=True)]
            extra += [value, *strides[: _STRIDES[axes]]]
        else:
            extra.append(value.reshape(-1).contiguous())
    return extra


# How many strides there are of operands that have some, those of B, T and H or of the first two.
_STRIDES = {"BT": 2, "BTH": 3, "BTD": 2, "BTHD": 3}


@cache
def _module(region: Region) -> Any:
    return load(source(region))


@cache
def _module_of_parts(regions: tuple[Region, ...]) -> Any:
    return load(source_of_parts(regions))


_LOAD, _FUSED = "sample, token, extra, D: tl.constexpr", "x_0, x_1, held, sample, token, head, extra, D: tl.constexpr"
_IMPORTS = f"from {triton_heads.__name__} import load_halves\n"


def source(region: Region) -> str:
    """The Python file of a region."""
    writer = _Writer(region, is_interleaved(region))
    return python_file([region], {f"load({_LOAD})": writer.loads, f"fused({_FUSED})": writer.lines}, _IMPORTS)


def source_of_parts(regions: Sequence[Region]) -> str:
    """The Python file of several, the functions of each and those that choose among them."""
    functions: dict[str, list[str]] = {}
    starts: list[str] = []
    at = 0
    for i, region in enumerate(regions):
        starts.append(f"extra[{at}] + (sample * extra[{at + 1}] + token * extra[{at + 2}]), extra[{at + 3}]")
        writer = _Writer(region, is_interleaved(*regions), at + 4)
        functions |= {f"load_{i}({_LOAD})": writer.loads, f"fused_{i}({_FUSED})": writer.lines}
        at = writer.end
    loads = [f"load_{i}(sample, token, extra, D)" for i in range(len(regions))]
    calls = [f"fused_{i}(x_0, x_1, held, sample, token, head, extra, D)" for i in range(len(regions))]
    functions |= {
        "start(part: tl.constexpr, sample, token, extra)": _choosing(starts),
        f"load(part: tl.constexpr, {_LOAD})": _choosing(loads),
        f"fused(part: tl.constexpr, {_FUSED})": _choosing(calls),
    }
    return python_file(regions, functions, _IMPORTS)


def _choosing(results: Sequence[str]) -> list[str]:
    """The lines that return the result of a part, of two or more."""
    cases = ["if part == 0:", *(f"elif part == {i}:" for i in range(1, len(results) - 1)), "else:"]
    return [line for case, result in zip(cases, results, strict=True) for line in (case, f"    return {result}")]


class _Writer:
    """The lines of a function, whose operands begin at extra[at] and end before extra[end]. variables: those that each
    value consists of.
    """

    def __init__(self, region: Region, interleaved: bool, at: int = 0) -> None:
        self.interleaved = interleaved
        self.loads: list[str] = []
        self.lines: list[str] = []
        self.variables: dict[str, tuple[str, ...]] = {"x": ("x_0", "x_1")}
        self.end = self._load([operand for operand in region.operands if operand[0] != "x"], at)
        for step in region.steps:
            self._step(step.name, step.operation, step.arguments)
        self.lines.append(f"return {', '.join(self.variables[region.result])}")

    def _load(self, operands: list[tuple[str, str]], at: int) -> int:
        held: list[str] = []
        for name, axes in operands:
            where, strides = f"extra[{at}]", _STRIDES.get(axes, 0)
            if strides:
                where += f" + (sample * extra[{at + 1}] + token * extra[{at + 2}])"
            elif "D" in axes:
                where += " + token * 0"
            if "H" in axes:
                where += f" + head * {f'extra[{at + 3}]' if strides else 'D'}"
            at += 1 + strides
            if "D" in axes:
                self.variables[name] = (f"{name}_0", f"{name}_1")
                value = f"load_halves({where}, D, {self.interleaved})"
            else:
                self.variables[name] = (name,)
                value = f"tl.load({where}).to(tl.float32)"
            line = f"{', '.join(self.variables[name])} = {value}"
            if "H" in axes or axes == "1":
                self.lines.append(line)
            else:
                held += self.variables[name]
                self.loads.append(line)
        self.loads.append(f"return ({''.join(f'{name}, ' for name in held)})")
        if held:
            self.lines.insert(0, f"({''.join(f'{name}, ' for name in held)}) = held")
        return at

    def _let(self, name: str, expression: str) -> None:
        self.variables[name] = (name,)
        self.lines.append(f"{name} = {expression}")

    def _step(self, name: str, operation: str, arguments: tuple) -> None:
        read = [self.variables[a] if isinstance(a, str) else (repr(float(a)),) for a in arguments]
        if operation == "row_mean":
            self._let(name, f"tl.sum({' + '.join(read[0])}, 1, keep_dims=True) * (1.0 / D)")
        elif operation in ("even", "low"):
            self.variables[name] = read[0][:1]
        elif operation in ("odd", "high"):
            self.variables[name] = read[0][1:]
        elif operation in ("pair", "halves"):
            self.variables[name] = (*read[0], *read[1])
        elif all(len(p) == 1 for p in read):
            self._let(name, expression(operation, [p[0] for p in read]))
        else:
            self.variables[name] = (f"{name}_0", f"{name}_1")
            for i, half in enumerate(self.variables[name]):
                self.lines.append(f"{half} = {expression(operation, [p[i % len(p)] for p in read])}")
