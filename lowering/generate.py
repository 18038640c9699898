"""A fused region as a Triton function that the hand-written kernels call: readable source, kept on disk.

The file stands in the `regions` folder of the cache and is named by its content, so equal regions of all blocks, models
and processes share it; it is written again whenever it is missing. SVDQ_DUMP=folder gets a copy beside the graphs.

What the function reads besides its block, its `extra`, is (M + 1, C, then for each operand, by its axes)

    BTC   pointer, row stride         BC   pointer, row stride, B         BT, C, 1   pointer

M is one more because Triton makes a constant of the argument 1, which a warp-specialized kernel cannot pass on.
"""

import hashlib
import importlib.util
import linecache
import logging
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels.portable import erf, rounding, tanh
from ..kernels.runtime.generated import Generated
from ..kernels.runtime.tuning import cache_folder
from .region import GIVEN, Region, Step, parse

log = logging.getLogger("svdq_compile")

_CALLED = {"erf": erf, "tanh": tanh, "to_bf16": rounding, "to_fp16": rounding, "widened": rounding}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_CALLS = {
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "tanh": "tanh({0})",
    "erf": "erf({0})",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{0}))",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "reciprocal": "1.0 / {0}",
    "bf16": "to_bf16({0})",
    "fp16": "to_fp16({0})",
}


def bind(
    text: str, values: dict[str, Tensor], lead: torch.Size, columns: int, kernel_loads_auxiliary: bool = False
) -> Generated:
    """The function of the region with this text, its operands laid out for a block of lead.numel() rows.

    values: the operands by name. x and right, which the kernel is given itself, are not among them
    """
    rows = lead.numel()
    extra: list[Any] = [rows + 1, columns]
    auxiliary = None
    for name, axes in parse(text).operands:
        if name in ("x", "right"):
            continue
        value = values[name]
        if name == "auxiliary" and kernel_loads_auxiliary:
            auxiliary = _copyable(as_matrix(value, lead, columns))
        elif axes == "BTC":
            matrix = as_matrix(value, lead, columns)
            extra += [matrix, matrix.stride(0)]
        elif axes == "BC":
            matrix = as_matrix(value.reshape(lead[0], columns), lead[:1], columns)
            extra += [matrix, matrix.stride(0), lead[0]]
        elif axes == "BT":
            extra.append(value.expand(*lead, 1).reshape(rows).contiguous())
        else:
            extra.append(value.reshape(columns if axes == "C" else 1).contiguous())
    return Generated(function(text, kernel_loads_auxiliary), tuple(extra), auxiliary, parse(text).kind == "gate")


def as_matrix(value: Tensor, lead: torch.Size, columns: int) -> Tensor:
    """[..., C] that broadcasts over lead -> [rows, C] with neighbouring columns, a view wherever there is one."""
    if value.shape[:-1] != lead:
        value = value.expand(*lead, columns)
    matrix = value.reshape(lead.numel(), columns)
    if matrix.stride(1) != 1 or matrix.stride(0) < columns:
        matrix = matrix.contiguous()
    return matrix


def _copyable(matrix: Tensor) -> Tensor:
    """What the copy engine can read: rows that begin at multiples of 16 bytes."""
    misaligned = matrix.stride(0) % 8 or matrix.data_ptr() % 16
    return matrix.clone(memory_format=torch.contiguous_format) if misaligned else matrix


@cache
def function(text: str, kernel_loads_auxiliary: bool = False) -> Any:
    """The JIT function of the region with this text. Raises ValueError if it is no region."""
    return load(source(parse(text), kernel_loads_auxiliary)).fused


def load(code: str) -> Any:
    """Keep a source on disk, and import it from there; where nothing can be kept, from memory."""
    name = f"region_{hashlib.sha256(code.encode()).hexdigest()[:16]}"
    if os.environ.get("SVDQ_DUMP"):
        _write(Path(os.environ["SVDQ_DUMP"]) / f"{name}.py", code)
    try:
        path = cache_folder() / "regions" / f"{name}.py"
        _write(path, code)
    except OSError as error:
        log.warning("svdquant: generated code is not kept, and made anew in each process: %s", error)
        return _in_memory(name, code)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _in_memory(name: str, code: str) -> Any:
    """Triton reads a function's source through `inspect`, which asks `linecache` where there is no file."""
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = len(code), None, code.splitlines(keepends=True), module.__file__
    exec(compile(code, module.__file__, "exec"), module.__dict__)
    return module


def _write(path: Path, code: str) -> None:
    """All or nothing: other processes may write and read the same file. One that holds something else is repaired."""
    content = code.encode()
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def source(region: Region, kernel_loads_auxiliary: bool = False) -> str:
    """The Python file of a region. kernel_loads_auxiliary: if not, the function does, element by element."""
    given = {"x", "right"}
    signature = "x, rows, columns, live, extra"
    if region.kind in GIVEN:
        given = {"auxiliary"} if kernel_loads_auxiliary else set()
        first = [*GIVEN[region.kind], *(name for name, _ in region.operands if name in given)]
        signature = f"{', '.join(first)}, columns, rows, live, extra"
    loads = _loads([(name, axes) for name, axes in region.operands if name not in given])
    return python_file(
        [region], {f"fused({signature})": [*loads, *map(_line, region.steps), f"return {region.result}"]}
    )


def python_file(regions: Sequence[Region], functions: dict[str, list[str]], imports: str = "") -> str:
    """A file of JIT functions, their lines by their signatures."""
    drawings = (region.drawing().split("\n") for region in regions)
    drawing = "\n\n".join("\n".join(f"    {line}" for line in lines) for lines in drawings)
    code = "\n".join(f"\n\n@triton.jit\ndef {signature}:\n" + "\n".join(f"    {line}" for line in lines)
                     for signature, lines in functions.items())  # fmt: skip
    for name, module in _CALLED.items():
        if f"{name}(" in code:
            imports += f"from {module.__name__} import {name}\n"
    imports = f"\n{imports}" if imports else ""
    return f'"""A fused region.\n\n{drawing}\n"""\n\nimport triton\nimport triton.language as tl\n{imports}{code}\n'


def _loads(operands: list[tuple[str, str]]) -> list[str]:
    lines, at = [], 2
    for name, axes in operands:
        where, mask, width = "0", "", 1
        if axes == "BTC":
            where, mask, width = f"rows.to(tl.int64) * extra[{at + 1}] + columns", "live", 2
        elif axes == "BT":
            where, mask = "rows", "rows < extra[0] - 1"
        elif axes == "C":
            where, mask = "columns", "columns < extra[1]"
        elif axes == "BC":
            sample = f"rows.to(tl.int32) // ((extra[0] - 1) // extra[{at + 2}])"
            where, mask, width = f"({sample}).to(tl.int64) * extra[{at + 1}] + columns", "live", 3
        load = f"tl.load(extra[{at}] + {where}{f', mask={mask}, other=0.0' if mask else ''})"
        lines.append(f"{name} = widened({load})" if "C" in axes else f"{name} = {load}.to(tl.float32)")
        at += width
    return lines


def _line(step: Step) -> str:
    arguments = [a if isinstance(a, str) else repr(float(a)) for a in step.arguments]
    return f"{step.name} = {expression(step.operation, arguments)}"


def expression(operation: str, arguments: list[str]) -> str:
    """An operation in Triton."""
    if operation in _INFIX:
        return f"{arguments[0]} {_INFIX[operation]} {arguments[1]}"
    return _CALLS[operation].format(*arguments)
