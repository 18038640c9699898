"""svdq::joined: parts put one after another, without a copy where they lie so already.

    y = joined([text, image], 1)        [B, T, C], [B, S, C] -> [B, T + S, C], contiguous

A block that works on two streams as one sequence often gets, in two tensors, the two halves of what the block before it
computed. y is then that result again: memory that others own, so nothing may write to it (passes/join_parts.py). Only
compiled code calls this; torch's operators must not give their operands back, so there the operator is `torch.cat`.
"""

import torch
from torch import Tensor


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """A view of the parts' memory, or what `torch.cat` makes of them."""
    y = empty_result(parts, dim, "meta")
    first = parts[0]
    if _lie_in(parts, y, dim):
        return first.as_strided(y.shape, y.stride(), first.storage_offset())
    return torch.cat(parts, dim).contiguous()


def empty_result(parts: list[Tensor], dim: int, device: str | torch.device | None = None) -> Tensor:
    """A tensor for the result; also the operator's shape function."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].new_empty(shape, device=device or parts[0].device)


def _lie_in(parts: list[Tensor], whole: Tensor, dim: int) -> bool:
    """Whether the parts are in their places within one piece of memory that `whole` would fit into."""
    first = parts[0]
    memory = first.untyped_storage()
    if first.data_ptr() % 16:  # kernels and Inductor count on it
        return False
    offset = first.storage_offset()
    if (offset + whole.numel()) * whole.itemsize > memory.nbytes():
        return False
    for part in parts:
        if part.untyped_storage().data_ptr() != memory.data_ptr() or part.storage_offset() != offset:
            return False
        if any(n > 1 and a != b for n, a, b in zip(part.shape, part.stride(), whole.stride(), strict=True)):
            return False
        offset += part.shape[dim] * whole.stride(dim)
    return True
