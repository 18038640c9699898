"""A released weight in every hand: the right thing, or an error that names the layer and the remedy. Never a crash."""

import copy
import io
import pickle
import threading

import pytest
import safetensors.torch
import torch
from torch import nn

import svdq_compile as svdq
from conftest import FLIPPED_CODES, Net, compiled, inputs, net, relative_error
from svdq_compile.errors import WeightsReleased
from svdq_compile.parameter import QuantizedWeight


def quantized(**options) -> tuple[Net, nn.Module]:
    """A model after its observed call, and its compiled form."""
    model = net()
    run = compiled(model, **options)
    run(*inputs())
    assert isinstance(model.blocks[0].to_q.weight, QuantizedWeight)
    return model, run


REFUSED = {
    "save state_dict": lambda m, w: torch.save(m.state_dict(), io.BytesIO()),
    "torch.save": lambda m, w: torch.save(m, io.BytesIO()),
    "pickle": lambda m, w: pickle.dumps(w),
    "safetensors": lambda m, w: safetensors.torch.save({"w": w}),
    "clone": lambda m, w: w.clone(),
    "clone of a detached": lambda m, w: w.detach().clone(),
    "copy into a plain weight": lambda m, w: net().blocks[0].to_q.weight.copy_(w),
    "copy between quantized": lambda m, w: m.blocks[1].to_q.weight.copy_(w),
    "other model's state_dict": lambda m, w: svdq.restore(quantized()[0], m.state_dict()),
    "data": lambda m, w: w.data.clone(),
    "transpose": lambda m, w: w.T,
    "read an element": lambda m, w: w[0, 0],
    "tolist": lambda m, w: w.tolist(),
    "numpy": lambda m, w: w.numpy(),
    "asarray": lambda m, w: torch.asarray(w) + 0,
    "dlpack": lambda m, w: w.__dlpack__(),
    "data_ptr": lambda m, w: w.data_ptr(),
    "norm": lambda m, w: torch.linalg.norm(w),
    "compare": lambda m, w: torch.equal(w, w),
    "arithmetic": lambda m, w: w + 1,
    "in-place": lambda m, w: w.add_(1),
    "init": lambda m, w: nn.init.normal_(w),
    "view": lambda m, w: w.view(-1),
    "foreach": lambda m, w: torch._foreach_add([w], 1),
    "out=": lambda m, w: torch.add(torch.ones(()), 1, out=w),
    "product": lambda m, w: torch.ones(1, 128) @ w.t(),
    "flatten parameters": lambda m, w: nn.utils.parameters_to_vector(m.parameters()),
    "to whole numbers": lambda m, w: w.to(torch.int8),
    "share_memory": lambda m, w: m.share_memory(),
    "merge an adapter": lambda m, w: w.data.add_(torch.ones_like(w)),
}


@pytest.mark.parametrize("use", REFUSED)
def test_refused_with_the_layer_and_the_remedy(use: str) -> None:
    model, run = quantized()
    weight = model.blocks[0].to_q.weight
    with pytest.raises(
        WeightsReleased, match=r"blocks\.0\.\w+, which was released when the layer was quantized\. [A-Z]"
    ):
        REFUSED[use](model, weight)
    assert isinstance(model.blocks[0].to_q.weight, QuantizedWeight)
    assert run(*inputs()).isfinite().all(), "the model still runs"


def test_described_as_it_was() -> None:
    model, _ = quantized()
    weight, original = model.blocks[0].up.weight, net().blocks[0].up.weight
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "is_leaf", "layout", "grad", "is_meta"):
        assert getattr(weight, name) == getattr(original, name), name
    assert (weight.size(), weight.stride(), weight.numel(), weight.dim()) == ((256, 128), (128, 1), 256 * 128, 2)
    assert weight.untyped_storage().nbytes() == 0
    assert isinstance(weight, nn.Parameter)
    assert repr(weight) == ("QuantizedWeight('blocks.0.up', shape=[256, 128], precision='w4a8', rank=32, device='cpu')")
    assert "Linear(in_features=128" in repr(model)


def test_load_state_dict_brings_new_weights_which_are_quantized_again() -> None:
    model, run = quantized()
    run(*inputs())
    other = net(seed=5)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.blocks[0].to_q.weight, other.blocks[0].to_q.weight)
    expected = other(*inputs())
    assert torch.equal(run(*inputs()), expected), "observed again, exactly"
    assert 0 < relative_error(run(*inputs()), expected) < 0.06


def test_state_dict_holds_the_weights_themselves() -> None:
    model, run = quantized()
    before = run(*inputs())
    state = model.state_dict()
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in net().state_dict().items()}
    assert state["blocks.0.to_q.weight"] is model.blocks[0].to_q.weight
    model.load_state_dict(state)
    assert isinstance(model.blocks[0].to_q.weight, QuantizedWeight)
    assert torch.equal(run(*inputs()), before)


def test_load_state_dict_assign_and_replacing_a_parameter() -> None:
    model, run = quantized()
    other = net(seed=5)
    model.load_state_dict(other.state_dict(), assign=True)
    run(*inputs())
    assert 0 < relative_error(run(*inputs()), other(*inputs())) < 0.06
    model.blocks[0].to_q.weight = nn.Parameter(torch.zeros(128, 128), requires_grad=False)
    other = net(seed=5)
    other.blocks[0].to_q.weight.zero_()
    run(*inputs())
    assert relative_error(run(*inputs()), other(*inputs())) < 0.06


