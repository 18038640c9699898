"""The private corners of torch that this package leans on, all of them. Tried on torch 2.11 and 2.13."""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import kernels

LINEAR_TARGETS = frozenset({torch.nn.functional.linear, torch._C._nn.linear})


def shell(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape with no memory behind it. Reading it would be out of bounds: see parameter.py.

    Unlike `empty_strided` followed by `resize_(0)` it never allocates the memory it goes without.
    """
    if device.type == "meta":
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]

    return _reinterpret_tensor(torch.empty(0, dtype=dtype, device=device), tuple(shape), tuple(stride), 0)


def allocator(device: torch.device) -> Callable[[tuple, tuple, torch.dtype], Tensor]:
    """(shape, strides, dtype), the first two tuples -> a tensor on this device: for CUDA, on the current one.

    It is what Inductor's code calls, and takes a quarter of `empty_strided`'s time.
    """
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    return quick or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device))


def source_name(node: fx.Node) -> str:
    """Where Dynamo found this graph input, as Python ("L['self'].proj.weight"), or ''."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else name


def clone_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy to edit. Dynamo reads its own placeholders again after the backend returns, so those must stay."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copied)
    graph.output(result).meta = dict(gm.graph.output_node().meta)
    for old, new in copied.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    clone = fx.GraphModule(gm, graph)
    clone.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        clone._param_name_to_source = gm._param_name_to_source
    return clone


def mark_as_weight(placeholder: fx.Node, example: Tensor) -> None:
    """Give a new graph input what AOTAutograd and CUDA graphs expect of a parameter: a source, and a fixed address."""
    placeholder._dynamo_source = None
    placeholder.meta["example_value"] = example
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def fake_like(fake: Tensor | None, real: Tensor) -> Tensor:
    """`real` as a fake tensor of the mode that `fake` belongs to, with fixed sizes."""
    from torch._dynamo.utils import detect_fake_mode

    mode = detect_fake_mode([fake]) if fake is not None else None
    return mode.from_tensor(real, static_shapes=True) if mode is not None else real


def fake_mode_of(*values: Any) -> Any:
    """The context in which operators of these fake tensors, nested in lists or dicts, give fake tensors."""
    from torch._dynamo.utils import detect_fake_mode

    mode = detect_fake_mode(torch.utils._pytree.tree_leaves(values))
    assert mode is not None
    return mode


def without_fake_tensors() -> Any:
    """A context in which tensors are made in earnest, within tracing too."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def describe(node: fx.Node, instead_of: fx.Node) -> None:
    """Give a new node of an aten graph what others read of it: where it stands, and its result as fake tensors."""

    def value(argument: fx.Node) -> Any:
        return argument.meta["val"]

    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    assert callable(node.target)
    with fake_mode_of(args, kwargs):
        node.meta["val"] = node.target(*args, **kwargs)
    node.meta.update({k: instead_of.meta[k] for k in ("nn_module_stack", "stack_trace") if k in instead_of.meta})


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], mode: str | None, rewrite: Callable[[fx.GraphModule], None] | None = None
) -> Callable[..., Any]:
    """Hand a rewritten graph to Inductor; the result takes the inputs as separate arguments.

    rewrite  what to do with the aten graph that Inductor has made of it, once decomposed and functional. Inductor's
             caches know it by the sources of its folder, of this one and of kernels/, and by SVDQ_KERNELS: while
             these stay, equal graphs must come out alike.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    _call_by_sites()
    patches = dict(list_mode_options(mode)) if mode not in (None, "default") else {}
    if rewrite is not None:
        patches["post_grad_custom_pre_pass"] = _aten_pass(rewrite)
    return compile_fx(gm, list(inputs), config_patches=patches)  # type: ignore[return-value]


@cache
def _call_by_sites() -> None:
    """Have Inductor's code call our operators through a `Site` each where sizes are fixed, past torch's dispatcher,
    which takes longer than a launch; and leave alone the memory of results that are not its own.
    """
    from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
    from torch._inductor.codegen.wrapper import ExternKernelAllocLine
    from torch._inductor.virtualized import V

    from .ops import BORROWING, IMPLEMENTATIONS, site

    def generate(node: Any, writeline: Callable[[Any], None]) -> None:
        wrapper, name = V.graph.wrapper_code, f"svdq_{node.get_name()}"
        if not any(getattr(size, "free_symbols", ()) for t in node.inputs for size in (*t.get_size(), *t.get_stride())):
            wrapper.add_import_once(f"from {site.__module__} import site")
            wrapper.add_import_once(f"{name} = site({str(node.op_overload)!r})")
            node.python_kernel_name = name
        if str(node.op_overload) in BORROWING:
            V.graph.never_reuse_buffers.update(buffer.get_name() for buffer in (node, *node.outputs))
        writeline(ExternKernelAllocLine(wrapper, node))

    for operator in IMPLEMENTATIONS:
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{operator}"] = CustomCodegen(python=generate)


def _aten_pass(rewrite: Callable[[fx.GraphModule], None]) -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class AtenPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            assert graph.owning_module is not None
            rewrite(graph.owning_module)

        def uuid(self) -> Any:
            function, options = getattr(rewrite, "func", rewrite), getattr(rewrite, "keywords", {})
            sources = _sources(Path(inspect.getfile(function)).parent)
            return get_hash_for_files(sources), repr(options), os.environ.get("SVDQ_KERNELS", "")

    return AtenPass()


def _sources(passes: Path) -> tuple[str, ...]:
    """All that decides what comes out of the passes: theirs, and those of lowering/ and kernels/."""
    folders = passes, Path(__file__).parent, *map(Path, kernels.__path__)
    return tuple(sorted(str(file) for folder in folders for file in folder.rglob("*.py")))


@contextmanager
def compiled_in_place(model: nn.Module, backend: Callable) -> Iterator[None]:
    """Within the context, calling the model runs what torch.compile makes of it with this backend."""
    before = model._compiled_call_impl
    model.compile(backend=backend)
    try:
        yield
    finally:
        model._compiled_call_impl = before


def check_weights_at_every_call() -> None:
    """Have Dynamo look at the type of each weight whenever compiled code is called.

    It skips guards on tensors, and on whole modules in torch 2.10 and 2.11, as long as the dictionaries that hold them
    have the same entries. A weight that becomes a QuantizedWeight stays the same entry: its new class would go unseen.
    """
    for name in ("skip_tensor_guards_with_matching_dict_tags", "use_recursive_dict_tags_for_guards"):
        if hasattr(torch._dynamo.config, name):
            _set_in_every_thread(name, False)


@cache
def allow_many_graphs() -> None:
    """Raise Dynamo's limits on how many graphs one function may have, once: what is set later counts.

    Each set of active adapters is a graph of its own, and so is each size of picture. At the default limit of 8 torch
    would go on eagerly, in 4-bit still, but slowly.
    """
    for name, least in (("recompile_limit", 256), ("accumulated_recompile_limit", 4096)):
        _set_in_every_thread(name, max(least, getattr(torch._dynamo.config, name)))


def _set_in_every_thread(name: str, value: Any) -> None:
    """Set one of Dynamo's options. An assignment holds for this thread alone; others begin with the default."""
    setattr(torch._dynamo.config, name, value)
    torch._dynamo.config._config[name].default = value  # type: ignore[attr-defined]


def traced_for_torch_itself() -> bool:
    """Whether Dynamo is tracing for a backend that torch brings along, which knows nothing of 4-bit weights.

    Dynamo runs it instead of tracing it: `_dynamo_marked_constant` is what `assume_constant_result` sets.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend = InstructionTranslator.current_tx().output.compiler_fn
    for name in ("_torchdynamo_orig_backend", "compiler_fn"):
        backend = getattr(backend, name, backend)
    return (getattr(backend, "__module__", None) or type(backend).__module__).split(".")[0] == "torch"


traced_for_torch_itself._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def refuse_export(check: Callable[[nn.Module], None]) -> None:
    """Have torch.export hand each model to `check`, which raises, before it touches the parameters.

    Its fake copy of a weight does not know the weight's class; the strict way clones weights in C++, past everything.
    """
    from torch.export import _trace

    export = _trace._export

    @wraps(export)
    def checked(mod: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check(mod)
        return export(mod, *args, **kwargs)

    _trace._export = checked


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into the structured trace (TORCH_TRACE, tlparse)."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
    )


def data_property_calls() -> tuple[Any, Any]:
    """What __torch_function__ is handed when `.data` is read and when it is assigned."""
    descriptor: Any = Tensor.data
    return descriptor.__get__, descriptor.__set__
