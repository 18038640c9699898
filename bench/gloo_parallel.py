"""Several processes on a CPU quantize and run one small model: are the packs equal, and is the output that of one
process?

    python bench/gloo_parallel.py                       # every row, some ten minutes: results/gloo-parallel.json
    python bench/gloo_parallel.py --models flux --ranks 2 --kinds ulysses   # a part; the file's other rows stay

    kind        what the ranks split
    ulysses     tokens, of whose heads each does a part (diffusers' ContextParallelConfig)
    ring        tokens; keys and values go round
    unified     ring of 2 by ulysses of 2
    groups      ulysses of 2 in each half of the ranks, which get other pictures
    batch       pictures, or the two halves of guidance: each rank has its own
    tensor      weights (svdq_compile.parallelize), after they were quantized by all; packs_equal is of before

packs_equal: the checksums of all packs, over all ranks. rel_err: the output against one process that runs the same
packs eagerly. Models are in float32, so that rounding does not hide what a wrong token would do. diffusers' attention
on a CPU does not give the log-sum that a ring needs; here torch's does.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import step_models
import torch
import torch.distributed as dist
import torch.multiprocessing
from diffusers import ContextParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_map_only

import record
import svdq_compile as svdq
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.ranks import checksums

CPU = torch.device("cpu")
MODELS = {"flux": "flux", "wan": "wan2.1-14b", "qwen-image": "qwen-image", "sd3": "sd3.5-large"}
# SD3 has no plan for context parallelism in diffusers.
KINDS = {
    2: {
        "ulysses": ("flux", "wan", "qwen-image"),
        "ring": ("flux", "wan"),
        "batch": tuple(MODELS),
        "tensor": tuple(MODELS),
    },
    4: {
        "ulysses": ("flux", "wan", "qwen-image"),
        "unified": ("flux", "wan"),
        "groups": ("flux",),
        "batch": ("sd3",),
        "tensor": ("flux", "qwen-image"),
    },
}
DEGREES = {
    "ulysses": lambda size: {"ulysses_degree": size},
    "ring": lambda size: {"ring_degree": size},
    "unified": lambda size: {"ring_degree": 2, "ulysses_degree": size // 2},
    "groups": lambda size: {"ulysses_degree": 2},
}
HEAD = 64  # channels of a head where weights are split: a group of one of four ranks
TEXT = 64  # tokens: more than a linear with few rows has, on each of four ranks
OPTIONS = {"progress": False, "calibration_steps": 2, "refine": 2}


def build(name: str, head: int = 32) -> nn.Module:
    """A small model whose heads, of so many channels, four ranks can share."""
    spec = step_models.MODELS[MODELS[name]]
    config = spec.tiny_config | {"num_attention_heads": 4, "attention_head_dim": head}
    if "caption_projection_dim" in config:
        config["caption_projection_dim"] = 4 * head
    if "axes_dims_rope" in config:
        config["axes_dims_rope"] = (head // 4, head * 3 // 8, head * 3 // 8)
    with mock.patch.dict(step_models.MODELS, {"small": replace(spec, tiny_config=config)}):
        return step_models.build("small", True, CPU).float()


def inputs(name: str, model: nn.Module, seed: int) -> dict[str, Any]:
    """Of one picture."""
    call = step_models.inputs(MODELS[name], True, model, CPU, {"text": TEXT, "batch": 1}, seed)
    return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, call)


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """diffusers asks for an accelerator, and takes the log-sum of attention from kernels that need one."""
    from diffusers.models import attention_dispatch

    def attention(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> Any:
        q, k, v = (x.permute(0, 2, 1, 3) for x in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return (out.permute(0, 2, 1, 3), lse.permute(0, 2, 1)) if rest[-1] else out.permute(0, 2, 1, 3)

    with (
        mock.patch("torch.accelerator.device_count", return_value=1),
        mock.patch("torch._C._get_accelerator", return_value=CPU),
        mock.patch.object(attention_dispatch, "_native_attention_forward_op", attention),
    ):
        yield


def measured(name: str, kind: str) -> dict[str, Any]:
    """In each of the ranks: calibrated, compiled by blocks and run, against one process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    picture = {"batch": rank, "groups": rank // 2}.get(kind, 0)
    model = build(name)
    exact = model(**inputs(name, model, picture))[0]
    if kind in DEGREES:
        degrees = DEGREES[kind](size)
        if kind == "groups":
            mesh = init_device_mesh("cpu", (size // 2, 1, 2), mesh_dim_names=("halves", "ring", "ulysses"))
            degrees["mesh"] = mesh["ring", "ulysses"]
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
        model(**inputs(name, model, picture))  # diffusers' hooks look up arguments then, which Dynamo cannot
    model.compile_repeated_blocks(backend="svdquant", fullgraph=True, dynamic=False, options=OPTIONS)
    for call in range(OPTIONS["calibration_steps"]):
        model(**inputs(name, model, 10 + 10 * call + picture))
    output = model(**inputs(name, model, picture))[0]
    alone = _in_one_process(model, name)(**inputs(name, model, picture))[0]
    return _row(name, kind, _sums(model), output, alone, exact)


def tensor_parallel(name: str, kind: str) -> dict[str, Any]:
    """In each of the ranks: calibrated together, split, compiled by blocks and run, against one process."""
    model = build(name, HEAD)
    call = inputs(name, model, 0)
    exact = model(**call)[0]
    others = [inputs(name, model, 10 + 10 * place) for place in range(OPTIONS["calibration_steps"])]
    svdq.quantize(model, calibrate=lambda model: [model(**other) for other in others], **OPTIONS)
    sums = _sums(model)
    alone = _in_one_process(model, name, HEAD)(**call)[0]
    svdq.parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)), progress=False)
    model.compile_repeated_blocks(backend="svdquant", fullgraph=True, dynamic=False, options=OPTIONS)
    return _row(name, kind, sums, model(**call)[0], alone, exact)


