"""The compiler's front half, as rewrites of the graph that Dynamo hands over.

`observing` and `quantizing` are its table of contents; `pipeline.run` does the counting, checking and dumping.
"""

from collections.abc import Callable
from functools import partial

from .drop_replaced_weights import drop_replaced_weights
from .observe_linears import observe_linears
from .pipeline import Pass
from .quantize_linears import Packs, quantize_linears
from .share_quantized_inputs import share_quantized_inputs


def observing(observe: Callable[..., None], run: Callable) -> list[Pass]:
    """The passes of the first phase, while inputs are watched."""
    return [partial(observe_linears, observe=observe, run=run)]


def quantizing(packs: Packs) -> list[Pass]:
    """The passes of the second phase, when the weights in `packs` are quantized."""
    return [
        partial(quantize_linears, packs=packs),
        share_quantized_inputs,  # after: it merges what the first one made for each linear
        partial(drop_replaced_weights, weights=list(packs)),  # last: only now is a weight without readers unused
    ]
