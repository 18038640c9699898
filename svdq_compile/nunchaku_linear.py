"""One linear of a Nunchaku file as numbers in plain order, on the way from its tensors to a pack of ours, or back.

    file's tensors  --read-->  Linear  --rows, join_columns-->  Linear  --pack-->  PackedLinear and bias
    file's tensors  <--write-- Linear  <--join_rows, columns--  Linear  <--unpack-- PackedLinear and bias

Integers, scales, smoothing factors and low-rank branch pass both ways bit for bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import nunchaku_layout as layout
from .kernels.formats import FORMATS, nibbles
from .kernels.formats.groups import padded
from .lowering.launch import in_device_order, round_weight
from .lowering.packed import PackedLinear, SharedInput
from .nunchaku_keys import Rule
from .nunchaku_layout import TILE
from .passes.activations import GELU_SHIFT

RANK_STEP = 16  # ranks in a file are a multiple of this
AWQ_GROUP = 64
_SIGN = 8  # between two's complement and the codes + 8 of our int4


@dataclass(frozen=True)
class Linear:
    """y = dequantize(weight) Q((x + shift) / smooth) + up (down x) + bias, padded only along K, to whole groups.

    weight   the format's tensors in the plain order, of nvfp4 with a wtscale that broadcasts to [N, Kp/16]
    smooth   [K] fp32
    down, up [r, K], [N, r], in the file's 16-bit dtype
    bias     [N] fp32 or None: what is added to this very product, with what the shift brings taken out
    """

    precision: str
    weight: tuple[Tensor, ...]
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    shift: float = 0.0

    @property
    def values(self) -> Tensor:
        """[N, K] fp32: what the codes stand for, smoothed."""
        return FORMATS[self.precision].dequantize_weight(*self.weight)[:, : self.smooth.shape[0]]

    @property
    def dense(self) -> Tensor:
        """[N, K] fp32: the whole weight."""
        return self.values / self.smooth + self.up.float() @ self.down.float()

    def unshifted(self) -> "Linear":
        """The same for an input that is not shifted."""
        if not self.shift:
            return self
        brought = self.values @ self.smooth.reciprocal() * self.shift
        return replace(self, bias=brought if self.bias is None else self.bias + brought, shift=0.0)

    def shifted(self, shift: float) -> "Linear":
        """The same for an input that is shifted by so much."""
        if self.shift == shift:
            return self
        plain = self.unshifted()
        brought = self.values @ self.smooth.reciprocal() * shift
        return replace(plain, bias=-brought if plain.bias is None else plain.bias - brought, shift=shift)

    def rows(self, start: int, stop: int) -> "Linear":
        """The output channels start..stop."""
        own = slice(start, stop)
        weight = tuple(t[own].clone() if t.dim() and t.shape[0] > 1 else t for t in self.weight)
        bias = None if self.bias is None else self.bias[own]
        return replace(self, weight=_simplified(weight), up=self.up[own], bias=bias)._trimmed()

    def columns(self, start: int, stop: int) -> "Linear":
        """The input channels start..stop, multiples of the group size unless they are the last; without a bias."""
        group, (qweight, scales, *rest) = FORMATS[self.precision].group_size or 1, self.weight
        last = start + padded(stop - start, group)
        own = slice(start // group, last // group)
        rest = [t[:, own].clone() if t.dim() and t.shape[1] > 1 else t for t in rest]
        weight = (qweight[:, start // 2 : last // 2].clone(), scales[:, own].clone(), *rest)
        smooth, down = self.smooth[start:stop].clone(), self.down[:, start:stop].clone()
        return replace(self, weight=_simplified(weight), smooth=smooth, down=down, bias=None)._trimmed()

    def _trimmed(self) -> "Linear":
        """Without ranks that add nothing."""
        used = (self.up != 0).any(0) & (self.down != 0).any(1)
        return replace(self, up=self.up[:, used].contiguous(), down=self.down[used].contiguous())


def join_rows(linears: Sequence[Linear]) -> Linear:
    """Linears of one input, one under the other: with the branch they share, or a branch of all their ranks."""
    first = linears[0]
    if len(linears) == 1:
        return first
    weights = [linear.weight for linear in linears]
    if first.precision == "nvfp4" and len({tuple(w[2].reshape(-1).tolist()) for w in weights}) > 1:
        weights = [(*w[:2], w[2].expand(w[0].shape[0], 1) if w[2].dim() == 0 else w[2]) for w in weights]
    weight = tuple(torch.cat(t) if t[0].dim() else t[0] for t in zip(*weights, strict=True))
    if all(torch.equal(linear.down, first.down) for linear in linears):
        down, up = first.down, torch.cat([linear.up for linear in linears])
    else:
        down, up = torch.cat([linear.down for linear in linears]), torch.block_diag(*(linear.up for linear in linears))
    biases = [linear.bias if linear.bias is not None else linear.smooth.new_zeros(len(linear.up)) for linear in linears]
    bias = None if all(linear.bias is None for linear in linears) else torch.cat(biases)
    return replace(first, weight=weight, down=down, up=up, bias=bias)


def join_columns(left: Linear, right: Linear) -> Linear:
    """Two linears whose results are added, as one that reads both inputs; neither is shifted any more. ValueError if
    the left one's channels do not fill their groups.
    """
    left, right = left.unshifted(), right.unshifted()
    k, group = left.smooth.shape[0], FORMATS[left.precision].group_size or 1
    if k % group:
        raise ValueError(f"{k} input channels are not whole groups of {group}")
    (codes, scales), (other_codes, other_scales) = left.weight[:2], right.weight[:2]
    weight: tuple[Tensor, ...] = (torch.cat((codes, other_codes), 1), torch.cat((scales, other_scales), 1))
    if left.precision == "nvfp4":
        rows = max(1, *(w.weight[2].shape[0] for w in (left, right) if w.weight[2].dim()), 1)
        spread = [w.weight[2].expand(rows, w.weight[1].shape[1]) for w in (left, right)]
        weight = (*weight, torch.cat(spread, 1))
    if torch.equal(left.up, right.up):
        down, up = torch.cat((left.down, right.down), 1), left.up
    else:
        down, up = torch.block_diag(left.down, right.down), torch.cat((left.up, right.up), 1)
    given = [bias for bias in (left.bias, right.bias) if bias is not None]
    bias = torch.stack(given).sum(0) if given else None
    return Linear(left.precision, _simplified(weight), torch.cat((left.smooth, right.smooth)), down, up, bias)


def _simplified(weight: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The scale above nvfp4's scales as one number where all its numbers are the same."""
    if len(weight) == 3 and weight[1].dtype == torch.float8_e4m3fn and weight[2].dim():
        scale = weight[2]
        if bool((scale == scale.reshape(-1)[0]).all()):
            return (*weight[:2], scale.reshape(-1)[0].clone())
        if bool((scale == scale[:, :1]).all()):
            return (*weight[:2], scale[:, :1].clone())
        if bool((scale == scale[:1]).all()):
            return (*weight[:2], scale[:1].clone())
    return weight


