"""All that talks to Inductor: handing it a graph, our pass over its aten graph, our operators in the code it writes.

Only the backend imports this file: whoever quantizes, loads or saves a model needs no
Inductor, and importing it takes as long as torch itself.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config, custom_graph_pass, list_mode_options
from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
from torch._inductor.codegen.wrapper import ExternKernelAllocLine
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_iter

from .. import kernels
from .ops import BORROWING, IMPLEMENTATIONS, sites

# Passes that want to know whether gradients are wanted; older releases have none.
INFERENCE_AWARE: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], mode: str | None, rewrite: Callable[[fx.GraphModule], None] | None = None
) -> Callable[..., Any]:
    """Hand a rewritten graph to Inductor; the result takes the inputs as separate arguments.

    rewrite  what to do with the aten graph that Inductor has made of it, once decomposed and functional. Inductor's
             caches know it by the sources of its folder, of this one and of kernels/, and by SVDQ_KERNELS: while
             these stay, equal graphs must come out alike. What somebody has set torch._inductor.config's
             post_grad_custom_pre_pass to runs before it.
    """
    _call_by_sites()
    patches = dict(list_mode_options(mode)) if mode not in (None, "default") else {}
    # Our operators' results are as their shape functions say, and Dynamo's guards have looked at what a call gets. Only
    # of somebody's own operators nobody asks any more.
    patches |= {"size_asserts": False, "alignment_asserts": False}
    if rewrite is not None:
        patches["post_grad_custom_pre_pass"] = _aten_pass(rewrite)
    if torch.__version__ < "2.13" and not all(isinstance(value, torch.Tensor) for value in inputs):
        # It compares the sizes a (b + c) and a b + a c as they are written, and an assertion fails.
        patches["triton.coalesce_tiling_analysis"] = False
    return compile_fx(gm, list(inputs), config_patches=patches)  # type: ignore[return-value]


@cache
def _call_by_sites() -> None:
    """Have Inductor's code call each of our operators through `Sites` of its own, past torch's dispatcher, which takes
    longer than a launch; and leave alone the memory of results that are not its own.
    """

    def generate(node: Any, writeline: Callable[[Any], None]) -> None:
        wrapper, name = V.graph.wrapper_code, f"svdq_{node.get_name()}"
        symbols = sorted(map(str, _symbols(node)))
        if all(symbol.startswith("s") for symbol in symbols):  # backed: known when the code is entered
            wrapper.add_import_once(f"from {sites.__module__} import sites")
            wrapper.add_import_once(f"{name} = sites({str(node.op_overload)!r}){'' if symbols else '()'}")
            node.python_kernel_name = f"{name}({', '.join(symbols)})" if symbols else name
        if str(node.op_overload) in BORROWING:
            V.graph.never_reuse_buffers.update(buffer.get_name() for buffer in (node, *node.outputs))
        writeline(ExternKernelAllocLine(wrapper, node))

    for operator in IMPLEMENTATIONS:
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{operator}"] = CustomCodegen(python=generate)


def _symbols(node: Any) -> set[Any]:
    """What the sizes of a call's operands depend on, and the numbers among them."""
    sizes = (size for t in node.inputs for size in (*t.get_size(), *t.get_stride()))
    numbers = tree_iter((node.constant_args, node.kwargs))
    return {symbol for value in (*sizes, *numbers) for symbol in getattr(value, "free_symbols", ())}


def _aten_pass(rewrite: Callable[[fx.GraphModule], None]) -> Any:
    theirs: Any = config.post_grad_custom_pre_pass or ()
    theirs = tuple(theirs) if isinstance(theirs, list | tuple) else (theirs,)  # more than one: since torch 2.13

    class AtenPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for their in theirs:
                their(graph, **({"is_inference": True} if isinstance(their, INFERENCE_AWARE) else {}))
            assert graph.owning_module is not None
            rewrite(graph.owning_module)

        def uuid(self) -> Any:
            """None, which keeps the code out of Inductor's caches, where they do not know a pass of theirs."""
            known = [their.uuid() if isinstance(their, CustomGraphPass) else None for their in theirs]
            if not all(known):
                return None
            function, options = getattr(rewrite, "func", rewrite), getattr(rewrite, "keywords", {})
            sources = _sources(Path(inspect.getfile(function)).parent)
            return get_hash_for_files(sources), repr(options), os.environ.get("SVDQ_KERNELS", ""), *known

    return AtenPass()


def _sources(passes: Path) -> tuple[str, ...]:
    """All that decides what comes out of the passes: theirs, and those of lowering/ and kernels/."""
    folders = passes, Path(__file__).parent, *map(Path, kernels.__path__)
    return tuple(sorted(str(file) for folder in folders for file in folder.rglob("*.py")))
