"""`gdc_wait`: a kernel that was launched early waits for what the one before it writes (runtime/launcher.py)."""

import importlib
from typing import Any

try:
    gdc_wait: Any = importlib.import_module("triton.language.extra.cuda").gdc_wait
except ImportError:  # a Triton built for AMD alone: no kernel is launched early there
    gdc_wait = None
