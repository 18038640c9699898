"""What each thing that one does with LoRA adapters costs a quantized model: graphs compiled, weights quantized, time.

    python bench/lora_events.py [--model wan] [--whole] [--device cpu] [--out bench/results/lora-events.json]

A small model of the zoo in tests/, through diffusers' own calls. `seconds` are those of the event and of the first call
after it, so compiling is in it; `steady` those of the call after that. `requantized` counts weights whose packed
tensors have other bits than before.
"""

import argparse
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, fx, nn

import record
import svdq_compile as svdq
from svdq_compile.backend import svdquant
from svdq_compile.errors import WeightsReleased
from svdq_compile.lowering.packed import PackedLinear
from svdq_compile.parameter import QuantizedWeight

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from zoo import make

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "ffn.net.0.proj", "ffn.net.2", "proj_mlp"]
OPTIONS = {"progress": False, "calibration_steps": 1, "rank": 16, "refine": 2}


class Walk:
    """A compiled model and the table of what happened to it."""

    def __init__(self, name: str, regional: bool, device: str) -> None:
        self.graphs = 0
        self.events: list[dict[str, Any]] = []
        self.name, self.device = name, device
        self.model, self.inputs = self.fresh()
        known = inspect.signature(type(self.model).forward).parameters
        self.scale_keyword = next(key for key in known if key.endswith("attention_kwargs"))
        self.call: Callable = self.model
        if regional:
            self.model.compile_repeated_blocks(backend=self.backend, fullgraph=True)
        else:
            self.call = torch.compile(self.model, backend=self.backend, fullgraph=True)

    def fresh(self) -> tuple[nn.Module, dict[str, Any]]:
        model, inputs = make(self.name, torch.bfloat16)
        return model.to(self.device), {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def backend(self, gm: fx.GraphModule, example_inputs: list) -> Callable:
        self.graphs += 1
        return svdquant(gm, example_inputs, options=OPTIONS)

    def packs(self) -> dict[str, PackedLinear]:
        named = self.model.named_parameters()
        return {n.replace(".base_layer", ""): p._svdq for n, p in named if isinstance(p, QuantizedWeight)}

    def run(self, **more: Any) -> float:
        begin = time.perf_counter()
        self.call(**self.inputs, **more)[0].sum().item()
        return time.perf_counter() - begin

    def event(self, title: str, do: Callable[[], object] = lambda: None, **more: Any) -> None:
        graphs, packs = self.graphs, self.packs()
        begin = time.perf_counter()
        note = {}
        try:
            do()
        except WeightsReleased as error:
            note = {"refused": str(error)}
        self.model.requires_grad_(False)
        self.run(**more)
        seconds = time.perf_counter() - begin
        row = {
            "event": title,
            "new_graphs": self.graphs - graphs,
            "requantized": sum(_differs(pack, packs.get(name)) for name, pack in self.packs().items()),
            "seconds": round(seconds, 3),
            "steady": round(self.run(**more), 4),
        } | note
        self.events.append(row)
        print(f"{title:44s} {row['new_graphs']} graphs  {row['requantized']} requantized  {seconds:7.2f} s", flush=True)

    def add(self, name: str, rank: int, targets: list[str] = TARGETS) -> None:
        self.model.add_adapter(_config(rank, targets), name)

    def state(self, rank: int) -> dict[str, Tensor]:
        """An adapter as a file holds it, of values of its own."""
        model, _ = self.fresh()
        model.add_adapter(_config(rank), "x")
        state = get_peft_model_state_dict(model, adapter_name="x")
        return {f"transformer.{key}": value for key, value in state.items()}

    def load(self, rank: int, name: str, hotswap: bool = False) -> None:
        self.model.load_lora_adapter(self.state(rank), adapter_name=name, hotswap=hotswap)


def _differs(pack: PackedLinear, before: PackedLinear | None) -> bool:
    """Whether a weight that was in 4-bit is in other bits now."""
    if before is None or pack is before:
        return False
    tensors = zip(pack.own_tensors().values(), before.own_tensors().values(), strict=True)
    return not all(torch.equal(a, b) for a, b in tensors)


def _config(rank: int, targets: list[str] = TARGETS) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=targets)


def walk(w: Walk) -> None:
    """Every event, in the order of a session."""
    model = w.model
    w.run()  # observes and quantizes
    w.event("compile in 4 bits")
    w.event("add a (rank 8)", lambda: w.add("a", 8))
    for i in range(10):
        w.event(f"scale, {i + 1}", lambda i=i: model.set_adapters("a", 0.9 - 0.07 * i))
    w.event("per-block scale", lambda: per_block(model, 0.5))
    w.event("per-block scale, another", lambda: per_block(model, 0.4))
    w.event("second adapter b (rank 12, attention only)", lambda: w.add("b", 12, TARGETS[:4]))
    for i in range(3):
        w.event(f"mix, {i + 1}", lambda i=i: model.set_adapters(["a", "b"], [0.7 - 0.1 * i, 0.3 + 0.1 * i]))
    for scale in (0.9, 0.8, 0.7):
        w.event(f"{w.scale_keyword} scale {scale}", **{w.scale_keyword: {"scale": scale}})
    w.event("back to no scale")
    w.event("disable", model.disable_lora)
    w.event("enable", model.enable_lora)
    w.event("delete b", lambda: model.delete_adapters("b"))
    w.event("fuse", model.fuse_lora)
    w.event("unfuse", model.unfuse_lora)
    w.event("delete a", lambda: model.delete_adapters("a"))
    w.event("prepare hotswap and load h (rank 8 of 16)", lambda: prepare(w))
    w.event("hotswap, same rank", lambda: w.load(8, "h", hotswap=True))
    w.event("hotswap, rank 16", lambda: w.load(16, "h", hotswap=True))
    w.event("delete h", lambda: model.delete_adapters("h"))
    for i in range(3):
        w.event(f"load under the same name s, {i + 1}", lambda: w.load(8, "s"))
        w.event(f"delete s, {i + 1}", lambda: model.delete_adapters("s"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.svdq.safetensors"
        w.event("save the quantized model", lambda: svdq.save(model, path))
        w.event("reload it", lambda: svdq.load(model, path, device=w.device))


def per_block(model: nn.Module, strength: float) -> None:
    """Another strength in each block, as a schedule sets them."""
    for i, module in enumerate(m for m in model.modules() if isinstance(m, BaseTunerLayer)):
        module.set_scale("a", strength / (1 + i % 5))


def prepare(w: Walk) -> None:
    w.model.enable_lora_hotswap(target_rank=16)
    w.load(8, "h")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="wan")
    parser.add_argument("--whole", action="store_true", help="compile the whole model, not its blocks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "lora-events.json")
    arguments = parser.parse_args()
    with torch.no_grad():
        session = Walk(arguments.model, not arguments.whole, arguments.device)
        walk(session)
    told = record.environment() | {"model": arguments.model, "regional": not arguments.whole, "options": OPTIONS}
    arguments.out.write_text(json.dumps(told | {"events": session.events}, indent=1) + "\n")
    print(f"wrote {arguments.out}")
