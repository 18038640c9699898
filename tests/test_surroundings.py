"""The process around a model: threads of a service, forked and interrupted processes, and what a process may lack, as
memory, a compiler, a home, a terminal.
"""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import DataLoader, Dataset

import svdq_compile as svdq
from conftest import FLIPPED_CODES, Net, inputs, net, quiet, relative_error
from svdq_compile import decisions
from svdq_compile.errors import WeightsReleased
from svdq_compile.lowering import packed
from svdq_compile.parameter import QuantizedWeight

CLOSE = 0.06  # w4a8 of this net; a layer left out or doubled is above 0.1


def count(model: nn.Module) -> int:
    return sum(isinstance(p, QuantizedWeight) for p in model.parameters())


def quantized(**options: Any) -> Net:
    model = net()
    svdq.quantize(model, svdq.Config(**quiet(**options)))
    return model


# Threads.


def error_of(model: nn.Module, expected: torch.Tensor) -> float:
    with torch.inference_mode():
        return relative_error(model(*inputs()), expected)


@pytest.mark.usefixtures("without_inductor")
def test_first_calls_of_eight_threads_at_once(capfd: pytest.CaptureFixture) -> None:
    model, expected, together = net(), net()(*inputs()), threading.Barrier(8)
    svdq.compile(model, **quiet(calibration_steps=4) | {"progress": True})

    def call(_: int) -> list[float]:
        together.wait(60)
        return [error_of(model, expected) for _ in range(4)]

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(call, range(8)))
    assert count(model) == 10
    assert all(each < CLOSE for own in errors for each in own)
    assert all(own[-1] > 1e-3 for own in errors), "in 4 bits in the end"
    told = capfd.readouterr().err
    assert told.count("10 linears quantized") == 1
    assert told.count("observing 1 of 4 calls") == 1


@pytest.mark.usefixtures("without_inductor")
def test_two_models_in_two_threads() -> None:
    models, expected = [net(0), net(1)], [net(0)(*inputs()), net(1)(*inputs())]
    for model in models:
        svdq.compile(model, **quiet(calibration_steps=2))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            errors = list(pool.map(lambda i: error_of(models[i % 2], expected[i % 2]), range(4)))
    assert [count(model) for model in models] == [10, 10]
    assert all(1e-3 < each < CLOSE for each in errors)


@pytest.mark.usefixtures("without_inductor")
def test_an_adapter_switched_between_calls_of_a_pool() -> None:
    models = [net(), net()]
    svdq.compile(models[0], **quiet())
    for model in models:
        torch.manual_seed(7)
        for name in ("style", "night"):
            config = LoraConfig(target_modules=["up", "to_q"], r=4, init_lora_weights=False)
            inject_adapter_in_model(config, model, name)
    with ThreadPoolExecutor(4) as pool:
        for name in ("style", "night"):
            for model in models:
                for layer in model.modules():
                    if isinstance(layer, BaseTunerLayer):
                        layer.set_adapter(name)
                model.requires_grad_(False)
            expected = models[1](*inputs())
            for _ in range(2):
                errors = list(pool.map(lambda _, expected=expected: error_of(models[0], expected), range(4)))
            assert all(1e-3 < each < CLOSE for each in errors), name
    assert relative_error(expected, net()(*inputs())) > 0.1, "the adapters do something"


@pytest.mark.usefixtures("without_inductor")
def test_asyncio() -> None:
    model, expected = net(), net()(*inputs())
    svdq.compile(model, **quiet(calibration_steps=2))

    async def serve() -> list[float]:
        for _ in range(3):
            await asyncio.to_thread(error_of, model, expected)
        return await asyncio.gather(*(asyncio.to_thread(error_of, model, expected) for _ in range(6)))

    assert all(1e-3 < each < CLOSE for each in asyncio.run(serve()))


# Other processes.


def in_a_fork(act: Callable[[], Any]) -> str:
    """What `act` gives in a forked child, as text; "hangs" after a minute."""
    end, start = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(start, repr(act()).encode())
        except BaseException as error:
            os.write(start, repr(error).encode())
        os._exit(0)
    os.close(start)
    for _ in range(600):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hangs"
    with os.fdopen(end) as pipe:
        return pipe.read()


