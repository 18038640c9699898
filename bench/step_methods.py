"""The methods of bench/flux_step.py: how a 16-bit model is made ready, ours and the peers', each as documented.

METHODS[name](model, others) gets the model in memory and the inputs of some steps that are not measured, to calibrate
on; the next calls of what it returns are the method's own. Everything is compiled by repeated blocks (diffusers'
`compile_repeated_blocks`), or whole where the name says so, sizes fixed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_models import CALIBRATING, repeated_blocks
from torch import nn

import svdq_compile as svdq
from svdq_compile.config import FUSIONS

# What a peer quantizes: embedders and output projections with a narrow side stay 16-bit, as torchao's guides have it.
NARROW = 512
# torch._int_mm takes more than 16 rows.
FEW_ROWS = 16


def _by_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """`model.compile_repeated_blocks`; the whole model if nothing in it is repeated."""
    if any(repeated_blocks(model).values()):
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, **options)
    else:
        model.compile(dynamic=False, **options)
    return model


def eager(model: nn.Module, others: list[dict]) -> nn.Module:
    return model


def compiled(model: nn.Module, others: list[dict]) -> nn.Module:
    return _by_blocks(model)


def compiled_max(model: nn.Module, others: list[dict]) -> nn.Module:
    return _by_blocks(model, mode="max-autotune-no-cudagraphs")


def compiled_whole(model: nn.Module, others: list[dict]) -> nn.Module:
    model.compile(dynamic=False)
    return model


def compiled_graphs(model: nn.Module, others: list[dict]) -> nn.Module:
    """One CUDA graph a block: by ranks, where the whole is not one graph."""
    return _by_blocks(model, mode="reduce-overhead")


def compiled_best(model: nn.Module, others: list[dict]) -> nn.Module:
    """16-bit in its fastest mode: one CUDA graph for the whole step."""
    model.compile(dynamic=False, mode="reduce-overhead")
    return model


def _ours(**options: Any) -> dict[str, Any]:
    from svdq_compile.backend import svdquant  # by the function, so that it works where only the sources are

    return {
        "backend": svdquant,
        "options": {"precision": "w4a8", "calibration_steps": CALIBRATING, "progress": False} | options,
    }


def _observed(model: nn.Module, others: list[dict]) -> nn.Module:
    """The model after its calibrating calls: 16-bit and watched, the last of them quantizes."""
    for other in others:
        model(**other)
    return model


def ours(model: nn.Module, others: list[dict]) -> nn.Module:
    return _observed(_by_blocks(model, **_ours()), others)


def compiled_by_us(model: nn.Module) -> nn.Module:
    """Of a model that is quantized already."""
    return _by_blocks(model, **_ours())


def loaded(path: Path) -> Callable[[nn.Module, list[dict]], nn.Module]:
    """Ours with what an earlier process has saved, instead of quantizing."""

    def method(model: nn.Module, others: list[dict]) -> nn.Module:
        svdq.load(model, path, progress=False)
        return compiled_by_us(model)

    return method


def _ours_fusing(*fusions: str) -> Callable[[nn.Module, list[dict]], nn.Module]:
    def method(model: nn.Module, others: list[dict]) -> nn.Module:
        return _observed(_by_blocks(model, **_ours(fuse=fusions)), others)

    return method


def _ours_attending(attention: str) -> Callable[[nn.Module, list[dict]], nn.Module]:
    def method(model: nn.Module, others: list[dict]) -> nn.Module:
        return _observed(_by_blocks(model, **_ours(attention=attention)), others)

    return method


def ours_whole(model: nn.Module, others: list[dict]) -> nn.Module:
    model.compile(dynamic=False, **_ours())
    return _observed(model, others)


def ours_graphs(model: nn.Module, others: list[dict]) -> nn.Module:
    return _observed(_by_blocks(model, **_ours(mode="reduce-overhead")), others)


def ours_graphs_whole(model: nn.Module, others: list[dict]) -> nn.Module:
    """One CUDA graph for the whole step instead of one a block."""
    model.compile(dynamic=False, **_ours(mode="reduce-overhead"))
    return _observed(model, others)


def _linear_rows(model: nn.Module, call: dict) -> dict[str, int]:
    """The least rows that each linear is called with in one step."""
    rows: dict[str, int] = {}

    def watch(name: str) -> Callable:
        def before(module: nn.Module, args: tuple) -> None:
            count = args[0].shape[:-1].numel()
            rows[name] = min(count, rows.get(name, count))

        return before

    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    model(**call)
    for hook in hooks:
        hook.remove()
    return rows


def _torchao(model: nn.Module, config: Any, wanted: Callable[[str], bool]) -> nn.Module:
    from torchao.quantization import quantize_

    def chosen(module: nn.Module, name: str) -> bool:
        linear = isinstance(module, nn.Linear) and module.weight.dtype == torch.bfloat16
        return linear and min(module.in_features, module.out_features) >= NARROW and wanted(name)

    quantize_(model, config, filter_fn=chosen)
    return _by_blocks(model)


def torchao_fp8(model: nn.Module, others: list[dict]) -> nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return _torchao(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), lambda name: True)


def torchao_int8(model: nn.Module, others: list[dict]) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    rows = _linear_rows(model, others[0])
    return _torchao(model, Int8DynamicActivationInt8WeightConfig(), lambda name: rows.get(name, 0) > FEW_ROWS)


def _sdnq(model: nn.Module, **options: Any) -> nn.Module:
    from sdnq import sdnq_post_load_quant

    return _by_blocks(sdnq_post_load_quant(model, use_quantized_matmul=True, **options))


def sdnq_int8(model: nn.Module, others: list[dict]) -> nn.Module:
    return _sdnq(model, weights_dtype="int8")


def sdnq_int4_svd(model: nn.Module, others: list[dict]) -> nn.Module:
    return _sdnq(model, weights_dtype="int4", use_svd=True, svd_rank=32)


Method = Callable[[nn.Module, list[dict]], nn.Module]

LESS_FUSED: dict[str, Method] = {
    "ours-unfused": _ours_fusing(),
    **{f"ours-without-{name}": _ours_fusing(*(f for f in FUSIONS if f != name)) for name in FUSIONS},
}
METHODS: dict[str, Method] = {
    "eager": eager,
    "compile": compiled,
    "compile-max": compiled_max,
    "compile-whole": compiled_whole,
    "compile-graphs": compiled_graphs,
    "compile-best": compiled_best,
    "ours": ours,
    "ours-fp8-attention": _ours_attending("fp8"),
    "ours-int8-attention": _ours_attending("int8"),
    "ours-whole": ours_whole,
    **LESS_FUSED,
    "ours-graphs": ours_graphs,
    "ours-graphs-whole": ours_graphs_whole,
    "torchao-fp8": torchao_fp8,
    "torchao-int8": torchao_int8,
    "sdnq-int8": sdnq_int8,
    "sdnq-int4-svd": sdnq_int4_svd,
}
