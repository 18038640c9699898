"""Waiting for a stream is taken out of a graph, to be done before it.

Who fetches weights on a stream of his own, as diffusers' group offloading does, waits for it in a hook that Dynamo
traces with the block. torch 2.11 and 2.12 do that while they trace and not in the code that they make; later ones keep
an operator, which no operand ties to what must come after it. It can be done sooner: a graph that gives a stream no
work finds there what was given before it. The current stream has the graph's own work: waiting for that is not lifted.
"""

from typing import Any

import torch
from torch import fx

from ..lowering.torch_private import external_object

_METHODS = ("synchronize", "wait_stream", "wait_event")
_WAITS = ("synchronize_stream", "synchronize_event", "wait_stream", "wait_event")
_CURRENT = 0  # Dynamo's number for the current stream, where there is a device that has one


def gives_streams_work(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph does more with streams and events than to wait for what others gave them."""
    return any(_is_of_streams(node) and not _is_wait(node) for node in gm.graph.nodes)


def lift_waits(gm: fx.GraphModule) -> fx.GraphModule | None:
    """Take all waits out of a Dynamo graph -> what does them, of the same inputs; None if there are none. The graph
    must not give streams work.
    """
    waits = [node for node in gm.graph.nodes if _is_wait(node)]
    if not waits:
        return None
    needed = set(waits)
    for node in reversed(gm.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    front = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = front.node_copy(node, copies.__getitem__)
    front.output(None)
    for node in reversed(waits):
        gm.graph.erase_node(node)
    gm.recompile()
    return fx.GraphModule(gm, front)


def _is_of_streams(node: fx.Node) -> bool:
    if node.op == "call_method":
        first = node.args[0] if node.args else None
        value = first.meta.get("example_value") if isinstance(first, fx.Node) else None
        return isinstance(value, torch.Stream | torch.Event)
    return node.op == "call_function" and _operator(node) != ""


def _is_wait(node: fx.Node) -> bool:
    if not _is_of_streams(node):
        return False
    name = node.target if node.op == "call_method" else _operator(node)
    awaited = node.args[1 if name == "wait_stream" else 0] if node.args else None
    if node.op == "call_method":
        return name in _METHODS and isinstance(awaited, fx.Node) and not _is_current(awaited.meta.get("example_value"))
    if name not in _WAITS or not isinstance(awaited, int):
        return False
    found = external_object(awaited)
    return not (_is_current(found) or (awaited == _CURRENT and found is None))


def _is_current(stream: Any) -> bool:
    if not isinstance(stream, torch.Stream) or not torch.accelerator.is_available():
        return False
    return stream == torch.accelerator.current_stream(stream.device.index)


def _operator(node: fx.Node) -> str:
    """The name of an operator of the namespace `streams`, else nothing."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return ""
    namespace, _, name = target._qualified_op_name.partition("::")
    return name if namespace == "streams" else ""
