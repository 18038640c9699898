"""SVDQuant for any diffusion model, as a torch.compile backend.

    pipe.transformer = torch.compile(pipe.transformer, backend="svdquant")

The names below are for quantizing ahead of time, for files, and for looking at what was done.
"""

from .checkpoint import load, save
from .config import Config
from .doctor import Diagnosis, doctor
from .errors import SvdqError
from .parameter import packed
from .quantize_model import quantize, restore
from .report import report
from .reproduce import reproduce

__all__ = [
    "Config",
    "Diagnosis",
    "SvdqError",
    "doctor",
    "load",
    "packed",
    "quantize",
    "report",
    "reproduce",
    "restore",
    "save",
]
