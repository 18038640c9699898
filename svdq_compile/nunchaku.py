"""Nunchaku's checkpoints into a model: each linear becomes the pack that the file has, bit for bit.

A checkpoint is checked whole against the model before either is touched.
"""

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import decisions
from .checkpoint import serve_libraries
from .errors import FileRefused, OptionError
from .kernels.formats.groups import padded
from .kernels.runtime.target import is_hopper
from .layers import layers, matrices
from .nunchaku_file import LITE, NunchakuFile, Piece, opened
from .nunchaku_keys import W4A4, W4A16, Rule
from .nunchaku_layout import TILE, deinterleave, unpack_vector
from .nunchaku_linear import AWQ_GROUP, RANK_STEP, Linear, Packed, join_columns, own_rows, pack, read
from .passes.peft_names import is_adapter, without_adapters
from .placing import device_of, own_buffers, owner_of, put_plain, put_quantized
from .progress import say, steps
from .summary import tell_to_compile, title

IN_FILE = "16-bit in the file"
JOINT = 64  # input channels: linears are joined where groups of any format end
RECODED = "w4a8"  # what a 4-bit linear may be coded anew as


@dataclass(frozen=True)
class _Job:
    """Linears to make: of one module of the file, or of the two that hold the columns of one linear.

    linears  stock modules whose rows they hold; rows: how many of each
    widths   input channels of each module of the file
    """

    pieces: tuple[Piece, ...]
    linears: tuple[str, ...]
    rows: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass
class _Plan:
    """Everything that is to be done to a model, found and checked before any of it is."""

    jobs: list[_Job] = field(default_factory=list)
    plain: dict[str, tuple[str, Rule | None, int, int]] = field(default_factory=dict)  # stock name -> tensor, rows


def load(
    model: nn.Module,
    path: str | os.PathLike,
    device: torch.device | None = None,
    *,
    precision: str | None = None,
    progress: bool = True,
) -> None:
    """Load a checkpoint into a model of diffusers' class, on the meta device or with any weights.

    precision  None: what the file has; "w4a8": code its 4-bit linears anew for int8 activations, and say the error

    Raises OptionError, FileNotFoundError, and FileRefused, naming what is wrong: before the model is changed.
    """
    serve_libraries()
    with opened(path) as file:
        chosen = _precision(file, precision)
        plan = _planned(file, model)
        target = device_of(model) if device is None else device
        for job in steps(plan.jobs, f"checking {path}", progress):
            _check_values(file, model, job, target, chosen)
        packs: dict[str, Packed] = {}
        for job in steps(plan.jobs, f"loading {path}", progress):
            packs |= _packs(file, model, job, target, chosen)
        plain = {
            name: _part(file.get(tensor), rule, start, rows).view(_shape(model, name)).to(target)
            for name, (tensor, rule, start, rows) in plan.plain.items()
        }
    # Everything has been read: nothing can be refused any more.
    for name, made in packs.items():
        put_quantized(model, f"{name}.weight", made.packed, made.packed.up.dtype, error=made.error, calibrated=None)
        if made.bias is not None:
            put_plain(model, f"{name}.bias", made.bias)
    for name, tensor in plain.items():
        put_plain(model, name, tensor)
    for name, buffer in list(without_adapters(model.named_buffers())):
        put_plain(model, name, buffer.to(target))
    for layer in layers(model):
        if layer.name not in packs and not is_adapter(layer.name):
            decisions.leave_alone(layer.weight, IN_FILE)
    decisions.place(model)
    model.eval()
    _tell(model, file, {name: made.error for name, made in packs.items()}, chosen, progress)
    tell_to_compile(model, progress)


def _tell(model: nn.Module, file: NunchakuFile, errors: dict[str, float], precision: str, progress: bool) -> None:
    text = f"svdquant: {title(model)}: {len(errors)} linears of Nunchaku's {file.packaging}, {file.precision}"
    if precision != file.precision and errors:
        worst = max(errors, key=lambda name: errors[name])
        recoded = [error for error in errors.values() if error]
        mean = sum(recoded) / max(len(recoded), 1)
        text += (
            f", coded anew as {precision}: their weights change by {100 * mean:.2f} % on average, "
            f"by {100 * errors[worst]:.2f} % at most ({worst})"
        )
    else:
        text += ", with the file's own integers and scales"
    say(text, progress)


def _precision(file: NunchakuFile, wanted: str | None) -> str:
    if wanted is None or wanted in (file.precision, RECODED):
        return wanted or file.precision
    raise OptionError(
        f"precision={wanted!r}: {file.path} has {file.precision} linears; they can be loaded as they are "
        f"(leave precision out) or coded anew with precision={RECODED!r}"
    )


# ** does it fit? **


