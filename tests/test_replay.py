"""Replaying a call: what is recorded, for which operands it stands, and what cannot be replayed.

There is no GPU here: kernels are those of test_launch.py, which pass their arguments to a recorder.
"""

from contextlib import nullcontext

import pytest
import torch
from kernel_testing import compiled
from test_launch import GRID, SIGNATURE, Kernel, described, driver, flat  # noqa: F401, a fixture

from svdq_compile.kernels.runtime import launcher
from svdq_compile.kernels.runtime.launcher import launch
from svdq_compile.lowering import cuda_graphs, plan, replay

pytestmark = compiled


@pytest.fixture
def fake(request, monkeypatch):
    recorder = request.getfixturevalue("driver")
    counters = torch.zeros(4)
    monkeypatch.setattr(replay, "_is_recordable", lambda operands: True)
    monkeypatch.setattr(launcher, "zeroed_counters", lambda device, count: counters)
    monkeypatch.setattr(launcher, "gpu", lambda: (lambda: None, recorder.get_current_stream))
    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda: False)
    return recorder


def normal(*shape):
    return torch.randn(*shape).half()


class Operator:
    """x [.., M, K], weights [w, scales], bias or None -> y, z: launches one kernel, and counts its own calls."""

    def __init__(self, fake, scratch=4):
        self.kernel, self.calls, self.driver, self.scratch = Kernel(fake, SIGNATURE), 0, fake, scratch

    def __call__(self, x, weights, bias, factor=0.5):
        self.calls += 1
        rows = x.view(-1, x.shape[-1])
        y, z = x.new_empty(rows.shape), x.new_empty(rows.shape[0], 2, dtype=torch.int32)
        scratch = x.new_empty(rows.shape[0] * self.scratch, dtype=torch.float32)
        w, scales = weights
        hook = (scales if bias is None else bias, x.shape[-1], factor, z)
        launch(
            self.kernel,
            GRID,
            (described(rows), scratch, described(w[:, 8:]), 48, factor, hook),
            (y.dtype,),
            num_warps=4,
        )
        return y.view(x.shape), z.view(torch.float32)


def operands(rows=3, width=128):
    return normal(2, rows, width), [normal(16, width + 8), normal(24)], normal(8)


def passed_by(fake, op, given):
    fake.passed.clear()
    results = op(*given)
    (passed,) = fake.passed
    return results, [a for a in flat(passed) if a is not None]


def test_replayed_as_called(fake):
    """For operands that lie elsewhere: the same launch, but for the addresses of scratch memory and of z."""
    plain, op = Operator(fake), Operator(fake)
    fast = replay.Replayed(op)
    for _ in range(2):
        plain(*operands())
        fast(*operands())
    kept = []
    for _ in range(3):
        given = operands()
        (y, z), want = passed_by(fake, plain, given)
        (y2, z2), got = passed_by(fake, fast, given)
        for a, b in ((y, y2), (z, z2)):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        at = want.index(z.data_ptr())
        assert got[at] == z2.data_ptr()
        differ = [i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b]
        assert len(differ) <= 2
        assert all(i == at or got[i] not in want for i in differ)
        kept += given, y2, z2
    assert op.calls == 2, "one to compile, one to record"


def test_replayed_where_all_scratch_memory_is_empty(fake):
    """As the result of a branch of rank 0."""
    op = Operator(fake, scratch=0)
    fast = replay.Replayed(op)
    for _ in range(4):
        y, z = fast(*operands())
        assert (y.shape, z.shape) == ((2, 3, 128), (6, 2))
    assert op.calls == 2


@pytest.mark.parametrize("change", [
    lambda x, w, b: (x[:, :2], w, b), lambda x, w, b: (x.bfloat16(), w, b), lambda x, w, b: (x, w, None),
    lambda x, w, b: (x, [w[0].t().contiguous().t(), w[1]], b), lambda x, w, b: (x, w, b, 0.25),
    lambda x, w, b: (x, [w[0], torch.zeros(25).half()[1:]], b),
])  # fmt: skip
def test_other_metadata_is_another_plan(change):
    x, w, b = operands()
    entries = []
    for given in ((x, w, b, 0.5), (*change(x, w, b), 0.5)[:4]):
        key = []
        replay._read(given, key)
        entries.append(tuple(key))
    assert entries[0] != entries[1]


class Impure(Operator):
    def __init__(self, fake, work):
        super().__init__(fake)
        self.work = work

    def __call__(self, x, weights, bias, factor=0.5):
        y, z = super().__call__(x, weights, bias, factor)
        return self.work(x, y, z)


