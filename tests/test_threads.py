"""Models in the threads of a service: compiled in one, called in others, several at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import svdq_compile as svdq
from conftest import FLIPPED_CODES, compiled, inputs, net, quiet, relative_error
from svdq_compile.parameter import QuantizedWeight

SIZES = range(20, 32)


@pytest.fixture
def model() -> torch.nn.Module:
    """Compiled for fixed sizes and quantized, in the main thread."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        made = compiled(net())
        for _ in range(2):
            made(*inputs())
    return made


def call(model: torch.nn.Module, tokens: int) -> Tensor:
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        return model(*inputs(tokens=tokens))


@pytest.mark.parametrize("threads", [1, 4])
def test_more_sizes_than_dynamos_limit(model: torch.nn.Module, threads: int) -> None:
    """More than 8: torch's own limit, which each thread would begin with."""
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda tokens: call(model, tokens), SIZES))
    for tokens, result in zip(SIZES, results, strict=True):
        assert relative_error(result, model._orig_mod(*inputs(tokens=tokens))) < 10 * FLIPPED_CODES


def test_no_weight_changes_while_another_thread_traces() -> None:
    """Dynamo makes its guards after the backend has returned, and fails if a weight's class is another by then."""
    model, held, changed = net(), threading.Event(), threading.Event()

    def quantize() -> None:
        held.wait(60)
        svdq.quantize(model, svdq.Config(**quiet(refine=0)))
        changed.set()

    thread = threading.Thread(target=quantize)
    thread.start()
    with torch._dynamo.convert_frame.compile_lock:
        held.set()
        assert not changed.wait(4.0)
        assert not any(isinstance(weight, QuantizedWeight) for weight in model.parameters())
    thread.join()
    assert any(isinstance(weight, QuantizedWeight) for weight in model.parameters())
