"""Saving to a path: whole or not at all, beside others who save there, and what is left behind is removed."""

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch

import svdq_compile as svdq
from conftest import Net, inputs, net, quiet
from svdq_compile.replacing import replacing


def child(work: Callable[[], object]) -> int:
    """Do this in another process, which ends with 0 if nothing was raised -> its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def end_of(pid: int) -> int:
    """What a process ends with; minus the signal's number if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def soon(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_takes_the_place(old: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a[1]*.txt"
    if old is not None:
        file.write_text(old)
    write(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == [file.name]


def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")

    def fail() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_many_threads_to_one_path(tmp_path: Path) -> None:
    file, failed = tmp_path / "a", []

    def several(number: int) -> None:
        try:
            for _ in range(20):
                write(file, str(number) * 1000)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=several, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set(file.read_text())) == 1
    assert len(file.read_text()) == 1000
    assert os.listdir(tmp_path) == ["a"]


def test_many_processes_to_one_path(tmp_path: Path) -> None:
    file = tmp_path / "a"
    children = [child(lambda text=str(n) * 1000: [write(file, text) for _ in range(50)]) for n in range(4)]
    assert [end_of(pid) for pid in children] == [0] * 4
    assert file.read_text() in [str(n) * 1000 for n in range(4)]
    assert os.listdir(tmp_path) == ["a"]


def test_leftovers_of_a_killed_save_go_and_those_of_a_running_one_stay(tmp_path: Path) -> None:
    file = tmp_path / "a"

    def half() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            time.sleep(60)

    killed, running = child(half), child(half)
    try:
        soon(lambda: [path.read_text() for path in tmp_path.glob(".a.*/a")] == ["half"] * 2)
        os.kill(killed, signal.SIGKILL)
        end_of(killed)
        write(file, "new")
        assert [path.read_text() for path in tmp_path.glob(".a.*/a")] == ["half"]
    finally:
        os.kill(running, signal.SIGKILL)
        end_of(running)
    write(file, "newer")
    assert os.listdir(tmp_path) == ["a"]


@cache
def quantized(seed: int) -> Net:
    model = net(seed=seed, dtype=torch.bfloat16)
    svdq.quantize(model, svdq.Config(**quiet()), calibrate=lambda m: m(*inputs(dtype=torch.bfloat16)))
    return model


def save(seed: int, file: Path) -> None:
    svdq.save(quantized(seed), file, progress=False)


def whose(file: Path) -> int:
    """Which of two models a file holds, whole."""
    with torch.device("meta"):
        model = Net().to(torch.bfloat16)
    svdq.load(model, file, progress=False)
    biases = [torch.equal(model.embed.bias, quantized(seed).embed.bias) for seed in (0, 1)]
    assert sum(biases) == 1
    return biases.index(True)


def test_saves_that_are_killed_leave_a_whole_file(tmp_path: Path) -> None:
    file, draw, left, found = tmp_path / "model", Random(0), 0, set()

    def again_and_again() -> None:
        while True:
            save(0, file)
            save(1, file)

    save(1, file)
    save(0, file)
    for _ in range(20):
        pid = child(again_and_again)
        time.sleep(0.2 * draw.random())
        os.kill(pid, signal.SIGKILL)
        assert end_of(pid) == -signal.SIGKILL
        found.add(whose(file))
        left += len(os.listdir(tmp_path)) > 1
        assert len(os.listdir(tmp_path)) <= 2  # each removes what the one before has left
    assert found == {0, 1}
    assert left  # else none was killed while it wrote
    save(1, file)
    assert os.listdir(tmp_path) == ["model"]
    assert whose(file) == 1


def test_threads_that_save_models_to_one_path(tmp_path: Path) -> None:
    for seed in (0, 1):
        quantized(seed)
    file, failed = tmp_path / "model", []

    def several(seed: int) -> None:
        try:
            for _ in range(5):
                save(seed, file)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=several, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert whose(file) in (0, 1)
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_a_disk_that_fills(part: float, tmp_path: Path) -> None:
    file = tmp_path / "model"
    save(0, file)
    before = file.read_bytes()

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * len(before)), resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=f"cannot write {file}: .*File too large"):
            save(1, file)

    assert end_of(child(full)) == 0
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "a", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path / "elsewhere") == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_rights(umask: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        write(tmp_path / "a", "new")
        (tmp_path / "b").write_text("old")
        (tmp_path / "b").chmod(0o640)
        write(tmp_path / "b", "new")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640


def test_errors_name_the_path_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "no" / "a")
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'dir'}: it is no file"):
        write(tmp_path / "dir", "x")
    for path in (tmp_path / "no" / "a", tmp_path / "link"):
        with pytest.raises(FileNotFoundError, match=f"cannot write {path}: No such file"):
            write(path, "x")
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("No space left on device")):
        with pytest.raises(OSError, match=f"cannot write {tmp_path / 'a'}: No space left"), replacing(tmp_path / "a"):
            raise error
    assert sorted(os.listdir(tmp_path)) == ["dir", "link"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """Such as /dev/null, for one who may."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"cannot write \S+/pipe: it is no file"):
        write(pipe, "x")
    assert pipe.is_fifo()


@pytest.mark.parametrize("letter", ["a", "\N{GREEK SMALL LETTER OMEGA}"])
def test_the_longest_name_there_can_be(letter: str, tmp_path: Path) -> None:
    name = letter * (255 // len(letter.encode()))
    write(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]
