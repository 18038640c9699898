"""Other models in the same process: Dynamo converts, guards and limits them as it would without this package."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN
from torch._inductor.utils import run_and_get_code

from conftest import compiled, inputs, net, quiet
from svdq_compile.backend import svdquant
from svdq_compile.parameter import QuantizedWeight

NAMES = (
    "recompile_limit",
    "accumulated_recompile_limit",
    "skip_tensor_guards_with_matching_dict_tags",
    "use_recursive_dict_tags_for_guards",
)


def settings() -> tuple:
    return tuple(getattr(torch._dynamo.config, name) for name in NAMES)


def torchs_own() -> tuple:
    return tuple(torch._dynamo.config._config[name].default for name in NAMES)


class Eager:
    """A backend that counts its graphs and notes Dynamo's settings while it works."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def __call__(self, gm, example_inputs) -> Callable:
        self.seen.append(settings())
        return gm


class Around(Eager):
    """A backend of somebody's own that hands the graphs on to ours."""

    def __call__(self, gm, example_inputs) -> Callable:
        done = svdquant(gm, example_inputs, options=quiet())
        super().__call__(gm, example_inputs)
        return done


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@pytest.fixture
def fixed_sizes() -> Iterator[None]:
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


def quantized() -> nn.Module:
    run = compiled(net())
    for _ in range(2):
        run(*inputs())
    assert any(isinstance(p, QuantizedWeight) for p in run.parameters())
    return run


def test_settings_are_torchs_own_before_and_after() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(quantized).result()
        quantized()
        assert torchs_own()[:2] == (8, 256), "the defaults of every thread"
        assert pool.submit(settings).result() == settings() == torchs_own()


def test_another_model_has_torchs_limit(fixed_sizes: None) -> None:
    ours, backend, other = quantized(), Eager(), Other()
    run = torch.compile(other, backend=backend)
    for tokens in range(20, 32):
        ours(*inputs(tokens=tokens))
        run(torch.randn(tokens, 8))
    assert backend.seen == [torchs_own()] * 8, "after eight sizes torch goes on eagerly"


@pytest.mark.parametrize("threads", [0, 2])
def test_a_backend_around_ours_has_our_settings(fixed_sizes: None, threads: int) -> None:
    """Each block has a compiled function of its own; the last ones are converted only after torch's limit."""
    model, backend = net(blocks=4), Around()
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)

    def call(tokens: int) -> None:
        with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            model.blocks[tokens % 4](torch.randn(2, tokens, 128), torch.randn(2, 128))

    for _ in range(2):
        model(*inputs())
    before = len(backend.seen)
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(call, range(30, 42)))
    else:
        for tokens in range(30, 42):
            call(tokens)
    assert len(backend.seen) == before + 12
    assert set(backend.seen) == {(256, 4096, False, False)}
    assert settings() == torchs_own()


def test_limits_that_somebody_has_set_stay(fixed_sizes: None) -> None:
    backend = Around()
    with torch._dynamo.config.patch(recompile_limit=5, accumulated_recompile_limit=6000):
        torch.compile(net(), backend=backend)(*inputs())
        assert settings()[:2] == (5, 6000)
    assert backend.seen == [(5, 6000, False, False)]


def test_guards_of_another_model_are_built_by_torchs_settings() -> None:
    """The settings count where guards are made, which is after the backend was called."""
    seen: list[tuple] = []

    def filter_guards(guards: list) -> list[bool]:
        seen.append(settings())
        return [True] * len(guards)

    ours = torch.compile(net(), backend="svdquant", options=quiet() | {"guard_filter_fn": filter_guards})
    ours(*inputs())
    assert seen == [(256, 4096, False, False)]
    seen.clear()
    torch.compile(Other(), backend=Eager(), options={"guard_filter_fn": filter_guards})(torch.randn(2, 8))
    assert seen == [torchs_own()]


def test_a_backend_that_imports_ours_only_when_it_is_called() -> None:
    """Then the first conversion is under way already; its guards must look at the weights all the same."""
    code = (
        "import torch\n"
        "graphs = []\n"
        "def backend(gm, inputs):\n"
        "    from svdq_compile.backend import svdquant\n"
        "    graphs.append(gm)\n"
        "    return svdquant(gm, inputs, options={'progress': False, 'calibration_steps': 1})\n"
        "net = torch.nn.Sequential(torch.nn.Linear(128, 128)).requires_grad_(False)\n"
        "run = torch.compile(net, backend=backend)\n"
        "for _ in range(3): run(torch.ones(2, 20, 128))\n"
        "print(len(graphs), type(net[0].weight).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout == "2 QuantizedWeight\n", done.stderr


def test_a_failed_conversion_leaves_no_settings() -> None:
    run = torch.compile(net(), backend="svdquant", options={"precison": "int4"})
    with pytest.raises(Exception, match="precison"):
        run(*inputs())
    assert settings() == torchs_own()


def test_inductor_writes_the_same_code() -> None:
    def code() -> list[str]:
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
            (text,) = run_and_get_code(torch.compile(Other(), backend="inductor"), torch.ones(2, 8))[1]
            return text.split("\n")[1:]  # without the running number of the graph

    registered = {name: made for name, made in CUSTOM_EXTERN_KERNEL_CODEGEN.items() if ".svdq." in name}
    for name in registered:
        del CUSTOM_EXTERN_KERNEL_CODEGEN[name]
    before = code()
    CUSTOM_EXTERN_KERNEL_CODEGEN.update(registered)
    quantized()
    assert code() == before
    assert registered or any(".svdq." in name for name in CUSTOM_EXTERN_KERNEL_CODEGEN)


def test_functions_that_are_disabled_alone_still_are() -> None:
    """Dynamo finds out about them by looking at the caller of its own frames: nothing may stand in between."""

    @torch.compiler.disable(recursive=False)
    def outside(x: Tensor) -> Tensor:
        return inside(x) + 1

    def inside(x: Tensor) -> Tensor:
        return x * 2

    backend = Eager()
    run = torch.compile(lambda x: outside(x).sin(), backend=backend)
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 3.0).sin())
    assert len(backend.seen) == 2, "what is called inside, and the rest; not the function itself"
