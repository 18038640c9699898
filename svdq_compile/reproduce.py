"""A stand-alone reproduction of one layer or block of a model, for a bug report.

    reproduce(pipe.transformer, "transformer_blocks.0", "bug", call=lambda: pipe("a dog", num_inference_steps=1))

The folder gets `reproduce.py`, which needs nothing but torch and svdq_compile, and `tensors.safetensors`. The script is
the graph that Dynamo makes of the block, printed as Python, with the linears where they were: it holds no pickled
class and does not care which version of diffusers the model came from. Run, it compares 16-bit, the plain torch
reference, and compiled code.

What it cannot do: a block with graph breaks or with graphs inside its graph (flex_attention, cond), one that takes
something other than tensors and constants, and sizes that change from call to call. Inputs become contiguous.
"""

import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from .config import Config
from .errors import CannotReproduce
from .lowering.torch_private import source_name
from .parameter import has_quantized
from .passes.linears import LINEAR
from .passes.scope import clean
from .passes.subgraphs import placeholders

PACKAGES = ("svdq-compile", "torch", "triton", "diffusers", "transformers", "peft")
_FREED = re.compile(r";\s+\w+ = (\w+ = )*None.*$", re.MULTILINE)  # what fx appends to let go of values


def reproduce(
    model: nn.Module,
    name: str,
    folder: str | Path,
    *,
    call: Callable[[], Any],
    config: Config | None = None,
    private: bool = False,
) -> Path:
    """Write what runs one module of a model by itself. Returns the script.

    name     of the module, as `model.named_modules()` has it; "" for the model itself
    folder   to write to; made if it is missing
    call     runs the model; what the module is given at its first call becomes the reproduction's input
    config   how the reproduction quantizes
    private  replace weights and inputs by random numbers, with the mean and the spread of each channel kept

    The model must be in 16 (or 32) bits and uncompiled. Raises CannotReproduce.
    """
    module = _module(model, name)
    args, kwargs = _inputs(module, name, call)
    gm, examples = _graph(module, args, kwargs)
    graph, weights, inputs = _bind(gm, examples)
    if private:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights, inputs = ({key: _alike(t) for key, t in tensors.items()} for tensors in (weights, inputs))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weights.{key}": t for key, t in weights.items()} | {f"inputs.{key}": t for key, t in inputs.items()}
    save_file(
        {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, folder / "tensors.safetensors"
    )
    script = folder / "reproduce.py"
    script.write_text(_script(graph, f"{type(module).__name__} {name}".strip(), inputs, config or Config(), private))
    return script


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise CannotReproduce(name, "the model has no such module; model.named_modules() lists them") from error
    if has_quantized(module):
        raise CannotReproduce(name, "it is quantized already: load the model anew, or svdq_compile.restore it first")
    return module


def _inputs(module: nn.Module, name: str, call: Callable[[], Any]) -> tuple[tuple, dict[str, Any]]:
    """Copies of what the module is given at its first call."""
    caught: list[tuple[tuple, dict[str, Any]]] = []

    def catch(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not caught:
            caught.append(tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs)))

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            call()
    finally:
        handle.remove()
    if not caught:
        raise CannotReproduce(name, "`call` did not run it, or ran a compiled copy: give the model uncompiled")
    return caught[0]


def _graph(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[fx.GraphModule, list]:
    """What Dynamo hands to a backend for this call."""
    caught: list[tuple[fx.GraphModule, list]] = []

    def backend(gm: fx.GraphModule, examples: list) -> Callable[..., Any]:
        caught.append((gm, examples))
        return gm.forward

    try:
        with torch.no_grad():
            torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise CannotReproduce(
            type(module).__name__, f"torch.compile does not take it as one graph ({reason})"
        ) from error
    if not caught:
        raise CannotReproduce(type(module).__name__, "it computes nothing")
    return caught[0]


def _bind(gm: fx.GraphModule, examples: list) -> tuple[fx.Graph, dict[str, Tensor], dict[str, Tensor]]:
    """A copy of the graph in which weights are attributes of a module, and products with them its linears, as in the
    model. -> (graph, weights by name, inputs by name); the inputs are what the graph still takes.
    """
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, copied))
    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    names: dict[fx.Node, str] = {}
    for original, value in zip(placeholders(gm.graph), examples, strict=True):
        node = copied[original]
        if not isinstance(value, Tensor):
            raise CannotReproduce(node.name, f"the graph takes a {type(value).__name__}, which is no tensor")
        if isinstance(value, nn.Parameter):
            path = clean(source_name(original))
            names[node] = path if "." in path else f"layer.{path}"  # the module's own, and not of a part of it
            weights[names[node]] = value
        else:
            node.name = node.target = f"input_{len(inputs)}"
            inputs[node.name] = value
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(gm, str(node.target), None)
        if not isinstance(value, Tensor):
            raise CannotReproduce(str(node.target), "the graph holds a graph of its own (flex_attention, cond, ...)")
        weights[f"constants.{node.target}"] = value
        node.target = f"constants.{node.target}"
    for target in LINEAR:
        for node in graph.find_nodes(op="call_function", target=target):
            _as_linear(node, names)
    for node, name in names.items():
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name))
        graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    return graph, weights, inputs


