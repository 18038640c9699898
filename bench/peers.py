"""Output errors of linears quantized by this program and by its peers: the same 16-bit weights, the same inputs to fit
to, and errors on inputs that fitted nothing. On the CPU, some five minutes.

    pip install --target PEERS --no-deps nvidia-modelopt sdnq torchao omegaconf antlr4-python3-runtime==4.9.3 pulp scipy
    PYTHONPATH=PEERS python bench/peers.py

The layers are the demo model's linears that read many rows (this program has the others in w4a16), and those of
bench/accuracy.py with planted outliers. Each method is in its best documented mode; what it fits is fitted to the calls
of a calibration, thinned to 512 rows each:

    ours-*          by default; linears of one input share what is done to it
    modelopt        NVIDIA's NVFP4_SVDQUANT_DEFAULT_CFG: smoothing searched on the outputs, truncated SVD
    sdnq-*-svd      SDNQ, by the weights alone, uint4 with zero points; the product in 16 bits, or by "-int8" in 8
    torchao-int4    by the weights alone, HQQ
    torchao-fp8     weights and activations, a scale for each row

An error is |y - x W^T| / |x W^T|; null: the method leaves the layer in 16 bits. "bits" are of a weight and of an
activation, with their scales; `bytes_per_weight` has smoothing and branch too. `share_ours_at_or_below` is the share of
the layers on which `against` is no worse. The layers go to quality.json as well, of recipe "peers": ours in nvfp4
beside modelopt. A method whose package is missing is left out.
"""

import argparse
import copy
import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import quality
import torch
from rich.progress import track
from torch import Tensor, nn

import accuracy
from record import RESULTS, environment
from svdq_compile import Config
from svdq_compile.input_statistics import InputStatistics, thinned
from svdq_compile.lowering import ops
from svdq_compile.quantize_model import _observed
from svdq_compile.quantizer import quantize_group

RANK = 32
ROWS = 512  # of each call that is fitted to
PLANTED = 5  # layers with planted outliers


@dataclass(frozen=True)
class Group:
    """Linears that share an input.

    weights  [N_i, K] bf16 each
    calls    [S, K] bf16 each: the input in the calls of a calibration
    shown    [M, K] bf16: the input in calls that calibrated nothing
    shift    as in svdq_compile.task.Task
    """

    names: Sequence[str]
    weights: Sequence[Tensor]
    calls: Sequence[Tensor]
    shown: Tensor
    shift: float = 0.0


@dataclass(frozen=True)
class Result:
    """Of one linear: its outputs [M, N] for what is shown, and the bytes that it takes."""

    outputs: Tensor
    nbytes: float


def demo_groups(todo: quality.Job) -> list[Group]:
    pipe = quality.demo.load_pipeline("cpu")
    linears = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}

    def calibrate(_: Any = None) -> None:
        steps = quality.demo.CALIBRATION_STEPS
        pipe(todo.calibration, num_inference_steps=steps, seed=quality.FIRST_SEED - 100, output_type="latent")

    tasks = [task for task in _observed(pipe.transformer, calibrate, visible=False) if not task.has_few_rows]
    calls: dict[str, list[Tensor]] = {task.names[0]: [] for task in tasks}

    def watch(name: str) -> Callable:
        return lambda _, args: calls[name].append(thinned(args[0].flatten(0, -2), ROWS))

    hooks = [linears[name].register_forward_pre_hook(watch(name)) for name in calls]
    calibrate()
    for hook in hooks:
        hook.remove()
    shown = quality.layer_inputs(pipe, todo)
    return [
        Group(task.names, [w.detach() for w in task.weights], calls[task.names[0]], shown[task.names[0]], task.shift)
        for task in tasks
    ]


def planted_groups() -> list[Group]:
    groups = []
    for seed in range(PLANTED):
        weight, known, shown = (tensor.bfloat16() for tensor in accuracy.layer(seed))
        groups.append(Group([f"planted.{seed}"], [weight], [known], shown))
    return groups


def ours(precision: str) -> Callable[[Group], list[Result]]:
    def run(group: Group) -> list[Result]:
        statistics = InputStatistics()
        for call in group.calls:
            statistics.observe(call)
        config = Config(precision, rank=RANK)
        found = quantize_group(group.weights, group.names, precision, config, statistics, group.shift)
        packs = [one.packed for one in found]
        return [Result(ops.linear(group.shown, pack, None, group.shown.dtype), pack.nbytes()) for pack in packs]

    return run


