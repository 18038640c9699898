"""What becomes of a failure that is no mistake of the user's: the model goes on without what failed, and the cause is
told. What is quantized runs in 4 bits, eagerly where it cannot be compiled; the rest runs in 16-bit.
"""

import logging

import torch
from torch import fx

from .config import Config
from .errors import SendsAlone, SvdqError, WeightsReleased
from .lowering.torch_private import is_for_dynamo
from .passes import sums_adapters
from .passes.order import may_send
from .passes.verify import BrokenGraph

log = logging.getLogger("svdq_compile")


def go_on(error: Exception, what: str, then: str, config: Config, graph: fx.GraphModule | None = None) -> None:
    """Called where an error was caught: warn that `what` failed and what happens `then`, or raise it.

    Raised are mistakes of the user's, which have a class in errors.py; want of memory, since whatever comes instead
    would want it too, and another call may find more; what Dynamo sends to itself; a graph that SVDQ_VERIFY found
    broken; a `graph` that could not be compiled and would exchange otherwise with ranks where it was
    (`refuse_to_send_alone`); and everything with fallback=False.
    """
    cause = cause_of(error)
    if isinstance(cause, WeightsReleased):
        # The graph reads a weight otherwise than as a linear: perhaps only to move it. Run eagerly, that is done, or
        # refused, when it comes to it.
        refuse_to_send_alone(error, what, config, graph)
        log.info("%s, so %s", cause, then)
        return
    if isinstance(cause, SvdqError) or is_out_of_memory(cause):
        raise cause
    if not config.fallback or isinstance(cause, BrokenGraph) or is_for_dynamo(error):
        raise error
    refuse_to_send_alone(error, what, config, graph)
    log.warning(
        "svdquant: %s failed, so %s (options={'fallback': False} raises instead): %s: %s",
        what,
        then,
        type(cause).__name__,
        cause,
        exc_info=error if log.isEnabledFor(logging.DEBUG) else None,
    )


def refuse_to_send_alone(error: Exception, what: str, config: Config, graph: fx.GraphModule | None) -> None:
    """Raise SendsAlone if a graph that runs eagerly, since `what` failed, sends otherwise than where it is compiled."""
    if graph is None:
        return
    remedies = []
    if joins_exchanges(graph, config):
        fusions = [name for name in config.fusions if name != "exchanges"]
        remedies.append(f"have them sent one by one on all ranks, with options={{'fuse': {fusions}}}")
    if sums_adapters(graph):
        remedies.append("remove the adapters around split linears on all ranks, or compile the model on none")
    if remedies:
        raise SendsAlone(what, cause_of(error), "; and ".join(remedies)) from error


def joins_exchanges(graph: fx.GraphModule, config: Config) -> bool:
    """Whether compiling a graph may join what it sends (passes/join_exchanges.py)."""
    return "exchanges" in config.fusions and may_send(graph, "all_to_all_single")


def cause_of(error: BaseException) -> BaseException:
    """What went wrong, out of what Dynamo and Inductor wrap around it."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was missing: a GPU's, Python's, or that of torch's CPU allocator, which has no class for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
