"""A small model of repeated blocks, and a clean compiler for each test."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Small work, many threads: with more than one, starting them costs more than they give.
torch.set_num_threads(1)

# Inductor's pool of compile processes is forked beside running threads and may hang; each worker compiles by itself.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("SVDQ_VERIFY", "1")  # the passes check every graph (passes/verify.py)

WIDTH, TOKENS, CHANNELS = 128, 24, 16

# How far two compilations of the same arithmetic may be apart: their fp32 rounding differs, and where a value lies
# between two int8 codes that flips one code in many thousands. A real mistake is off by a percent or more.
FLIPPED_CODES = 1e-3


class Block(nn.Module):
    """What transformers' blocks have in common: siblings that read one tensor, GELU, a modulation with one row a
    sample.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(F.silu(condition))[:, None].chunk(2, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        x = x + torch.tanh(self.to_q(h)) * self.to_k(h)
        return x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


class Net(nn.Module):
    """Embedder, repeated blocks, final projection."""

    def __init__(self, blocks: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.project = nn.Linear(width, CHANNELS)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.project(x)


def net(seed: int = 0, blocks: int = 2, dtype: torch.dtype = torch.float32) -> Net:
    """A Net with random weights, ready for inference."""
    torch.manual_seed(seed)
    return Net(blocks).to(dtype).eval().requires_grad_(False)


def inputs(batch: int = 2, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs of a Net, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, tokens, CHANNELS, generator=generator).to(dtype)
    return x, torch.randn(batch, WIDTH, generator=generator).to(dtype)


def run_eagerly(gm: fx.GraphModule, *_: Any) -> Callable:
    """Instead of Inductor, which takes seconds: our operators, one by one."""
    return gm.forward


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor would compile is run eagerly."""
    for module in ("compiled", "undecided"):
        monkeypatch.setattr(f"svdq_compile.{module}.compile_with_inductor", run_eagerly)


def compiled(model: nn.Module, **options) -> nn.Module:
    """The whole model through the backend, quiet, quantized after one observed call unless told otherwise."""
    return torch.compile(model, backend="svdquant", fullgraph=True, options=quiet(**options))


def quiet(**options) -> dict:
    """Options for a test: no progress on the terminal, one observed call, few refinement rounds, failures raised."""
    return {"progress": False, "calibration_steps": 1, "refine": 2, "fallback": False} | options


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.float() - b.float()).norm() / b.float().norm())


@contextmanager
def logged(name: str, level: int = logging.DEBUG) -> Iterator[list[logging.LogRecord]]:
    """Within the context, the list gets what this logger says; pytest's own way is switched off in pyproject.toml."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger(name)
    handler.emit = records.append  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-of-each", action="store_true", help="of a test with parameters, the last ones only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--one-of-each` (compat.py), one item of each test: the last, whose parameters ask for the most."""
    if config.getoption("--one-of-each"):
        items[:] = {(item.path, item.function): item for item in items}.values()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Dynamo forgets what other tests compiled, random numbers do not depend on which tests ran before, and nothing
    records gradients unless a test wants to.
    """
    torch._dynamo.reset()
    torch.manual_seed(2026)  # not 0, which tests make their models with
    with torch.no_grad():
        yield
