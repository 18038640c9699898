"""Several ranks quantize one model: equal packs, whatever each has seen; what goes wrong on one ends all."""

import gc
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from ranks_testing import message, on_ranks, packs, results_on_ranks
from torch import Tensor, nn

import svdq_compile as svdq
from conftest import CHANNELS, TOKENS, WIDTH, Net, logged, net, quiet, relative_error, run_eagerly
from svdq_compile import compiled, convert, decisions, progress, ranks, sharing, task
from svdq_compile.errors import OptionError
from svdq_compile.input_statistics import InputStatistics
from svdq_compile.quantizer import quantize_group
from svdq_compile.ranks import checksums

BOTH = range(2)


def seen_by(rank: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """What a rank calls the model with: others see other values, louder ones in another channel."""
    generator = torch.Generator().manual_seed(rank + 1)
    x = torch.randn(2, tokens, CHANNELS, generator=generator)
    x[..., rank] *= 10
    return x, torch.randn(2, WIDTH, generator=generator)


def by_blocks(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend="svdquant", options=quiet(refine=1, **options))
    return model


# What follows runs in the processes. Each step leaves them in step, errors too: all of it happens in one run.


def together() -> dict[str, Any]:
    rank, found = dist.get_rank(), {}
    compiled.compile_with_inductor = run_eagerly
    quantized: list[str] = []
    whole = convert.quantize_group

    def counted(weights: Any, names: Any, *args: Any) -> Any:
        quantized.extend(names)
        return whole(weights, names, *args)

    convert.quantize_group = counted
    for name, step in STEPS.items():
        torch._dynamo.reset()
        quantized.clear()
        found[name] = step(rank)
        found[f"{name}: quantized here"] = list(quantized)
    return found


def blocks(rank: int) -> Any:
    model = by_blocks(net())
    model(*seen_by(rank))
    return packs(model), relative_error(model(*seen_by(rank)), net()(*seen_by(rank)))


def whole_model(rank: int) -> Any:
    model = net()
    model.compile(backend="svdquant", options=quiet(refine=1, calibration_steps=2))
    for _ in range(2):
        model(*seen_by(rank))
    return packs(model)


def ahead(rank: int) -> Any:
    model = net()
    svdq.quantize(model, calibrate=lambda m: m(*seen_by(rank)), **quiet(refine=1))
    return packs(model)


def by_weights(rank: int) -> Any:
    model = net()
    svdq.quantize(model, **quiet(refine=1))
    return packs(model)


def few_tokens_here(rank: int) -> Any:
    """As a short prompt in one half of a batch: too few rows on one rank for 8-bit activations."""
    model = by_blocks(net())
    model(*seen_by(rank, tokens=(2, 24)[rank]))
    return packs(model), {row.precision for row in svdq.report(model) if "to_q" in row.name}


def alone(rank: int) -> Any:
    model = by_blocks(net(), group="alone")
    if rank == 0:  # nobody waits
        model(*seen_by(rank))
    return packs(model)


def own_group(rank: int) -> Any:
    model = by_blocks(net(seed=rank), group=[rank])
    model(*seen_by(rank))
    return len(packs(model))


def process_group(rank: int) -> Any:
    model = net()
    svdq.quantize(model, group=dist.group.WORLD, **quiet(refine=0))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    return packs(model), svdq.Config(group=dist.group.WORLD).group, svdq.Config(group=mesh).group


def not_in_the_group(rank: int) -> str:
    return message(lambda: svdq.quantize(net(), group=[1 - rank], **quiet()))


def other_options(rank: int) -> str:
    return message(lambda: by_blocks(net(), rank=32 if rank else 64)(*seen_by(rank)))


def other_calls(rank: int) -> str:
    """One would quantize while the other goes on observing."""
    return message(lambda: by_blocks(net(), calibration_steps=1 + rank)(*seen_by(rank)))


def other_weights(rank: int) -> str:
    return message(lambda: by_blocks(net(seed=rank))(*seen_by(0)))


def one_other_value(rank: int) -> str:
    model = net()
    model.blocks[1].down.weight.view(-1)[5] += 1e-3 * rank
    return message(lambda: svdq.quantize(model, **quiet()))


def other_model(rank: int) -> str:
    return message(lambda: svdq.quantize(net(blocks=1 + rank), **quiet()))


class Partly(Net):
    """Its first blocks can be left out."""

    first = 0

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks[self.first :]:
            x = block(x, condition)
        return self.project(x)


def other_order(rank: int) -> str:
    """Equal blocks, of which one rank's calibration leaves out the first: its layers come last there."""
    torch.manual_seed(0)
    model = Partly().requires_grad_(False)
    model.first = rank
    return message(lambda: svdq.quantize(model, calibrate=lambda m: m(*seen_by(rank)), **quiet()))


def other_inputs(rank: int) -> str:
    """On one rank k reads an input of its own."""
    model = net()
    if rank:
        model.blocks[0].to_k.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return message(lambda: svdq.quantize(model, calibrate=lambda m: m(*seen_by(rank)), **quiet()))


def a_broken_weight(rank: int) -> str:
    model = net()
    model.blocks[0].to_q.weight[0, 0] = torch.nan
    return message(lambda: svdq.quantize(model, **quiet()))


def failing(error: Exception, on: int) -> Any:
    """Quantizing fails on one rank."""

    def quantize_group(*args: Any) -> Any:
        if dist.get_rank() == on:
            raise error
        return whole(*args)

    whole = convert.quantize_group
    convert.quantize_group = quantize_group
    return whole


def a_fault(rank: int) -> Any:
    whole, model = failing(ZeroDivisionError("a bug"), on=1), net()
    told = message(lambda: by_blocks(model)(*seen_by(rank)))
    convert.quantize_group = whole
    before = len(packs(model))
    model(*seen_by(rank))  # nothing is in the way any more
    return told, before, packs(model)


def a_fault_with_fallback(rank: int) -> Any:
    """What fails on one rank stays 16-bit on all."""
    whole, model = failing(ZeroDivisionError("a bug"), on=1), net()
    by_blocks(model, fallback=True)(*seen_by(rank))
    convert.quantize_group = whole
    return packs(model), {row.reason for row in svdq.report(model) if "ZeroDivision" in row.reason}


def no_memory(rank: int) -> Any:
    """Goes on in 16-bit on all ranks; the next call takes up what is left."""
    whole, model = failing(torch.OutOfMemoryError("none left"), on=1), net()
    by_blocks(model, fallback=True)(*seen_by(rank))
    convert.quantize_group = whole
    before = len(packs(model))
    model(*seen_by(rank))
    return before, packs(model)


def taking_fails(error: Exception) -> Any:
    """On one rank a weight cannot be switched to its packed tensors."""
    whole, left = convert.freezing, [2]

    def freezing(*args: Any) -> Any:
        left[0] -= 1
        if dist.get_rank() == 1 and left[0] == 0:
            raise error
        return whole(*args)

    convert.freezing = freezing
    return whole


def no_memory_for_a_copy(rank: int) -> Any:
    """What one rank cannot take, no rank does; the next call takes it up."""
    whole, model = taking_fails(torch.OutOfMemoryError("no copy")), net()
    first = message(lambda: svdq.quantize(model, **quiet(weights="offload")))
    convert.freezing = whole
    before = list(packs(model))
    svdq.quantize(model, **quiet(weights="offload"))
    return first, before, packs(model)


def a_fault_while_taking(rank: int) -> Any:
    whole, model = taking_fails(ZeroDivisionError("a bug")), net()
    svdq.quantize(model, **quiet(fallback=True))
    convert.freezing = whole
    return packs(model), {row.reason for row in svdq.report(model) if "ZeroDivision" in row.reason}


def adapters(rank: int) -> Any:
    """The same ones on all ranks, switched on and off after quantizing."""
    from peft import LoraConfig, inject_adapter_in_model

    model = by_blocks(net())
    model(*seen_by(rank))
    plain = model(*seen_by(0))
    before = packs(model)
    inject_adapter_in_model(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "up"]), model, "style")
    model.eval().requires_grad_(False)
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.copy_(torch.randn(weight.shape) / 16)
    with_style = model(*seen_by(0))
    for module in model.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(False)
    same = list(packs(model).values()) == list(before.values())
    return with_style.tolist(), relative_error(with_style, plain), relative_error(model(*seen_by(0)), plain), same


