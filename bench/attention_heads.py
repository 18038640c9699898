"""Attention with what makes its heads, in 16 bits and in 8 (svdq::attention_of_heads): fp8 on an sm_90 with fa3-fwd,
int8 on every GPU.

python bench/attention_heads.py            Writes bench/results/attention-heads-h200.json
python bench/as_target.py 89 bench/attention_heads.py --out attention-heads-89.json

All ways begin at a linear's result, q, k and v side by side, and end at attention's: norm, rotation, layout and codes
included. `codes` is what makes the codes, with its look at samples; `tiles` are the int8 kernel's; the GPU's time,
medians in us, the host's hidden. Errors are against the 16-bit way. A minute or two.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from step_times import gpu_milliseconds
from torch import Tensor

import record
from svdq_compile.kernels.portable.attention_codes import attention_codes, attention_codes_int8
from svdq_compile.kernels.portable.attention_int8 import Tile, attention_int8, tiles
from svdq_compile.kernels.runtime.target import amd_architecture, shared_memory
from svdq_compile.lowering import attention_of_heads as of_heads
from svdq_compile.lowering import heads, ops
from svdq_compile.lowering.generate_heads import bind_heads

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
# What makes q and k, the tokens of each part, the heads and their channels.
CASES = {
    "FLUX.1, text and image": (ROTATED, (512, 4096), 24, 128),
    "FLUX.1, one stream": (ROTATED, (4608,), 24, 128),
    "FLUX.1, one stream, 512x512": (ROTATED, (1536,), 24, 128),
    "Qwen-Image, text and image": (ROTATED, (256, 4096), 24, 128),
    "SD3.5 large, text and image, heads that are there": (PLAIN, (333, 4096), 38, 64),
    "SDXL, 32x32, heads that are there": (PLAIN, (1024,), 20, 64),
    "Wan 2.1 14B, 33 frames, heads that are there": (PLAIN, (14040,), 40, 128),
    "Wan 2.1 14B, 81 frames, heads that are there": (PLAIN, (32760,), 40, 128),
}
ROWS = {"fp8": "flash3_fp8_heads", "int8": "attention_int8_heads"}


def parts_of(text: str, tokens: int, count: int, channels: int) -> list[list[Tensor]]:
    """What q, k and v read in a part."""
    qkv = torch.randn(1, tokens, 3, count, channels, device="cuda", dtype=torch.bfloat16).unbind(2)
    if text == PLAIN:
        return [[x] for x in qkv]
    angle = torch.arange(tokens, device="cuda")[:, None] * 1e4 ** -torch.linspace(0, 1, channels // 2, device="cuda")
    wide = angle.repeat_interleave(2, 1)[:, None]
    weight = torch.rand(channels, device="cuda", dtype=torch.bfloat16) + 0.5
    return [[x, weight, wide.cos(), wide.sin()] for x in qkv[:2]] + [[qkv[2]]]


def operands(text: str, tokens: tuple[int, ...], count: int, channels: int) -> tuple:
    """The operator's, but for the arithmetic."""
    parts = [parts_of(text, n, count, channels) for n in tokens]
    each = [[part[i] for part in parts] for i in range(3)]
    read = [t for of_one in each for given in of_one for t in given]
    kinds = [text] * (2 * len(tokens)) + [PLAIN] * len(tokens)
    return read, list(range(len(read))), heads.PARTS.join(kinds), [len(tokens)] * 2, False, None, [0, 2, 1, 3]


def microseconds(call: Callable[[], object], repeats: int) -> float:
    return round(1e3 * statistics.median(gpu_milliseconds(call, repeats)), 1)


def by_tile(o: of_heads.OfHeads, repeats: int) -> dict[str, float]:
    """The int8 kernel and its codes with each of the tiles that it may measure."""
    xs, generated = bind_heads(o.parts[:2])
    v = torch.cat([values["x"] for _, values in o.parts[2]], 1).transpose(1, 2)
    y = torch.empty_like(v)
    width = triton.next_power_of_2(v.shape[3])

    def run(tile: Tile) -> None:
        attention_int8(xs, generated, v, y, False, None, tile)

    candidates = tiles(width, shared_memory(v.device), amd_architecture(v.device))
    return {str(tuple(tile)): microseconds(partial(run, tile), repeats) for tile in candidates}


def in_8_bits(given: tuple, arithmetic: str, expected: Tensor, repeats: int) -> dict | None:
    """None where there is no kernel."""
    row = next(row for row in of_heads.ATTENTION_OF_HEADS.rows if row.name == ROWS[arithmetic])
    o = of_heads.record(*given, arithmetic)
    reason = row.refuses(o)
    if reason is not None:
        print(f"no attention in {arithmetic} here: {reason}")
        return None
    codes, count = (attention_codes, 3) if arithmetic == "fp8" else (attention_codes_int8, 2)
    xs, generated = bind_heads(o.parts[:count])
    site = ops.sites("svdq.attention_of_heads.default")()
    for _ in range(3):
        site(*given, arithmetic)
    return {
        "us": microseconds(lambda: row.run(o), repeats),
        "codes": microseconds(lambda: codes(xs, generated), repeats),
        "as compiled code calls it": microseconds(lambda: site(*given, arithmetic), repeats),
        "chosen": of_heads.ATTENTION_OF_HEADS.choose(o).name,
        "rel_err": round(float((row.run(o) - expected).norm() / expected.norm()), 4),
    } | ({"tiles": by_tile(o, repeats)} if arithmetic == "int8" else {})


def measure(case: str, repeats: int) -> dict:
    text, tokens, count, channels = CASES[case]
    given = operands(text, tokens, count, channels)
    exact, o = of_heads.ATTENTION_OF_HEADS.rows[0], of_heads.record(*given, "exact")
    expected = exact.run(o).double()
    line = {"case": case, "tokens": list(tokens), "heads": count, "channels": channels,
            "exact": {"us": microseconds(lambda: exact.run(o), repeats)},
            **{arithmetic: in_8_bits(given, arithmetic, expected, repeats) for arithmetic in ROWS}}  # fmt: skip
    print(line, flush=True)
    return line


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=record.results("attention-heads"))
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        lines = []
        for case in CASES:
            lines.append(measure(case, options.repeats))
            record.write(options.out, lines)  # whatever comes of the others