ELSEWHERE = torch.zeros(6, 128, dtype=torch.float16)


@torch.library.custom_op("svdq_testing::seeded", mutates_args=())
def seeded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice x, and a seed on another device, as torch's efficient attention gives."""
    return x * 2, torch.empty((), device="meta")


@pytest.mark.parametrize("work", [
    lambda x, y, z: (y[:, :1], z), lambda x, y, z: (x, z), lambda x, y, z: (y, y), lambda x, y, z: (ELSEWHERE, z),
    lambda x, y, z: (ELSEWHERE.view_as(y) + y, z),
    lambda x, y, z: (y, z) if torch.empty(4, device="meta").add(1).numel() else None,
    lambda x, y, z: (seeded(x)[0], z), lambda x, y, z: (y, z) if seeded(x)[1].add(1).shape == () else None,
    lambda x, y, z: (y, z)[: 2 + int(x.sum() > 1e30)], lambda x, y, z: (y, x.nonzero()),
], ids=["part", "operand", "twice", "elsewhere", "reads-elsewhere", "another-device", "any-seed",
        "takes-a-seed", "number", "shape-by-values"])  # fmt: skip
def test_anything_else_runs_as_ever(fake, work):
    op = Impure(fake, work)
    fast = replay.Replayed(op)
    for _ in range(6):
        fast(*operands())
    assert op.calls == 6


def scaled(q, w):
    return q.new_empty(q.shape).copy_(q).mul_(w)


def products(q, w):
    return scaled(q @ w, w[0]), q.new_empty(3).fill_(2) + w[0, :3]


def kept_apart(q, w):
    """q lies in the call's own memory, where nothing but operators of torch's sees it."""
    inner = q.new_empty(q.shape)
    inner.copy_(q)
    inner.mul_(w)
    return q.new_empty(q.shape).copy_(inner)


@pytest.mark.parametrize("function", [scaled, products, kept_apart])
def test_a_graph_is_not_for_addresses_that_only_torch_reads(fake, monkeypatch, function):
    """Other operands, in other memory, with the same weight: what an operator of torch's is given counts."""
    monkeypatch.setattr(cuda_graphs, "_captured", lambda run, stream, device: lambda: run(stream))
    fast, q, w, kept = replay.Replayed(function), torch.randn(8, 8), torch.randn(8, 8), []
    for i in range(12):
        q = torch.randn(8, 8) if i % 4 < 2 else q.mul_(-1)
        results, want = fast(q, w), function(q, w)
        for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (results, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        kept.append((q, results))


def attended(x):
    heads = x.view(2, -1, 2, x.shape[-1] // 2).transpose(1, 2).float()
    return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).half()


@pytest.mark.parametrize("work", [
    lambda x: x + 1, lambda x: x.clone(), lambda x: x.float().sum(0), lambda x: torch.cat((x[:, :2], x[:, :2]), 1),
    lambda x: x.new_empty(x.shape).copy_(x).mul_(2), lambda x: x.new_empty(x.shape).fill_(3)[:, :1] + x,
    lambda x: (x.transpose(0, 1) @ x.new_ones(128, 4)).relu(), attended, lambda x: attended(x).contiguous(),
    lambda x: x.unbind(1)[1] * x.split([1, 2], 1)[0][:, 0], lambda x: seeded(x)[0],
], ids=["add", "clone", "sum", "cat", "in-place", "filled", "product", "attention",
        "attention-copied", "parts", "seed-elsewhere"])  # fmt: skip
def test_operators_of_torch_are_called_again(fake, monkeypatch, work):
    """On other tensors, on memory of theirs and of the call's own; whether a CUDA graph does it or not."""
    graphs = []

    def captured(run, stream, device):
        graphs.append(1)
        return lambda: run(stream)

    monkeypatch.setattr(cuda_graphs, "_captured", captured)
    monkeypatch.setattr(replay, "_SEEDED", {torch.ops.svdq_testing.seeded.default})
    op = Impure(fake, lambda x, y, z: (y, work(x)))
    fast = replay.Replayed(op)
    same = operands()
    for i in range(9):
        given = same if i > 5 else operands()
        y, result = fast(*given)
        want = work(given[0])
        assert y.shape == given[0].shape
        assert (result.shape, result.stride(), result.dtype) == (want.shape, want.stride(), want.dtype)
        torch.testing.assert_close(result, want, rtol=0, atol=0)
    assert op.calls == 2


def test_scratch_memory_of_two_never_overlaps_while_both_are_in_use():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        count = int(torch.randint(1, 12, (), generator=generator))
        sizes = dict(enumerate(torch.randint(1, 4000, (count,), generator=generator).tolist()))
        begins = torch.randint(0, 10, (count,), generator=generator)
        lasts = begins + torch.randint(0, 5, (count,), generator=generator)
        spans = {i: (int(begins[i]), int(lasts[i])) for i in range(count)}
        offsets, total = plan.arrange(sizes, spans)
        assert set(offsets) == set(sizes)
        for a in sizes:
            assert offsets[a] % plan.ALIGNMENT == 0
            assert offsets[a] + sizes[a] <= total
            for b in range(a):
                meet = spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]
                apart = offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
                assert apart or not meet
        most = max(sum(s for i, s in sizes.items() if spans[i][0] <= t <= spans[i][1]) for t in range(16))
        assert total <= 2 * most + count * plan.ALIGNMENT, "memory is used again"