def _sums(model: nn.Module) -> list[list[int]]:
    own = [weight._svdq for weight in model.parameters() if isinstance(weight, QuantizedWeight)]
    return [checksums([*packed.plain_tensors().values(), packed.shared.smooth, packed.down]) for packed in own]


def _row(name: str, kind: str, sums: list, output: Tensor, alone: Tensor, exact: Tensor) -> dict[str, Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (sums, _apart(output, alone), _apart(output, exact)))
    return {
        "model": name,
        "ranks": len(found),
        "kind": kind,
        "packs": len(sums),
        "packs_equal": bool(sums) and all(other == sums for other, *_ in found),
        "rel_err": max(error for _, error, _ in found),
        "rel_err_to_16_bit": max(error for *_, error in found),
    }


def _in_one_process(model: nn.Module, name: str, head: int = 32) -> nn.Module:
    """A model with the same packs that knows of no other ranks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.svdq.safetensors"
        svdq.save(model, path, progress=False)
        alone = build(name, head)
        svdq.load(alone, path, device="cpu", progress=False)
    return alone


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _process(rank: int, size: int, folder: Path, make: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    with on_a_cpu():
        torch.save(make(*arguments), folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(size: int, make: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `make` gives in each of `size` processes. Raises what one of them raises."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (size, Path(folder), make, arguments), nprocs=size)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=KINDS, default=list(KINDS))
    parser.add_argument("--kinds", nargs="+", choices=[*DEGREES, "batch", "tensor"], default=None)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "gloo-parallel.json")
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for size in options.ranks:
        for kind, models in KINDS[size].items():
            for name in models:
                if name in options.models and kind in (options.kinds or KINDS[size]):
                    make = tensor_parallel if kind == "tensor" else measured
                    row = on_ranks(size, make, name, kind)[0]
                    print(row, flush=True)
                    key = ("model", "ranks", "kind")
                    rows = [*(r for r in rows if any(r[part] != row[part] for part in key)), row]
                    record.write(options.out, rows)


if __name__ == "__main__":
    main()
