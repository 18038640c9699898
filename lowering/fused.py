"""The fused operators: the kernel with the region generated into it, or the region in torch and the plain operator."""

from contextlib import suppress

import torch
from torch import Tensor

from ..kernels.formats import FORMATS
from ..kernels.operands import Gemm, Quantize
from . import launch
from .kernel_table import NoKernel
from .region import GIVEN, parse


def quantize(
    operands: list[Tensor],
    smooth: Tensor,
    down: Tensor,
    precision: str,
    shift: float,
    region: str,
    rotate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`launch.quantize` of what the region makes of its operands."""
    program = parse(region)
    values = program.named(operands)
    x, right = values.pop("x"), values.pop("right", None)
    given = Quantize(x, smooth, down, precision, shift, rotate)
    if launch.takes_prologue(given):
        from . import generate

        function = generate.bind(region, values, x.shape[:-1], smooth.shape[0]) if program.steps else None
        with suppress(NoKernel):
            return launch.quantize(*given, prologue=function, right=right)
    joined = x if right is None else torch.cat((x, right), -1)
    h = program.evaluate({"x": joined, **values}).to(x.dtype) if program.steps else joined
    return launch.quantize(*given._replace(x=h))


def gemm(
    qx: Tensor,
    ascales: Tensor,
    xd: Tensor,
    weight: list[Tensor],
    up: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    precision: str,
    out_dtype: torch.dtype,
    operands: list[Tensor],
    region: str,
) -> Tensor:
    """`launch.gemm`, and what the region makes of the result or of its halves before it is rounded to out_dtype."""
    program = parse(region)
    given = GIVEN[program.kind]
    values = program.named(operands)
    plain = Gemm(qx, ascales, xd, weight, up, bias, offset, precision, out_dtype)
    if launch.takes_epilogue(plain):
        from . import generate

        features, in_tiles = up.shape[0] // len(given), program.kind == "epilogue" and FORMATS[precision].tiles
        function = generate.bind(region, values, qx.shape[:-1], features, in_tiles)
        with suppress(NoKernel):
            return launch.gemm(*plain, epilogue=function if program.steps else None)
    y = launch.gemm(*plain._replace(out_dtype=torch.float32))
    parts = dict(zip(given, y.chunk(len(given), -1), strict=True))
    return program.evaluate(parts | values).to(out_dtype).contiguous()
