"""Who is told that the GPU waits for Python."""

import pytest
import torch

from svdq_compile.config import Config
from svdq_compile.pace import BLOCKS, WARM, Pace

CUDA = torch.device("cuda", 0)
LINE = ": at this size the GPU waits for Python"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that has ended all work by the time the host comes to a block, or not: as `queue` says."""
    queue = []

    class Stream:
        def query(self):
            return queue.pop(0) if len(queue) > 1 else queue[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    return queue


def calls(model, pace, blocks, times):
    """The model, so many times; how many calls of it were looked at."""
    for call in range(times):
        for block in blocks:
            if not pace.is_known:
                pace.look(block, CUDA)
                if pace.is_known:
                    pace.tell(model)
                    return call + 1
    return times


@pytest.mark.parametrize(
    ("idle", "told"), [([True], 1), ([False], 0), ([False] * 8 + [True], 0), ([False] * 3 + [True], 1)],
    ids=["it waits", "it is behind", "it was behind at times", "it hardly ever was"],
)  # fmt: skip
def test_the_gpu_waits_for_the_host(gpu, capsys, idle, told):
    """Said once of a model, after the calls that compile, and nothing is looked at any more."""
    model, blocks = torch.nn.Identity(), [object() for _ in range(20)]
    for pace in (Pace(Config()), Pace(Config())):  # of two graphs, as FLUX's two kinds of blocks are
        gpu[:] = idle
        assert calls(model, pace, blocks, 100) == WARM + BLOCKS // 20 + 1
        assert pace.is_known
    assert capsys.readouterr().err.count(LINE) == told


def test_a_model_compiled_whole_is_not_judged(gpu, capsys):
    """What lies between two calls of it is the user's."""
    gpu[:] = [True]
    assert calls(torch.nn.Identity(), Pace(Config()), [object()], 1000) == WARM + BLOCKS + 1
    assert capsys.readouterr().err == ""


def test_who_needs_no_advice(gpu):
    assert Pace(Config(mode="reduce-overhead")).is_known
    assert Pace(Config(mode="max-autotune")).is_known
    assert not Pace(Config(mode="max-autotune-no-cudagraphs")).is_known


def test_on_a_cpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Pace(Config()).is_known
