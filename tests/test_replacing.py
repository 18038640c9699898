"""Saving to a path: whole or not at all, beside others who save there, and what is left behind is removed."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from svdq_compile.replacing import replacing


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


CODE = """
import os, sys, time
from pathlib import Path
from svdq_compile.replacing import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_save_go_and_those_of_a_running_one_stay(tmp_path: Path) -> None:
    file = tmp_path / "a"
    killed, running = (
        subprocess.Popen([sys.executable, "-c", CODE, str(file)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    try:
        for process in (killed, running):
            assert process.stdout.readline() == "writing\n"
        killed.kill()
        killed.wait()
        assert len(os.listdir(tmp_path)) == 2
        write(file, "new")
        left = [name for name in os.listdir(tmp_path) if name != "a"]
        assert len(left) == 1
        assert (tmp_path / left[0] / "a").read_text() == "half"
    finally:
        running.kill()
        running.wait()
    write(file, "newer")
    assert os.listdir(tmp_path) == ["a"]


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
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'dir'}"):
        write(tmp_path / "dir", "x")
    with pytest.raises(FileNotFoundError, match=f"cannot write {tmp_path / 'no' / 'a'}"):
        write(tmp_path / "no" / "a", "x")
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'a'}: No space left"), replacing(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert sorted(os.listdir(tmp_path)) == ["dir"]
