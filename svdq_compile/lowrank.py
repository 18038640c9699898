"""Best low-rank approximation by randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061)."""

import torch
from torch import Tensor

OVERSAMPLING = 8
# From a random start three rounds reach the same residual as a full SVD to 3 digits; from the last round's basis one does.
COLD_ITERATIONS = 3


def factorize(a: Tensor, rank: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """a [N, K] fp32 ~ up [N, rank] @ down [rank, K]. Also returns a basis [K, rank + 8] that starts the next call warm.

    up has orthonormal columns (or zero ones, where `a` has a lower rank). Deterministic: the random start is seeded.
    """
    iterations = 1
    if basis is None:
        iterations = COLD_ITERATIONS
        width = min(rank + OVERSAMPLING, *a.shape)
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(a.shape[1], width, generator=generator).to(a.device)
    for _ in range(iterations):
        left = _orthonormal(a @ basis)
        basis = _orthonormal(a.t() @ left)
    left = _orthonormal(a @ basis)
    right = left.t() @ a
    _, rotation = _eigh(right @ right.t())
    rotation = rotation[:, -rank:]
    return left @ rotation, rotation.t() @ right, basis


def _orthonormal(y: Tensor) -> Tensor:
    """An orthonormal basis of y's columns. By the Gram matrix: a QR of a tall matrix costs ten times more on a GPU.

    Directions a millionth as strong as the strongest come back as zero columns.
    """
    y64 = y.double()
    values, vectors = _eigh(y64.t() @ y64)
    scale = torch.where(values > 1e-12 * values[-1], values, torch.inf).rsqrt()
    return (y64 @ (vectors * scale)).to(y.dtype)


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ascending and vectors of a small symmetric matrix; on the CPU, where 40 x 40 is quickest."""
    values, vectors = torch.linalg.eigh(gram.cpu().double())
    return values.to(gram), vectors.to(gram)
