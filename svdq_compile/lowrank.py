"""Best low-rank approximation by randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061).

On a GPU a float64 SVD of one FLUX weight takes seconds and a QR of a tall thin matrix milliseconds; Cholesky factors of
40 x 40 Gram matrices take neither, nor a word with the CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OVERSAMPLING = 8
COLD_ITERATIONS = 3  # within 1 % of the best residual even of a Gaussian matrix, whose spectrum is flattest


def factorize(a: Tensor, rank: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """a [N, K] fp32 ~ up [N, rank] @ down [rank, K]. Also returns a basis [K, rank] that starts the next call warm.

    A warm start is one more step of the iteration: enough where `a` changed little. Deterministic: the start is seeded.
    """
    if basis is not None:
        left = _orthonormal(a @ basis)
        down = left.t() @ a
        return left, down, F.normalize(down, dim=1).t()
    generator = torch.Generator("cpu").manual_seed(0)
    size = a.shape[1], min(rank + OVERSAMPLING, *a.shape)
    # The defaults for new tensors are the user's to change.
    basis = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(a.device)
    left = _orthonormal(a @ basis)
    for _ in range(COLD_ITERATIONS):
        left = _orthonormal(a @ _orthonormal(a.t() @ left))
    right = left.t() @ a
    _, rotation = torch.linalg.eigh((right @ right.t()).double())
    rotation = rotation[:, -rank:].to(a.dtype)
    down = rotation.t() @ right
    return left @ rotation, down, F.normalize(down, dim=1).t()


def _orthonormal(y: Tensor) -> Tensor:
    """An orthonormal basis of y's columns, by Cholesky of the Gram matrix in float64.

    Columns that depend on others, to a millionth of the largest, come out shorter than 1: they add nothing to a
    projection.
    """
    y64 = y.double()
    gram = y64.t() @ y64
    ridge = 1e-12 * gram.diagonal().amax() + 1e-30
    gram.diagonal().add_(ridge)
    lower, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(lower, y64.t(), upper=False).t().to(y.dtype)
