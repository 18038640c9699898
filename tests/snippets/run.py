"""Run the snippets of a document in order, or a script, as on a machine with a GPU and the published models.

    python tests/snippets/run.py docs/lora.md
    python tests/snippets/run.py            # many, each in a process forked from one that has imported only (`serve`)

The working directory holds what a reader would have (reader.py), Hugging Face's cache the tiny pipelines of hub.py.
Three more things differ from a reader's machine:
- "cuda" is the CPU,
- a pipeline is called for less: an eighth of the height and width, 5 frames, prompts of 32 tokens, at most 10 steps,
- graphs run as our passes rewrote them, without Inductor and its C++ compiler: seconds instead of minutes. What
  Inductor makes of them is tested elsewhere.
"""

import functools
import inspect
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from snippets.document import Block, blocks

SHRINK = 8
MOST = {"num_frames": 5, "max_sequence_length": 32, "num_inference_steps": 10}
SECONDS = 550  # for each; pytest ends the run after 600

# In a shell, programs in Python are run as snippets are.
SHELL = """
svdq() { $RUN "$(type -P svdq)" "$@"; }
python() { $RUN "$@"; }
"""


def serve() -> None:
    """Run what each line of stdin says: [file, folder to work in, file for what it prints, arguments...] as JSON.
    Prints the exit status of each.
    """
    stand_in(pipelines=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_alone(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _alone(file: str, folder: str, printed: str, *arguments: str) -> int:
    """Run one and return its exit status."""
    signal.alarm(SECONDS)
    os.chdir(folder)
    with open(printed, "w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    status = 0
    try:
        run(Path(file), *arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def stand_in(pipelines: bool) -> None:
    """Put in place what differs from a reader's machine; `pipelines`: those of diffusers too, which takes seconds."""
    torch.set_num_threads(1)
    _on_the_cpu(pipelines)
    if pipelines:
        _small_pictures()
    _without_inductor()


def run(file: Path, *arguments: str) -> None:
    """Run a document's snippets, or a script with arguments."""
    if file.suffix == ".md":
        namespace = _main()
        for block in blocks(file):
            _run(block, file, namespace)
    else:
        sys.argv = [str(file), *arguments]
        sys.path.insert(0, str(file.parent))
        namespace = _main()
        namespace["__file__"] = str(file)
        exec(compile(file.read_text(), file, "exec"), namespace)


def _main() -> dict[str, Any]:
    """The names of a new main module: Dynamo looks there for what a function of the reader's reads."""
    sys.modules["__main__"] = main = ModuleType("__main__")
    return main.__dict__


def _run(block: Block, file: Path, namespace: dict[str, Any]) -> None:
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, file, "exec"), namespace)
    elif block.language == "bash" and block.to_run().strip():
        print(f"{file.name}:{block.line}: {block.to_run().strip()}", flush=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        shell = ["bash", "-euo", "pipefail", "-c", SHELL + block.to_run()]
        subprocess.run(shell, check=True, env=os.environ | {"PATH": path, "RUN": f"{sys.executable} {__file__}"})


def _replace(owner: Any, name: str, around: Callable) -> None:
    setattr(owner, name, functools.wraps(getattr(owner, name))(around(getattr(owner, name))))


def _on_the_cpu(pipelines: bool) -> None:
    import svdq_compile as svdq

    def around(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if _is_cuda(value) else value for value in args)
            return function(*args, **{name: "cpu" if _is_cuda(v) else v for name, v in kwargs.items()})

        return call

    _replace(torch.nn.Module, "to", around)
    if pipelines:
        from diffusers import DiffusionPipeline

        _replace(DiffusionPipeline, "to", around)
    for name in ("quantize", "load", "from_pretrained"):
        _replace(svdq, name, around)


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str) and value == "cuda"


def _small_pictures() -> None:
    import diffusers

    def around(call: Callable) -> Callable:
        signature = inspect.signature(call)

        def smaller(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs).arguments
            for side in ("height", "width"):
                asked = given.get(side) or signature.parameters[side].default or 1024
                given[side] = max(round(asked / SHRINK / 16), 1) * 16
            for name in MOST.keys() & signature.parameters.keys():
                given[name] = min(given.get(name, signature.parameters[name].default), MOST[name])
            return call(**given)

        return smaller

    for kind in (diffusers.FluxPipeline, diffusers.StableDiffusionXLPipeline, diffusers.WanPipeline):
        _replace(kind, "__call__", around)


def _without_inductor() -> None:
    from svdq_compile import compiled

    def as_it_is(gm: torch.fx.GraphModule, *_: Any, **__: Any) -> Callable:
        return gm.forward

    compiled.compile_with_inductor = as_it_is  # type: ignore[assignment]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        stand_in(pipelines=sys.argv[1].endswith(".md") or "--prompt" in sys.argv)
        run(Path(sys.argv[1]).resolve(), *sys.argv[2:])
