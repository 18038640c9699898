"""Writing a file whole or not at all: what is read under its name is the old file or the new one, whatever happens.

A file is written in a folder of its own beside its place, `.<name>.<random>.partial`, and moved from there. Whoever
writes holds a lock on that folder, which the system opens when the process ends: a folder that nobody holds was left
behind by a process that was killed, and the next who writes the same file removes it.
"""

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

ENDING = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name for a file that takes the place of `path`, whole, at the end. Of a symbolic link the target is replaced; a
    new file has the rights that the umask leaves, an older one's stay.

    Raises OSError that names `path` where nothing can be written there, as on a full disk.
    """
    target = Path(os.path.realpath(path))
    with naming(path):
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "it is no file")
        remove_leftovers(target.parent, beginning(target), ENDING)
        with ExitStack() as held:
            folder = _folder_beside(target, held)
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            temporary = folder / target.name
            mode = _mode(target, folder / "rights")
            yield temporary
            _place(temporary, target, mode)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """While something is written for `path`: raises OSError that names it where that fails, as on a full disk."""
    try:
        yield
    except OSError as error:
        told = f"cannot write {path}: {error.strerror or error}"
        raise (type(error)(error.errno, told) if error.errno else OSError(told)) from error
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _folder_beside(target: Path, held: ExitStack) -> Path:
    """A new folder, locked as long as this process writes into it."""
    while True:
        folder = Path(tempfile.mkdtemp(ENDING, beginning(target), target.parent))
        with suppress(BlockingIOError, FileNotFoundError):  # before it is locked, others may take it for a leftover
            held.enter_context(lock(folder))
            if folder.exists():
                return folder


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Whether a folder can be locked here. Raises BlockingIOError if somebody else has the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _has_locked(descriptor)
    finally:
        os.close(descriptor)


def _has_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return True


def _place(temporary: Path, target: Path, mode: int) -> None:
    os.chmod(temporary, mode)
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, target)
    with suppress(OSError):  # some file systems have no folders to bring to the disk
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode(target: Path, probe: Path) -> int:
    """The rights that the file shall have. Asking for the umask would change it for other threads."""
    if target.exists():
        return target.stat().st_mode & 0o777
    probe.touch(mode=0o666)
    return probe.stat().st_mode & 0o777


def remove_leftovers(parent: Path, start: str, ending: str) -> None:
    """The folders in a folder that processes which are no more have left, by how their names begin and end."""
    for folder in parent.glob(f"{glob.escape(start)}*{ending}"):
        with suppress(OSError), lock(folder) as is_left:  # or somebody writes there, or has removed it in between
            if is_left:
                shutil.rmtree(folder, ignore_errors=True)


def beginning(target: Path) -> str:
    """Of the folder's name. A file's name may be as long as the system allows, and more is added here."""
    return f".{target.name[:40]}."
