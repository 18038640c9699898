"""Attention with what makes its heads, in 16 bits and in 8 (svdq::attention_of_heads), on an sm_90 GPU with fa3-fwd.

python bench/attention_heads.py            Writes bench/results/attention-heads-h200.json

Both ways begin at a linear's result, q, k and v side by side, and end at attention's: norm, rotation, layout and codes
included. `codes` is what makes the codes, with its look at samples; the GPU's time, medians in us, the host's hidden.
Errors are against the 16-bit way.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from step_times import gpu_milliseconds
from torch import Tensor

import record
from svdq_compile.kernels.portable.attention_codes import GeneratedParts, attention_codes
from svdq_compile.lowering import attention_of_heads as of_heads
from svdq_compile.lowering import generate_heads, heads, ops

ROTATED = """heads(x, a0: D, a1: BTD, a2: BTD)
t0 = mul(x, x)
t1 = row_mean(t0)
t2 = add(t1, 1e-06)
t3 = rsqrt(t2)
t4 = mul(x, t3)
t5 = mul(t4, a0)
t6 = even(t5)
t7 = odd(t5)
t8 = neg(t7)
t9 = pair(t8, t6)
t10 = mul(t5, a1)
t11 = mul(t9, a2)
t12 = add(t10, t11)""".replace("\n", "; ")
PLAIN = "heads(x)"
# What makes q and k, the tokens of each part, and the heads, of 128 channels.
CASES = {
    "FLUX.1, text and image": (ROTATED, (512, 4096), 24),
    "FLUX.1, one stream": (ROTATED, (4608,), 24),
    "FLUX.1, one stream, 512x512": (ROTATED, (1536,), 24),
    "Qwen-Image, text and image": (ROTATED, (256, 4096), 24),
    "Wan 2.1 14B, 33 frames, heads that are there": (PLAIN, (14040,), 40),
    "Wan 2.1 14B, 81 frames, heads that are there": (PLAIN, (32760,), 40),
}


def parts_of(text: str, tokens: int, count: int, channels: int = 128) -> list[list[Tensor]]:
    """What q, k and v read in a part."""
    qkv = torch.randn(1, tokens, 3, count, channels, device="cuda", dtype=torch.bfloat16).unbind(2)
    if text == PLAIN:
        return [[x] for x in qkv]
    angle = torch.arange(tokens, device="cuda")[:, None] * 1e4 ** -torch.linspace(0, 1, channels // 2, device="cuda")
    wide = angle.repeat_interleave(2, 1)[:, None]
    weight = torch.rand(channels, device="cuda", dtype=torch.bfloat16) + 0.5
    return [[x, weight, wide.cos(), wide.sin()] for x in qkv[:2]] + [[qkv[2]]]


def operands(text: str, tokens: tuple[int, ...], count: int) -> tuple:
    """The operator's."""
    parts = [parts_of(text, n, count) for n in tokens]
    each = [[part[i] for part in parts] for i in range(3)]
    read = [t for of_one in each for given in of_one for t in given]
    kinds = [text] * (2 * len(tokens)) + [PLAIN] * len(tokens)
    return read, list(range(len(read))), heads.PARTS.join(kinds), [len(tokens)] * 2, False, None, [0, 2, 1, 3], "fp8"


def microseconds(call: Callable[[], object], repeats: int) -> float:
    return round(1e3 * statistics.median(gpu_milliseconds(call, repeats)), 1)


def measure(case: str, repeats: int) -> dict:
    given = operands(*CASES[case])
    o = of_heads.record(*given)
    exact, coded = (row for row in of_heads.ATTENTION_OF_HEADS.rows if row.name in ("exact_heads", "flash3_fp8_heads"))
    reason = coded.refuses(o)
    if reason is not None:
        raise SystemExit(f"no attention in 8 bits here: {reason}")
    regions, values = zip(*(part for each in o.parts for part in each), strict=True)
    generated = GeneratedParts(*generate_heads.bind_parts(regions, values))
    xs = [[named["x"] for _, named in each] for each in o.parts]
    site = ops.sites("svdq.attention_of_heads.default")()
    for _ in range(3):
        site(*given)
    expected = exact.run(o).double()
    us = {
        "exact": microseconds(lambda: exact.run(o), repeats),
        "fp8": microseconds(lambda: coded.run(o), repeats),
        "codes": microseconds(lambda: attention_codes(xs, generated), repeats),
        "as compiled code calls it": microseconds(lambda: site(*given), repeats),
    }
    line = {
        "case": case,
        "tokens": list(CASES[case][1]),
        "heads": CASES[case][2],
        "us": us,
        "chosen": of_heads.ATTENTION_OF_HEADS.choose(o).name,
        "rel_err": round(float((coded.run(o) - expected).norm() / expected.norm()), 4),
    }
    print(line, flush=True)
    return line


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=record.results("attention-heads"))
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        record.write(options.out, [measure(case, options.repeats) for case in CASES])
