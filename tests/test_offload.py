"""Offloading with packed weights, as diffusers' group offloading does it on a stream: pinned copies, fetched ahead.

A machine without a GPU has no pinned memory and no streams. Here the CPU stands for both sides: pinned memory is a copy
that is known, and streams write down what they are asked.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import HookRegistry, group_offloading
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import FLIPPED_CODES, Net, inputs, net, quiet, relative_error
from svdq_compile import convert
from svdq_compile.errors import OptionError, WeightsReleased
from svdq_compile.foreign import groups_of
from svdq_compile.lowering import packed as packed_module
from svdq_compile.lowering.packed import Copy, PackedLinear
from svdq_compile.parameter import QuantizedWeight

pytestmark = pytest.mark.usefixtures("without_inductor")

CPU = torch.device("cpu")


class Stream:
    def __init__(self) -> None:
        self.waited = 0

    @torch.compiler.disable
    def synchronize(self) -> None:
        self.waited += 1


class Machine:
    """What stands for torch.cuda.

    pinned    storages by address, which keeps them
    recorded  storages that a stream was recorded for
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: dict[int, Any] = {}
        self.recorded: set[int] = set()
        self.now = Stream()
        for name in ("pin_memory", "is_pinned", "record_stream"):
            monkeypatch.setattr(torch.Tensor, name, self._method(name))
        monkeypatch.setattr(packed_module, "pinned_memory", self.pinned_memory)
        monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda device: self)

    def _method(self, name: str) -> Callable:
        """Of a plain tensor our own; a quantized weight is asked as torch would ask it, which takes no such stream."""
        mine = getattr(self, name)

        @torch.compiler.disable
        @functools.wraps(mine)  # by whose name torch asks the weight
        def call(tensor: Tensor, *args: Any) -> Any:
            if isinstance(tensor, QuantizedWeight):
                return QuantizedWeight.__torch_function__(call, (), (tensor, *args))
            return mine(tensor, *args)

        return call

    def pin_memory(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def pinned_memory(self, count: int) -> Tensor:
        return self.pin_memory(torch.empty(count, dtype=torch.uint8, device=CPU))

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        assert stream is self.now
        self.recorded.add(tensor.untyped_storage().data_ptr())

    def current_stream(self) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        yield


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def offload(model: nn.Module, level: str, **more: Any) -> Stream:
    """`enable_group_offload(use_stream=True)`, which refuses a CPU."""
    stream = Stream()
    how = {"record_stream": False, "low_cpu_mem_usage": False, "non_blocking": True} | more
    config = group_offloading.GroupOffloadingConfig(
        CPU, CPU, group_offloading.GroupOffloadingType(level), num_blocks_per_group=1, stream=stream, **how
    )
    group_offloading._apply_group_offloading(model, config)
    return stream


def remove_hooks(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("group_offloading", recurse=False)


def quantized(**options: Any) -> Net:
    model = net()
    svdq.quantize(model, svdq.Config(**quiet(**options)))
    return model


def packs(model: nn.Module) -> list[PackedLinear]:
    return [p._svdq for p in model.parameters() if isinstance(p, QuantizedWeight)]


def tensors(packed: PackedLinear) -> list[Tensor]:
    return [*packed.own_tensors().values(), packed.shared.smooth, packed.shared.down]


LEVELS = ["block_level", "leaf_level"]
MODES: dict[str, dict[str, bool]] = {
    "pinned once": {},
    "pinned at each call": {"low_cpu_mem_usage": True},
    "recorded": {"record_stream": True},
}


@pytest.mark.parametrize(
    ("mode", "weights"), [*((mode, "release") for mode in MODES), ("pinned once", "offload")], ids=lambda value: value
)
@pytest.mark.parametrize("level", LEVELS)
def test_a_quantized_model_on_a_stream(machine: Machine, level: str, mode: str, weights: str) -> None:
    model = quantized(weights=weights)
    reference = model(*inputs())
    offload(model, level, **MODES[mode])
    run = torch.compile(model, backend="svdquant", options=quiet())
    for _ in range(3):
        assert torch.equal(run(*inputs()), reference)
    assert len(packs(model)) == 10
    recorded = {t.untyped_storage().data_ptr() in machine.recorded for p in packs(model.blocks) for t in tensors(p)}
    if mode == "recorded":
        assert True in recorded
    # Between calls each weight is in the copy that was pinned, or in the one that will be.
    pinned = {machine.is_pinned(t) for p in packs(model.blocks[0]) for t in tensors(p)}
    assert pinned == {mode != "pinned at each call"}


def test_it_is_pinned_once_and_given_back_without_a_copy(machine: Machine) -> None:
    model = quantized()
    offload(model, "block_level")
    model(*inputs())
    held, pinned = packs(model), len(machine.pinned)
    for _ in range(2):
        model(*inputs())
    assert len(machine.pinned) == pinned
    assert all(a is b for a, b in zip(packs(model), held, strict=True))


def test_hooks_again_on_what_they_pinned(machine: Machine) -> None:
    """Their copy of a weight is not the weight: that one moves."""
    model = quantized()
    for _ in range(2):
        offload(model, "leaf_level")
        model(*inputs())
        groups = groups_of(model)
        assert sum(len(group.cpu_param_dict) for group in groups) >= 10
        assert all(copy is not weight for group in groups for weight, copy in group.cpu_param_dict.items())
        remove_hooks(model)


def test_siblings_are_pinned_together(machine: Machine) -> None:
    model = net()
    svdq.quantize(model, svdq.Config(**quiet()), example_inputs=dict(zip(("x", "condition"), inputs(), strict=True)))
    run = torch.compile(model, backend="svdquant", options=quiet())
    reference = run(*inputs())
    block = model.blocks[0]
    assert block.to_q.weight._svdq.siblings is block.to_k.weight._svdq.siblings
    together = block.to_q.weight._svdq.siblings
    offload(model, "block_level")
    q, k = block.to_q.weight._svdq, block.to_k.weight._svdq
    assert q.siblings is k.siblings is not together
    assert together is not None
    assert q.shared is k.shared
    assert torch.equal(run(*inputs()), reference)


def test_what_is_pinned_moves_as_one(machine: Machine, tmp_path: Path) -> None:
    """To begin a copy takes longer than most of a pack's tensors: they lie in one piece, there and where they go."""
    model = quantized()
    expected = model(*inputs())
    svdq.save(model, tmp_path / "before", progress=False)
    offload(model, "block_level")
    for pack in packs(model):
        here = pack.pin_memory()
        copy = Copy(CPU, here.up.dtype)
        of_all = here.siblings.tensors if here.siblings else here.own_tensors()
        for tensors in (of_all, {"smooth": here.shared.smooth, "down": here.shared.down}):
            there = copy.moved(tensors)
            for name, tensor in tensors.items():
                assert torch.equal(there[name], tensor)
                assert there[name].stride() == tensor.stride()
                assert there[name].data_ptr() % 16 == 0
            assert len({t.untyped_storage().data_ptr() for t in there.values()}) <= 2
        cast = Copy(CPU, torch.float16).moved(of_all)
        assert cast["up"].dtype == torch.float16
        assert torch.equal(cast["up"], of_all["up"].half())
    assert relative_error(model(*inputs()), expected) < FLIPPED_CODES
    svdq.save(model, tmp_path / "after", progress=False)
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_pinned_memory_is_given_in_powers_of_two(machine: Machine) -> None:
    """A pack a little larger than one lies in two pieces, and so it moves."""
    copy = Copy(CPU, torch.bfloat16, pinned=True)
    codes, up = torch.randint(256, (1024, 1024), dtype=torch.uint8), torch.randn(1024, 32).bfloat16()
    scale = torch.tensor(2.0)
    for rows, pieces in ((1024, [2**20, 2**16 + 256]), (768, [768 * 1024 + 2**16 + 256])):
        machine.pinned.clear()
        here = copy.moved({"scale": scale, "codes": codes[:rows], "up": up})
        assert [memory.nbytes for memory in machine.pinned.values()] == pieces
        assert list(here) == ["scale", "codes", "up"]
        there = replace(copy, pinned=False).moved(here)
        assert len({t.untyped_storage().data_ptr() for t in there.values()}) == len(pieces)
        assert all(torch.equal(there[name], t) for name, t in (("scale", scale), ("codes", codes[:rows]), ("up", up)))


def test_pinned_whatever_the_default_device(machine: Machine) -> None:
    model = quantized()
    expected = model(*inputs())
    with torch.device("meta"):
        offload(model, "block_level")
    assert torch.equal(model(*inputs()), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("way", ["ahead", "compiled"])
def test_hooks_before_quantizing(machine: Machine, way: str, level: str) -> None:
    """Their copies of the 16-bit values become copies of the 4-bit ones."""
    model = net()
    reference = net()(*inputs())
    stream = offload(model, level)
    assert torch.equal(model(*inputs()), reference)
    waited = stream.waited
    if way == "ahead":
        svdq.quantize(model, svdq.Config(**quiet()))
        assert stream.waited > waited  # for what is on its way
    run = torch.compile(model, backend="svdquant", options=quiet())
    for _ in range(4):
        result = run(*inputs())
        assert relative_error(result, reference) < 0.06
    assert relative_error(result, reference) > 1e-3
    assert len(packs(model)) == 10


def test_interrupted_while_quantizing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quantized by then stays so in the copies of the hooks."""
    model = net()
    offload(model, "block_level")
    model(*inputs())
    whole, calls = convert.quantize_group, iter(range(10))

    def interrupted(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(convert, "quantize_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        svdq.quantize(model, svdq.Config(**quiet()))
    assert len(packs(model)) == 3
    for _ in range(2):
        assert relative_error(model(*inputs()), net()(*inputs())) < 0.06
    assert len(packs(model)) == 3


def test_nothing_is_compiled_again(machine: Machine) -> None:
    model = quantized()
    offload(model, "block_level")
    for block in model.blocks:
        block.compile(backend="svdquant", options=quiet())
    for _ in range(2):
        model(*inputs())
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            model(*inputs())


def test_restore_and_back(machine: Machine) -> None:
    model = quantized(weights="offload")
    reference = model(*inputs())
    offload(model, "block_level")
    assert svdq.restore(model, progress=False) == 10
    for _ in range(2):
        assert torch.equal(model(*inputs()), net()(*inputs()))
    svdq.quantize(model, svdq.Config(**quiet()))
    for _ in range(2):
        assert torch.equal(model(*inputs()), reference)


@pytest.mark.parametrize("level", LEVELS)
def test_hooks_are_taken_away(machine: Machine, level: str) -> None:
    model = quantized()
    reference = model(*inputs())
    offload(model, level)
    model(*inputs())
    remove_hooks(model)
    assert torch.equal(model(*inputs()), reference)
    assert torch.equal(torch.compile(model, backend="svdquant", options=quiet())(*inputs()), reference)


def test_kept_values_would_be_what_moves(machine: Machine) -> None:
    model = net()
    offload(model, "block_level")
    with pytest.raises(OptionError, match=r"weights='keep'.*group offloading.*weights='offload'"):
        svdq.quantize(model, svdq.Config(**quiet(weights="keep")))
    assert torch.equal(model(*inputs()), net()(*inputs()))


def test_pinning_is_for_the_packed_tensors(machine: Machine) -> None:
    weight = quantized().blocks[0].up.weight
    assert not weight.is_pinned()
    twin = weight.pin_memory()
    assert twin.is_pinned()
    assert twin.pin_memory() is twin
    assert all(machine.is_pinned(t) for t in tensors(twin._svdq))
    assert (twin.shape, twin.dtype, twin.device) == (weight.shape, weight.dtype, weight.device)
    assert twin.untyped_storage().nbytes() == 0
    weight.record_stream(machine.now)
    assert machine.recorded >= {t.untyped_storage().data_ptr() for t in tensors(weight._svdq)}


def test_with_an_adapter(machine: Machine) -> None:
    """LoRA beside the offloaded weights: PEFT's layer holds the weight that moves."""
    peft = pytest.importorskip("peft")
    model = quantized()
    lora = peft.LoraConfig(r=4, target_modules=["up", "to_q"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.inject_adapter_in_model(lora, model).eval().requires_grad_(False)
    reference = model(*inputs())
    for level in LEVELS:
        offload(model, level)
        run = torch.compile(model, backend="svdquant", options=quiet())
        for _ in range(2):
            assert torch.equal(model(*inputs()), reference)
            assert relative_error(run(*inputs()), reference) < FLIPPED_CODES
        remove_hooks(model)
    assert len(packs(model)) == 10


# accelerate's


def placed(model: nn.Module, where: str, folder: Path) -> nn.Module:
    places = {"embed": "cpu", "blocks.0": "cpu", "blocks.1": where, "project": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def test_device_map(tmp_path: Path) -> None:
    model = quantized()
    model.blocks[1].up.weight = model.blocks[0].up.weight  # accelerate has a table of tied ones, by their addresses
    reference = model(*inputs())
    placed(model, "cpu", tmp_path)
    assert torch.equal(model(*inputs()), reference)
    assert torch.equal(torch.compile(model, backend="svdquant", options=quiet())(*inputs()), reference)
    assert model.blocks[1].up.weight is model.blocks[0].up.weight
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(*inputs()), reference)


def test_device_map_to_disk_is_refused(tmp_path: Path) -> None:
    model = quantized()
    reference = model(*inputs())
    with pytest.raises(WeightsReleased, match=r"a device_map to disk needs .*blocks.1.* Give it no module for disk"):
        placed(model, "disk", tmp_path)
    assert torch.equal(model(*inputs()), reference)


def test_an_address_is_told_to_nobody_else() -> None:
    """Who has it would read 4-bit codes for 16-bit values, or nothing."""
    with pytest.raises(WeightsReleased, match="data_ptr"):
        quantized().blocks[0].up.weight.data_ptr()
