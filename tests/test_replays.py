"""Calls that are kept and made again: which, how faithfully, and that packs in a replay are the quantized model."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import inputs, net, relative_error
from svdq_compile import eager, replays
from svdq_compile.config import Config
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.lowering.packed import PackedLinear, as_matrix
from svdq_compile.quantizer import quantize_group
from svdq_compile.replays import CannotReplay, Recorder, Replays, replaying


def pack_of(weight: Tensor, precision: str = "w4a8") -> PackedLinear:
    matrix = as_matrix(weight.detach())
    return quantize_group([matrix], ["layer"], precision, Config(rank=8, refine=0), InputStatistics())[0].packed


class Doubling(nn.Module):
    """Writes into its input, as some samplers' models do."""

    def forward(self, x: Tensor, *, scale: float, more: dict[str, Tensor]) -> dict[str, Tensor]:
        x.mul_(2)
        return {"y": x * scale + more["z"], "index": torch.arange(3)}


def recorded(model: nn.Module, *calls: tuple[tuple, dict]) -> Recorder:
    recorder = Recorder()
    model._compiled_call_impl = model._call_impl
    with recorder.watching(model):
        for args, kwargs in calls:
            model(*args, **kwargs)
    assert model._compiled_call_impl == model._call_impl
    model._compiled_call_impl = None
    return recorder


def test_arguments_are_copies() -> None:
    x, z, model = torch.ones(2), torch.ones(2), Doubling()
    recorder = recorded(model, ((x,), {"scale": 3.0, "more": {"z": z}}))
    z.zero_()
    with replaying():
        (y,) = recorder.calls(1)[0].run(model)
        assert torch.equal(y, torch.full((2,), 7.0))
        assert torch.equal(recorder.calls(1)[0].run(model)[0], y), "a replay does not write into what is kept"
        assert Replays(model, recorder.calls(1)).error({}) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 50, 200])
def test_calls_are_kept_evenly_and_few(count: int) -> None:
    recorder = recorded(nn.Identity(), *(((torch.tensor([float(i)]),), {}) for i in range(count)))
    with replaying():
        kept = [int(call.run(nn.Identity())[0]) for call in recorder.calls(100)]
        one = int(recorder.calls(1)[0].run(nn.Identity())[0])
    assert len(kept) == min(count, replays.MAX_CALLS)
    assert kept == sorted(set(kept))
    assert kept[0] <= count / 4
    assert kept[-1] >= count / 2 - 1
    assert count / 4 - 1 <= one <= 3 * count / 4


def test_large_calls_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "MAX_BYTES", 100)
    for size, wanted in ((1000, 1), (12, 2)):
        recorder = recorded(nn.Identity(), *(((torch.ones(size),), {}) for _ in range(20)))
        assert 1 <= len(recorder.calls(10)) <= wanted


def test_autocast_is_a_calls_own() -> None:
    model = nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        recorder = recorded(model, ((torch.ones(1, 8),), {}))
        with replaying():
            assert recorder.calls(1)[0].run(model)[0].dtype == torch.bfloat16
    outside = recorded(model, ((torch.ones(1, 8),), {}))
    with torch.autocast("cpu", torch.bfloat16), replaying():
        assert outside.calls(1)[0].run(model)[0].dtype == torch.float32


def test_packs_are_the_quantized_model() -> None:
    model = net()
    recorder = recorded(model, (inputs(3), {}))
    weight = model.blocks[0].up.weight
    before = weight.clone()
    pack = pack_of(weight, "w4a16")
    with replaying():
        found = Replays(model, recorder.calls(1)).error({id(weight): pack})
    assert type(weight) is nn.Parameter
    assert torch.equal(weight, before)
    truth = model(*inputs(3))
    weight.copy_(pack.dequantize(torch.float32))
    assert found == pytest.approx(relative_error(model(*inputs(3)), truth), rel=1e-3)


class Convolutions(nn.Module):
    """A weight that is expanded before use, one that is cut first, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1)
        self.both = nn.Parameter(torch.randn(2, 64, 64) / 8)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.conv(x).movedim(1, -1))
        return F.silu(x @ self.both[0]) @ self.both[1].t()


@pytest.mark.parametrize("name", ["conv.weight", "both"])
def test_expanded_weights(name: str) -> None:
    torch.manual_seed(0)
    model, x = Convolutions().requires_grad_(False), torch.randn(1, 64, 4, 4)
    weight, plain = model.get_parameter(name), pack_of(model.get_parameter(name), "w4a16")
    pack = PackedLinear(plain.shared, plain.weight, plain.up, expanded=True)
    with replaying():
        found = Replays(model, recorded(model, ((x,), {})).calls(1)).error({id(weight): pack})
    truth = model(x)
    weight.copy_(pack.dequantize(torch.float32).view_as(weight))
    assert 0.02 < found == pytest.approx(relative_error(model(x), truth), rel=1e-3)


def test_a_pack_goes_where_its_weight_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloading has moved the weight since the pack was made; the meta device stands for a GPU."""
    seen: list[str] = []
    monkeypatch.setattr(eager, "run", lambda call, pack: seen.append(f"{pack.device}") or call.input)
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    with replays._Packs({id(weight): pack_of(weight)}):
        for device in ("cpu", "meta"):
            F.linear(torch.empty(2, 64, device=device), weight)
    assert seen == ["cpu", "meta"]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Nameless(nn.Module):
    def forward(self, x: Tensor) -> object:
        return object()


def test_what_cannot_be_replayed() -> None:
    with replaying():
        for model, x, words in (
            (Noisy(), 1.0, "another output"),
            (nn.Identity(), torch.nan, "finite"),
            (Nameless(), 1.0, "no tensor"),
        ):
            with pytest.raises(CannotReplay, match=words):
                Replays(model, recorded(model, ((torch.full((3,), x),), {})).calls(1))
        with pytest.raises(CannotReplay, match="did not call the model"):
            Replays(nn.Identity(), Recorder().calls(4))
