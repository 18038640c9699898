"""The compiler's front half, as rewrites of the graph that Dynamo hands over. Read `OBSERVING` and `QUANTIZING` as its
table of contents; `pipeline.run` does the counting, dumping and checking for all of them.
"""

from .drop_replaced_weights import drop_replaced_weights
from .observe_linears import observe_linears
from .quantize_linears import quantize_linears
from .share_quantized_inputs import share_quantized_inputs

OBSERVING = (observe_linears,)

QUANTIZING = (
    quantize_linears,
    share_quantized_inputs,  # after: it merges what the first one made for each linear
    drop_replaced_weights,  # last: only now is a weight without readers really unused
)
