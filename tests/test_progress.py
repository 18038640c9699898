"""What is told while something takes long: in a log and on a terminal, without a model."""

import io
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest

from conftest import logged
from svdq_compile import progress
from svdq_compile.progress import Activity, say, steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> str:
        """What is left of the last line, and those above it, once the terminal has done as it was told."""
        lines = self.getvalue().split("\n")
        return "\n".join(line.rpartition("\r\x1b[K")[2] for line in lines)


S = TypeVar("S", bound=io.StringIO)


def stderr_becomes(stream: S, monkeypatch: pytest.MonkeyPatch) -> S:
    """For progress.py alone: pytest puts its own stream back between a fixture and the test."""
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return stderr_becomes(Terminal(), monkeypatch)


@pytest.fixture
def log_file(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    return stderr_becomes(io.StringIO(), monkeypatch)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A day is a second: a line every 0.3 s."""
    monkeypatch.setattr(progress, "EVERY", 0.3)
    monkeypatch.setattr(progress, "REFRESH", 0.05)
    monkeypatch.setattr(progress._DISPLAY, "_last", time.monotonic())


def test_a_terminal_has_a_line_that_goes_away(terminal: Terminal) -> None:
    with Activity(lambda: "Net: compiling", True, opening="Net: compiling, a minute", hint=", a minute"):
        assert terminal.screen() == "svdquant: Net: compiling, a minute"
        say("svdquant: done", True)
        assert terminal.screen() == "svdquant: done\n"
    assert terminal.screen() == "svdquant: done\n"


def test_a_terminal_shows_what_is_innermost(terminal: Terminal) -> None:
    with Activity(lambda: "outside", True):
        with Activity(lambda: "inside", True):
            assert terminal.screen() == "svdquant: inside"
        assert terminal.screen() == "svdquant: outside"
    assert terminal.screen() == ""


def test_a_terminal_counts_seconds(terminal: Terminal, quick: None) -> None:
    with Activity(lambda: "waiting", True, since=time.monotonic() - 0.9):
        time.sleep(0.5)
        assert terminal.screen() == "svdquant: waiting, 1 s"


def test_a_line_is_no_wider_than_the_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    with Activity(lambda: "quantizing " * 20, True):
        assert len(terminal.screen()) == 29, "one more would begin a second line, which is not cleared"


def test_a_warning_begins_a_line_of_its_own(terminal: Terminal) -> None:
    with Activity(lambda: "compiling", True):
        logging.getLogger("svdq_compile").warning("this failed")
        assert not terminal.screen().startswith("svdquant: compiling")


def test_a_log_has_the_opening_alone(log_file: io.StringIO) -> None:
    for _ in range(3):
        with Activity(lambda: "quantizing 1 of 2", True, opening="quantizing 2 blocks"):
            pass
        with Activity(lambda: "quantizing 2 of 2", True):
            pass
    assert log_file.getvalue() == "svdquant: quantizing 2 blocks\n" * 3


def test_a_log_has_a_line_now_and_then(log_file: io.StringIO, quick: None) -> None:
    done = 0
    with Activity(lambda: f"quantizing {done} of 9", True, opening="quantizing 9 blocks"):
        for done in range(5):  # noqa: B007
            time.sleep(0.2)
    opening, *others = log_file.getvalue().splitlines()
    assert opening == "svdquant: quantizing 9 blocks"
    assert 1 < len(others) < 5
    assert all(line.startswith("svdquant: quantizing") and line.endswith("s so far") for line in others)
    assert len(set(others)) == len(others)


def test_short_activities_are_told_by_the_time_since_their_stage_began(log_file: io.StringIO, quick: None) -> None:
    begun = time.monotonic()
    for i in range(1, 9):
        with Activity(lambda i=i: f"observing {i} of 8", True, since=begun):  # type: ignore[misc]
            pass
        time.sleep(0.15)
    lines = log_file.getvalue().splitlines()
    assert 2 <= len(lines) <= 4
    assert lines[0].startswith("svdquant: observing 3 of 8") or lines[0].startswith("svdquant: observing 4 of 8")


def test_steps_are_counted_and_a_short_loop_says_nothing(log_file: io.StringIO, quick: None) -> None:
    assert list(steps([1, 2, 3], "saving Net", True)) == [1, 2, 3]
    assert list(steps([], "saving Net", True)) == []
    assert log_file.getvalue() == ""
    for _ in steps(range(4), "saving Net", True):
        time.sleep(0.2)
    assert log_file.getvalue().startswith("svdquant: saving Net, 1 of 4")


@pytest.mark.parametrize("where", ["log", "terminal"])
def test_nothing_is_told_of_what_is_not_visible(where: str, request: pytest.FixtureRequest) -> None:
    stream = request.getfixturevalue({"log": "log_file", "terminal": "terminal"}[where])
    with Activity(lambda: "compiling", False, opening="compiling"):
        say("svdquant: done", False)
        list(steps([1], "saving", False))
    assert stream.getvalue() == ""


def test_an_activity_that_fails_is_over(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), Activity(lambda: "compiling", True):
        raise KeyboardInterrupt
    assert terminal.screen() == ""
    assert not progress._DISPLAY._activities


@pytest.mark.parametrize("name", ["svdq_compile", ""])
def test_a_line_that_is_logged_to_stderr_comes_once(log_file: io.StringIO, name: str) -> None:
    logger, handler = logging.getLogger(name), logging.StreamHandler(log_file)
    logger.addHandler(handler)
    try:
        with logged("svdq_compile", logging.INFO):
            say("svdquant: 10 linears quantized", True)
        assert log_file.getvalue().count("10 linears quantized") == 1
        logging.getLogger("svdq_compile").setLevel(logging.NOTSET)
        say("svdquant: 11 linears quantized", True)
        assert log_file.getvalue().count("11 linears quantized") == 1, "nobody logs at this level"
    finally:
        logger.removeHandler(handler)


def test_a_line_that_is_logged_elsewhere_is_shown_too(log_file: io.StringIO, tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("svdq_compile").addHandler(handler)
    try:
        with logged("svdq_compile", logging.INFO):
            say("svdquant: done", True)
    finally:
        logging.getLogger("svdq_compile").removeHandler(handler)
        handler.close()
    assert log_file.getvalue() == (tmp_path / "log").read_text() == "svdquant: done\n"


def test_one_file_for_both_ways_of_telling(tmp_path: Path) -> None:
    """`program > log 2>&1`, with logging set up for stdout."""
    code = (
        "import logging, sys\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "from svdq_compile.progress import say\n"
        "say('svdquant: done', True)\n"
    )
    with open(tmp_path / "log", "w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, stderr=file, check=True, timeout=300)
    assert (tmp_path / "log").read_text().count("done") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_tells_too(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from svdq_compile import progress\n"
        "progress.EVERY = progress.REFRESH = 0.1\n"
        "with progress.Activity(lambda: 'waiting', True), progress._DISPLAY._lock:\n"
        "    child = os.fork()\n"
        "if child == 0:\n"
        "    with progress.Activity(lambda: 'in the child', True): time.sleep(1)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert "svdquant: in the child" in done.stderr