def alone(quantize: Callable[[nn.Module, Sequence[Tensor]], float]) -> Callable[[Group], list[Result]]:
    """A method that quantizes a model in place, here of one linear, given its calls, and tells the bytes it takes."""

    def run(group: Group) -> list[Result]:
        results = []
        for weight in group.weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            model = nn.Sequential(linear)
            nbytes = quantize(model, group.calls)
            results.append(Result(model(group.shown), nbytes))
        return results

    return run


def held(model: nn.Module) -> float:
    """Bytes of its tensors and of those that they are made of."""
    parts: list[Tensor] = []
    for tensor in model.state_dict().values():
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        parts += [tensor] if inner is None else [getattr(tensor, name) for name in inner]
    return sum(part.nbytes for part in parts)


def modelopt(model: nn.Module, calls: Sequence[Tensor]) -> float:
    """Its kernels that round to NVFP4 need a GPU, so its quantizers are given the plain torch by which it exports
    weights, which rounds alike.
    """
    from modelopt.torch import quantization as mtq
    from modelopt.torch.quantization.nn.modules import tensor_quantizer
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def rounded(x: Tensor, quantizer: Any) -> Tensor:
        whole = quantizer._get_amax(x).amax().float() / (6 * 448)
        packed, scales, _ = NVFP4QTensor.quantize(x, quantizer.block_sizes[-1], weights_scaling_factor_2=whole)
        return packed.dequantize(scale=scales, double_scale=whole, block_sizes=quantizer.block_sizes)

    name = "nvfp4-in-torch"
    if not tensor_quantizer.is_registered_quant_backend(name):
        tensor_quantizer.register_quant_backend(name, rounded)
    config = copy.deepcopy(mtq.NVFP4_SVDQUANT_DEFAULT_CFG)
    for entry in config["quant_cfg"]:
        if "cfg" in entry:
            entry["cfg"]["backend"] = name
    mtq.quantize(model, config, lambda model: [model(call) for call in calls])
    if not (model[0].weight_quantizer.is_enabled and model[0].input_quantizer.is_enabled):
        return held(model)
    n, k = model[0].weight.shape
    return n * k * (4 + 8 / 16) / 8 + 2 * (RANK * (n + k) + k)  # codes and scales; branch and smoothing


def sdnq(codes: str, quantized_product: bool) -> Callable[[nn.Module, Sequence[Tensor]], float]:
    def quantize(model: nn.Module, calls: Sequence[Tensor]) -> float:
        from sdnq import sdnq_post_load_quant

        options = {"weights_dtype": codes, "use_svd": True, "svd_rank": RANK}
        sdnq_post_load_quant(model, use_quantized_matmul=quantized_product, **options)
        return held(model)

    return quantize


def torchao_int4(model: nn.Module, calls: Sequence[Tensor]) -> float:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # Int4WeightOnlyConfig needs a GPU
    from torchao.quantization import quantize_

    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=64, int4_choose_qparams_algorithm="hqq"))
    return held(model)


