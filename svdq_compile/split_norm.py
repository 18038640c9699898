"""A norm over the channels of all heads, of which a rank has some, as Wan has one on q and k.

    y[its channels] = x[its channels] / sqrt(mean over ranks of (mean of their x^2) + eps) * weight[its channels]

One number a token is summed.
"""

import torch
from torch import Tensor, nn

from .lowering.torch_private import sum_over
from .splits import Part


class SplitRMSNorm(nn.RMSNorm):
    """Has some of the channels, as many as each other rank. group: torch's name of the ranks"""

    part: Part
    group: str

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps  # as torch, which computes in fp32 too
        means = sum_over(wide.square().mean(-1, keepdim=True), self.group)  # [..., 1] fp32
        y = wide * torch.rsqrt(means / self.part.size + eps)
        return (y if self.weight is None else y * self.weight).to(x.dtype)
