"""Run passes over a graph: count, time, check and dump, so that no pass has to.

TORCH_LOGS="+svdq_compile"     one line a pass, at debug level
SVDQ_DUMP=folder               the graph before the first pass and after each that changed it, as readable Python;
                               a note where Inductor had the code in its caches, so that no pass ran
TORCH_TRACE=folder             the same graphs among torch's own artifacts (tlparse shows them)
SVDQ_VERIFY=1                  what must hold of every graph is checked after each pass (verify.py), as in all tests
"""

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import fx

from ..lowering.torch_private import trace_artifact
from .verify import BrokenGraph, Promise

log = logging.getLogger("svdq_compile.passes")
_numbers = itertools.count()

FROM_CACHE = (
    "Inductor had the code of this graph in its caches, so no fusing pass ran and there is nothing to show of them. To "
    "see them, start again with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1."
)

Pass = Callable[[fx.GraphModule], int]


def run(gm: fx.GraphModule, passes: Sequence[Pass]) -> None:
    """Apply passes in order, in place. A pass returns how much it changed; `name_of` says how it is called."""
    dump(gm, "before")
    verifying = os.environ.get("SVDQ_VERIFY") == "1"
    for rewrite in passes:
        promise = Promise(gm) if verifying else None
        start = time.perf_counter()
        changed = rewrite(gm)
        log.debug("%s changed %d in %.1f ms", name_of(rewrite), changed, 1e3 * (time.perf_counter() - start))
        if promise is not None:
            promise.check(gm, name_of(rewrite), changed)
        if changed:
            gm.graph.lint()
            gm.recompile()
            dump(gm, f"after_{name_of(rewrite)}")
        if promise is not None:
            _check_again(gm, rewrite)


def _check_again(gm: fx.GraphModule, rewrite: Pass) -> None:
    """A pass that has done its work finds nothing more to do."""
    promise = Promise(gm)
    again = rewrite(gm)
    if again:
        raise BrokenGraph(f"{name_of(rewrite)}, run once more, changed {again}")
    promise.check(gm, name_of(rewrite), again)


def name_of(rewrite: Callable) -> str:
    """The pass's own name, also where some of its arguments were bound by functools.partial."""
    return getattr(rewrite, "func", rewrite).__name__


def dump(gm: fx.GraphModule, label: str) -> None:
    """Write a graph where SVDQ_DUMP and TORCH_TRACE ask for it, named by a running number and `label`."""

    _write(label, "py", lambda: gm.print_readable(print_output=False, include_stride=True, include_device=True))


def dump_from_cache() -> None:
    """Say in place of the graphs that the fusing passes would have made why there are none."""
    log.info(FROM_CACHE)
    _write("from_cache", "txt", lambda: f"{FROM_CACHE}\n")


def _write(label: str, suffix: str, text: Callable[[], str]) -> None:
    number = next(_numbers)
    trace_artifact(f"svdq_{number:03d}_{label}", text)
    folder = os.environ.get("SVDQ_DUMP")
    if folder:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number:03d}.{label}.{suffix}").write_text(text())
