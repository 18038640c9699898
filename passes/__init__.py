"""The compiler's front half, as rewrites of graphs.

`observing`, `quantizing` and FUSING are its table of contents; `pipeline.run` counts, checks and dumps. The first two
rewrite the graph that Dynamo hands over, where a linear is one node with a name and a Parameter; the third rewrites the
aten graph that Inductor has made of it, where whatever the model wrote is a few operations.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial

from torch import fx

from .drop_replaced_weights import drop_replaced_weights
from .expand_weights import expand_weights
from .fold_adapters import fold_adapters
from .fold_adapters import sums_adapters as sums_adapters
from .fuse_epilogues import fuse_epilogues
from .fuse_gates import fuse_gates
from .fuse_heads import fuse_heads
from .fuse_prologues import fuse_prologues
from .group_sequences import group_sequences
from .join_exchanges import join_exchanges
from .join_parts import join_parts
from .lift_waits import gives_streams_work as gives_streams_work
from .lift_waits import lift_waits as lift_waits
from .measure_rows import measure_rows
from .merge_siblings import merge_siblings
from .observe_convolutions import observe_convolutions
from .observe_linears import observe_linears
from .pipeline import Pass, run
from .quantize_linears import Packs, quantize_linears
from .replace_attention import replace_attention
from .share_quantized_inputs import share_quantized_inputs


def observing(
    observe: Callable[..., None],
    run: Callable,
    names: Mapping[fx.Node, str],
    run_convolution: Callable,
    expanded: Collection[fx.Node],
) -> list[Pass]:
    """The passes of the first phase, while inputs are watched; `names` as for `find_linears`, and `expanded` as for
    `observe_convolutions`.
    """
    return [
        partial(observe_linears, observe=observe, run=run, names=names),
        partial(observe_convolutions, run=run_convolution, weights=expanded),
    ]


def quantizing(packs: Packs, expanded: Collection[fx.Node]) -> list[Pass]:
    """The passes of the second phase, when the weights in `packs` are quantized; `expanded` as for `expand_weights`."""
    return [
        partial(quantize_linears, packs=packs),
        partial(expand_weights, packs=packs, weights=expanded),
        share_quantized_inputs,  # after: it merges what the first one made for each linear
        fold_adapters,  # after: the adapters of linears that share an input go into one product
        partial(drop_replaced_weights, weights=list(packs)),  # last: only now is a weight without readers unused
    ]


FUSING: dict[str, Callable[..., int]] = {
    "epilogues": fuse_epilogues,  # first: an activation between two linears is cheaper where it is computed once
    "gates": fuse_gates,  # likewise
    "siblings": merge_siblings,  # after: it takes those that have no epilogue
    "heads": fuse_heads,  # before somebody else takes the means
    "rows": measure_rows,  # before what it measures becomes part of a prologue
    "prologues": fuse_prologues,
    "joins": join_parts,  # after: it asks who reads what
    "exchanges": join_exchanges,  # after: heads are looked for through what is sent
    "attention": replace_attention,  # after: the others know torch's operators
    "sequences": group_sequences,  # last: the others know these operators one by one
}


def fuse(gm: fx.GraphModule, fusions: Collection[str], attention: str = "exact") -> None:
    """Run those of the third list that are named over a graph; attention: as for `replace_attention`."""
    passes = FUSING | {"attention": partial(FUSING["attention"], arithmetic=attention)}
    run(gm, [rewrite for name, rewrite in passes.items() if name in fusions])
