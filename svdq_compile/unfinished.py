"""Where long work keeps what is done until its file is there: a folder beside it, which the same work takes up again.

    .<name>.<whose>.<key>.unfinished/   locked by the process that works on it
        facts.json                      all that the result depends on
        *                               what is done

The name may be shortened, so `whose` is a digest of it. The key is a digest of the facts: what other options or other
files have left is never taken up.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import SvdqError
from .progress import say
from .replacing import beginning, lock, naming, remove_leftovers

_ENDING = ".unfinished"
_FACTS = "facts.json"


@contextmanager
def unfinished_folder(target: Path, facts: Mapping[str, Any], doing: str) -> Iterator[Path]:
    """The folder for a file. At the end it is removed, with those that were kept for the same file; if the end is not
    reached, and there is a *.safetensors in it, it stays.

    facts  what the result depends on, as JSON
    doing  to the file, as in "quantizing to"
    Raises SvdqError while another process has it, OSError that names the target where there can be none.
    """
    target = Path(os.path.realpath(target))
    start = f"{beginning(target)}{_digest(target.name)}."
    folder = target.with_name(f"{start}{_digest(facts)}{_ENDING}")
    with ExitStack() as held:
        with naming(target):
            _make_and_lock(folder, target, doing, held)
            (folder / _FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True))
        _tell_of_others(folder, target, start, facts)
        try:
            yield folder
        except BaseException:
            if any(folder.glob("*.safetensors")):
                say(f"svdquant: what is done is kept in {folder}: the same again goes on from there", True)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    remove_leftovers(target.parent, start, _ENDING)


def _make_and_lock(folder: Path, target: Path, doing: str, held: ExitStack) -> None:
    while True:
        folder.mkdir(exist_ok=True)
        try:
            made = folder.stat().st_ino
            held.enter_context(lock(folder))
            if folder.stat().st_ino == made:
                return
        except FileNotFoundError:  # who had it has come to the end, and removed it
            continue
        except BlockingIOError:
            raise SvdqError(f"{target}: another process is {doing} it: wait for it, or end it") from None


def _tell_of_others(folder: Path, target: Path, start: str, facts: Mapping[str, Any]) -> None:
    """Say in what facts that differ which were left here and are not taken up."""
    own = json.loads(json.dumps(facts))
    for other in set(target.parent.glob(f"{start}*{_ENDING}")) - {folder}:
        with suppress(OSError, ValueError):
            before = json.loads((other / _FACTS).read_text())
            changed = ", ".join(name for name in own | before if before.get(name) != own.get(name))
            say(f"svdquant: {target}: begun anew, since what was left unfinished had other {changed}", True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
