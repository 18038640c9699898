"""A fused region: the elementwise operations around an svdq:: operator, as a small program in text.

    epilogue(y, auxiliary: BTC, a0: C); t0 = mul(y, a0); t1 = add(auxiliary, t0)
    prologue(x, right, a0: BT, a1: BT, a2: C); t0 = sub(x, a0); t1 = mul(t0, a1); t2 = mul(t1, a2)
    gate(y, right); t0 = sigmoid(right); t1 = mul(right, t0); t2 = mul(y, t1)

The text is an argument of the operator in the graph, so it is all that a compile cache needs to keep: `parse` reads it
back, `evaluate` runs it in torch (the oracle), and generate.py turns it into a Triton function. The last step is the
result. Values are fp32; `bf16` and `fp16` round where the model casts. It is one line, because Inductor copies a node's
arguments into a comment above its own kernels, where a second line would be code.

The block that a region works on is a matrix [M, C]: all leading dimensions of a tensor [..., C] are its rows, the
tokens T of the samples B. Of an operand the text says which of these axes it varies over:

    x, y      what the operator reads, or the result it would store; `right` continues it: [x | right], [y | right]
    BTC       [..., C]              full: a value for each element. `auxiliary`: the one that a GEMM's kernel may load
    BT        [..., 1]              per token (a mean)
    C         [C]                   per channel (a norm's weight)
    BC        [B, 1, ..., C]        per sample, a value for each channel (a modulation); M / B rows each
    1                               one value

A gate is an epilogue that makes one feature of two: it works on the two halves of the result, which are a block each.

A fourth kind works on the heads of attention, a block [B, T, H, D]. Its text may have several parts, with ` | `
between them: each makes some of the tokens, one after the other.

    heads(x, a0: D, a1: BTD); t0 = mul(x, x); t1 = row_mean(t0); ...

    BTD       [B, T, 1, D]          per token, a value for each channel (cos, sin); B, T or both may be 1
    BTH       [B, T, H, 1]          per token and head, likewise
    BT        [B, T, 1, 1]          per token (a mean over all heads), likewise
    HD        [H, D]                per head, a value for each channel (the weight of a norm over all heads)
    BTHD      [B, T, H, D]          full, as x (tables that differ from head to head); B, T or H may be 1

It may average over D (`row_mean`) and take D apart and together again: `even`, `odd`, `pair` by neighbouring channels,
`low`, `high`, `halves` in the middle. What is half as long is only met by its like, by BT, BTH and numbers.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

STEPS, PARTS = "; ", " | "  # what stands between steps, and between the parts of a region over heads
Argument = str | float  # the name of a value, or a number

# The axes that an operand may vary over, in the order in which they are tried.
ROWS = ("1", "BTC", "C", "BT", "BC")
# What the kernel itself gives a region of each kind: no operands.
GIVEN = {"epilogue": ("y",), "gate": ("y", "right")}
HEADS = ("1", "BT", "BTH", "D", "HD", "BTD", "BTHD")

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": lambda a, b: torch.maximum(*_tensors(a, b)),
    "minimum": lambda a, b: torch.minimum(*_tensors(a, b)),
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "bf16": lambda a: a.to(torch.bfloat16).float(),
    "fp16": lambda a: a.to(torch.float16).float(),
}

ALONG_HEADS: dict[str, Callable[..., Tensor]] = {
    "row_mean": lambda a: a.mean(-1, keepdim=True),
    "even": lambda a: a[..., 0::2],
    "odd": lambda a: a[..., 1::2],
    "pair": lambda a, b: torch.stack((a, b), -1).flatten(-2),
    "low": lambda a: a[..., : a.shape[-1] // 2],
    "high": lambda a: a[..., a.shape[-1] // 2 :],
    "halves": lambda a, b: torch.cat((a, b), -1),
}


# A region over heads takes their channels apart in one of these ways.
IN_THE_MIDDLE = {"low", "high", "halves"}
INTERLEAVED = {"even", "odd", "pair"}


def _tensors(*values: Tensor | float) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(v, dtype=torch.float32) for v in values)


@dataclass(frozen=True)
class Step:
    """One line: `name = operation(*arguments)`."""

    name: str
    operation: str
    arguments: tuple[Argument, ...]

    def expression(self) -> str:
        """What it computes; equal texts have equal values."""
        return f"{self.operation}({', '.join(map(str, self.arguments))})"

    def __str__(self) -> str:
        return f"{self.name} = {self.expression()}"


@dataclass(frozen=True)
class Region:
    """A program. kind: "prologue", "epilogue", "gate" or "heads"; operands: (name, axes) in the operator's order.

    The first operand of a prologue or of heads is x (and a prologue's second `right`, where x has two parts), which is
    full; what an epilogue or a gate is given (GIVEN) is no operand.
    """

    kind: str
    operands: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        named = [name if name in ("x", "right") else f"{name}: {axes}" for name, axes in self.operands]
        return STEPS.join([f"{self.kind}({', '.join([*GIVEN.get(self.kind, ()), *named])})", *map(str, self.steps)])

    def drawing(self) -> str:
        """The text as people read it, a step a line."""
        return str(self).replace(STEPS, "\n")

    @property
    def result(self) -> str:
        """The name of what it makes."""
        return self.steps[-1].name if self.steps else "y" if self.kind in GIVEN else "x"

    def named(self, operands: Iterable[Tensor]) -> dict[str, Tensor]:
        """The operands by name."""
        return {name: value for (name, _), value in zip(self.operands, operands, strict=True)}

    def evaluate(self, values: Mapping[str, Tensor]) -> Tensor:
        """Run the program in fp32. values: what it is given, and its operands, which broadcast against the block."""
        known: dict[str, Tensor] = {name: value.float() for name, value in values.items()}
        for step in self.steps:
            arguments = (known[a] if isinstance(a, str) else a for a in step.arguments)
            operation = OPERATIONS.get(step.operation) or ALONG_HEADS[step.operation]
            known[step.name] = operation(*arguments)
        return known[self.result]


Part = tuple[Region, dict[str, Tensor]]  # some tokens of a block: what makes them, and its operands by name
PLAIN = Region("heads", (("x", "BTHD"),), ())  # heads as they are

_HEADER = re.compile(r"(prologue|epilogue|gate|heads)\((.*)\)")
_STEP = re.compile(r"(\w+) = (\w+)\((.*)\)")


@cache
def parse(text: str) -> Region:
    """The region that `str(region)` wrote. Raises ValueError for anything else."""
    header, *lines = text.split(STEPS)
    found = _HEADER.fullmatch(header)
    if found is None:
        raise ValueError(f"not a fused region: {header!r}")
    kind, names = found.groups()
    operations, choices, full = set(OPERATIONS), {*ROWS}, "BTC"
    if kind == "heads":
        operations, choices, full = operations | set(ALONG_HEADS), {*HEADS}, "BTHD"
    given, operands = GIVEN.get(kind, ()), []
    for item in names.split(", "):
        name, _, axes = item.partition(": ")
        if name not in given:
            operands.append((name, axes or full))
    known = {*given, *(name for name, _ in operands)}
    steps = []
    for line in lines:
        found = _STEP.fullmatch(line)
        if found is None or found[2] not in operations:
            raise ValueError(f"not a step of a fused region: {line!r}")
        arguments = tuple(a if a in known else float(a) for a in found[3].split(", "))
        steps.append(Step(found[1], found[2], arguments))
        known.add(found[1])
    if any(axes not in choices for _, axes in operands):
        raise ValueError(f"not a fused region: {header!r}")
    return Region(kind, tuple(operands), tuple(steps))