# ** a file's tensors **


def read(tensors: Mapping[str, Tensor], rule: Rule, sizes: Sequence[int], k: int) -> Linear:
    """The linears of one module of a file, one under the other.

    tensors  by the new names, of shapes that were checked
    sizes    rows of each part; k: input channels
    """
    if tensors["qweight"].dtype == torch.int32:
        return _read_awq(tensors, rule, k)

    def own(rows: Tensor) -> Tensor:
        return own_rows(rows, rule, sizes)

    codes = own(layout.unpack_codes(tensors["qweight"]))
    weight: tuple[Tensor, ...]
    if tensors["wscales"].dtype == torch.float8_e4m3fn:
        precision, group = "nvfp4", 16
        scales = own(layout.unpack_fp8_scales(tensors["wscales"]).view(torch.uint8)).view(torch.float8_e4m3fn)
        above = torch.ones(1, 1, device=codes.device)
        if "wcscales" in tensors:
            above = own(layout.unpack_vector(tensors["wcscales"]).float())[:, None]
        if "wtscale" in tensors:
            above = above * tensors["wtscale"].float().reshape(1, 1)
    else:
        precision, group = "int4", 64
        codes, scales, above = codes ^ _SIGN, own(layout.unpack_scales(tensors["wscales"])), None
    kp = padded(k, group)
    weight = (nibbles.pack(codes[:, :kp]), scales[:, : kp // group].contiguous())
    weight = _simplified(weight if above is None else (*weight, above))
    if "proj_down" in tensors:
        down = layout.unpack_down(tensors["proj_down"])[:, :k].contiguous()
        up = own(layout.unpack_up(tensors["proj_up"]))
    else:
        down, up = _no_branch(len(codes), k, tensors["smooth_factor"])
    bias = own(layout.unpack_vector(tensors["bias"])).float() if "bias" in tensors else None
    smooth = layout.unpack_vector(tensors["smooth_factor"])[:k].float()
    shift = GELU_SHIFT if rule.shifted and precision == "int4" else 0.0
    return Linear(precision, weight, smooth, down, up, bias, shift)


def own_rows(rows: Tensor, rule: Rule, sizes: Sequence[int]) -> Tensor:
    """A file's rows without padding, in the stock order."""
    if rule.padded:
        ends = torch.tensor([padded(size, TILE) for size in sizes]).cumsum(0).tolist()
        rows = torch.cat([rows[end - padded(size, TILE) :][:size] for end, size in zip(ends, sizes, strict=True)])
    return layout.deinterleave(rows[: sum(sizes)], rule.chunks).contiguous()


def _read_awq(tensors: Mapping[str, Tensor], rule: Rule, k: int) -> Linear:
    groups = padded(k, AWQ_GROUP) // AWQ_GROUP
    codes = layout.unpack_awq_codes(tensors["qweight"])
    scales, zeros = (tensors[name][:groups].t() for name in ("wscales", "wzeros"))
    rows = [layout.deinterleave(t, rule.chunks).contiguous() for t in (nibbles.pack(codes), scales, zeros)]
    bias = None
    if "bias" in tensors:
        bias = layout.deinterleave(tensors["bias"].float(), rule.chunks)
        bias = bias - _ones(rule, bias)
    smooth = torch.ones(k, device=codes.device)
    return Linear("w4a16", tuple(rows), smooth, *_no_branch(len(codes), k, scales), bias)


def _ones(rule: Rule, bias: Tensor) -> Tensor:
    """[N]: what is added to the biases of factors."""
    ones = torch.zeros_like(bias).unflatten(0, (rule.chunks, -1))
    ones[list(rule.ones)] = 1
    return ones.flatten()


def _no_branch(n: int, k: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """down and up of rank 0."""
    return like.new_zeros(0, k), like.new_zeros(n, 0)


def write(linear: Linear, rule: Rule, sizes: Sequence[int], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A module of a file, by the new names, padded as Nunchaku's engine wants it; the inverse of `read`.

    rank  of all linears of the file; dtype: of its 16-bit tensors
    """
    if linear.precision == "w4a16":
        return _write_awq(linear, rule, dtype)
    return _write_w4a4(linear, rule, sizes, rank, dtype)


def _write_w4a4(linear: Linear, rule: Rule, sizes: Sequence[int], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    k = padded(linear.smooth.shape[0], TILE)

    def own(rows: Tensor, fill: float, width: int = 0) -> Tensor:
        """Rows in the file's order, and columns if width is given, padded."""
        rows = layout.interleave(rows, rule.chunks)
        parts = rows.split(list(sizes)) if rule.padded else (rows,)
        rows = torch.cat([_filled(part, padded(len(part), TILE), fill) for part in parts])
        return _filled(rows.t(), width, fill).t().contiguous() if width else rows

    qweight, scales, *above = linear.weight
    codes = nibbles.unpack(qweight)
    h = dtype
    tensors: dict[str, Tensor] = {}
    if linear.precision == "int4":
        tensors["qweight"] = layout.pack_codes(own(codes ^ _SIGN, 0, k))
        tensors["wscales"] = layout.pack_scales(own(scales.to(h), 1, k // 64))
    else:
        tensors["qweight"] = layout.pack_codes(own(codes, 0, k))
        one = torch.ones((), dtype=torch.float8_e4m3fn).view(torch.uint8).item()
        raw = own(scales.view(torch.uint8), one, k // 16).view(torch.float8_e4m3fn)
        tensors["wscales"] = layout.pack_fp8_scales(raw)
        # One number for a linear by itself, one for each row of several: some kernels read only the latter there.
        if above[0].dim() == 0 and len(sizes) == 1:
            tensors["wtscale"] = above[0].reshape(1).to(h)
        else:
            rows = above[0].reshape(-1, 1).expand(len(codes), 1).squeeze(1)
            tensors["wcscales"] = layout.pack_vector(own(rows.to(h), 1))
    if linear.bias is not None:
        tensors["bias"] = layout.pack_vector(own(linear.bias.to(h), 1))
    tensors["smooth_factor"] = layout.pack_vector(_filled(linear.smooth, k, 1).to(h))
    tensors["smooth_factor_orig"] = tensors["smooth_factor"].clone()
    down = _filled(_filled(linear.down.to(h), rank, 0).t(), k, 0).t().contiguous()
    tensors["proj_down"] = layout.pack_down(down)
    tensors["proj_up"] = layout.pack_up(own(_filled(linear.up.to(h).t(), rank, 0).t(), 0))
    return tensors


def _write_awq(linear: Linear, rule: Rule, dtype: torch.dtype) -> dict[str, Tensor]:
    qweight, *scales = (layout.interleave(t, rule.chunks) for t in linear.weight)
    tensors = {"qweight": layout.pack_awq_codes(nibbles.unpack(qweight))}
    tensors |= {n: t.t().contiguous().to(dtype) for n, t in zip(("wscales", "wzeros"), scales, strict=True)}
    if linear.bias is not None:
        bias = linear.bias + _ones(rule, linear.bias)
        tensors["bias"] = layout.interleave(bias, rule.chunks).to(dtype)
    return tensors


def _filled(rows: Tensor, length: int, value: float) -> Tensor:
    """Rows [n, ...] -> [length, ...]."""
    missing = length - rows.shape[0]
    return torch.cat((rows, rows.new_full((missing, *rows.shape[1:]), value))) if missing else rows


# ** packs of ours **


@dataclass(frozen=True)
class Packed:
    """A linear as a model holds it: error is how far the weight is from the file's, relative."""

    packed: PackedLinear
    bias: Tensor | None
    error: float


def pack(linears: Sequence[Linear], has_bias: Sequence[bool], precision: str) -> list[Packed]:
    """Linears that read one input, on the device where they are.

    has_bias   whether the module of each has one
    precision  the linears' own, or w4a8: then their codes are made anew
    """
    smooth, h = linears[0].smooth, linears[0].up.dtype
    recoded = precision != linears[0].precision
    if recoded:
        linears = [linear.unshifted() for linear in linears]
    down = torch.cat([linear.down for linear in linears])
    shared = SharedInput(precision, smooth, down, linears[0].shift)
    packs, start = [], 0
    for linear, wants_bias in zip(linears, has_bias, strict=True):
        weight, error = _recoded(linear, precision) if recoded else (linear.weight, 0.0)
        bias = linear.unshifted().bias if wants_bias else None
        bias = None if bias is None else bias.to(h)
        offset = None if recoded or precision == "w4a16" else _offset(linear, bias)
        packs.append(
            Packed(PackedLinear(shared, in_device_order(precision, weight), linear.up, start, offset), bias, error)
        )
        start += linear.up.shape[1]
    return packs


def _offset(linear: Linear, bias: Tensor | None) -> Tensor | None:
    """What has to be subtracted beside a module's bias, so that the sum is the file's."""
    if linear.bias is None:
        return None
    offset = -linear.bias if bias is None else bias.float() - linear.bias
    return offset if bool(offset.any()) else None


def _recoded(linear: Linear, precision: str) -> tuple[tuple[Tensor, ...], float]:
    """A weight in another format, and the relative error that this brings."""
    values = linear.values
    weight, rounded = round_weight(precision, values, None)
    wrong = (rounded[:, : values.shape[1]] - values) / linear.smooth
    return weight, float(wrong.norm() / linear.dense.norm().clamp_min(1e-30))


def unpack(packed: PackedLinear, bias: Tensor | None) -> Linear:
    """A pack and its module's bias, on the CPU; the inverse of `pack`."""
    shared, weight = packed.shared, tuple(t.cpu() for t in packed.plain_weight)
    exact = None if bias is None else bias.detach().float().cpu()
    if packed.offset is not None:
        offset = packed.offset.cpu()
        exact = -offset if exact is None else exact - offset
    smooth, down, up = shared.smooth.cpu(), packed.down.cpu(), packed.up.cpu()
    return Linear(packed.precision, weight, smooth, down, up, exact, shared.shift)


def as_16_bit(linear: Linear, dtype: torch.dtype) -> Tensor:
    """[N, K]: the whole weight."""
    return linear.dense.to(dtype)


def as_awq(weight: Tensor, bias: Tensor | None) -> tuple[Linear, float]:
    """A weight [N, K] coded for few rows, without a branch, and its relative error."""
    values = weight.float()
    coded = FORMATS["w4a16"].quantize_weight(values)
    n, k = values.shape
    own_bias = None if bias is None else bias.float()
    linear = Linear("w4a16", coded, torch.ones(k), *_no_branch(n, k, weight), own_bias)
    return linear, float((linear.values - values).norm() / values.norm().clamp_min(1e-30))


def fits_16_bit(linear: Linear, dtype: torch.dtype) -> bool:
    """Whether a file of this dtype holds the linear's scales and smoothing factors as they are."""
    kept = [linear.smooth, *(t for t in linear.weight[1:] if t.dtype == torch.float32)]
    kept += [t for t in linear.weight[1:] if t.dtype in (torch.bfloat16, torch.float16)]
    kept += [linear.up, linear.down]
    return all(torch.equal(t.to(dtype).float(), t.float()) for t in kept)


def fuses(linears: Sequence[Linear]) -> bool:
    """Whether linears can be one module of a file: packed alike, with the same smoothing factors."""
    first = linears[0]
    return all(
        linear.precision == first.precision and torch.equal(linear.smooth, first.smooth) and linear.shift == first.shift
        for linear in linears
    )


def padded_rank(rank: int) -> int:
    """A rank that a file can have."""
    return padded(rank, RANK_STEP)
