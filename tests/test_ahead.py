"""svdq_compile.quantize and report, before anything is compiled."""

import pytest
import torch
from torch import nn

import svdq_compile as svdq
from conftest import Net, compiled, inputs, net, quiet, relative_error
from svdq_compile.errors import NothingToQuantize, UnsupportedDevice
from svdq_compile.parameter import QuantizedWeight

CONFIG = svdq.Config(**quiet())


def test_calibrated() -> None:
    model = net()
    reference = model(*inputs())
    calls = []

    def calibrate(m: nn.Module) -> None:
        calls.append(torch.equal(m(*inputs()), reference))

    report = svdq.quantize(model, CONFIG, calibrate=calibrate)
    assert calls == [True], "the model runs exactly while it is observed"
    assert {row.precision for row in report} == {"float32", "w4a16", "w4a8"}
    assert 0 < relative_error(compiled(model)(*inputs()), reference) < 0.06


def test_calibrating_is_what_the_backend_does_by_itself() -> None:
    ahead, itself = net(), net()
    svdq.quantize(ahead, CONFIG, calibrate=lambda m: m(*inputs()))
    run = compiled(itself)
    run(*inputs())
    for (name, a), b in zip(ahead.named_parameters(), itself.parameters(), strict=True):
        if isinstance(a, QuantizedWeight):
            assert torch.equal(svdq.packed(a).weight[0], svdq.packed(b).weight[0]), name
            assert a._svdq_name == b._svdq_name


def test_example_inputs_show_the_structure_without_computing() -> None:
    model = net()
    x, condition = inputs()
    report = svdq.quantize(model, CONFIG, example_inputs={"x": x, "condition": condition})
    block = model.blocks[0]
    assert svdq.packed(block.to_q.weight).shared is svdq.packed(block.to_k.weight).shared
    assert {row.name: row.precision for row in report}["blocks.0.modulate"] == "w4a16"
    assert relative_error(compiled(model)(x, condition), net()(x, condition)) < 0.08


def test_by_weights_alone() -> None:
    model = net()
    report = svdq.quantize(model, CONFIG)
    rows = {row.name: row for row in report}
    assert rows["blocks.0.modulate"].precision == "w4a8"
    assert rows["embed"].reason.startswith("it is small")
    assert rows["blocks.0.up"].bytes_after < 0.55 * rows["blocks.0.up"].bytes_before
    assert 0 < rows["blocks.0.up"].error < 0.1
    assert relative_error(compiled(model)(*inputs()), net()(*inputs())) < 0.08
    assert "blocks.0.up" in str(report)


def test_embedders_and_projections_stay_16_bit() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Linear(128, 128),
            "blocks": nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)) for _ in range(2)),
            "project": nn.Linear(128, 128),
        }
    ).requires_grad_(False)
    reasons = {row.name: row.reason for row in svdq.quantize(model, CONFIG)}
    assert reasons["embed"] == reasons["project"] == "outside the repeated blocks: an embedder or a final projection"
    assert reasons["blocks.1.0"] == ""


def test_quantizing_twice_changes_nothing() -> None:
    model = net()
    svdq.quantize(model, CONFIG)
    packed = svdq.packed(model.blocks[0].up.weight)
    svdq.quantize(model, CONFIG)
    assert svdq.packed(model.blocks[0].up.weight) is packed


def test_report_of_a_compiled_model_before_its_first_call() -> None:
    rows = {row.name: row for row in svdq.report(compiled(net()))}
    assert rows["blocks.0.up"].reason == "not reached yet"
    assert rows["blocks.0.up"].bytes_after == rows["blocks.0.up"].bytes_before


def test_nothing_to_quantize() -> None:
    with pytest.raises(NothingToQuantize, match="Conv2d has no linear layer"):
        svdq.quantize(nn.Conv2d(3, 8, 3), CONFIG)
    with pytest.raises(NothingToQuantize, match="does it call the model"):
        svdq.quantize(net(), CONFIG, calibrate=lambda m: None)


def test_meta_weights_have_no_values_to_quantize() -> None:
    with torch.device("meta"):
        model = nn.Linear(128, 128)
    with pytest.raises(UnsupportedDevice, match="on device 'meta'"):
        svdq.quantize(nn.Sequential(model), CONFIG)


def test_calibrate_or_example_inputs() -> None:
    with pytest.raises(ValueError, match="not both"):
        svdq.quantize(net(), CONFIG, calibrate=lambda m: None, example_inputs={})


def test_a_calibration_that_fails_leaves_the_model_as_it_was() -> None:
    model = net()

    def calibrate(m: nn.Module) -> None:
        m(*inputs())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svdq.quantize(model, CONFIG, calibrate=calibrate)
    assert not any(isinstance(p, QuantizedWeight) for p in model.parameters())
    assert torch.equal(model(*inputs()), net()(*inputs()))


def test_packed_of_a_plain_weight() -> None:
    with pytest.raises(TypeError, match="not quantized"):
        svdq.packed(net().blocks[0].up.weight)


class Nested(Net):
    """A net whose condition comes in a dict, as SDXL's do."""

    def forward(self, x: torch.Tensor, added: dict) -> torch.Tensor:
        return super().forward(x, *added["conditions"])


def test_example_inputs_may_be_nested() -> None:
    torch.manual_seed(0)
    model, (x, condition) = Nested().eval().requires_grad_(False), inputs()
    svdq.quantize(model, quiet(), example_inputs={"x": x, "added": {"conditions": [condition]}})
    assert any(isinstance(parameter, QuantizedWeight) for parameter in model.parameters())
