"""Pick the fastest of a few configurations of a kernel on this GPU, once for each class of shapes, and remember it.

Candidates come best guess first. That guess is what runs wherever measuring is impossible or unwanted: on the CPU,
while a CUDA graph is captured, under `torch.use_deterministic_algorithms(True)`, with SVDQ_TUNE=0, and, of a kernel's
tiles, once this process has spent SECONDS on measuring them; or, for a GEMM's tiles, what was measured for other
numbers of rows (`choose_tile`). Choices are kept in a JSON file for each GPU and version of Triton, in
`cache_folder()`, so another process measures nothing.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime import errors

from .launcher import recording

ALONE = threading.RLock()  # to measure, which waits for the GPU, or to make a CUDA graph, which that would break
SECONDS = 5.0
REPEATS = 7
ASLEEP = 10_000_000  # cycles, some 5 ms: for the host to queue its calls, whose Python a replay will not run
MEASURED_CLASSES = 2
UP, DOWN = 1, 2  # classes: a tile may serve twice as many rows as those it was chosen for, or a quarter


class CannotRun(Exception):
    """Raised by `run` where a candidate does not take these operands."""


_C = TypeVar("_C", bound=Hashable)
_chosen: dict[tuple, int] = {}
_tiles: dict[tuple, dict[int, Any]] = {}  # by layer, then by class of rows
_spent = 0.0


def failed_to_compile(error: Exception) -> bool:
    """Whether Triton, or ptxas behind it, could not make a kernel; a failing launch or wrong operands are not that."""
    kinds = (triton.CompilationError, errors.OutOfResources, errors.PTXASError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "PassManager" in str(error))


def cache_folder() -> Path:
    """Where choices and generated kernels are kept: SVDQ_CACHE, or svdq_compile in the user's cache folder. It may be
    missing, or not to be written to. FileNotFoundError where the user has no home.
    """
    own = os.environ.get("SVDQ_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svdq_compile"
    except RuntimeError as error:  # there is no home
        raise FileNotFoundError("no folder for caches: set SVDQ_CACHE") from error


def choose(kernel: str, shape: tuple[Hashable, ...], candidates: Sequence[_C], run: Callable[[_C], object],
           device: torch.device, limited: bool = True) -> _C:  # fmt: skip
    """The fastest candidate for a kernel and a class of shapes; `run(candidate)` launches it on real operands.

    limited: by SECONDS. Whole ways to do the work, which differ by more than tiles do and are few, are always measured.
    """
    global _spent
    if len(candidates) == 1 or device.type != "cuda":
        return candidates[0]
    index = _answer(kernel, shape, candidates, device)
    if index is None:
        if not _may_measure() or (limited and _spent >= SECONDS):
            return candidates[0]
        with ALONE:
            index = _answer(kernel, shape, candidates, device)  # another thread's, while this one waited: one for all
            if index is None:
                begin = time.perf_counter()
                index = _measure(candidates, run)
                _spent += (time.perf_counter() - begin) if limited else 0.0
                _remember(device, _key(kernel, shape, candidates), index)
    return candidates[index]


def _key(kernel: str, shape: tuple[Hashable, ...], candidates: Sequence[Hashable]) -> str:
    """A list that changed is a new question."""
    return f"{kernel} {shape} {list(candidates)}"


def _answer(kernel: str, shape: tuple[Hashable, ...], candidates: Sequence[Hashable],
            device: torch.device) -> int | None:  # fmt: skip
    """What was measured, by this process or an earlier one."""
    question = device, kernel, shape, tuple(candidates)
    index = _chosen.get(question)
    if index is None:
        index = _known(device).get(_key(kernel, shape, candidates))
        if type(index) is not int or not 0 <= index < len(candidates):  # nothing, or nothing of ours
            return None
        _chosen[question] = index
    return index


def choose_tile(kernel: str, rows: int, layer: tuple[Hashable, ...], candidates: Sequence[_C],
                run: Callable[[_C], object], device: torch.device, limited: bool = True) -> _C:  # fmt: skip
    """`choose` among the tiles of a GEMM, where a shape is a number of rows and what is the layer's own.

    Each tile is a kernel to compile. So once a layer has been measured for two classes of rows, one not far from them
    takes the tile of the nearest, which is compiled: pictures of a new size must not wait for it. Not limited are tiles
    of one of whole ways: that way would be measured by a guess, and left out for ever.
    """
    if len(candidates) == 1 or device.type != "cuda":
        return candidates[0]
    size = max(rows - 1, 0).bit_length()
    shape = (1 << size, *layer)
    tiles = _tiles.setdefault((device, kernel, layer), {})
    if size not in tiles:
        near = [c for c, tile in list(tiles.items()) if -UP <= c - size <= DOWN and tile in candidates]
        if near and len(tiles) >= MEASURED_CLASSES and _answer(kernel, shape, candidates, device) is None:
            return tiles[min(near, key=lambda c: (abs(c - size), -c))]
        tile = choose(kernel, shape, candidates, run, device, limited)
        if _answer(kernel, shape, candidates, device) is None:  # a guess
            return tile
        tiles[size] = tile
    return tiles[size]


def _may_measure() -> bool:
    wanted = os.environ.get("SVDQ_TUNE") != "0" and not torch.are_deterministic_algorithms_enabled()
    return wanted and not torch.cuda.is_current_stream_capturing()


def _measure(candidates: Sequence[_C], run: Callable[[_C], object]) -> int:
    """Index of the candidate with the smallest time; one that fails to compile or cannot run is out."""
    recording.has_measured = True
    able = [i for i, candidate in enumerate(candidates) if _can_run(candidate, run)]
    times = _milliseconds([partial(run, candidates[i]) for i in able])
    return min(zip(times, able, strict=True), default=(0.0, 0))[1]


def _can_run(candidate: _C, run: Callable[[_C], object]) -> bool:
    try:
        run(candidate)
    except Exception as error:
        if not isinstance(error, CannotRun) and not failed_to_compile(error):
            raise
        return False
    return True


def _milliseconds(calls: list[Callable[[], object]]) -> list[float]:
    """The shortest of each one's times: the others count what other processes do on the GPU, so calls take turns."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2 * REPEATS)] for _ in calls]
    torch.cuda._sleep(ASLEEP)
    for i in range(0, 2 * REPEATS, 2):
        for call, own in zip(calls, events, strict=True):
            own[i].record()
            call()
            own[i + 1].record()
    torch.cuda.synchronize()
    return [min(map(torch.cuda.Event.elapsed_time, own[::2], own[1::2])) for own in events]


@cache
def _file(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return cache_folder() / f"choices-{name}-triton-{triton.__version__}.json"


@cache
def _known(device: torch.device) -> dict[str, Any]:
    try:
        known = json.loads(_file(device).read_bytes())
    except (OSError, ValueError, RecursionError):  # none yet, or torn: measure again
        return {}
    return known if isinstance(known, dict) else {}


def _remember(device: torch.device, key: str, index: int) -> None:
    """Into the file, whole or not at all; a cache that cannot be written costs a measurement next time."""
    known = _known(device)
    known[key] = index
    try:
        path = _file(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass
