"""Where Dynamo cuts a model into several graphs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def graph_breaks(model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
    """Run a model through Dynamo: for each place that cuts it, the source line and the reason, each once.

    Dynamo forgets what it has compiled in this process, before and after.
    """
    with torch.no_grad():
        told = torch._dynamo.explain(model)(**inputs)
    return list(dict.fromkeys(_line(reason) for reason in told.break_reasons))


def _line(reason: Any) -> str:
    """`model.py:12 in forward: x.item(): Unsupported ...`, the innermost frame first that is the user's."""
    what = str(reason.reason).strip().splitlines()[0]
    if not reason.user_stack:
        return what
    frame = reason.user_stack[-1]
    code = (frame.line or "").strip()
    return f"{frame.filename}:{frame.lineno} in {frame.name}: {code}: {what}"