def test_a_graph_stands_for_the_addresses_it_was_made_at(monkeypatch):
    ran, launched = [], []
    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda: capturing)
    monkeypatch.setattr(cuda_graphs, "_captured", lambda run, stream, device: lambda: launched.append(stream))
    capturing, weight = False, torch.zeros(4)
    repeated = cuda_graphs.Repeated(lambda tensors, *addresses: ran.append(addresses), torch.device("cpu"))
    repeated((weight,), (), 7, 16, 32)
    repeated((weight,), (), 7, 16, 48)
    repeated((weight,), (), 8, 16, 32)
    assert (ran, launched) == ([(7, 16, 32), (7, 16, 48), (8, 16, 32)], []), "met once; another stream is another"
    repeated((weight,), (), 7, 16, 32)
    repeated((weight,), (), 7, 16, 32)
    assert (len(ran), launched) == (3, [7, 7])
    capturing = True
    repeated((weight,), (), 7, 16, 32)
    assert (len(ran), launched) == (4, [7, 7]), "within somebody's capture kernels are launched one by one"


def test_a_graph_goes_with_a_weight(monkeypatch):
    """Compiled code outlives its model; what its graphs hold of the GPU's memory does not."""
    ran = []
    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda: False)
    monkeypatch.setattr(cuda_graphs, "_captured", lambda run, stream, device: lambda: None)
    repeated = cuda_graphs.Repeated(lambda tensors, *addresses: ran.append(addresses), torch.device("cpu"))
    for _ in range(6):
        repeated((torch.zeros(4), torch.zeros(4)), (), 1, 2)
    assert len(ran) == 6, "no graph where nothing stays"
    assert not repeated._graphs
    weight = torch.zeros(4)
    for _ in range(4):
        repeated((torch.zeros(4), weight), (), 1, 2)
    assert (len(ran), len(repeated._graphs)) == (7, 1)
    del weight
    assert not repeated._graphs


def test_launches_that_cannot_be_a_graph_stay_apart(monkeypatch):
    ran, tried = [], []

    def refuse(run, stream, device):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda: False)
    monkeypatch.setattr(cuda_graphs, "_captured", refuse)
    repeated, weight = cuda_graphs.Repeated(lambda *given: ran.append(given), torch.device("cpu")), torch.zeros(4)
    for _ in range(6):
        repeated((weight,), (), 1, 2)
    assert (len(ran), len(tried)) == (6, 1)


def test_too_many_graphs_drop_the_oldest(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda: False)
    monkeypatch.setattr(cuda_graphs, "_captured", lambda run, stream, device: lambda: None)
    repeated, weight = cuda_graphs.Repeated(lambda *given: None, torch.device("cpu")), torch.zeros(4)
    for i in range(cuda_graphs.MAX_GRAPHS + 3):
        for _ in range(2):
            repeated((weight,), (), 1, i)
    assert list(repeated._graphs) == [(1, i) for i in range(3, cuda_graphs.MAX_GRAPHS + 3)]


def test_out_of_memory_may_pass(monkeypatch):
    tried = []

    def full(run, stream, device):
        tried.append(1)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda: False)
    monkeypatch.setattr(cuda_graphs, "_captured", full)
    repeated, weight = cuda_graphs.Repeated(lambda *given: None, torch.device("cpu")), torch.zeros(4)
    for _ in range(6):
        repeated((weight,), (), 1, 2)
    assert len(tried) == 3


def test_a_pool_without_graphs_is_a_new_one(monkeypatch):
    """torch takes a pool for no graph again once its last one is gone."""
    handles = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **options: None)
    memory, graph = cuda_graphs._Memory(torch.device("cuda")), torch.nn.Module()
    assert memory.pool() == 0
    memory.graphs.add(graph)
    assert memory.pool() == memory.pool() == 0
    del graph
    assert memory.pool() == 1


