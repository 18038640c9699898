"""A use of a weight whose 16-bit values are gone, refused: by whom it came and what to do instead.

Who asks stands on Python's stack: the same `add()` may fuse a LoRA or be somebody's own arithmetic.
"""

from dataclasses import dataclass
from types import FrameType

from .errors import WeightsReleased
from .lowering.stack import frames

KEEP_A_COPY = 'Quantize with weights="offload", which keeps a copy of it in CPU memory.'
SAVE = "Write the 4-bit model with svdq_compile.save(model, path)."
SOURCE = "Give restore a state_dict that holds it, or dequantize=True for values that are close to it."
RESTORE = "Turn the model back to 16-bit first, with svdq_compile.restore(model, state_dict)."


@dataclass(frozen=True)
class _Asker:
    """Somebody's code that reads weights.

    package, file  that its path holds; function: the name of one, or "" for all in the file
    """

    package: str
    file: str
    functions: tuple[str, ...]
    use: str
    remedy: str


_FUSING = ("merge", "unmerge", "merge_and_unload", "merge_adapter", "fuse_lora", "unfuse_lora")
_AT_ONCE = "It need not be: linears that read one input are one product here. Or fuse before the model is quantized."
_GROUPS = "Leave out offload_to_disk_path."
_SMALLER = "It is smaller than the adapter's: fuse that into the 16-bit model before it is quantized."
_LORA = "A LoRA need not be fused: beside the weight it runs in the same kernel, and set_adapters changes its strength."
_ASKERS = (
    _Asker("peft", "dora.py", (), "a DoRA adapter", "Fuse it into the 16-bit model, then quantize what comes out."),
    _Asker("peft", "", _FUSING, "fusing an adapter", _LORA),
    _Asker("diffusers", "", _FUSING, "fusing an adapter", _LORA),
    _Asker(
        "diffusers",
        "lora_pipeline.py",
        ("_maybe_expand_transformer_param_shape_or_error_",),
        "enlarging a linear for an adapter",
        _SMALLER,
    ),
    _Asker("diffusers", "", ("fuse_projections", "fuse_qkv_projections"), "fusing q, k and v", _AT_ONCE),
    _Asker("diffusers", "group_offloading.py", (), "group offloading through a file", _GROUPS),
    _Asker("accelerate", "offload.py", (), "a device_map to disk", "Give it no module for disk, but for the CPU."),
    _Asker("torchao", "", (), "quantizing with torchao", RESTORE),
    _Asker("safetensors", "torch.py", (), "writing a safetensors file", SAVE),
    _Asker("torch", "serialization.py", ("save",), "torch.save", SAVE),
    _Asker("", "", ("save_pretrained",), "save_pretrained", SAVE),
)


def refused(layer: str, use: str, remedy: str = KEEP_A_COPY) -> WeightsReleased:
    """The error, for the first of `_ASKERS` that is on the stack, or for this use."""
    calls = [(_path(frame), frame.f_code.co_name) for frame in frames()]
    for asker in _ASKERS:
        for parts, function in calls:
            is_there = (not asker.package or asker.package in parts) and asker.file in ("", parts[-1])
            if is_there and (not asker.functions or function in asker.functions):
                return WeightsReleased(layer, asker.use, asker.remedy)
    return WeightsReleased(layer, use, remedy)


def is_asked_by(package: str, file: str = "", function: str = "") -> bool:
    """Whether what a weight is asked just now stands in this package, in a file and a function of these names if they
    are given.
    """
    calls = frames()
    for frame in calls:
        if frame.f_code.co_name == "__torch_function__":
            break
    asker = next(calls)
    path = _path(asker)
    return package in path and file in ("", path[-1]) and function in ("", asker.f_code.co_name)


def _path(frame: FrameType) -> list[str]:
    return frame.f_code.co_filename.replace("\\", "/").split("/")
