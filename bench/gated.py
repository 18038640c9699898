"""What multiplying gated halves in the GEMM is worth, at the sizes of SDXL and SD 1.5 on this GPU.

    python bench/gated.py [--out bench/results/gated-h200.json]
    python bench/gated.py --step sdxl       a step of a model instead, its gates fused and not (sdxl or sd1.5)

A row is GEGLU and the next linear's quantize: "apart", where the GEMM stores both halves and quantize multiplies them
as it reads them, and "gated", where the GEMM does. Random data, results compared before they are timed, medians with
a cold L2. Then quantize alone on short rows, against a copy of as many bytes. A step is the whole model, a CUDA graph,
its weights quantized without calibration: times only.
"""

import argparse
import statistics
from pathlib import Path

import torch
from gemm import copy_us, microseconds
from step_models import build, inputs
from step_times import milliseconds
from torch import Tensor

import record
import svdq_compile as svdq
from svdq_compile.config import FUSIONS
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.lowering import ops
from svdq_compile.lowering.packed import PackedLinear
from svdq_compile.quantizer import quantize_group

GEGLU = "t0 = mul({right}, 0.5); t1 = mul({right}, 0.7071067811865476); t2 = erf(t1); t3 = add(t2, 1.0); " \
    "t4 = mul(t0, t3); t5 = mul({left}, t4)"  # fmt: skip
APART = "prologue(x, a0: BTC); " + GEGLU.format(left="x", right="a0")
GATED = "gate(y, right); " + GEGLU.format(left="y", right="right")
GATES = [(8192, 2560, 640), (2048, 5120, 1280), (8192, 1280, 320), (512, 5120, 1280)]  # rows, features of a half, in
SHORT = [(8192, 320), (8192, 640), (2048, 640), (2048, 1280), (512, 1280)]  # rows, channels
FLIPS = 0.02  # a bf16 rounding less flips codes


def packed(n: int, k: int) -> PackedLinear:
    weight = (torch.randn(n, k) * k**-0.5).to("cuda", torch.bfloat16)
    config = svdq.Config(precision="w4a8", rank=32, refine=0)
    return quantize_group([weight], ["layer"], "w4a8", config, InputStatistics())[0].packed


def row(op: str, us: float, **more: object) -> dict:
    print(op, more, f"{us:.1f} us", flush=True)
    return {"op": op, "us": us, **more}


def gate_rows(m: int, features: int, k: int) -> list[dict]:
    first, following = packed(2 * features, k), packed(640, features)
    x = torch.randn(2, m // 2, k, device="cuda", dtype=torch.bfloat16)
    quantized = ops.quantize(x, first.shared.smooth, first.shared.down, "w4a8", 0.0)
    plain = (*quantized, list(first.weight), first.up, None, None, "w4a8", torch.bfloat16)
    shared = (following.shared.smooth, following.shared.down, "w4a8", 0.0)

    def apart() -> tuple[Tensor, ...]:
        left, right = ops.gemm(*plain).chunk(2, -1)
        return ops.fused_quantize([left, right], *shared, APART)

    def gated() -> tuple[Tensor, ...]:
        return ops.quantize(ops.fused_gemm(*plain, [], GATED), *shared)

    expected, found = ([t.float() for t in call()[:2]] for call in (apart, gated))
    off = (expected[0] * expected[1] - found[0] * found[1]).norm() / (expected[0] * expected[1]).norm()
    if not off < FLIPS:
        raise SystemExit(f"wrong result: {off:.2e} apart")
    y = ops.gemm(*plain)
    h = ops.fused_gemm(*plain, [], GATED)
    parts = {
        "apart": {"us_gemm": microseconds(lambda: ops.gemm(*plain)),
                  "us_quantize": microseconds(lambda: ops.fused_quantize([*y.chunk(2, -1)], *shared, APART))},
        "gated": {"us_gemm": microseconds(lambda: ops.fused_gemm(*plain, [], GATED)),
                  "us_quantize": microseconds(lambda: ops.quantize(h, *shared))},
    }  # fmt: skip
    return [
        row(name, microseconds(call), m=m, features=features, k=k, rel_err=off.item(), **parts[name])
        for name, call in (("apart", apart), ("gated", gated))
    ]


def short_row(m: int, k: int) -> dict:
    shared = packed(640, k).shared
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    results = ops.quantize(x, shared.smooth, shared.down, "w4a8", 0.0)
    us = microseconds(lambda: ops.quantize(x, shared.smooth, shared.down, "w4a8", 0.0))
    copy = copy_us(sum(t.nbytes for t in (x, *results)))
    return row("quantize", us, m=m, k=k, us_copy=copy, share_of_copy=copy / us)


def step_rows(name: str) -> list[dict]:
    rows = []
    for op, fusions in (("step, gated", FUSIONS), ("step, apart", tuple(f for f in FUSIONS if f != "gates"))):
        torch._dynamo.reset()
        model = build(name, tiny=False, device=torch.device("cuda"))
        call = inputs(name, tiny=False, model=model, device=torch.device("cuda"))
        options = {"precision": "w4a8", "calibration_steps": 0, "progress": False, "fuse": fusions}
        model.compile(dynamic=False, backend="svdquant", options=options | {"mode": "reduce-overhead", "refine": 0})
        for _ in range(4):
            model(**call)
        rows.append(row(op, 1e3 * statistics.median(milliseconds(lambda m=model, c=call: m(**c), 20)), model=name))
        del model
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", choices=["sdxl", "sd1.5"], help="time a model's step instead")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if options.step:
        rows = step_rows(options.step)
    else:
        rows = [line for shape in GATES for line in gate_rows(*shape)] + [short_row(*shape) for shape in SHORT]
    record.write(options.out or record.results(f"gated-{options.step}" if options.step else "gated"), rows)


if __name__ == "__main__":
    main()
