"""Sequences replayed on a GPU, as a CUDA graph too: bit for bit what their operators give one by one. Needs CUDA:

python -m pytest tests/gpu/test_sequences_gpu.py
"""

import threading

import pytest
import torch
from torch import Tensor

from svdq_compile.kernels.formats import FORMATS, layout
from svdq_compile.lowering import cuda_graphs, ops, replay, sequences

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

K, N, R = 256, 512, 32
BF16 = torch.bfloat16
# Two products of one input, attention between them, and a fused product of what comes out.
PROGRAM = (
    "v0 = svdq.quantize.default(x[0], x[1], x[2], 'w4a8', 0.0); "
    "v1 = svdq.gemm.default(v0[0], v0[1], v0[2], [x[3], x[4], x[5]], x[6], None, None, 'w4a8', torch.bfloat16); "
    "v2 = aten.permute.default(aten.reshape.default(v1, [1, n[0], 4, 128]), [0, 2, 1, 3]); "
    "v3 = svdq.attention.default(v2, v2, v2, False, None, [0, 2, 1, 3]); "
    "v4 = aten.reshape.default(aten.permute.default(v3, [0, 2, 1, 3]), [1, n[0], 512]); "
    "v5 = svdq.quantize.default(v4, x[7], x[8], 'w4a8', 0.0); "
    "v6 = svdq.fused_gemm.default(v5[0], v5[1], v5[2], [x[9], x[10], x[11]], x[12], None, None, 'w4a8', "
    "torch.bfloat16, [x[0]], 'epilogue(y, auxiliary: BTC); t0 = add(auxiliary, y)'); return [v6, v1]"
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(BF16)


def weight(n: int, k: int) -> list[Tensor]:
    return list(layout.to_kernel("w4a8", FORMATS["w4a8"].quantize_weight(normal(n, k).float() * k**-0.5)))


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    smooth = [torch.rand(size, device="cuda") + 0.5 for size in (K, N)]
    first = [smooth[0], normal(R, K), *weight(N, K), normal(N, R)]
    return [*first, smooth[1], normal(R, N), *weight(K, N), normal(K, R)]


def plainly(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    functions = {name: getattr(f, "_function", f) for name, f in ops.IMPLEMENTATIONS.items()}
    return sequences.run([x, *weights], [x.shape[1]], PROGRAM, sequences.namespace(functions))


def same(results: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(results, wanted, strict=True))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a graph was made."""
    made: list[int] = []
    captured = cuda_graphs._captured
    monkeypatch.setattr(cuda_graphs, "_captured", lambda *args: made.append(1) or captured(*args))
    return made


def new_sites() -> replay.Sites:
    return replay.Sites(replay.Replayed(ops.IMPLEMENTATIONS["svdq.sequence.default"]._function))


def test_bit_for_bit(weights: list[Tensor], graphs: list[int]) -> None:
    sites = new_sites()
    for round_ in range(4):
        for tokens in (192, 77, 1000):
            for x in [normal(1, tokens, K) for _ in range(2)]:
                for _ in range(4):
                    results = sites.of(tokens)([x, *weights], [tokens], PROGRAM)
                    assert same(results, plainly(x, weights)), (round_, tokens)
                    x.mul_(-1.5)  # in place: the same addresses, other values
    assert graphs


def test_results_are_memory_of_their_own(weights: list[Tensor], graphs: list[int]) -> None:
    site, x = new_sites().of(), normal(1, 192, K)
    kept = []
    for i in range(12):
        results = site([x, *weights], [192], PROGRAM)
        if i % 3 == 0:
            kept.append((results, [t.clone() for t in results]))
        x = x + 1 if i % 2 else x
    for results, copies in kept:
        assert same(results, copies)


def test_in_several_threads_and_streams(weights: list[Tensor], graphs: list[int]) -> None:
    site = new_sites().of()
    wrong: list[int] = []

    def work(number: int) -> None:
        torch.manual_seed(number)
        with torch.cuda.stream(torch.cuda.Stream()):
            x = normal(1, 192, K)
            wanted = plainly(x, weights)
            for _ in range(50):
                if not same(site([x, *weights], [192], PROGRAM), wanted):
                    wrong.append(number)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_in_somebody_elses_graph(weights: list[Tensor]) -> None:
    site, x = new_sites().of(), normal(1, 192, K)
    for _ in range(5):
        site([x, *weights], [192], PROGRAM)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = site([x, *weights], [192], PROGRAM)
    x.copy_(normal(1, 192, K))
    graph.replay()
    assert same(results, plainly(x, weights))


# q, k and v come from outside: only an operator of torch's reads them, and a product whose branch may be another.
OUTSIDE = (
    "v0 = svdq.attention.default(x[0], x[1], x[2], False, None, [0, 2, 1, 3]); "
    "v1 = aten.reshape.default(aten.permute.default(v0, [0, 2, 1, 3]), [1, n[0], 256]); "
    "v2 = svdq.quantize.default(v1, x[3], x[4], 'w4a8', 0.0); "
    "v3 = svdq.gemm.default(v2[0], v2[1], v2[2], [x[5], x[6], x[7]], x[8], None, None, 'w4a8', torch.bfloat16); "
    "return [v3]"
)


def test_what_only_torch_reads_counts_too(weights: list[Tensor], graphs: list[int]) -> None:
    functions = {name: getattr(f, "_function", f) for name, f in ops.IMPLEMENTATIONS.items()}
    site, kept, given = new_sites().of(), [], list(weights[:6])
    q, k, v = (normal(1, 2, 96, 128) for _ in range(3))
    for i in range(24):
        if i % 6 == 3:
            q = normal(1, 2, 96, 128)
        if i % 8 == 5:
            given[5] = normal(N, R)  # as an adapter that is loaded
        results = site([q, k, v, *given], [96], OUTSIDE)
        assert same(results, sequences.run([q, k, v, *given], [96], OUTSIDE, sequences.namespace(functions))), i
        kept.append((q, list(given)))
    assert graphs


def test_graphs_go_with_their_weights_and_come_again(graphs: list[int]) -> None:
    for _ in range(3):
        site, x = new_sites().of(), normal(1, 192, K)
        smooth = [torch.rand(size, device="cuda") + 0.5 for size in (K, N)]
        own = [smooth[0], normal(R, K), *weight(N, K), normal(N, R)]
        own += [smooth[1], normal(R, N), *weight(K, N), normal(K, R)]
        before = len(graphs)
        for _ in range(6):
            assert same(site([x, *own], [192], PROGRAM), plainly(x, own))
        assert len(graphs) > before
        del own, smooth, x, site
