"""What is known of weights that are not quantized (yet): what was observed of their inputs, and why some stay 16-bit.

Both tables hold weights weakly, by identity. A quantized weight carries its own state (parameter.py).
"""

import threading

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .input_statistics import InputStatistics
from .parameter import QuantizedWeight

LOCK = threading.RLock()  # held while weights change their form

_STATISTICS = WeakIdKeyDictionary()  # weight -> InputStatistics of its input, while it is observed
_REASONS = WeakIdKeyDictionary()  # weight -> why it stays 16-bit


def statistics_of(weights: tuple[nn.Parameter, ...]) -> InputStatistics:
    """The statistics of the input that these weights share; empty ones if nothing was observed yet."""
    with LOCK: return _STATISTICS.setdefault(weights[0], InputStatistics())  # noqa: E701  # fmt: skip


def forget_statistics(weights: tuple[nn.Parameter, ...]) -> None:
    """Free what was observed, once it has served."""
    for weight in weights:
        _STATISTICS.pop(weight, None)


def leave_alone(weight: nn.Parameter, reason: str) -> None:
    """Decide that a weight stays 16-bit, and why."""
    _REASONS[weight] = reason


def reason_of(weight: nn.Parameter) -> str | None:
    """Why a weight stays 16-bit; None if that was not decided."""
    return _REASONS.get(weight)


def forget_reason(weight: nn.Parameter) -> None:
    """Let a weight be considered again."""
    _REASONS.pop(weight, None)


def is_undecided(weight: object) -> bool:
    """Whether a graph input is a weight still to be quantized or left alone."""
    return isinstance(weight, nn.Parameter) and not isinstance(weight, QuantizedWeight) and weight not in _REASONS