def torchao_fp8(model: nn.Module, calls: Sequence[Tensor]) -> float:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quant_api, quantize_

    with patch.object(quant_api, "_check_hardware_support"):  # it wants a GPU; torch has the product for CPUs too
        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return held(model)


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    run      gives a result for each linear of a group
    against  of a peer: which of ours it is compared with
    package  what to import, and what to install for it
    """

    run: Callable[[Group], list[Result]]
    format: str
    bits: str
    against: str | None = None
    package: tuple[str, str] | None = None


MODELOPT, SDNQ, TORCHAO = ("modelopt.torch.quantization", "nvidia-modelopt"), ("sdnq", "sdnq"), ("torchao", "torchao")
METHODS = {
    "ours-nvfp4": Method(ours("nvfp4"), "nvfp4", "4.5, 4.5"),
    "ours-w4a8": Method(ours("w4a8"), "int4, int8", "4.13, 8"),
    "ours-int4": Method(ours("int4"), "int4", "4.25, 4.25"),
    "modelopt": Method(alone(modelopt), "nvfp4", "4.5, 4.5", "ours-nvfp4", MODELOPT),
    "sdnq-int4-svd": Method(alone(sdnq("int4", False)), "int4, bf16", "4.25, 16", "ours-w4a8", SDNQ),
    "sdnq-int4-svd-int8": Method(alone(sdnq("int4", True)), "int4, int8", "4.25, 8", "ours-w4a8", SDNQ),
    "sdnq-uint4-svd": Method(alone(sdnq("uint4", False)), "int4, bf16", "4.5, 16", "ours-w4a8", SDNQ),
    "torchao-int4": Method(alone(torchao_int4), "int4, bf16", "4.5, 16", "ours-w4a8", TORCHAO),
    "torchao-fp8": Method(alone(torchao_fp8), "fp8", "8, 8", "ours-w4a8", TORCHAO),
}


def present() -> dict[str, Method]:
    """The methods whose packages are there; of the others it is said."""
    found = {}
    for name, method in METHODS.items():
        if method.package is not None:
            try:
                import_module(method.package[0])
            except ModuleNotFoundError as missing:
                print(f"{name} is left out, there is no {missing.name}: pip install {method.package[1]}")
                continue
        found[name] = method
    return found


def measure(groups: Sequence[Group], methods: dict[str, Method]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """-> layers, and each method's bytes per weight over the layers that it quantizes."""
    layers: list[dict[str, Any]] = []
    nbytes, numel = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0)
    for group in track(groups, "groups of layers"):
        truths = [group.shown.float() @ weight.float().t() for weight in group.weights]
        rows: list[dict[str, Any]] = [{"layer": name} for name in group.names]
        for method, one in methods.items():
            with redirect_stdout(io.StringIO()):  # modelopt tells each layer
                results = one.run(group)
            for row, weight, truth, result in zip(rows, group.weights, truths, results, strict=True):
                if result.nbytes >= weight.nbytes:
                    row[method] = None
                    continue
                error = float((result.outputs.float() - truth).norm() / truth.norm())
                if not math.isfinite(error):
                    raise ValueError(f"{method} gives numbers that are not finite for {row['layer']}")
                row[method] = round(error, 5)
                nbytes[method] += result.nbytes
                numel[method] += weight.numel()
        layers += rows
    return layers, {method: nbytes[method] / numel[method] for method in methods if numel[method]}


def pairs(layers: Sequence[dict[str, Any]], one: str, other: str) -> list[tuple[float, float]]:
    """Errors by two methods of the layers that both have quantized."""
    both = [(layer.get(one), layer.get(other)) for layer in layers]
    return [(a, b) for a, b in both if a is not None and b is not None]


def summary(
    layers: Sequence[dict[str, Any]], methods: dict[str, Method], bytes_per_weight: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each method that has quantized a layer."""
    rows = []
    for name, method in methods.items():
        errors = [layer[name] for layer in layers if layer[name] is not None]
        if not errors:
            continue
        row: dict[str, Any] = {
            "method": name,
            "format": method.format,
            "bits": method.bits,
            "bytes_per_weight": round(bytes_per_weight[name], 3),
            "layers": len(errors),
            "median_rel_err": round(median(errors), 5),
            "p90": round(float(torch.tensor(errors).quantile(0.9)), 5),
        }
        if method.against is not None:
            compared = pairs(layers, method.against, name)
            share = sum(own <= other for own, other in compared) / len(compared)
            row |= {"against": method.against, "share_ours_at_or_below": round(share, 4)}
        rows.append(row)
        print(row)
    return rows


def merged(results: dict[str, Any], layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """quality.json with these layers in the place of its earlier ones of the recipe "peers"."""
    form = {"format": "nvfp4", "recipe": "peers", "rank": RANK}
    others = [layer for layer in results["layers"] if layer["recipe"] != "peers"]
    compared = [
        {"layer": layer["layer"], **form, "ours": layer["ours-nvfp4"], "modelopt": layer["modelopt"]}
        for layer in layers
        if layer.get("modelopt") is not None
    ]
    return results | {"layers": others + compared}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--quality", type=Path, default=RESULTS / "quality.json", help="gets the layers of modelopt")
    args = parser.parse_args(arguments)
    methods = present()
    with torch.no_grad():
        groups = demo_groups(quality.job(256, quality.STEPS, "cpu")) + planted_groups()
        layers, bytes_per_weight = measure(groups, methods)
    rows = summary(layers, methods, bytes_per_weight)
    packages = sorted({method.package[1] for method in methods.values() if method.package is not None})
    versions = {package: version(package) for package in packages}
    args.output.write_text(
        json.dumps(environment() | {"versions": versions, "rows": rows, "layers": layers}, indent=1) + "\n"
    )
    args.quality.write_text(json.dumps(merged(json.loads(args.quality.read_text()), layers), indent=1) + "\n")
    print(f"wrote {args.output} and {args.quality}")


if __name__ == "__main__":
    main()