LOCKS: dict[str, Callable[[], Any]] = {
    "of weights": lambda: decisions.LOCK,
    "of packs": lambda: packed._LOCK,
    "of Dynamo": lambda: torch._dynamo.convert_frame.compile_lock,
}


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.usefixtures("without_inductor")
def test_a_fork_while_another_thread_quantizes(name: str) -> None:
    """The thread that holds the lock is not there in the child, to open it."""
    model, held, done = net(), threading.Event(), threading.Event()
    expected, args = net()(*inputs()), inputs()

    def hold() -> None:
        with LOCKS[name]():
            held.set()
            done.wait(120)

    def work() -> list[bool]:
        svdq.quantize(model, svdq.Config(**quiet()), calibrate=lambda m: m(*args))
        run = torch.compile(model, backend="svdquant", options=quiet())
        return [1e-3 < relative_error(each(*args), expected) < CLOSE for each in (model, run)]

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        assert in_a_fork(work) == "[True, True]"
    finally:
        done.set()
        thread.join()


def test_a_fork_within_a_lock_of_its_own_goes_on() -> None:
    def work() -> bool:
        return decisions.LOCK._is_owned()  # type: ignore[attr-defined]

    with decisions.LOCK:
        assert in_a_fork(work) == "True"
    assert in_a_fork(work) == "False"


@pytest.mark.usefixtures("without_inductor")
def test_a_child_goes_on_observing_for_itself() -> None:
    model, expected, args = net(), net()(*inputs()), inputs()
    run = torch.compile(model, backend="svdquant", options=quiet(calibration_steps=2))
    run(*args)

    def work() -> list[bool]:
        return [relative_error(run(*args), expected) > 1e-3 for _ in range(3)]

    assert in_a_fork(work) == "[False, True, True]"
    assert count(model) == 0
    assert work() == [False, True, True]


class Features(Dataset):
    """Its workers call the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.model(*inputs())


def test_workers_of_a_data_loader() -> None:
    model = quantized()
    expected = model(*inputs())
    for loaded in DataLoader(Features(model), num_workers=1, multiprocessing_context="fork"):
        assert relative_error(loaded[0], expected) < FLIPPED_CODES
    with pytest.raises(WeightsReleased, match=r"to another process.*svdq_compile\.save"):
        iter(DataLoader(Features(model), num_workers=1, multiprocessing_context="spawn"))


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, "/dev/null")], ids=["pickle", "torch"])
def test_pickles_are_refused(write: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(WeightsReleased, match=r"svdq_compile\.save\(model, path\)"):
        write(quantized())


def child(code: str, *options: str, environment: dict[str, str | None] | None = None, **arguments: Any) -> Any:
    """Run a program. environment: what is set, None for what is not."""
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)} | (environment or {})
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        timeout=500,
        env={name: value for name, value in given.items() if value is not None},
        **arguments,
    )


INTERRUPTED = """
import os, random, signal, sys, threading, time, torch
import svdq_compile as svdq
from conftest import inputs, net, quiet, relative_error, run_eagerly
from svdq_compile import compiled, decisions, progress, undecided
from svdq_compile.lowering import packed

compiled.compile_with_inductor = undecided.compile_with_inductor = run_eagerly
torch.set_grad_enabled(False)
args, random = inputs(), random.Random(1)
expected = net()(*args)

def interrupt(seconds):
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGINT)

def run(model, calls):
    call = torch.compile(model, backend="svdquant", options=quiet(calibration_steps=2) | {"progress": True})
    begin = time.monotonic()
    for _ in range(calls):
        output = call(*args)
    return relative_error(output, expected), time.monotonic() - begin

