"""Watch what each linear reads, and run the linears one by one: the graph of the observing phase, run eagerly.

    before   q = linear(x, wq, bq)        after   observe(x, (wq, wk), -1)
             k = linear(x, wk, bk)                q = run("linear", -1, x, wq, bq)
                                                  k = run("linear", -1, x, wk, bk)

`observe` and `run` are plain Python functions that get the real tensors, so one graph serves every block and every
instance of a model. Left alone: what `find_linears` rejects.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import fx

from .linears import LinearSite, find_linears, group_by_input
from .subgraphs import invocations


def observe_linears(
    gm: fx.GraphModule,
    observe: Callable[..., None],
    run: Callable,
    names: Mapping[fx.Node, str] = MappingProxyType({}),
) -> int:
    """Insert the calls, in subgraphs too. Returns how many linears are watched (a subgraph's count once).

    names  as for `find_linears`
    """
    groups = group_by_input(find_linears(gm, names).sites)
    for group in groups:
        _watch(gm.graph, group, observe)
        for site in group:
            site.node.args = (site.node.target.__name__, site.channel_dim, *site.node.args)  # type: ignore[union-attr]
            site.node.target = run
    count = sum(len(group) for group in groups)
    for name in {call.subgraph for call in invocations(gm)}:
        count += observe_linears(gm.get_submodule(name), observe, run)  # type: ignore[arg-type]
    gm.recompile()
    return count


def _watch(graph: fx.Graph, group: list[LinearSite], observe: Callable[..., None]) -> None:
    with graph.inserting_before(group[0].node):  # the first of them: sites come in the graph's order
        graph.call_function(
            observe,
            (group[0].input, tuple(site.weight for site in group), group[0].channel_dim),
        )