def _as_linear(node: fx.Node, names: Mapping[Any, str]) -> None:
    """linear(x, w, b) -> self.to_q(x), if the graph has it as the module's own weight and bias."""
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    layer, _, kind = names.get(weight, "").rpartition(".")
    if kind == "weight" and (bias is None or names.get(bias) == f"{layer}.bias"):
        with node.graph.inserting_before(node):
            node.replace_all_uses_with(node.graph.call_module(layer, (x,)))
        node.graph.erase_node(node)


def _alike(t: Tensor) -> Tensor:
    """Random numbers with the mean and the spread of each of its channels, the last dimension."""
    if not t.is_floating_point():
        return t
    rows = t.detach().float().reshape(-1, t.shape[-1]) if t.dim() > 1 else t.detach().float().reshape(-1, 1)
    std, mean = torch.std_mean(rows, 0, correction=0)
    return (torch.randn(rows.shape, device=t.device) * std + mean).reshape(t.shape).to(t.dtype)


def _script(graph: fx.Graph, title: str, inputs: dict[str, Tensor], config: Config, private: bool) -> str:
    code = graph.python_code("self")
    forward = _FREED.sub("", code.src).strip()
    layers = sorted({str(node.target) for node in graph.find_nodes(op="call_module")})
    device = next((t.device.type for t in inputs.values()), "cpu")
    return _TEMPLATE.format(
        title=title,
        values="random numbers, channel by channel like the real ones" if private else "the real ones",
        versions="\n".join(_versions()),
        imports="\n".join(_imports(code.globals)),
        layers="".join(f"    {layer!r},\n" for layer in layers),
        config=", ".join(f"{name}={value!r}" for name, value in config.to_dict().items()),
        forward="\n".join(f"    {line}".rstrip() for line in forward.splitlines()),
        device=device,
    )


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()}, {platform.machine()}"
    for package in PACKAGES:
        try:
            yield f"{package} {getattr(sys.modules.get(package), '__version__', None) or version(package)}"
        except PackageNotFoundError:
            yield f"{package} is not installed"
    if torch.cuda.is_available():
        yield torch.cuda.get_device_name()


def _imports(names: dict[str, Any]) -> Iterator[str]:
    """What the printed graph calls by name."""
    for name, value in names.items():
        if name in ("torch", "nn"):
            continue
        if isinstance(value, float):
            yield f'{name} = float("{value}")'
        elif value is type(None):
            yield f"{name} = type(None)"
        elif hasattr(value, "__qualname__") and hasattr(value, "__module__"):
            yield f"from {value.__module__} import {value.__qualname__} as {name}"
        else:
            yield f"import {value.__name__} as {name}"


_TEMPLATE = '''"""{title}, by itself: 16-bit, the plain torch reference of the 4-bit operators, and compiled code.

    python reproduce.py [cpu|cuda]

Weights and inputs are {values}. Made with

{versions}
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import svdq_compile as svdq

{imports}

LINEARS = (
{layers})
CONFIG = svdq.Config({config})


class Block(nn.Module):
{forward}


def load(device):
    """The block with its weights, and its inputs."""
    block, inputs = Block(), []
    for key, tensor in load_file(Path(__file__).with_name("tensors.safetensors"), device).items():
        kind, _, name = key.partition(".")
        if kind == "inputs":
            inputs.append((int(name.removeprefix("input_")), tensor))
            continue
        path, _, last = name.rpartition(".")
        parent = block
        for i, part in enumerate(path.split(".")):
            if not hasattr(parent, part):
                linear = ".".join(path.split(".")[: i + 1]) in LINEARS
                parent.add_module(part, nn.Linear(1, 1, bias=False, device="meta") if linear else nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        if last == "weight" and path in LINEARS:
            parent.out_features, parent.in_features = tensor.shape
    return block, [tensor for _, tensor in sorted(inputs, key=lambda pair: pair[0])]


def first(result):
    return result[0] if isinstance(result, (tuple, list)) else result


def difference(a, b):
    return float((first(a).float() - first(b).float()).norm() / first(b).float().norm())


@torch.no_grad()
def main(device):
    block, inputs = load(device)
    exact = block(*inputs)
    print(svdq.quantize(block, CONFIG, calibrate=lambda model: model(*inputs)))
    os.environ["SVDQ_KERNELS"] = "reference"
    reference = block(*inputs)
    del os.environ["SVDQ_KERNELS"]
    compiled = torch.compile(block, backend="svdquant", fullgraph=True, options=CONFIG.to_dict())(*inputs)
    print(f"reference from 16-bit  {{difference(reference, exact):.5f}}")
    print(f"compiled from 16-bit   {{difference(compiled, exact):.5f}}")
    print(f"compiled from reference {{difference(compiled, reference):.5f}}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "{device}")
'''
