"""Formats and ranks by a target: the outcome keeps it, the predicted error is the real one, and what cannot be met is
refused with what can.
"""

import copy
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import Net, inputs, logged, net, quiet, relative_error
from svdq_compile import budget, quantize_model
from svdq_compile.config import Config
from svdq_compile.errors import OptionError
from svdq_compile.header import read_header
from svdq_compile.kernels.formats import FORMATS
from svdq_compile.parameter import QuantizedWeight
from svdq_compile.report import Report

MIDDLE = 220_000  # bytes of a Net: between all in 4 bits (158,000) and all in 8 (285,000)
SIBLINGS = [("blocks.0.to_q", "blocks.0.to_k"), ("blocks.1.to_q", "blocks.1.to_k")]


def calls(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Calls of a Net with different inputs."""
    return [tuple(t.roll(i, 0) * (1 + i / 4) for t in inputs(3)) for i in range(count)]


def run_all(model: nn.Module) -> None:
    for call in calls():
        model(*call)


def aimed(model: nn.Module, **options: Any) -> Report:
    """Quantized by a target."""
    return svdq.quantize(model, calibrate=run_all, **quiet(**options))


def error(model: nn.Module, truth: nn.Module) -> float:
    """Of the outputs of all calls, as it is predicted."""
    return float(torch.tensor([relative_error(model(*call), truth(*call)) for call in calls()]).square().mean().sqrt())


def by_name(report: Report) -> dict[str, Any]:
    return {row.name: row for row in report}


@pytest.fixture(scope="module")
def middle() -> tuple[Net, Report]:
    """A Net within MIDDLE."""
    with torch.no_grad():
        model = net()
        return model, aimed(model, target_bytes=MIDDLE)


def test_bytes_are_kept_and_used(middle: tuple[Net, Report]) -> None:
    model, report = middle
    assert 0.95 * MIDDLE < report.bytes_after <= MIDDLE
    assert report.bytes_after == svdq.report(model).bytes_after
    rows = by_name(report)
    assert {row.precision for row in report} >= {"w4a8", "w8a8", "float32"}
    for q, k in SIBLINGS:
        assert (rows[q].precision, rows[q].rank) == (rows[k].precision, rows[k].rank)


def test_predicted_error_is_the_real_one(middle: tuple[Net, Report]) -> None:
    model, report = middle
    assert report.effect is not None
    assert 0.7 < error(model, net()) / report.effect < 1.1, "predicted rather too large: it was fitted to fewer rows"
    assert report.effect == pytest.approx(sum((row.effect or 0) ** 2 for row in report) ** 0.5)
    assert all((row.effect is None) == (row.precision not in FORMATS) for row in report)


def test_the_choice_is_better_than_one_format_for_all(middle: tuple[Net, Report]) -> None:
    """At the bytes of w4a8 and rank 32 throughout, and the same with fewer bytes than MIDDLE for all in 8 bits."""
    plain = net()
    report = svdq.quantize(plain, calibrate=run_all, **quiet())
    model = net()
    chosen = aimed(model, target_bytes=report.bytes_after)
    assert chosen.bytes_after <= report.bytes_after
    assert error(model, net()) < 0.8 * error(plain, net())


def test_compiled_it_is_the_same_model(middle: tuple[Net, Report], without_inductor: None) -> None:
    """Adaptive norms in 8 bits with few rows, and siblings of another rank, among them."""
    model, _ = middle
    truth = model(*inputs(3))
    compiled = torch.compile(model, backend="svdquant", options=quiet())
    assert relative_error(compiled(*inputs(3)), truth) < 2e-3


def test_saved_and_loaded(middle: tuple[Net, Report], tmp_path: Path) -> None:
    model, report = middle
    svdq.save(model, tmp_path / "file", config=Config(target_bytes=MIDDLE))
    header = read_header(tmp_path / "file")
    assert header.config["target_bytes"] == MIDDLE
    assert {e.name: e.effect for e in header.layers} == {r.name: r.effect for r in report if r.effect is not None}
    loaded = svdq.load(Net(), tmp_path / "file", progress=False)
    assert svdq.report(loaded).effect == report.effect
    assert [row.precision for row in svdq.report(loaded)] == [row.precision for row in report]
    assert svdq.report(copy.deepcopy(loaded)).effect == report.effect
    assert "effect" in str(svdq.report(loaded.to(torch.bfloat16)))


def test_the_same_bits_again(middle: tuple[Net, Report]) -> None:
    model, report = middle
    again = net()
    assert aimed(again, target_bytes=MIDDLE) == report
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        if isinstance(a, QuantizedWeight):
            mine, others = (svdq.packed(p).own_tensors() for p in (a, b))
            assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_target_error() -> None:
    sizes = []
    for wanted in (0.03, 0.01):
        model = net()
        report = aimed(model, target_error=wanted)
        sizes.append(report.bytes_after)
        assert report.effect is not None
        assert 0.8 * wanted < report.effect <= wanted
        assert error(model, net()) <= 1.1 * wanted
    assert sizes[0] < 0.9 * sizes[1]


def test_bits_go_where_they_matter() -> None:
    """A block whose part in the output is small gets the fewest bits."""
    model = net()
    model.blocks[0].down.weight.mul_(1e-3)
    model.blocks[0].down.bias.mul_(1e-3)
    rows = by_name(aimed(model, target_bytes=262_000))
    for name in ("up", "down"):
        quiet_one, loud = rows[f"blocks.0.{name}"], rows[f"blocks.1.{name}"]
        assert (quiet_one.precision, quiet_one.rank) == ("w4a8", 0)
        assert loud.precision != "w4a8"
        assert 1e-5 < quiet_one.effect < 1e-3


def test_the_nearest_possible_target_is_named_and_is_possible() -> None:
    model = net()
    with pytest.raises(OptionError, match=r"target_bytes=1000.*give target_bytes=\d+ or more") as refused:
        aimed(model, target_bytes=1000)
    assert not any(isinstance(p, QuantizedWeight) for p in model.parameters()), "it was refused before it was changed"
    least = int(re.findall(r"target_bytes=(\d+) or", str(refused.value))[0])
    with pytest.raises(OptionError, match=f"give target_bytes={least} or more"):
        aimed(model, target_bytes=least - 1)
    report = aimed(model, target_bytes=least)
    assert report.bytes_after == least
    assert report == aimed(net(), target_bytes=least), "nothing is left of what was refused"


def test_skip_and_error_budget_hold() -> None:
    report = aimed(net(), target_bytes=10**7, skip=["*.to_q"])
    reasons = [row.reason for row in report if row.name.endswith(("to_q", "to_k"))]
    assert reasons == 2 * ["option skip", "the target leaves it 16-bit"]
    report = aimed(net(), target_bytes=520_000, skip=["*.up"], error_budget=0.02)
    rows = by_name(report)
    assert rows["blocks.0.up"].reason == rows["blocks.1.up"].reason == "option skip"
    assert all(row.error < 0.02 for row in report if row.error is not None)
    assert {row.precision for row in report} == {"w8a8", "float32"}
    assert report.bytes_after <= 520_000


def test_precision_is_the_4_bit_format() -> None:
    report = aimed(net(), target_bytes=200_000, precision="int4")
    kinds = {row.name.split(".")[-1]: row.precision for row in report if row.effect is not None}
    assert "w4a8" not in kinds.values()
    assert "int4" in kinds.values()


def test_a_format_without_a_kernel_on_the_device_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "has_kernels_for", lambda precision, device: False)
    report = aimed(net(), target_bytes=MIDDLE)
    assert {row.precision for row in report} <= {"w4a8", "w4a16", "float32"}
    assert report.bytes_after <= MIDDLE


class Counting(nn.Module):
    """Gives another output at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.count = net(), 0

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        self.count += 1
        return self.net(x, condition) * self.count


class Failing(Net):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            raise RuntimeError("it has been called too often")
        return super().forward(x, condition)


class Elsewhere(nn.Module):
    """Its weights are read only when it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.net(x, condition) if torch.compiler.is_compiling() else x + condition.mean()


UNREPEATABLE = {
    "called again with the same inputs": Counting,
    "it has been called too often": Failing,
    "read none of the weights": Elsewhere,
}


@pytest.mark.parametrize("why", UNREPEATABLE)
def test_calls_that_cannot_be_replayed(why: str) -> None:
    """Then the layers' own errors decide, which is said; an error of the output has no meaning."""
    make = UNREPEATABLE[why]
    with logged("svdq_compile", logging.WARNING) as said:
        report = aimed(make(), target_bytes=MIDDLE, fallback=True)
    assert sum(why in record.getMessage() for record in said) == 1 + (make is Failing)
    assert 0.9 * MIDDLE < report.bytes_after <= MIDDLE
    assert report.effect is None
    with pytest.raises(OptionError, match=f"(?s)target_error=0.01.*{why}.*Give target_bytes"):
        aimed(make(), target_error=0.01, fallback=True)


class FailingLater(Net):
    """Can be called again a few times."""

    count = 0

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.count += 1
            if self.count > 12:
                raise RuntimeError("it has been called too often")
        return super().forward(x, condition)


def test_a_replay_that_fails_late_is_told() -> None:
    with logged("svdq_compile", logging.WARNING) as said:
        report = aimed(FailingLater(2).eval().requires_grad_(False), target_bytes=MIDDLE, fallback=True)
    assert sum("it has been called too often" in record.getMessage() for record in said) == 2
    assert 0.9 * MIDDLE < report.bytes_after <= MIDDLE
    assert report.effect is None
    with pytest.raises(OptionError, match=r"(?s)target_error=0\.01.*called too often.*Give target_bytes"):
        aimed(FailingLater(2).eval().requires_grad_(False), target_error=0.01, fallback=True)


def test_what_offloading_fetches_ahead_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay leaves copies under way, and the next group is measured on them."""
    waited: list[str] = []
    group = Mock(stream=Mock(synchronize=lambda: waited.append("once")))
    monkeypatch.setattr(budget, "groups_of", lambda model: [group])
    aimed(net(), target_bytes=MIDDLE)
    assert len(waited) == 8, "for each group of linears"


def test_layers_that_no_call_reaches_are_named() -> None:
    class Half(Net):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return self.project(self.blocks[0](self.embed(x), condition))

    torch.manual_seed(0)
    model = Half(2).eval().requires_grad_(False)
    with logged("svdq_compile", logging.WARNING) as said:
        report = aimed(model, target_bytes=MIDDLE)
    told = [record.getMessage() for record in said if "no replayed call shows" in record.getMessage()]
    assert len(told) == 1
    assert "blocks.1.down" in told[0]
    assert "blocks.0" not in told[0]
    assert 0.9 * MIDDLE < report.bytes_after <= MIDDLE


def test_what_could_not_be_quantized_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    report = svdq.report(net())
    with logged("svdq_compile", logging.WARNING) as said:
        budget.check_outcome(report, Config(target_bytes=report.bytes_after - 1))
        budget.check_outcome(report, Config(target_bytes=report.bytes_after))
    assert [r.getMessage()[:30] for r in said] == [f"svdquant: the linears take {report.bytes_after}"[:30]]


@pytest.mark.parametrize(
    ("given", "taken"),
    [(12345, 12345), ("12345", 12345), ("12345 B", 12345), ("6.5GiB", 6.5 * 2**30), ("1.5 kB", 1500), ("2mib", 2**21)],
)
def test_bytes_are_read(given: Any, taken: float) -> None:
    assert Config(target_bytes=given).target_bytes == taken
    assert Config.of(Config(target_bytes=given)).target_bytes == taken


@pytest.mark.parametrize(
    "options",
    [
        {"target_bytes": bad}
        for bad in (
            0,
            -5,
            1.5,
            True,
            "6.8",
            "GiB",
            "6,8 GiB",
            "1 TiBs",
            "-1 GB",
            [],
            "0 MB",
            "1e9 B",
            "9" * 400,
            2**63,
            10**400,
        )
    ]
    + [{"target_error": bad} for bad in (0, -0.1, 1.5, "0.1", True, float("nan"))]
    + [{"target_bytes": 10**6, "target_error": 0.1}],
)
def test_bad_targets(options: dict) -> None:
    with pytest.raises(OptionError, match="target_"):
        Config(**options)


def test_a_target_needs_the_whole_model_and_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"target_bytes=220000 .*svdq_compile.quantize\(model, calibrate=lambda model: .*, target_bytes=...\)"
    for refused in (
        lambda: svdq.quantize(net(), target_bytes=MIDDLE),
        lambda: svdq.compile(net(), target_bytes=MIDDLE),
        lambda: svdq.doctor(net(), target_bytes=MIDDLE),
        lambda: torch.compile(net(), backend="svdquant", options=quiet(target_bytes=MIDDLE))(*inputs()),
    ):
        with pytest.raises(Exception, match=words) as error:
            refused()
        cause = getattr(error.value, "inner_exception", None) or error.value
        assert isinstance(cause, OptionError)
    ranks = SimpleNamespace(each=lambda make: make(), agree=lambda groups, config: None)
    monkeypatch.setattr(quantize_model, "ranks_of", lambda config: ranks)
    with pytest.raises(OptionError, match=r"several ranks would choose differently.*group='alone'"):
        aimed(net(), target_bytes=MIDDLE)
