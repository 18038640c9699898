"""A region over attention heads as a Triton function for kernels/portable/heads.py.

A value that has D channels is two variables, its halves: the even and the odd channels, or the lower and the upper
ones if the region takes D apart in the middle. Half a value, one for each head, and a number are one variable. So
`even`, `odd` and `pair` only rename, and are free.

The functions' `sample`, `token` and `head` broadcast against [tokens, D / 2]. Their `extra` is, for each operand

    BTD   pointer, strides of B and T        BTH   pointer, strides of B, T and H        D, 1   pointer
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.portable import heads as triton_heads
from .generate import expression, load, python_file
from .region import IN_THE_MIDDLE, Region


def is_interleaved(region: Region) -> bool:
    """Whether the halves are even and odd channels."""
    return not any(step.operation in IN_THE_MIDDLE for step in region.steps)


def bind(region: Region, values: dict[str, Tensor], block: torch.Size) -> triton_heads.GeneratedHeads:
    """The functions of a region, its operands laid out for a block [B, T, H, D]."""
    extra: list[Any] = []
    for name, axes in region.operands:
        if name == "x":
            continue
        value = values[name]
        if axes == "BTD":
            value = value.expand(*block[:2], 1, block[3])
            value = value if value.stride(3) == 1 else value.contiguous()
            extra += [value, *value.stride()[:2]]
        elif axes == "BTH":
            value = value.expand(*block[:3], 1)
            extra += [value, *value.stride()[:3]]
        else:
            extra.append(value.reshape(block[3] if axes == "D" else 1).contiguous())
    module = _module(region)
    return triton_heads.GeneratedHeads(module.load, module.fused, tuple(extra))


@cache
def _module(region: Region) -> Any:
    return load(source(region))


def source(region: Region) -> str:
    """The Python file of a region."""
    writer = _Writer(region)
    functions = {
        "load(sample, token, extra, D: tl.constexpr)": writer.loads,
        "fused(x_0, x_1, held, sample, token, head, extra, D: tl.constexpr)": writer.lines,
    }
    return python_file(region, functions, f"from {triton_heads.__name__} import load_halves\n")


class _Writer:
    """The lines of a function. variables: those that each value consists of."""

    def __init__(self, region: Region) -> None:
        self.interleaved = is_interleaved(region)
        self.loads: list[str] = []
        self.lines: list[str] = []
        self.variables: dict[str, tuple[str, ...]] = {"x": ("x_0", "x_1")}
        self._load([operand for operand in region.operands if operand[0] != "x"])
        for step in region.steps:
            self._step(step.name, step.operation, step.arguments)
        self.lines.append(f"return {', '.join(self.variables[region.result])}")

    def _load(self, operands: list[tuple[str, str]]) -> None:
        at = 0
        held: list[str] = []
        for name, axes in operands:
            if axes == "BTH":
                where = f"extra[{at}] + (sample * extra[{at + 1}] + token * extra[{at + 2}]) + head * extra[{at + 3}]"
                self._let(name, f"tl.load({where}).to(tl.float32)")
                at += 4
            elif axes == "1":
                self._let(name, f"tl.load(extra[{at}]).to(tl.float32)")
                at += 1
            else:
                where, width = "token * 0", 1
                if axes == "BTD":
                    where, width = f"(sample * extra[{at + 1}] + token * extra[{at + 2}])", 3
                self.variables[name] = (f"{name}_0", f"{name}_1")
                held += self.variables[name]
                self.loads.append(f"{name}_0, {name}_1 = load_halves(extra[{at}] + {where}, D, {self.interleaved})")
                at += width
        self.loads.append(f"return ({''.join(f'{name}, ' for name in held)})")
        if held:
            self.lines.insert(0, f"{', '.join(held)} = held")

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