def test_addresses_that_never_come_again_leave_little_behind(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "is_capturing", lambda: False)
    repeated, weight = cuda_graphs.Repeated(lambda *given: None, torch.device("cpu")), torch.zeros(4)
    for i in range(3 * cuda_graphs.MAX_GRAPHS):
        repeated((weight,), (), 1, i)
    assert len(repeated._met) <= cuda_graphs.MAX_GRAPHS
    assert not repeated._graphs


def test_no_result_is_a_view(fake):
    """Dynamo's guards tell views from others: the first calls' results would be of another kind than the later ones."""
    site = replay.Site(replay.Replayed(Operator(fake)))
    assert all(t._base is None for _ in range(4) for t in site(*operands()))


def test_sites_of_sizes(fake):
    op = Operator(fake)
    sites = replay.Sites(replay.Replayed(op))
    for _ in range(4):
        for rows in (3, 5):
            y, _ = sites.of(rows)(*operands(rows))
            assert y.shape == (2, rows, 128)
    assert op.calls == 4, "for each size one to compile, one to record"
    assert sites.of(3) is sites.of(3) is not sites.of(5)


@pytest.mark.parametrize("below_autograd", [False, True])
@pytest.mark.parametrize("copied", [
    lambda x: x.reshape(-1, 128), lambda x: x.flatten(0, 1), lambda x: x.contiguous(),
    lambda x: x.reshape(-1, 128).view(2, 3, 128),
], ids=["reshape", "flatten", "contiguous", "viewed"])  # fmt: skip
def test_rows_that_are_copied_are_copied_again(fake, copied, below_autograd):
    """There the dispatcher calls an operator from a graph with dynamic sizes; a copy is no operator of its own then."""
    op = Operator(fake)

    def function(x, *others):
        rows = copied(x)
        return op(rows, *others)[0], rows + 0

    fast = replay.Replayed(function)
    for _ in range(6):
        wide, (_, *others) = normal(2, 5, 128), operands()
        fake.passed.clear()
        with torch._C._AutoDispatchBelowAutograd() if below_autograd else nullcontext():
            _, rows = fast(wide[:, :3], *others)
        torch.testing.assert_close(rows.view(2, 3, 128), wide[:, :3], rtol=0, atol=0)
        assert wide.data_ptr() not in flat(fake.passed), "the kernel reads the copy"
    assert op.calls == 2


def test_one_tensor_as_two_operands(fake):
    op = Operator(fake)
    fast = replay.Replayed(op)
    x, (w, s), _ = operands()
    for _ in range(5):
        fast(x, [w, s], s)
    assert op.calls == 5


def test_a_site_goes_by_its_plan(fake):
    """Without a look at the operands, but for where they are: as an operator that looks each time."""
    plain, op = Operator(fake), Operator(fake)
    site = replay.Site(replay.Replayed(op))
    for _ in range(3):
        plain(*operands())
        site(*operands())
    assert site._plan is not None
    kept = []
    for _ in range(3):
        given = operands()
        (y, z), want = passed_by(fake, plain, given)
        (y2, z2), got = passed_by(fake, site, given)
        assert [(t.shape, t.stride(), t.dtype) for t in (y, z)] == [(t.shape, t.stride(), t.dtype) for t in (y2, z2)]
        addresses = [t.data_ptr() for t in (given[0], given[1][1], given[2])]
        assert [a in got for a in addresses] == [a in want for a in addresses] != [False] * 3
        assert sum(a != b for a, b in zip(want, got, strict=True)) <= 2, "scratch memory and z"
        kept += given, y2, z2
    assert op.calls == 2


@pytest.mark.parametrize("change", ["alignment", "device", "observer"])
def test_a_site_does_not_go_by_its_plan(fake, monkeypatch, change):
    current = [None]
    monkeypatch.setattr(launcher, "gpu", lambda: (lambda: current[0], fake.get_current_stream))
    op = Operator(fake)
    site = replay.Site(replay.Replayed(op))
    x, w, bias = operands()
    for _ in range(3):
        site(x, w, bias)
    assert op.calls == 2
    if change == "alignment":
        bias = torch.randn(9).half()[1:]
    elif change == "device":
        current[0] = 1
    else:
        monkeypatch.setattr(launcher.knobs.runtime.launch_enter_hook, "calls", [print])
    site(x, w, bias)
    assert op.calls == 3