def sums(rank: int) -> Any:
    """Of what each has seen of an input, at one of them; what a rank has not seen adds nothing."""
    generator = torch.Generator().manual_seed(rank)
    own = [torch.randn(3, 4, 4, generator=generator).mT, None if rank else torch.ones(2, 2, 2), torch.ones(5) * rank]
    known = ranks.ranks_of(svdq.Config())
    assert known is not None
    found = known.summed([*own, None], [(3, 4, 4), (2, 2, 2), (5,), None], [0, 1, 1, 0], torch.device("cpu"))
    too_large = (10**15 if rank else 5,)
    failed = message(lambda: known.summed(own, [(3, 4, 4), (2, 2, 2), too_large], [0, 1, 1], own[0].device))
    return own[0].tolist(), [None if total is None else total.tolist() for total in found], failed


def moments(rank: int) -> Any:
    """Second moments are where they are needed: what was observed of an input goes to whoever quantizes its linears."""
    seen, whole = [], convert.quantize_group

    def watched(weights: Any, names: Any, precision: Any, config: Any, statistics: Any, *args: Any) -> Any:
        seen.append((names[0], None if statistics.moment is None else statistics.moment.rows))
        return whole(weights, names, precision, config, statistics, *args)

    convert.quantize_group = watched
    model = net()
    svdq.quantize(model, calibrate=lambda m: m(*seen_by(rank, tokens=(20, 24)[rank])), **quiet(refine=0))
    convert.quantize_group = whole
    return dict(seen)


