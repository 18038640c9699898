"""Which of torch's exact attentions is the fastest for given inputs: measured once (runtime/tuning.py), then known.

torch itself goes by a fixed order. Which of flash, cuDNN and the memory-efficient kernel is ahead depends on the GPU,
the width of the heads and the length of the sequence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .torch_private import without_fake_tensors

aten = torch.ops.aten

_Attention = Callable[..., tuple]

# name -> operator, and what it takes between v and `is_causal` where there is no mask, no dropout and no gradient
KINDS: dict[str, tuple[_Attention, tuple]] = {
    "cudnn": (aten._scaled_dot_product_cudnn_attention.default, (None, False, 0.0)),
    "flash": (aten._scaled_dot_product_flash_attention.default, (0.0,)),
    "efficient": (aten._scaled_dot_product_efficient_attention.default, (None, False, 0.0)),
}


def attend(kind: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """q, k, v [B, H, S, D] -> [B, H, S, D]. RuntimeError where the kernel cannot."""
    function, between = KINDS[kind]
    return function(q, k, v, *between, is_causal, scale=scale)[0]


def fastest(torchs: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> str:
    """A key of KINDS, for tensors like these (fake ones will do). torchs: the one torch has chosen, which stays where
    nothing can be measured.
    """
    if q.device.type != "cuda" or not torch.cuda.is_available():
        return torchs
    from ..kernels.runtime.tuning import CannotRun, choose

    kinds = [torchs, *(kind for kind in KINDS if kind != torchs)]
    shape = tuple(int(n) for t in (q, k, v) for n in (*t.shape, *t.stride()))
    with without_fake_tensors(), torch.cuda.device(q.device), torch.no_grad():
        inputs: list[Tensor] = []

        def run(kind: str) -> Tensor:
            if not inputs:  # only if something is measured
                inputs.extend(_random_like(t) for t in (q, k, v))
            try:
                return attend(kind, inputs[0], inputs[1], inputs[2], is_causal, scale)
            except RuntimeError as no:
                raise CannotRun from no

        return choose(f"attention {q.dtype} {is_causal}", shape, kinds, run, q.device)


def _random_like(t: Tensor) -> Tensor:
    """Random values in the layout of t."""
    reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return torch.randn(reach, device=t.device).to(t.dtype).as_strided(t.shape, t.stride())
