"""Nunchaku's checkpoints as tensors by name: which packaging it is, whose linears they are, and what they are made of.

    single file   <name>.safetensors with a configuration in its metadata
    two files     a folder with transformer_blocks.safetensors and unquantized_layers.safetensors
    nunchaku_lite a folder of diffusers' with a quantization_config in its config.json

What a checkpoint is is read off its content. What does not fit is refused before a tensor is unpacked.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import reading
from .errors import FileRefused
from .header import FORMAT
from .nunchaku_keys import ARCHITECTURES, W4A4, W4A16, Architecture, Rule
from .reading import TensorFile, json_object, unchanged

LITE = "nunchaku_lite"
SINGLE, TWO_FILES = "single file", "two files"
BLOCKS, REST = "transformer_blocks.safetensors", "unquantized_layers.safetensors"
LITE_FILE = "diffusion_pytorch_model.safetensors"

OLD_NAMES = {
    "proj_down": "lora_down",
    "proj_up": "lora_up",
    "smooth_factor": "smooth",
    "smooth_factor_orig": "smooth_orig",
}
_NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}
_H = ("BF16", "F16")
# field -> dtypes it may have, by packing; of a 4-bit linear the scales' dtype tells int4 from nvfp4.
_FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    W4A4: {
        "qweight": ("I8",),
        "wscales": (*_H, "F8_E4M3"),
        "smooth_factor": _H,
        "smooth_factor_orig": _H,
        "proj_down": _H,
        "proj_up": _H,
        "bias": _H,
        "wtscale": (*_H, "F32"),
        "wcscales": _H,
    },
    W4A16: {"qweight": ("I32",), "wscales": _H, "wzeros": _H, "bias": _H},
}
_NEEDED = {W4A4: ("qweight", "wscales", "smooth_factor"), W4A16: ("qweight", "wscales", "wzeros")}
_ONLY_NVFP4 = ("wtscale", "wcscales")
_WEIGHT_DTYPES = {"int4": "int4", "fp4_e2m1_all": "nvfp4"}  # as metadata has them


@dataclass(frozen=True)
class Piece:
    """One quantized module of a checkpoint.

    block    the block it stands in, with its dot
    tensors  field, by its new name -> name of the tensor
    """

    name: str
    block: str
    rule: Rule
    packing: str
    tensors: Mapping[str, str]

    @property
    def parts(self) -> tuple[str, ...]:
        """The stock modules whose rows it holds."""
        return tuple(self.block + part for part in self.rule.parts)


@dataclass(frozen=True)
class _View:
    """A tensor that is not read yet."""

    file: TensorFile
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class NunchakuFile:
    """An open checkpoint.

    architecture  whose names it has; None for nunchaku_lite, which has the stock ones
    precision     of its 4-bit linears, "" if it has none; rank: of all of them
    dtype         of its 16-bit tensors, as safetensors names it
    plain         names of the tensors that no quantized module has
    config        of the model, if it says so
    """

    path: str | os.PathLike
    packaging: str
    architecture: Architecture | None
    precision: str
    rank: int
    dtype: str
    pieces: tuple[Piece, ...]
    plain: tuple[str, ...]
    config: Mapping[str, Any]
    nbytes: int
    _views: Mapping[str, _View] = field(repr=False)

    def get(self, name: str) -> Tensor:
        """A tensor, read now."""
        return self._views[name].file.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._views[name].shape

    def is_float(self, name: str) -> bool:
        return self._views[name].dtype in (*_H, "F32", "F64")

    def is_16_bit(self, name: str, *dtypes: str) -> bool:
        """Whether a tensor is of one of these dtypes, by default of any with 16 bits."""
        return self._views[name].dtype in (dtypes or _H)

    def refuse(self, reason: str) -> FileRefused:
        """The error to raise."""
        return FileRefused(self.path, reason)

    @property
    def stock_class(self) -> str:
        """The class of diffusers that it is for; "" if it does not say."""
        return self.architecture.stock if self.architecture else str(self.config.get("_class_name", ""))


def is_nunchaku(path: str | os.PathLike) -> bool:
    """Whether this looks like a checkpoint of Nunchaku's: a file or folder whose linears lie in `qweight` tensors that
    this package has not written.
    """
    place = Path(path)
    if place.is_dir():
        return (place / BLOCKS).is_file() or _lite_config(place) is not None
    try:
        with reading.opened(path) as file:
            return file.metadata.get("format") != FORMAT and any(name.endswith(".qweight") for name in file.dtypes)
    except (OSError, FileRefused):
        return False


def _lite_config(folder: Path) -> dict[str, Any] | None:
    """Its config.json, if that is one of nunchaku_lite."""
    try:
        config = json_object(folder, "its config.json", (folder / "config.json").read_bytes())
    except (OSError, FileRefused):
        return None
    told = config.get("quantization_config")
    return config if isinstance(told, dict) and told.get("quant_method") == LITE else None


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[NunchakuFile]:
    """A checkpoint, its names, dtypes and metadata checked. Raises FileNotFoundError and FileRefused."""
    place = Path(path)
    with ExitStack() as stack:
        if not place.is_dir():
            if not place.is_file():
                raise FileNotFoundError(f"{path}: there is no such file")
            views, metadata = _views(path, [place], stack)
            yield _engine_file(path, SINGLE, views, metadata, place.stat().st_size)
        elif (config := _lite_config(place)) is not None:
            files = _lite_files(place)
            views, _ = _views(path, files, stack)
            yield _lite_file(path, views, config, sum(file.stat().st_size for file in files))
        else:
            files = [place / BLOCKS, place / REST]
            for file in files:
                if not file.is_file():
                    raise FileRefused(path, f"{file.name} is missing: a folder of Nunchaku's has {BLOCKS} and {REST}")
            views, _ = _views(path, files, stack)
            config_file = place / "config.json"
            told = {"config": config_file.read_bytes()} if config_file.is_file() else {}
            yield _engine_file(path, TWO_FILES, views, told, sum(file.stat().st_size for file in files))


def _lite_files(folder: Path) -> list[Path]:
    index = folder / f"{LITE_FILE}.index.json"
    if not index.is_file():
        if not (folder / LITE_FILE).is_file():
            raise FileRefused(folder, f"it has neither {LITE_FILE} nor {index.name}")
        return [folder / LITE_FILE]
    names = json_object(folder, index.name, index.read_bytes()).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise FileRefused(folder, f"{index.name} has no weight_map of tensors to files")
    for name in sorted(set(names.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise FileRefused(folder, f"{index.name} names {name!r}, which is no file of this folder")
    return [folder / name for name in sorted(set(names.values()))]


def _views(path: str | os.PathLike, files: list[Path], stack: ExitStack) -> tuple[dict[str, _View], dict[str, str]]:
    stack.enter_context(unchanged(path, files))
    views: dict[str, _View] = {}
    metadata: dict[str, str] = {}
    for place in files:
        file = stack.enter_context(reading.opened(place))
        metadata |= file.metadata
        for name, dtype in file.dtypes.items():
            if name in views:
                raise FileRefused(path, f"tensor {name} is in two of its files")
            views[name] = _View(file, dtype, file.shapes[name])
    return views, metadata


# ** whose names they are **


def _engine_file(
    path: str | os.PathLike, packaging: str, views: dict[str, _View], metadata: Mapping[str, Any], nbytes: int
) -> NunchakuFile:
    modules = _modules(path, views)
    if not modules:
        raise FileRefused(path, "no module of it is quantized: it has no qweight tensor")
    architecture = _architecture(path, modules, metadata.get("model_class"))
    pieces, passed = [], set()
    for name, tensors in modules.items():
        if architecture.ignores(name):
            passed |= set(tensors.values())
            continue
        found = architecture.rule(name)
        if found is None:
            raise FileRefused(path, f"{name} is quantized, which the files of {architecture.title} models have not")
        block, rule = found
        packing = W4A16 if views[tensors["qweight"]].dtype == "I32" else W4A4
        if packing != rule.packing:
            raise FileRefused(
                path, f"{name} is {packing}, which this version knows as {rule.packing} in {architecture.title} models"
            )
        pieces.append(Piece(name, block, rule, packing, tensors))
    config = json_object(path, "its config", metadata["config"]) if "config" in metadata else {}
    found_precision, rank, dtype = _check_pieces(path, pieces, views)
    if "quantization_config" in metadata:
        told = json_object(path, "its quantization_config", metadata["quantization_config"])
        _check_told(path, told, found_precision, rank)
    plain = _plain(views, pieces, passed)
    return NunchakuFile(
        path, packaging, architecture, found_precision, rank, dtype, tuple(pieces), plain, config, nbytes, views
    )


def _architecture(path: str | os.PathLike, modules: Mapping[str, Mapping[str, str]], told: str | None) -> Architecture:
    """Whose names these are; the metadata, where it names a class, must say the same."""

    def known(candidate: Architecture) -> int:
        return sum(candidate.rule(name) is not None or candidate.ignores(name) for name in modules)

    best = max(ARCHITECTURES, key=known)
    if known(best) < len(modules):
        stranger = next(name for name in modules if best.rule(name) is None and not best.ignores(name))
        titles = ", ".join(candidate.title for candidate in ARCHITECTURES)
        raise FileRefused(path, f"the quantized module {stranger} is in no key map of this version ({titles})")
    if told is not None and told not in (*best.engines, best.stock):
        by_class = {name: candidate for candidate in ARCHITECTURES for name in (*candidate.engines, candidate.stock)}
        if told not in by_class:
            raise FileRefused(path, f"it is of a {told}, a class that this version has no key map for")
        if known(by_class[told]) < len(modules):
            raise FileRefused(path, f"its metadata says {told}, but its tensors have the names of {best.title} models")
        return by_class[told]
    return best


def _modules(path: str | os.PathLike, views: Mapping[str, _View]) -> dict[str, dict[str, str]]:
    """Quantized module -> field, by its new name -> tensor."""
    names = [name.rpartition(".")[0] for name in views if name.endswith(".qweight")]
    modules: dict[str, dict[str, str]] = {name: {} for name in names}
    for name in views:
        module, _, leaf = name.rpartition(".")
        if module in modules:
            new = _NEW_NAMES.get(leaf, leaf)
            if new in modules[module]:
                raise FileRefused(path, f"{module} has both {leaf} and {OLD_NAMES.get(leaf, new)}, which are one thing")
            modules[module][new] = name
    return modules


def _plain(views: Mapping[str, _View], pieces: list[Piece], passed: set[str]) -> tuple[str, ...]:
    held = {name for piece in pieces for name in piece.tensors.values()} | passed
    return tuple(name for name in views if name not in held)


def _check_pieces(path: str | os.PathLike, pieces: list[Piece], views: Mapping[str, _View]) -> tuple[str, int, str]:
    """That each module has its tensors, in dtypes that go together, and all are alike -> precision, rank, dtype."""
    seen: dict[str, dict[Any, str]] = {"precision": {}, "rank": {}, "16-bit dtype": {}}
    for piece in pieces:
        found = _check_piece(path, piece, views)
        for what, value in found.items():
            seen[what].setdefault(value, piece.name)
    for what, values in seen.items():
        if len(values) > 1:
            (a, one), (b, other) = list(values.items())[:2]
            raise FileRefused(path, f"its linears differ in {what}: {one} has {a}, {other} has {b}")
    precision, rank, dtype = (next(iter(values), None) for values in seen.values())
    return str(precision or ""), int(rank or 0), str(dtype)


def _check_piece(path: str | os.PathLike, piece: Piece, views: Mapping[str, _View]) -> dict[str, Any]:
    known = _FIELDS[piece.packing]
    for field_, name in piece.tensors.items():
        if field_ not in known:
            raise FileRefused(path, f"tensor {name} is none that this version knows of a {piece.packing} linear")
        if views[name].dtype not in known[field_]:
            raise FileRefused(path, f"tensor {name} is {views[name].dtype}, not {' or '.join(known[field_])}")
    for field_ in _NEEDED[piece.packing]:
        if field_ not in piece.tensors:
            raise FileRefused(path, f"tensor {piece.name}.{field_} is missing")
    halves = Counter(views[n].dtype for f, n in piece.tensors.items() if views[n].dtype in _H and f != "wtscale")
    if len(halves) > 1:
        raise FileRefused(path, f"the 16-bit tensors of {piece.name} are of two dtypes, {' and '.join(halves)}")
    found: dict[str, Any] = {"16-bit dtype": next(iter(halves))}
    if piece.packing == W4A16:
        return found
    precision = "nvfp4" if views[piece.tensors["wscales"]].dtype == "F8_E4M3" else "int4"
    for field_ in _ONLY_NVFP4:
        if precision == "int4" and field_ in piece.tensors:
            raise FileRefused(path, f"tensor {piece.tensors[field_]} goes with nvfp4, and {piece.name} is int4")
    if ("proj_down" in piece.tensors) != ("proj_up" in piece.tensors):
        raise FileRefused(path, f"{piece.name} has one half of a low-rank branch: proj_down and proj_up go together")
    shapes = [views[piece.tensors[f]].shape for f in ("proj_down", "proj_up") if f in piece.tensors]
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) > 1:
        raise FileRefused(path, f"the low-rank branch of {piece.name} is {shapes[0]} and {shapes[1]}: not of one rank")
    return found | {"precision": precision, "rank": shapes[0][1] if shapes else 0}


def _check_told(path: str | os.PathLike, told: Mapping[str, Any], precision: str, rank: int) -> None:
    """That the metadata says what the tensors are."""
    weight = told.get("weight")
    dtype = weight.get("dtype") if isinstance(weight, dict) else None
    if dtype is not None and (not isinstance(dtype, str) or _WEIGHT_DTYPES.get(dtype) != precision):
        raise FileRefused(path, f"its metadata says {dtype!r} weights, and its tensors are {precision}")
    if "rank" in told and told["rank"] != rank:
        raise FileRefused(path, f"its metadata says rank {told['rank']!r}, and its tensors have {rank}")


# ** nunchaku_lite **


def _lite_file(
    path: str | os.PathLike, views: dict[str, _View], config: Mapping[str, Any], nbytes: int
) -> NunchakuFile:
    told = config["quantization_config"]
    modules = _modules(path, views)
    packings: dict[str, str] = {}
    for section, packing in (("svdq_w4a4", W4A4), ("awq_w4a16", W4A16)):
        for target in _targets(path, told, section):
            if target not in modules:
                raise FileRefused(path, f"its config.json has {target} quantized, and its tensors do not")
            packings[target] = packing
    for name in modules.keys() - packings.keys():
        raise FileRefused(path, f"{name} is quantized, which its config.json does not say")
    if not packings:
        raise FileRefused(path, "its config.json has no targets in svdq_w4a4 or awq_w4a16")
    pieces = [
        Piece(name, "", Rule((name,), (name,), packing), packing, modules[name]) for name, packing in packings.items()
    ]
    precision, rank, dtype = _check_pieces(path, pieces, views)
    if (many := told.get("svdq_w4a4")) is not None:
        if many.get("precision") != precision:
            raise FileRefused(path, f"its config.json says {many.get('precision')!r}, and its tensors are {precision}")
        _check_told(path, {"rank": many.get("rank")}, precision, rank)
    plain = _plain(views, pieces, set())
    return NunchakuFile(path, LITE, None, precision, rank, dtype, tuple(pieces), plain, config, nbytes, views)


def _targets(path: str | os.PathLike, told: Mapping[str, Any], section: str) -> list[str]:
    content = told.get(section)
    if content is None:
        return []
    targets = content.get("targets") if isinstance(content, dict) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise FileRefused(path, f"{section} in its config.json has no list of targets")
    return targets