def _planned(file: NunchakuFile, model: nn.Module) -> _Plan:
    """What goes where; raises FileRefused unless the checkpoint's linears and tensors are the model's, all of them."""
    plan = _Plan()
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    state: dict[str, Tensor] = dict(without_adapters(named))
    hint = f"the file is of a {file.stock_class or 'model'}, the model a {type(model).__name__}"
    halves: dict[tuple[str, ...], list[Piece]] = {}
    for piece in file.pieces:
        halves.setdefault(piece.parts, []).append(piece)
    linears = {layer.name for layer in matrices(model) if layer.is_linear}
    for parts, pieces in halves.items():
        for part in parts:
            if part not in linears:
                raise file.refuse(f"the model has no linear {part}, which {pieces[0].name} is for ({hint})")
        plan.jobs.append(_job(file, state, parts, pieces, hint))
    held = {f"{part}.weight" for job in plan.jobs for part in job.linears}
    for job in plan.jobs:
        for part in job.linears:
            if f"{part}.bias" in state:
                if not any("bias" in piece.tensors for piece in job.pieces):
                    raise file.refuse(f"tensor {job.pieces[0].name}.bias is missing: {part} has a bias ({hint})")
                held.add(f"{part}.bias")
    for tensor in file.plain:
        _place_plain(file, state, plan, tensor, held, hint)
    for name in state.keys() - held - plan.plain.keys() - own_buffers(model):
        raise file.refuse(f"tensor {name} of the model is missing ({hint})")
    return plan


def _job(file: NunchakuFile, state: dict[str, Tensor], parts: tuple[str, ...], pieces: list[Piece], hint: str) -> _Job:
    shapes = [tuple(state[f"{part}.weight"].flatten(1).shape) for part in parts]
    rows, k = tuple(n for n, _ in shapes), shapes[0][1]
    if any(shape[1] != k for shape in shapes):
        raise file.refuse(f"{' and '.join(parts)} of the model read inputs of different widths ({hint})")
    widths: tuple[int, ...] = (k,)
    if pieces[0].rule.writer:
        order = {piece.rule.writer: piece for piece in pieces}
        pieces = sorted(pieces, key=lambda piece: piece.rule.shifted)
        writers = [f"{piece.block}{piece.rule.writer}.weight" for piece in pieces]
        if len(order) != 2 or any(writer not in state for writer in writers):
            raise file.refuse(f"{parts[0]} is split in two in the file, and only {pieces[0].name} is there")
        widths = tuple(state[writer].shape[0] for writer in writers)
        if sum(widths) != k or widths[0] % JOINT:
            raise file.refuse(f"{parts[0]} of the model reads {k} channels, which the file has as {widths} ({hint})")
    elif len(pieces) > 1:
        raise file.refuse(f"{parts[0]} is in the file twice: as {pieces[0].name} and as {pieces[1].name}")
    for piece, width in zip(pieces, widths, strict=True):
        _check_shapes(file, piece, rows, width, hint)
    return _Job(tuple(pieces), parts, rows, widths)