_, seconds = run(net(), 4)
for _ in range(6):
    torch._dynamo.reset()
    model = net()
    thread = threading.Thread(target=interrupt, args=(random.random() * seconds,))
    try:
        thread.start()
        run(model, 4)
        thread.join()
        time.sleep(1)
    except KeyboardInterrupt:
        pass
    except AssertionError as error:  # a guard was running Python code: torch takes what is raised there for its answer
        assert "Guard failed on the same frame" in str(error), error
    assert not decisions.LOCK._is_owned() and not packed._LOCK.locked() and not progress._DISPLAY._lock._is_owned()
    found = []
    other = threading.Thread(target=lambda: found.append(run(model, 4)[0]), daemon=True)
    other.start()
    other.join(60)
    assert found and 1e-3 < found[0] < 0.06, found
print("right", flush=True)
"""


def test_interrupted_at_random() -> None:
    done = child(INTERRUPTED)
    assert done.stdout == "right\n", done.stderr[-3000:]


MEMORY = """
import resource, torch
import svdq_compile as svdq
from conftest import relative_error

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(6))).requires_grad_(False)
x = torch.randn(20, 1024)
expected = model(x)
model[0](x)

def limit(spare):
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + spare if spare else resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def count():
    return sum(type(p).__name__ == "QuantizedWeight" for p in model.parameters())

limit(9 << 20)
try:
    svdq.quantize(model, rank=16, refine=1, progress=False)
    print("enough")
except Exception as error:
    limit(0)
    print("memory" in str(error), count() < 6, relative_error(model(x), expected) < 0.2)
limit(0)
svdq.quantize(model, rank=16, refine=1, progress=False)
print(count(), relative_error(model(x), expected) < 0.2)
"""


def test_a_limit_on_memory() -> None:
    done = child(MEMORY)
    assert done.stdout == "True True True\n6 True\n", done.stdout + done.stderr[-3000:]


PROGRAM = """
import sys, torch
import svdq_compile as svdq
from conftest import inputs, net, relative_error

torch.set_grad_enabled(False)
model, path = net(blocks=1), sys.argv[1]
expected = model(*inputs())
svdq.quantize(model, rank=16, refine=1, calibrate=lambda model: model(*inputs()))
svdq.save(model, path)
other = svdq.load(net(3, blocks=1), path)
print(svdq.report(model))
if sys.argv[2:]:
    svdq.compile(other)
errors = [relative_error(each(*inputs()), expected) for each in (model, other)]
svdq.restore(other, dequantize=True)
print(all(1e-3 < error < 0.06 for error in errors), end="", flush=True)
"""
SURROUNDINGS: dict[str, tuple[tuple[str, ...], dict[str, str | None]]] = {
    "warnings are errors": (("-W", "error"), {}),
    "ASCII": ((), {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii:replace"}),
    "optimized, without a home and a place for files": (
        ("-O",),
        {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "XDG_CACHE_HOME": None, "SVDQ_CACHE": None},
    ),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_program_in(name: str, tmp_path: Path) -> None:
    options, environment = SURROUNDINGS[name]
    done = child(f"import sys; sys.argv += [{str(tmp_path / 'file')!r}]\n" + PROGRAM, *options, environment=environment)
    assert done.stdout.endswith("True"), done.stderr[-3000:]
    assert "5 linears quantized" in done.stderr


def test_no_compiler_for_cpus(tmp_path: Path) -> None:
    arguments = f"import sys; sys.argv += [{str(tmp_path / 'file')!r}, 'compiled']\n"
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = child(arguments + PROGRAM, environment={"CXX": "/nonexistent/g++"} | cache)
    assert done.stdout.endswith("True"), done.stderr[-3000:]
    assert "runs eagerly, what is quantized in 4 bits" in done.stderr
    assert "No working C++ compiler" in done.stderr


@pytest.mark.parametrize("to", ["closed", "a reader that has gone"])
def test_the_command_line_without_a_stdout(to: str, tmp_path: Path) -> None:
    svdq.save(quantized(), tmp_path / "file", progress=False)
    command = f"{sys.executable} -c 'from svdq_compile.cli import main; main()' inspect {tmp_path / 'file'} --layers"
    end = ">&-" if to == "closed" else "| true"
    done = subprocess.run(f"{command} {end}", shell=True, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr
