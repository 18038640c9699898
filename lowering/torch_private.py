"""The private corners of torch that this package leans on, but for Inductor's (inductor.py). docs/compat.md has the
versions that were tried.

What it changes for the whole process, all of it; each leaves other models as they are:

    torch._dynamo.convert_frame._compile   converts the frames of our backend by settings of ours (`_settings`)
    torch.export._trace._export, torch._dynamo.variables.builder._clone_input,
    torch.jit._recursive.create_script_module
                                           refuse what holds a quantized weight, once there is one
    CUSTOM_EXTERN_KERNEL_CODEGEN           Inductor's: how to write calls of our operators (inductor.py)
    torch.library                          our operators, in a namespace of their own (ops.py)

torch._dynamo and torch.export are imported inside functions: that takes as long as importing torch, and whoever
quantizes, loads or saves a model needs neither.
"""

import gc
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, wraps
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad

from .locks import open_in_child
from .stack import frames

LINEAR_TARGETS = frozenset({torch.nn.functional.linear, torch._C._nn.linear})


def shell(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape with no memory behind it. Reading it would be out of bounds: see parameter.py.

    Unlike `empty_strided` followed by `resize_(0)` it never allocates the memory it goes without.
    """
    if device.type == "meta":
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return _reinterpret_tensor(torch.empty(0, dtype=dtype, device=device), tuple(shape), tuple(stride), 0)


def has_memory(tensor: Tensor) -> bool:
    """Whether there are values behind it: not of a shell, nor of a meta tensor."""
    return not tensor.is_meta and (tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0)


def allocator(device: torch.device) -> Callable[[tuple, tuple, torch.dtype], Tensor]:
    """(shape, strides, dtype), the first two tuples -> a tensor on this device: for CUDA, on the current one.

    It is what Inductor's code calls, and takes a quarter of `empty_strided`'s time.
    """
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    return quick or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device))


def reinterpret(tensor: Tensor, shape: tuple, strides: tuple, offset: int) -> Tensor:
    """Its memory as a tensor of this form, which begins `offset` elements later; what Inductor's code calls, too."""
    return _reinterpret_tensor(tensor, shape, strides, offset)


def without_views() -> AbstractContextManager:
    """Within the context a view does not know what it is a view of, which Dynamo's guards would ask for any size;
    nor is anything recorded for gradients.
    """
    return torch._C._AutoDispatchBelowADInplaceOrView()


def below_autograd() -> AbstractContextManager:
    """Within the context torch's operators are called past autograd, whose part in an exchange between ranks is Python
    (torch 2.13), whether or not somebody wants gradients.
    """
    return torch._C._AutoDispatchBelowAutograd()


def plainly(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function as if no tensor had a __torch_function__.

    It is off for the time of the call, whatever happens: behind the body of a `with` an interruption could come before
    its exit, and then it would stay off.
    """
    return torch._C._disabled_torch_function_impl(function, (), args, kwargs)


def eagerly(gm: fx.GraphModule) -> Callable:
    """Call a graph that Dynamo made as the Python that it stands for. Dynamo calls what it has compiled with
    __torch_function__ off, since it was traced already.
    """

    def run(*args: Any) -> Any:
        with torch._C._EnableTorchFunction():
            return gm(*args)

    return run


def patience_of(group: Any) -> timedelta:
    """How long members of a process group wait for one another: `timeout` of torch.distributed.init_process_group."""
    backend = group._get_backend(torch.device(group._device_types[0]))
    options = getattr(backend, "options", None)
    return options._timeout if options is not None else timedelta(minutes=10)


def sum_over(tensor: Tensor, group: str) -> Tensor:
    """The sum of the ranks' tensors, on all of them; in a graph an operator, which needs no gradients. group: the name
    of a process group, which graphs and copies can hold.
    """
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(tensor, "sum", group))


def ranks_in(group: str) -> tuple[int, ...]:
    """Those of a process group, by the name that graphs hold."""
    found = torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type] # a kind of str
    return tuple(sorted(torch.distributed.get_process_group_ranks(found)))


def external_object(index: int) -> Any:
    """What Dynamo's code has put aside for a graph under a number, as a stream; None if it is gone."""
    known = torch._dynamo.graph_bytecode_inputs.index_to_external_object_weakref.get(index)
    return None if known is None else known()


def transforms_in(gm: fx.GraphModule) -> set[str]:
    """Which transforms of torch.func a graph of Dynamo's works out itself: "grad" (vjp too), "jvp", "vmap"."""
    names = (getattr(node.target, "__name__", "") for node in gm.graph.nodes if node.op == "call_function")
    return {n.removeprefix("_").removesuffix("_increment_nesting") for n in names if n.endswith("_increment_nesting")}


def are_differentiated(values: Iterable[Any]) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp, forward_ad) is at work on some of these tensors."""
    if forward_ad._current_level < 0:
        return False
    tensors = [value for value in values if isinstance(value, Tensor)]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def source_name(node: fx.Node) -> str:
    """Where Dynamo found this graph input, as Python ("L['self'].proj.weight"), or ''."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    return _expression(source)


def _expression(source: Any) -> str:
    return source.name() if callable(source.name) else source.name


def modules_behind(gm: fx.GraphModule) -> Iterator[nn.Module]:
    """Called by a backend: the modules through which the function that Dynamo is converting reaches the parameters in
    its graph ("L['self'].proj.weight", "L['model'].blocks[0].weight" of a closure), outermost first.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # somebody calls the backend without Dynamo
        return
    scopes = {"L": output.local_scope, "G": output.global_scope}
    known: dict[str, Any] = {}  # by expression
    for node in gm.graph.find_nodes(op="placeholder"):
        for path in _bases(getattr(node, "_dynamo_source", None)):
            if path not in known:
                try:
                    known[path] = eval(path, scopes)
                except Exception:  # whatever only Dynamo's guards can read
                    known[path] = None
                if isinstance(known[path], nn.Module):
                    yield known[path]


def _bases(source: Any) -> list[str]:
    """The expressions that lead to a source, outermost first: "L['self']", "L['self'].proj", ..."""
    paths: list[str] = []
    while source is not None:
        paths.insert(0, _expression(source))
        source = getattr(source, "base", None)
    return paths


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


def compile_in_place(model: nn.Module, **arguments: Any) -> None:
    """`model.compile`, of torch's own modules too, as nn.Sequential: Dynamo by itself would not look into those."""
    from torch._dynamo import external_utils, trace_rules

    call = model._call_impl
    if trace_rules.check(type(model).forward):
        call = external_utils.wrap_inline(call)
    model._compiled_call_impl = torch.compile(call, **arguments)


@contextmanager
def compiled_in_place(model: nn.Module, backend: Callable) -> Iterator[None]:
    """Within the context, calling the model runs what torch.compile makes of it with this backend."""
    before = model._compiled_call_impl
    compile_in_place(model, backend=backend)
    try:
        yield
    finally:
        model._compiled_call_impl = before


def compilations() -> "WeakSet[Any]":
    """Everything that torch.compile has made and somebody still holds; what it makes later is not among them."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return WeakSet()
    base = dynamo._TorchDynamoContext
    kinds = (base, *base.__subclasses__())
    return WeakSet(found for found in gc.get_referrers(*kinds) if type(found) in kinds)  # an object refers to its class


def compilations_under_way() -> Iterator[Any]:
    """Called within compiled code, or by a backend: those of `compilations` that run and whose backend is ours."""
    for frame in frames():
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            this = frame.f_locals.get("self")
            if id(_innermost(getattr(this, "callback", None))) in _our_backends:
                yield this


def while_nothing_is_traced() -> AbstractContextManager:
    """A lock: as long as it is held no other thread traces or makes guards, so what they look at may change."""
    return _compile_lock() or nullcontext()


def _compile_lock() -> Any:
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)


open_in_child(_compile_lock)  # held while weights are quantized, which may take a minute


# Dynamo's limits on how many graphs one function may have. Each set of active adapters is a graph of its own, and so is
# each size of picture; at the default of 8 torch would go on eagerly, in 4-bit still, but slowly.
_LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}

# Where the dictionaries around them have the same entries as before, Dynamo skips its guards on tensors, and on whole
# modules in torch 2.11. A weight that becomes a QuantizedWeight stays the same entry: its new class would go unseen.
_SKIPPING = ("skip_tensor_guards_with_matching_dict_tags", "use_recursive_dict_tags_for_guards")


def _settings() -> dict[str, Any]:
    """How Dynamo converts our frames: high limits, unless somebody has set them, and guards on every weight."""
    config: Any = torch._dynamo.config
    raised = {name: least for name, least in _LIMITS.items() if getattr(config, name) == config._config[name].default}
    return raised | dict.fromkeys(_SKIPPING, False)


@dataclass
class _Conversion:
    """A frame that Dynamo is converting.

    backend  what torch.compile was given
    after    what is to be undone then
    """

    backend: Any
    after: ExitStack
    is_ours: bool = False

    def use_settings(self) -> None:
        if not self.is_ours:
            self.is_ours = True
            self.after.enter_context(torch._dynamo.config.patch(_settings()))


_conversion: ContextVar[_Conversion | None] = ContextVar("_conversion", default=None)
_tellings: dict[int, Callable[[bool], AbstractContextManager]] = {}  # by the id of a backend that stays
_our_backends: "WeakValueDictionary[int, Any]" = WeakValueDictionary()  # by id: they need not be hashable


def convert_by_our_settings(
    backend: Callable, telling: Callable[[bool], AbstractContextManager] | None = None
) -> Callable:
    """Decorate a backend, so that Dynamo converts the frames that it compiles by `_settings`, in whatever thread.

    All of them are read while a frame is converted: the limits before the backend is called, what guards may skip after
    it has returned. So no other model's frames are touched, nor does a call of compiled code cost anything.

    telling  the context in which frames are converted, by the option `progress`
    """
    _watch_conversions()
    if telling is not None:
        _tellings[id(backend)] = telling
    _our_backends[id(backend)] = backend
    return backend


def converting_for_us() -> None:
    """Called by our backend: whoever has called it (somebody's backend that stands around it) is ours from now on."""
    conversion = _conversion.get()
    if conversion is not None:
        with suppress(TypeError):  # cannot be referred to weakly
            _our_backends[id(conversion.backend)] = conversion.backend
        conversion.use_settings()
    elif torch._guards.TracingContext.try_get() is not None:
        # It was imported in the middle of a conversion, whose end we do not see: in this thread they stay.
        torch._dynamo.config.patch(_settings()).__enter__()


@cache
def _watch_conversions() -> None:
    from torch._dynamo import convert_frame

    convert = convert_frame._compile
    place = list(inspect.signature(convert).parameters).index("compiler_fn")

    @wraps(convert)
    def watched(*args: Any, skip: int = 0, **kwargs: Any) -> Any:
        with ExitStack() as after:
            conversion = _Conversion(_innermost(args[place]), after)
            after.callback(_conversion.reset, _conversion.set(conversion))
            if id(conversion.backend) in _our_backends:
                conversion.use_settings()
                if id(conversion.backend) in _tellings:
                    after.enter_context(_tellings[id(conversion.backend)](_wants_progress(args[place])))
            return convert(*args, skip=skip + 1, **kwargs)  # skip: frames that stack traces leave out

    convert_frame._compile = watched


def _innermost(backend: Any) -> Any:
    """What torch.compile was given, out of what it has wrapped around that."""
    backend = _with_options(backend)
    return getattr(backend, "compiler_fn", backend)


def _with_options(backend: Any) -> Any:
    """What torch.compile makes of its backend and the options, out of what it has wrapped around that."""
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    return backend


def _wants_progress(backend: Any) -> bool:
    options = (getattr(_with_options(backend), "kwargs", None) or {}).get("options") or {}
    wanted = options.get("progress", True) if isinstance(options, dict) else getattr(options, "progress", True)
    return wanted is True


def traced_for_torch_itself() -> bool:
    """Whether Dynamo is tracing for a backend that torch brings along, which knows nothing of 4-bit weights.

    Dynamo runs it instead of tracing it: `_dynamo_marked_constant` is what `assume_constant_result` sets.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend = _innermost(InstructionTranslator.current_tx().output.compiler_fn)
    return (getattr(backend, "__module__", None) or type(backend).__module__).split(".")[0] == "torch"


traced_for_torch_itself._dynamo_marked_constant = True  # type: ignore[attr-defined]


def leave_to_python(function: Callable) -> None:
    """Never make a graph of a call of this function, nor of what it calls. Traced as part of a graph it still is.

    Beneath a frame that Dynamo has compiled in part, every other frame comes before it, __torch_function__ too; there
    it takes one method of a tensor for another, as its guards do not tell them apart.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


@cache
def refuse_export(check: Callable[[str, Iterable[Tensor]], None]) -> None:
    """Have all that writes a model down as a program hand its tensors to `check`, which raises, before they are read.
    `check` is told what it is for.

    torch.export's fake copy of a weight does not know the weight's class. Dynamo's export (the strict way, in which
    weights may stand in a list or a closure too) clones tensors in C++, past everything, and so does TorchScript.
    """
    from torch._dynamo.variables import builder
    from torch.export import _trace

    export, clone, script = _trace._export, builder._clone_input, torch.jit._recursive.create_script_module

    @wraps(export)
    def checked_export(mod: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check("torch.export", mod.parameters())
        return export(mod, *args, **kwargs)

    @wraps(clone)
    def checked_clone(value: Any, fake_mode: Any) -> Any:
        check("torch.export", (value,))
        return clone(value, fake_mode)

    @wraps(script)
    def checked_script(nn_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_tracing"):  # a trace has the operators in it
            check("torch.jit.script", nn_module.parameters())
        return script(nn_module, *args, **kwargs)

    _trace._export, builder._clone_input = checked_export, checked_clone
    torch.jit._recursive.create_script_module = checked_script


def is_for_dynamo(error: Exception) -> bool:
    """Whether an error is how the inside of the compiler asks Dynamo to trace again, or to leave the frame alone."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    return isinstance(error, RestartAnalysis | SkipFrame)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into the structured trace (TORCH_TRACE, tlparse)."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
    )


def data_property_calls() -> tuple[Any, Any]:
    """What __torch_function__ is handed when `.data` is read and when it is assigned."""
    descriptor: Any = Tensor.data
    return descriptor.__get__, descriptor.__set__
