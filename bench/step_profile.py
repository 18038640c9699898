"""The kernels of one step: how many, how long, of what kind, and how fast against the work they have to do."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from step_models import repeated_blocks
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# The first group whose pattern is found in a kernel's name has it; an Inductor kernel is named after what it fuses, so
# those of its own making come first.
GROUPS = (
    ("copies", r"^Memcpy|^Memset|direct_copy|CatArray"),
    ("gemm", r"^triton_tem|^triton_mm"),
    ("norms/pointwise", r"^triton_(poi|red|per|for|unk)_"),
    ("attention", r"sdpa|fmha|flash|attention"),
    ("convolutions", r"fprop|dgrad|convolution"),
    ("quantize", r"quantize|_measure_kernel|_codes_kernel"),
    ("gemv", r"_gemv"),
    ("gemm", r"gemm|_int4_kernel|nvjet|cutlass|xmma|_mm_|matmul|splitK|wgmma"),
    ("norms/pointwise", r"_moments_kernel|_heads_kernel|elementwise|layer_norm|rms_norm|reduce_kernel|softmax"),
)
NAMES = tuple(dict.fromkeys(name for name, _ in GROUPS)) + ("other",)
FEW_ROWS = 64  # a linear with no more is a gemv


def group(kernel: str) -> str:
    return next((name for name, pattern in GROUPS if re.search(pattern, kernel)), "other")


def kernels(call: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, ms) of everything one call runs on the GPU, in order of time."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.elapsed_us() / 1e3) for e in events if not getattr(e, "is_user_annotation", False)]


def launches(events: list[tuple[str, float]]) -> int:
    """Kernels among them; copies by the copy engine are none."""
    return sum(not name.startswith(("Memcpy", "Memset")) for name, _ in events)


def first_blocks(model: nn.Module, call: dict) -> dict[str, tuple[nn.Module, tuple, dict]]:
    """Of each kind of repeated block the first one and what one step calls it with."""
    seen: dict[str, tuple[nn.Module, tuple, dict]] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.setdefault(type(module).__name__, (module, args, kwargs))

    blocks = [block for kind in repeated_blocks(model).values() for block in kind]
    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    model(**call)
    for hook in hooks:
        hook.remove()
    return seen


def block_launches(blocks: dict[str, tuple[nn.Module, tuple, dict]]) -> dict[str, int]:
    """Kernels of one block of each kind, called alone."""
    counts = {}
    for name, (block, args, kwargs) in blocks.items():

        def run(block: nn.Module = block, args: tuple = args, kwargs: dict = kwargs) -> None:
            block(*args, **kwargs)

        run()
        counts[name] = launches(kernels(run))
    return counts


def work(model: nn.Module, call: dict) -> dict[str, float]:
    """What one step has to do at least, by group of kernels: the 16-bit model's operations; bytes with 4-bit weights.

    gemm, attention   operations
    quantize          bytes: each distinct input of a linear read in 16 bits and written in 8
    gemv              bytes: 4-bit weights, their scales, and the rank-32 branch in 16 bits
    """
    totals: Counter = Counter()
    last: list[Tensor] = []

    def before(module: nn.Linear, args: tuple) -> None:
        m, n, k = args[0].shape[:-1].numel(), module.out_features, module.in_features
        if m <= FEW_ROWS:
            totals["gemv"] += n * k / 2 + 2 * n * k / 64 + 64 * (n + k)
            return
        totals["gemm"] += 2 * m * n * k
        if not any(args[0] is x for x in last):
            totals["quantize"] += 3 * m * k
        last[:] = [*last[-3:], args[0]]

    inside = [m for kind in repeated_blocks(model).values() for b in kind for m in b.modules()]
    hooks = [m.register_forward_pre_hook(before) for m in inside if isinstance(m, nn.Linear)]
    with FlopCounterMode(display=False) as counter:
        model(**call)
    for hook in hooks:
        hook.remove()
    by_operator = counter.get_flop_counts()["Global"]
    totals["attention"] = sum(flops for op, flops in by_operator.items() if "attention" in str(op))
    return dict(totals)


def summary(events: list[tuple[str, float]], least: dict[str, float], top: int = 25) -> dict[str, Any]:
    """Time, count and share by group and by kernel; the achieved rate where the work is known."""
    total = sum(ms for _, ms in events)
    groups, names = [], {}
    for name, ms in events:
        count, spent = names.get(name, (0, 0.0))
        names[name] = (count + 1, spent + ms)
    for kind in NAMES:
        own = [ms for name, ms in events if group(name) == kind]
        if own:
            line = {"group": kind, "ms": round(sum(own), 3), "count": len(own), "share": round(sum(own) / total, 4)}
            if least.get(kind):
                unit = "TB/s" if kind in ("quantize", "gemv") else "TFLOP/s"
                line |= {"rate": round(least[kind] / sum(own) / 1e9, 3), "unit": unit}
            groups.append(line)
    largest = sorted(names.items(), key=lambda item: -item[1][1])[:top]
    listed = [
        {"kernel": name[:160], "group": group(name), "ms": round(ms, 3), "count": count, "share": round(ms / total, 4)}
        for name, (count, ms) in largest
    ]
    return {"total_ms": round(total, 3), "work": least, "groups": groups, "kernels": listed}


def show(profile: dict[str, Any]) -> None:
    for line in profile["groups"]:
        rate = f"{line['rate']:8.2f} {line['unit']}" if "rate" in line else ""
        print(f"  {line['group']:16} {line['ms']:9.2f} ms {line['count']:6} {100 * line['share']:6.1f} % {rate}")
    for line in profile["kernels"][:16]:
        print(f"    {line['ms']:8.2f} ms {line['count']:5}  {line['group'][:8]:8} {line['kernel'][:90]}")
    for name, count in profile.get("block_kernels", {}).items():
        print(f"  {name}: {count} kernels", flush=True)