def test_load_state_dict_of_another_shape_changes_nothing() -> None:
    model, run = quantized()
    before = run(*inputs())
    with pytest.raises(RuntimeError, match=r"size mismatch|cannot copy"):
        model.load_state_dict({"blocks.0.to_q.weight": torch.zeros(3, 3)}, strict=False)
    assert torch.equal(run(*inputs()), before)


def test_deepcopy_is_independent() -> None:
    model, run = quantized()
    twin = copy.deepcopy(model)
    expected = run(*inputs())
    assert torch.equal(compiled(twin)(*inputs()), expected)
    svdq.restore(twin, net().state_dict())
    assert torch.equal(run(*inputs()), expected)
    del model, run
    assert relative_error(twin(*inputs()), net()(*inputs())) < 1e-6


def test_moving_moves_the_packed_tensors_and_keeps_sharing() -> None:
    model, run = quantized()
    expected = run(*inputs())
    twin = copy.deepcopy(model).to("meta")
    assert all(p.is_meta for p in twin.parameters())
    same = model.to("cpu").to(torch.float32)
    assert same is model
    assert torch.equal(run(*inputs()), expected)


def test_restore_needs_a_source_and_then_is_exact() -> None:
    model, run = quantized()
    run(*inputs())
    with pytest.raises(WeightsReleased, match=r"restoring needs.*blocks\.0"):
        svdq.restore(model)
    assert isinstance(model.blocks[0].to_q.weight, QuantizedWeight), "nothing was changed"
    assert svdq.restore(model, net().state_dict()) == 10
    assert torch.equal(model(*inputs()), net()(*inputs()))
    assert svdq.restore(model) == 0


def test_restore_by_dequantizing_is_close() -> None:
    model, _ = quantized()
    svdq.restore(model, dequantize=True)
    assert 0 < relative_error(model(*inputs()), net()(*inputs())) < 0.06


def test_restore_refuses_a_wrong_shape() -> None:
    model, _ = quantized()
    with pytest.raises(ValueError, match=r"blocks\.0\.to_q\.weight: state_dict has shape \(2, 2\)"):
        svdq.restore(model, net().state_dict() | {"blocks.0.to_q.weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("weights", ["offload", "keep"])
def test_originals_that_are_still_there_come_back(weights: str) -> None:
    model, run = quantized(weights=weights)
    assert 0 < relative_error(run(*inputs()), net()(*inputs())) < 0.06
    assert svdq.restore(model) == 10
    assert torch.equal(model(*inputs()), net()(*inputs()))
    model, run = quantized(weights=weights)
    assert relative_error(model(*inputs()), run(*inputs())) < FLIPPED_CODES, "an eager call is in 4-bit all the same"
    state = quantized(weights=weights)[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in net().state_dict().items())


@pytest.mark.parametrize("weights", ["offload", "keep"])
@pytest.mark.parametrize("through", ["data", "detach", "in-place"])
def test_writing_to_originals_is_seen(weights: str, through: str) -> None:
    """An adapter merged into the weight must show in the compiled model's output."""
    model, run = quantized(weights=weights)
    run(*inputs())
    weight = model.blocks[0].to_q.weight
    alias = {"data": lambda: weight.data, "detach": lambda: weight.detach(), "in-place": lambda: weight}[through]()
    alias.mul_(-3)
    expected = net()
    expected.blocks[0].to_q.weight.mul_(-3)
    reference = expected(*inputs())
    assert relative_error(net()(*inputs()), reference) > 0.5, "a write that went unseen would show"
    for _ in range(3):
        output = run(*inputs())
        assert relative_error(output, reference) < 0.09
    assert 0 < relative_error(output, reference), "quantized again"


@pytest.mark.parametrize("weights", ["offload", "keep"])
def test_originals_that_are_still_there_can_be_pickled(weights: str) -> None:
    model, _ = quantized(weights=weights)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(*inputs()), net()(*inputs()))


def test_offloaded_original_is_not_what_a_thawed_weight_writes_to() -> None:
    model, _ = quantized(weights="offload")
    twin = copy.deepcopy(model)
    model.blocks[0].to_q.weight.data.zero_()
    svdq.restore(twin)
    assert torch.equal(twin.blocks[0].to_q.weight, net().blocks[0].to_q.weight)


def test_a_state_dict_taken_before_keeps_its_values() -> None:
    model = net()
    state = model.state_dict()
    compiled(model)(*inputs())
    assert all(torch.equal(state[name], value) for name, value in net().state_dict().items())


def test_threads_quantize_once_and_agree() -> None:
    model = net()
    run = compiled(model, calibration_steps=0)
    outputs: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            outputs.extend(run(*inputs()) for _ in range(2))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 6
    assert all(relative_error(output, outputs[0]) < FLIPPED_CODES for output in outputs)


def test_packs_go_when_the_model_goes() -> None:
    import gc
    import weakref

    model, run = quantized()
    run(*inputs())
    packed = weakref.ref(svdq.packed(model.blocks[0].to_q.weight))
    del model, run
    gc.collect()
    assert packed() is None
