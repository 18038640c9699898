"""SVDQuant for any diffusion model, as a torch.compile backend.

    pipe.transformer.compile(backend="svdquant")  # in place, past which diffusers finds its adapters
    svdq_compile.compile(pipe)  # the same for a whole pipeline, by blocks where the model has them

The other names below are for quantizing ahead of time, for files, and for looking at what was done.
"""

from typing import TYPE_CHECKING, Any

from .checkpoint import save
from .compile_model import compile
from .config import Config
from .doctor import Diagnosis, doctor
from .errors import SvdqError
from .evaluate import evaluate
from .evaluation import Evaluation
from .loading import load
from .nunchaku_export import export_nunchaku
from .parallelize_model import parallelize
from .parameter import packed
from .quantize_model import observe, quantize, restore
from .registering import serve_diffusers
from .report import report
from .reproduce import reproduce
from .statistics import Statistics
from .streaming import from_pretrained

if TYPE_CHECKING:
    from .diffusers_quantizer import SVDQuantConfig as SVDQuantConfig

serve_diffusers()


def __getattr__(name: str) -> Any:
    """`SVDQuantConfig`, which needs diffusers, is there once it is asked for."""
    if name != "SVDQuantConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .diffusers_quantizer import SVDQuantConfig
    except ModuleNotFoundError as missing:
        raise SvdqError(f"SVDQuantConfig needs {missing.name}: pip install diffusers accelerate") from None
    return SVDQuantConfig


__all__ = [
    "Config",
    "Diagnosis",
    "Evaluation",
    "Statistics",
    "SvdqError",
    "compile",
    "doctor",
    "evaluate",
    "export_nunchaku",
    "from_pretrained",
    "load",
    "observe",
    "packed",
    "parallelize",
    "quantize",
    "report",
    "reproduce",
    "restore",
    "save",
]
