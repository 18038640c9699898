"""diffusers' models over processes on this machine: joined exchanges are fewer, and change no bit of what comes out."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from fusion_testing import count, run
from ranks_testing import on_ranks
from torch import fx
from torch._inductor.compile_fx import compile_fx

from svdq_compile import compiled
from svdq_compile.config import FUSIONS
from svdq_compile.passes import fuse
from zoo import make

diffusers = pytest.importorskip("diffusers")
SEND = torch.ops._c10d_functional.all_to_all_single.default
APART = tuple(name for name in FUSIONS if name != "exchanges")
HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "flux": HEADS | {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (8, 12, 12)},
    "wan": HEADS | {"num_layers": 1},
}


def exchanges(name: str, regional: bool) -> list[tuple[int, int]]:
    """In a rank: of each graph how many there are apart, and joined. Each call runs both, which must give the same."""
    numbers: list[tuple[int, int]] = []

    def compile_both(gm: fx.GraphModule, inputs: list, mode: str | None, rewrite: Callable) -> Callable:
        def inner(joined: fx.GraphModule, *_: Any, **__: Any) -> Callable:
            apart = copy.deepcopy(joined)
            fuse(apart, APART)
            rewrite(joined)
            numbers.append((count([apart], SEND), count([joined], SEND)))

            def call(*args: Any) -> Any:
                expected, found = apart(*args), joined(*args)
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
                return found

            return make_boxed_func(call)

        return compile_fx(gm, list(inputs), inner_compile=inner)  # type: ignore[return-value]

    model, inputs = make(name, torch.bfloat16, **MODELS[name])
    with (
        mock.patch.object(compiled, "compile_with_inductor", compile_both),
        mock.patch("torch.accelerator.device_count", return_value=1),
        mock.patch("torch._C._get_accelerator", return_value=torch.device("cpu")),
    ):
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=dist.get_world_size()))
        model(**inputs)  # its hooks look up arguments then, which Dynamo cannot
        assert run(model, inputs, regional).isfinite().all()
    return numbers


@pytest.mark.parametrize(
    ("size", "name", "regional", "expected"),
    [(2, "flux", False, [(8, 4)]), (4, "wan", True, [(4, 2)])],
)
def test_the_same(size: int, name: str, regional: bool, expected: list, tmp_path: Path) -> None:
    assert on_ranks(size, exchanges, tmp_path, name, regional, patience=120) == [expected] * size
