"""What the GPU of a tensor is and can do: asked here and nowhere else. Triton is imported only where there is a GPU."""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

log = logging.getLogger("svdq_compile.kernels")

# Bytes of shared memory that a program may use, by 10 x major + minor.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 110: 232448,
                 120: 101376, 121: 101376}  # fmt: skip


# AMD's GPUs that the kernels are compiled for in the tests, by what their names begin with: those with int8 matrix
# instructions (MFMA of CDNA 2 to 4, WMMA of RDNA 3 and 4).
AMD_FAMILIES = ("gfx90a", "gfx942", "gfx950", "gfx11", "gfx12")


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU that Triton can compile for; (0, 0) elsewhere."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    if not torch.cuda.is_available():  # fake tensors know devices that are not there
        return 0, 0
    return torch.cuda.get_device_capability(device) if _has_triton() else (0, 0)


@cache
def _has_triton() -> bool:
    """Whether Triton can be imported; if not, one warning says why."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        log.warning(
            "Triton cannot be imported (%s: %s): quantized layers run without kernels, as plain torch, slowly. "
            "Install the Triton that belongs to torch %s; docs/compat.md says which.",
            type(error).__name__, error, torch.__version__,
        )  # fmt: skip
        return False
    return True


@cache
def amd_architecture(device: torch.device) -> str:
    """ "gfx942" and the like for an AMD GPU that Triton can compile for, "" elsewhere."""
    if device.type != "cuda" or not torch.version.hip or not torch.cuda.is_available() or not _has_triton():
        return ""
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


def has_kernels(device: torch.device) -> bool:
    """Whether the portable kernels run here, and so weights should lie in the kernel order. If not on a GPU, one
    warning says so.
    """
    some = capability(device) >= (8, 0) or amd_architecture(device).startswith(AMD_FAMILIES)
    if not some and device.type != "cpu":
        _warn_of(device)
    return some


@cache
def _warn_of(device: torch.device) -> None:
    if is_there(device) and _has_triton():
        log.warning("no kernels for %s: quantized layers run as plain torch, slowly. There are some for %s.",
                    describe(device), PORTABLE.name)  # fmt: skip


def is_there(device: torch.device) -> bool:
    """Whether a GPU can be asked what it is: fake tensors know devices that are not there."""
    module = getattr(torch, device.type, None)
    return module is not None and hasattr(module, "get_device_properties") and module.is_available()


def describe(device: torch.device) -> str:
    """A GPU in words: its name, and what compilers call it."""
    if device.type != "cuda":
        return f"{device.type} devices"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({amd_architecture(device) or f'sm_{major}{minor}'})"


def is_hopper(device: torch.device) -> bool:
    """Whether this GPU has `wgmma`, which kernels/hopper needs."""
    return capability(device) == (9, 0)


def launches_early(device: torch.device) -> bool:
    """Whether the GPU can bring a kernel to its multiprocessors while the one before it ends."""
    return capability(device) >= (9, 0)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may use on an NVIDIA GPU; 0 elsewhere. What is not known is taken for the least."""
    major, minor = capability(device)
    return SHARED_MEMORY.get(10 * major + minor, min(SHARED_MEMORY.values())) if major else 0


class Target(NamedTuple):
    """GPUs that a kernel is written for. name: completes "not on ..."."""

    name: str
    includes: Callable[[torch.device], bool]


NVIDIA = Target("an NVIDIA GPU from sm_80", lambda d: capability(d) >= (8, 0))
PORTABLE = Target("an NVIDIA GPU from sm_80 or an AMD GPU of CDNA 2 to 4, RDNA 3 or 4", has_kernels)
HOPPER = Target("sm_90", is_hopper)
BLACKWELL = Target("a GPU with 4-bit floating-point products (sm_100, sm_120)", lambda d: capability(d) >= (10, 0))
