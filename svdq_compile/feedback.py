"""Round a weight one input channel after another, each error corrected by the channels that are still to come (GPTQ,
arXiv 2210.17323).

Of a weight error E the output's is E C E^T for inputs with the second moment C. With C = U D U^T, U upper triangular
with ones on its diagonal, that is the sum of D_k |E U_k|^2 over channels k. The values of channel k are rounded last
there, so rounding w_k + (E U_k of the channels before) makes each term as small as the grid allows.

Scales are found first, by rounding to nearest, and stay: only codes are chosen here. C is known in blocks of channels
(InputStatistics), and errors are carried within a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .input_statistics import Moment
from .kernels.formats import FORMATS
from .lowering.launch import round_columns, round_weight

# What is added to the diagonal of C, in units of its mean, for each channel of a block that there is to a row seen: a
# block is all that is estimated together. Rows of one picture are much alike, so three of them count as one. Of 0.1, 1,
# 10, 100 and 1000 the demo model's velocity on prompts that calibrated nothing was best with 10; with 3 its layers lose
# as much, and those of FLUX's structure 3 to 7 % less. Inputs with one row a sample, few in all, leave little of C.
RIDGE = 3.0
COLUMNS = 64  # channels whose errors are carried one by one; those before them come as one product


class Feedback:
    """Which multiple of an error in each channel those after it correct.

    weights  [G, B, B] fp32  U above its diagonal, of each block of B channels; else 0
    """

    def __init__(self, moment: Moment, smooth: Tensor) -> None:
        """For inputs with this second moment, divided by `smooth` [K]. Raises LinAlgError if it is not finite."""
        blocks, size, _ = moment.sum.shape
        inverse = F.pad(smooth.reciprocal(), (0, blocks * size - len(smooth)), value=1.0).view(blocks, size, 1)
        c = (moment.sum.to(smooth) / moment.rows * inverse * inverse.mT).double()
        ridge = RIDGE * size / moment.rows + 1e-3  # the sums are fp32
        mean = c.diagonal(dim1=1, dim2=2).sum() / len(smooth)
        c.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, mean * ridge, 1.0))
        upper = torch.linalg.cholesky(c.flip(1, 2)).flip(1, 2)
        self.weights = (upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(1)).float().triu(1)

    def round(self, precision: str, w: Tensor, importance: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """As `lowering.launch.round_weight`: w [N, K] fp32 -> the format's tensors, and [N, K] that they stand for."""
        form = FORMATS[precision]
        tensors, rounded = round_weight(precision, w, importance)
        if form.grid is None or form.group_size is None:
            return tensors, rounded
        steps = [
            self._by_block(s.repeat_interleave(form.group_size, 1)[:, : w.shape[1]]) for s in form.grid.steps(*tensors)
        ]
        target = self._by_block(w)
        rounded = torch.empty_like(target)
        lost = torch.zeros_like(target)
        for start in range(0, target.shape[1], COLUMNS):
            piece = slice(start, start + COLUMNS)
            wanted = torch.baddbmm(target[:, piece], self.weights[:, :start, piece].mT, lost[:, :start])
            rounded[:, piece], lost[:, piece] = round_columns(
                precision, target[:, piece], wanted, self.weights[:, piece, piece], tuple(s[:, piece] for s in steps)
            )
        values = rounded.flatten(0, 1)[: w.shape[1]].t().contiguous()
        return form.grid.encode(values, *tensors), values

    def _by_block(self, a: Tensor) -> Tensor:
        """[N, K] -> [G, B, N], with ones behind the last channel."""
        blocks, size, _ = self.weights.shape
        return F.pad(a.t(), (0, 0, 0, blocks * size - a.shape[1]), value=1.0).view(blocks, size, -1)