STEPS = {
    step.__name__: step
    for step in (blocks, whole_model, ahead, by_weights, few_tokens_here, alone, own_group, process_group,
                 not_in_the_group, other_options, other_calls, other_weights, one_other_value, other_model,
                 other_order, other_inputs, a_broken_weight, a_fault, a_fault_with_fallback, no_memory,
                 no_memory_for_a_copy, a_fault_while_taking, sums, moments,
                 adapters)
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of all steps, for each rank."""
    return results_on_ranks(2, together, tmp_path_factory.mktemp("ranks"))


def one_process(calibrate: Any) -> dict[str, list[int]]:
    """The packs of a model that sees in one process, in two calls, what the two ranks see in one each."""
    model = net()
    svdq.quantize(model, calibrate=calibrate, **quiet(refine=1))
    return packs(model)


def test_packs_are_those_of_one_process_that_sees_everything(results: list[dict]) -> None:
    expected = one_process(lambda model: [model(*seen_by(rank)) for rank in BOTH])
    assert len(expected) == 10
    for rank in BOTH:
        own, error = results[rank]["blocks"]
        assert own == expected
        assert error < 0.12  # rank 16 of 128, random weights
        assert results[rank]["ahead"] == expected
        assert results[rank]["whole_model"].keys() == expected.keys()
    assert results[0]["whole_model"] == results[1]["whole_model"]
    assert expected != one_process(lambda model: model(*seen_by(0)))


def test_work_is_shared(results: list[dict]) -> None:
    for step in ("blocks", "ahead", "by_weights"):
        first, second = (results[rank][f"{step}: quantized here"] for rank in BOTH)
        assert not set(first) & set(second)
        assert len(first) + len(second) == 10
        assert min(len(first), len(second)) >= 2


def test_without_calibration(results: list[dict]) -> None:
    model = net()
    svdq.quantize(model, **quiet(refine=1))
    assert results[0]["by_weights"] == results[1]["by_weights"] == packs(model)


def test_rows_are_few_where_they_are_on_all(results: list[dict]) -> None:
    assert results[0]["few_tokens_here"] == results[1]["few_tokens_here"]
    assert results[0]["few_tokens_here"][1] == {"w4a8"}


def test_alone(results: list[dict]) -> None:
    assert len(results[0]["alone"]) == 10
    assert not results[1]["alone"]
    assert results[0]["alone"] == one_process(lambda model: model(*seen_by(0)))
    assert [results[rank]["own_group"] for rank in BOTH] == [10, 10]


def test_groups_are_kept_as_ranks(results: list[dict]) -> None:
    for rank in BOTH:
        own, *groups = results[rank]["process_group"]
        assert len(own) == 10
        assert groups == [(0, 1), (0, 1)]
        assert results[rank]["not_in_the_group"].startswith("OptionError: option group=")


@pytest.mark.parametrize(
    ("step", "named"),
    {
        "other_options": ("rank=64", "rank=32", "option"),
        "other_calls": ("calibration_steps=1", "calibration_steps=2"),
        "other_weights": ("weight of blocks.0.", "group"),
        "one_other_value": ("weight of blocks.1.down", "group"),
        "other_model": ("blocks.1.modulate", "none", "group"),
        "other_order": ("is at layer ", "blocks.0.", "group"),
        "other_inputs": ("share the input of blocks.0.to_", "group"),
    }.items(),
)
def test_differences_are_named_on_all(step: str, named: tuple[str, ...], results: list[dict]) -> None:
    assert results[0][step] == results[1][step]
    assert results[0][step].startswith("RanksDiffer: rank 0 ")
    assert not [word for word in named if word not in results[0][step]]
    assert not results[0][f"{step}: quantized here"]


def test_a_mistake_that_one_rank_finds_ends_all(results: list[dict]) -> None:
    told = sorted(results[rank]["a_broken_weight"] for rank in BOTH)
    assert told[0].startswith("NonFiniteWeight: the weight of blocks.0.to_q")
    assert told[1].startswith("RankFailed: rank ")
    assert "NonFiniteWeight: the weight of blocks.0.to_q" in told[1]


def test_a_fault_ends_all_and_leaves_them_in_step(results: list[dict]) -> None:
    (told, before, own), (raised, *others) = (results[rank]["a_fault"] for rank in BOTH)
    assert raised == "ZeroDivisionError: a bug"
    assert told == "RankFailed: rank 1 failed, so all ranks stop: ZeroDivisionError: a bug"
    assert [before, own] == others
    assert before == 0
    assert len(own) == 10


def test_what_fails_on_one_stays_16_bit_on_all(results: list[dict]) -> None:
    own, reasons = results[0]["a_fault_with_fallback"]
    assert results[1]["a_fault_with_fallback"] == (own, reasons)
    assert reasons == {"quantizing it failed: ZeroDivisionError"}
    assert 2 <= len(own) < 10


def test_missing_memory_on_one(results: list[dict]) -> None:
    before, own = results[0]["no_memory"]
    assert results[1]["no_memory"] == (before, own)
    assert 2 <= before < 10
    assert len(own) == 10


def test_what_one_cannot_take_no_rank_does(results: list[dict]) -> None:
    (error, *own), (_, *others) = (results[rank]["no_memory_for_a_copy"] for rank in BOTH)
    assert own == others
    assert "OutOfMemoryError" in error
    assert len(own[0]) == 9
    assert len(own[1]) == 10
    packed, reasons = results[0]["a_fault_while_taking"]
    assert results[1]["a_fault_while_taking"] == (packed, reasons)
    assert reasons == {"quantizing it failed: ZeroDivisionError"}
    assert len(packed) == 9


def test_moments_are_summed_where_they_are_needed(results: list[dict]) -> None:
    (first, ours, failed), (second, theirs, also) = (result["sums"] for result in results)
    assert ours == [(torch.tensor(first) + torch.tensor(second)).tolist(), None, None, None]
    assert theirs == [None, torch.ones(2, 2, 2).tolist(), [1.0] * 5, None]
    assert "allocate" in failed
    assert "allocate" in also
    rows = results[0]["moments"] | results[1]["moments"]
    assert not results[0]["moments"].keys() & results[1]["moments"].keys()
    assert {rows[f"blocks.{i}.{name}"] for i in BOTH for name in ("to_q", "up", "down")} == {2 * 20 + 2 * 24}
    assert {rows[f"blocks.{i}.modulate"] for i in BOTH} == {4}


def test_adapters_are_the_same_on_all(results: list[dict]) -> None:
    output, apart, off, same = results[0]["adapters"]
    assert results[1]["adapters"] == (output, apart, off, same)
    assert same
    assert apart > 0.05
    assert off < 1e-3


def never_coming() -> Any:
    """The last rank does not call the model."""
    rank = dist.get_rank()
    if rank == 1:
        time.sleep(14)
        return None
    model, begun = by_blocks(net()), time.monotonic()
    first, second = (message(lambda: model(*seen_by(rank))) for _ in range(2))
    return first, second, time.monotonic() - begun, len(packs(model))


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    (first, second, seconds, quantized), _ = on_ranks(2, never_coming, tmp_path, patience=4)
    assert first.startswith("RanksApart: ranks 0, 1 did not all come")
    assert "group" in first
    assert second.startswith("RanksApart: ")
    assert seconds < 60
    assert quantized == 0


def interrupted_between_rounds() -> Any:
    """One rank is interrupted while it takes what was quantized."""
    rank, model = dist.get_rank(), net()

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    if rank == 1:
        convert._take = interrupt
        with pytest.raises(KeyboardInterrupt):
            svdq.quantize(model, **quiet())
    else:
        svdq.quantize(model, **quiet())
    begun = time.monotonic()
    return message(lambda: svdq.quantize(net(), **quiet())), time.monotonic() - begun


def test_who_is_interrupted_has_lost_the_others(tmp_path: Path) -> None:
    told, seconds = on_ranks(2, interrupted_between_rounds, tmp_path, patience=6)[1]
    assert told.startswith("RanksApart: ")
    assert "lost each other before" in told
    assert seconds < 3


def test_missing_memory_leaves_streaming_ranks_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised at once, on all: nobody has lost the others."""
    known = ranks.Ranks((0, 1), 0, cast(Any, None), timedelta(seconds=1), False, False)
    monkeypatch.setattr(known, "agree", lambda *args: None)
    monkeypatch.setattr(sharing, "ranks_of", lambda config: known)
    monkeypatch.setattr(sharing, "_round", lambda ranks, tasks, *args: ((t, torch.OutOfMemoryError()) for t in tasks))
    model = net()
    decisions.place(model)
    tasks = [task.Task((model.embed.weight,), ("embed",), False, 0.0, InputStatistics())]
    with pytest.raises(torch.OutOfMemoryError):
        convert.convert(tasks, svdq.Config(progress=False), fetch=lambda task: None, keep=lambda task: None)
    gc.collect()
    assert not known._is_apart


@pytest.mark.parametrize("at", ["cpu", "meta"])
def test_packs_lie_where_their_weights_do(at: str) -> None:
    """Not where those of the first task do."""

    class Alone:
        size, own = 1, 0

        def exchange(self, make: Any, device: Any) -> Any:
            return [make()]

        def each(self, make: Any) -> Any:
            return make()

        def told(self, make: Any) -> Any:
            return [make()]

        def summed(self, own: Any, shapes: Any, owners: Any, device: Any) -> Any:
            return own

    weight = net().embed.weight
    tasks = [task.Task((w,), ("layer",), False, 0.0, InputStatistics()) for w in (weight, nn.Parameter(weight.to(at)))]
    quantized = quantize_group([weight], ["layer"], "w4a8", svdq.Config(rank=8, refine=0), InputStatistics())[0]
    alone: Any = Alone()
    taken = sharing._round(alone, tasks, lambda task: {0: quantized}, lambda task, outcomes: outcomes, None)  # type: ignore[arg-type,return-value]
    assert [switches[0].packed.device.type for _, switches in taken] == ["cpu", at]  # type: ignore[index,union-attr]


PATIENCE = 15.0


def in_groups() -> Any:
    """Two models, each on two ranks of four; then one on all; and at the end the second of each group leaves it: rank 2
    ends, rank 3 goes on with something else.
    """
    compiled.compile_with_inductor = run_eagerly
    rank = dist.get_rank()
    own = [0, 2] if rank % 2 == 0 else [1, 3]
    model = by_blocks(net(seed=rank % 2), group=own)
    model(*seen_by(rank))
    everybody = net()
    svdq.quantize(everybody, **quiet(refine=0))
    more = by_blocks(net(), group=own, calibration_steps=2)
    more(*seen_by(rank))
    found = packs(model), packs(everybody)
    if rank == 3:
        time.sleep(PATIENCE + 5)
    if rank >= 2:
        return *found, "", 0.0
    begun = time.monotonic()
    told = message(lambda: more(*seen_by(rank)))
    seconds = time.monotonic() - begun
    assert message(lambda: more(*seen_by(rank))).startswith("RanksApart: ")
    assert time.monotonic() - begun - seconds < 1, "nobody is waited for twice"
    return *found, told, seconds


def test_groups_in_a_larger_group(tmp_path: Path) -> None:
    own, everybody, told, seconds = zip(*on_ranks(4, in_groups, tmp_path, patience=PATIENCE), strict=True)
    assert own[0] == own[2] != own[1] == own[3]
    assert everybody[0] == everybody[1] == everybody[2] == everybody[3]
    assert {len(part) for part in own + everybody} == {10}
    assert told[0].startswith("RanksApart: ranks 0, 2 did not all come")
    assert told[1].startswith("RanksApart: ranks 1, 3 did not all come")
    assert seconds[0] < 5  # that a process ends is noticed
    assert PATIENCE - 1 < seconds[1] < PATIENCE + 4


@pytest.mark.parametrize("group", ["all", 3, [], [0.5], [-1], object()])
def test_groups_that_are_none(group: Any) -> None:
    with pytest.raises(OptionError, match="group"):
        svdq.Config(group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_checksums_tell_tensors_apart(dtype: torch.dtype) -> None:
    x = (torch.arange(1, 40) ** 3 % 11).div(6 if dtype is torch.bool else 1, rounding_mode="floor").to(dtype)
    (sum_of_x,) = checksums([x])
    assert checksums([x.clone(), x[1:], x.flip(0), torch.cat([x, x[:1]]), x[:0]])[0] == sum_of_x
    assert len(set(checksums([x, x[1:], x.flip(0), torch.cat([x, x[:1]]), x[:0]]))) == 5
    assert checksums([torch.stack([x, x], 1)[:, 0]]) == [sum_of_x]


def test_statistics_of_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(600, 8, generator=generator), torch.randn(30, 8, generator=generator) * 3
    parts = [InputStatistics(), InputStatistics()]
    for part, x in zip(parts, (a, b), strict=True):
        for chunk in x.split(60):
            part.observe(chunk, rows=len(chunk))
    spans, rows = [p.span for p in parts], [p.thinned(256) for p in parts]
    whole = InputStatistics.of(spans, rows, 60)  # type: ignore[arg-type]
    assert whole.span is not None
    assert whole.moment is None
    assert whole.most_rows == 60
    assert torch.equal(whole.span, torch.cat([a, b]).abs().amax(0))
    assert whole.rows.shape == (286, 8)
    assert torch.equal(whole.rows[256:], b)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_work_is_dealt_evenly(size: int) -> None:
    class Work:
        def __init__(self, cost: int) -> None:
            self.undecided = [(torch.empty(cost, device="meta"), "")]

    tasks: Any = [Work(cost) for cost in (57, 57, 28, 28, 9, 9, 38, 38, 38, 38)]
    owners = sharing._dealt(tasks, size)
    loads = [sum(t.undecided[0][0].numel() for t, o in zip(tasks, owners, strict=True) if o == r) for r in range(size)]
    assert max(loads) <= 1.1 * sum(loads) / size


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("rank", BOTH)
def test_the_first_rank_shows_for_all(
    rank: int, first: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(progress, "_shown_by", 0)
    progress.show_by(first)
    with logged("svdq_compile") as records:
        progress.say("svdquant: a line", True)
    assert [record.getMessage() for record in records] == ["svdquant: a line"]
    assert ("a line" in capsys.readouterr().err) == (rank == first)


def test_all_ranks_tell_that_they_wait(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with ranks._waiting([0, 1], True):
        pass
    assert "rank 1 waits for ranks 0, 1" in capsys.readouterr().err


@pytest.mark.parametrize(("bound", "size", "nccl"), [(None, 4, True), ("cuda:0", 4, False), ("cuda:0", 2, True)])
def test_nccl_splits_no_group_off(bound: str | None, size: int, nccl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For that all ranks of the world would have to come, of which some hold another model."""
    timeouts: list[Any] = []

    def new_group(members: Any, timeout: Any = None, backend: Any = None, **_: Any) -> Any:
        timeouts.append(timeout)

    world = SimpleNamespace(bound_device_id=bound)
    fake = SimpleNamespace(
        group=SimpleNamespace(WORLD=world),
        get_backend_config=lambda world: "cpu:gloo,cuda:nccl",
        get_world_size=lambda: size,
        get_rank=lambda: 0,
        new_group=new_group,
    )
    monkeypatch.setattr(ranks, "dist", fake)
    monkeypatch.setattr(ranks, "patience_of", lambda world: "patience")
    met = ranks.Ranks.meet((0, 1), False)
    assert met.nccl == nccl
    met._group_of_gpus()
    assert set(timeouts) == {"patience"}