def _check_shapes(file: NunchakuFile, piece: Piece, rows: tuple[int, ...], k: int, hint: str) -> None:
    """That each tensor of a module has the shape it must have, padded or not."""
    shapes = {name: file.shape(tensor) for name, tensor in piece.tensors.items()}

    def check(name: str, *allowed: tuple[int, ...]) -> None:
        if name in shapes and shapes[name] not in allowed:
            expected = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
            raise file.refuse(f"tensor {piece.tensors[name]} is {shapes[name]}, not {expected} ({hint})")

    if piece.packing == W4A16:
        n, groups = sum(rows), padded(k, AWQ_GROUP) // AWQ_GROUP
        if n % 4 or k % AWQ_GROUP or n % piece.rule.chunks:
            raise file.refuse(
                f"{piece.name} is of {n} x {k}, which this layout cannot hold: 4 rows, {AWQ_GROUP} channels"
            )
        check("qweight", (n // 4, k // 2))
        for name in ("wscales", "wzeros"):
            check(name, (groups, n), (padded(groups, 16), n))
        check("bias", (n,))
        return
    n = sum(padded(size, TILE) for size in rows) if piece.rule.padded else padded(sum(rows), TILE)
    # As they are, to whole tiles of 64 or of 128 channels: the converter, the engine and nunchaku_lite differ.
    inner = [padded(k, 64), padded(k, TILE)]
    if file.packaging == LITE and (n != sum(rows) or k != inner[0]):
        raise file.refuse(
            f"{piece.name} is of {sum(rows)} x {k}: {LITE} has no padding, and this layout's tiles are {TILE} x 64"
        )
    group = 16 if file.precision == "nvfp4" else 64
    check("qweight", *((n, width // 2) for width in inner))
    check("wscales", *((width // group, n) for width in inner))
    for name in ("smooth_factor", "smooth_factor_orig"):
        check(name, *((padded(width, TILE),) for width in inner))
    if file.rank % RANK_STEP:
        raise file.refuse(f"its low-rank branches are of rank {file.rank}, not a multiple of {RANK_STEP}")
    check("proj_down", *((width, file.rank) for width in inner))
    check("proj_up", (n, file.rank))
    for name in ("bias", "wcscales"):
        check(name, (n,))
    check("wtscale", (1,), ())


def _place_plain(
    file: NunchakuFile, state: dict[str, Tensor], plan: _Plan, tensor: str, held: set[str], hint: str
) -> None:
    """Find which tensors of the model a 16-bit tensor of the file holds."""
    module, _, leaf = tensor.rpartition(".")
    block, rule = _rule_of_plain(file, module)
    names = [f"{block}{part}.{leaf}" for part in rule.parts] if rule else [tensor]
    start = 0
    for name in names:
        if name not in state:
            raise file.refuse(f"the model has no tensor {name} ({hint})")
        if name in held or name in plan.plain:
            raise file.refuse(f"{name} is in the file twice, once as {tensor}")
        if file.is_float(tensor) != state[name].is_floating_point():
            raise file.refuse(
                f"tensor {tensor} has another dtype than the model's {name}, {state[name].dtype} ({hint})"
            )
        if file.is_16_bit(tensor) and not file.is_16_bit(tensor, file.dtype):
            raise file.refuse(f"tensor {tensor} is of another 16-bit dtype than the linears, {file.dtype}")
        rows = state[name].shape[0] if state[name].dim() else 1
        plan.plain[name] = tensor, rule, start, rows
        start += rows
    shape, expected = file.shape(tensor), tuple(state[names[0]].shape)
    if rule is not None:
        expected = (start, *(rule.shape[1:] if rule.shape and leaf == "weight" else expected[1:]))
    if shape != expected:
        raise file.refuse(f"tensor {tensor} is {shape}, not {expected} ({hint})")


def _rule_of_plain(file: NunchakuFile, module: str) -> tuple[str, Rule | None]:
    """How a module that is not quantized is to be cut; None if it is as the model has it."""
    found = file.architecture.rule(module) if file.architecture else None
    if found is None:
        return "", None
    block, rule = found
    if rule.packing == W4A16 or rule.writer:
        raise file.refuse(f"{module} is 16-bit in the file: this version knows it as {rule.packing} only")
    is_same = rule.chunks == 1 and rule.parts == (module.removeprefix(block),)
    return block, None if is_same else rule


def _check_values(file: NunchakuFile, model: nn.Module, job: _Job, device: torch.device, precision: str) -> None:
    """That scales and factors are numbers, and that this device's order has a place for all codes."""
    for piece in job.pieces:
        for name, tensor in piece.tensors.items():
            if name in ("qweight", "smooth_factor_orig"):
                continue
            values = file.get(tensor).float()
            bad = int((~values.isfinite()).sum())
            if bad:
                raise file.refuse(f"tensor {tensor} holds {bad} NaN or Inf values")
            if name == "smooth_factor" and not bool(values.all()):
                raise file.refuse(
                    f"tensor {tensor} holds {int((values == 0).sum())} zeros, by which inputs are divided"
                )
            if name == "bias" and not (_has_bias(model, job.linears[0]) or piece.rule.shifted):
                values = own_rows(unpack_vector(values) if piece.packing == W4A4 else values, piece.rule, job.rows)
                if bool(values.any()):
                    raise file.refuse(f"tensor {tensor} is a bias, and {job.linears[0]} of the model has none")
        if precision == "int4" and is_hopper(device):
            nibbles = file.get(piece.tensors["qweight"]).view(torch.uint8)
            if piece.packing != W4A16 and bool((((nibbles & 15) == 8) | ((nibbles >> 4) == 8)).any()):
                raise FileRefused(
                    file.path,
                    f"{piece.name} holds the code -8, for which this GPU has no place: give precision={RECODED!r}",
                )


def _has_bias(model: nn.Module, linear: str) -> bool:
    return owner_of(model, linear)._parameters.get("bias") is not None


# ** into the model **


def _packs(file: NunchakuFile, model: nn.Module, job: _Job, device: torch.device, precision: str) -> dict[str, Packed]:
    """The linears of one job, by their modules' names."""
    with torch.no_grad():
        halves = [
            read({name: file.get(t).to(device) for name, t in piece.tensors.items()}, piece.rule, job.rows, width)
            for piece, width in zip(job.pieces, job.widths, strict=True)
        ]
        whole = halves[0] if len(halves) == 1 else join_columns(*halves)
        linears = _split(whole, job.rows)
        wanted = whole.precision if whole.precision == "w4a16" else precision
        packs = pack(linears, [_has_bias(model, name) for name in job.linears], wanted)
    return dict(zip(job.linears, packs, strict=True))


def _split(whole: Linear, rows: tuple[int, ...]) -> list[Linear]:
    linears, start = [], 0
    for count in rows:
        linears.append(whole.rows(start, start + count))
        start += count
    return linears


def _part(tensor: Tensor, rule: Rule | None, start: int, rows: int) -> Tensor:
    """The rows of one of the linears that a 16-bit tensor holds."""
    if rule is None:
        return tensor
    return deinterleave(tensor, rule.chunks)[start : start + rows].contiguous()


def _shape(model: nn.Module, name: str) -> torch.Size:
    module, _, leaf = name.rpartition(".")
    return getattr(owner_of(model, module), leaf).shape
