"""`gdc_wait`: a kernel that was launched early waits for what the one before it writes (runtime/launcher.py)."""

from typing import Any

gdc_wait: Any
try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:  # a Triton built for AMD alone: no kernel is launched early there
    gdc_wait = None
