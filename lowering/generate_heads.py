"""A region over attention heads as a Triton function for kernels/portable/heads.py.

A value that has D channels is two variables, its even and its odd channels (or its lower and upper half, if the region
takes D apart in the middle). Half a value, one for each row, and a number are one variable. So `even`, `odd` and `pair`
only rename, and are free.

The functions' `sample`, `token` and `head` broadcast against [tokens, D / 2]. Their `extra` is, for each operand

    token   pointer, strides of B and T        row   pointer, strides of B, T and H        column, scalar   pointer
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..kernels.portable import heads as triton_heads
from .generate import IMPORT_TANH, expression, load
from .region import COLUMN, IN_THE_MIDDLE, ROW, SCALAR, TOKEN, Region


def is_interleaved(region: Region) -> bool:
    """Whether the parts are even and odd channels."""
    return not any(step.operation in IN_THE_MIDDLE for step in region.steps)


def generated(region: Region, values: dict[str, Tensor], block: torch.Size) -> triton_heads.Region:
    """The function of a region, its operands laid out for a block [B, T, H, D]."""
    extra: list[Any] = []
    for name, cls in region.operands:
        if name == "x":
            continue
        value = values[name]
        if cls == TOKEN:
            value = value.expand(*block[:2], 1, block[3])
            value = value if value.stride(3) == 1 else value.contiguous()
            extra += [value, *value.stride()[:2]]
        elif cls == ROW:
            value = value.expand(*block[:3], 1)
            extra += [value, *value.stride()[:3]]
        elif cls == COLUMN:
            extra.append(value.reshape(block[3]).contiguous())
        else:
            extra.append(value.reshape(1))
    module = _module(region)
    return triton_heads.Region(module.load, module.fused, tuple(extra))


@cache
def _module(region: Region) -> Any:
    return load(source(region))


def source(region: Region) -> str:
    """The Python file of a region."""
    writer = _Writer(region)
    loads, lines = ("\n".join(f"    {line}" for line in block) for block in (writer.loads, writer.lines))
    drawing = "\n".join(f"    {line}" for line in region.drawing().split("\n"))
    return (
        f'"""A fused region.\n\n{drawing}\n"""\n\n'
        "import triton\nimport triton.language as tl\n"
        f"\nfrom {triton_heads.__name__} import load_parts{IMPORT_TANH if 'tanh(' in lines else chr(10)}\n\n"
        f"@triton.jit\ndef load(sample, token, extra, D: tl.constexpr):\n{loads}\n\n\n"
        f"@triton.jit\ndef fused(x_0, x_1, held, sample, token, head, extra, D: tl.constexpr):\n{lines}\n"
    )


class _Writer:
    """The lines of a function. parts: the variables that each value consists of."""

    def __init__(self, region: Region) -> None:
        self.interleaved = is_interleaved(region)
        self.loads: list[str] = []
        self.lines: list[str] = []
        self.parts: dict[str, tuple[str, ...]] = {"x": ("x_0", "x_1")}
        self._load([operand for operand in region.operands if operand[0] != "x"])
        for step in region.steps:
            self._step(step.name, step.operation, step.arguments)
        result = self.parts[region.steps[-1].name if region.steps else "x"]
        self.lines.append(f"return {', '.join(result)}")

    def _load(self, operands: list[tuple[str, str]]) -> None:
        at = 0
        held: list[str] = []
        for name, cls in operands:
            if cls == ROW:
                where = f"extra[{at}] + (sample * extra[{at + 1}] + token * extra[{at + 2}]) + head * extra[{at + 3}]"
                self._let(name, f"tl.load({where}).to(tl.float32)")
                at += 4
            elif cls == SCALAR:
                self._let(name, f"tl.load(extra[{at}]).to(tl.float32)")
                at += 1
            else:
                where, width = "token * 0", 1
                if cls == TOKEN:
                    where, width = f"(sample * extra[{at + 1}] + token * extra[{at + 2}])", 3
                self.parts[name] = (f"{name}_0", f"{name}_1")
                held += self.parts[name]
                self.loads.append(f"{name}_0, {name}_1 = load_parts(extra[{at}] + {where}, D, {self.interleaved})")
                at += width
        self.loads.append(f"return ({''.join(f'{name}, ' for name in held)})")
        if held:
            self.lines.insert(0, f"{', '.join(held)} = held")

    def _let(self, name: str, expression: str) -> None:
        self.parts[name] = (name,)
        self.lines.append(f"{name} = {expression}")

    def _step(self, name: str, operation: str, arguments: tuple) -> None:
        parts = [self.parts[a] if isinstance(a, str) else (repr(float(a)),) for a in arguments]
        if operation == "row_mean":
            self._let(name, f"tl.sum({' + '.join(parts[0])}, 1, keep_dims=True) * (1.0 / D)")
        elif operation in ("even", "low"):
            self.parts[name] = parts[0][:1]
        elif operation in ("odd", "high"):
            self.parts[name] = parts[0][1:]
        elif operation in ("pair", "halves"):
            self.parts[name] = (*parts[0], *parts[1])
        elif all(len(p) == 1 for p in parts):
            self._let(name, expression(operation, [p[0] for p in parts]))
        else:
            self.parts[name] = (f"{name}_0", f"{name}_1")
            for i, part in enumerate(self.parts[name]):
                self.lines.append(f"{part} = {expression(operation, [p[i % len(p)] for p in parts])}")
