"""Every mistake a user can make has a class here, and its message says what to do about it."""

OF_THEIR_OWN = (
    "Where ranks hold models or parts of their own, say so with option group: 'alone', or the group of those ranks "
    "that hold the same."
)


class SvdqError(RuntimeError):
    """The base of all errors this package raises on purpose."""


class OptionError(SvdqError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class NotAModel(SvdqError, TypeError):
    """Something else was given where a model is wanted."""


class AlreadyWrapped(SvdqError):
    """A model in the wrapper of torch.compile was given where it is to be compiled in place."""

    def __init__(self, place: str) -> None:
        super().__init__(
            f"{place} is in the wrapper of torch.compile already: "
            f"take it off with `{place} = {place}._orig_mod`, then compile it in place"
        )


class TangentsNeeded(SvdqError):
    """The model is run with forward-mode differentiation; 4-bit weights are for inference."""

    def __init__(self) -> None:
        super().__init__(
            "svdquant is for inference only, but this call would be differentiated (torch.func.jvp or forward_ad). "
            "Differentiate the model in 16-bit, after svdq_compile.restore(model, state_dict)."
        )


class GradientsNeeded(SvdqError):
    """The model is run with gradients; 4-bit weights are for inference."""

    def __init__(self) -> None:
        super().__init__(
            "svdquant is for inference only, but this call would record gradients. "
            "Run the model under torch.no_grad() or torch.inference_mode(), or call model.requires_grad_(False) first."
        )


class NonFiniteWeight(SvdqError):
    """A weight holds NaN or Inf."""

    def __init__(self, layer: str, count: int) -> None:
        super().__init__(
            f"the weight of {layer} holds {count} NaN or Inf values, so it cannot be quantized. "
            f'Repair the checkpoint, or leave the layer in 16-bit with options={{"skip": ["*{layer}"]}}.'
        )


class UnsupportedDevice(SvdqError):
    """The weights are on a device this package has no arithmetic for."""

    def __init__(self, layer: str, device: str) -> None:
        super().__init__(
            f"{layer} is on device {device!r}; svdquant runs on 'cpu' and 'cuda'. Move the model first, "
            "or load a quantized file into it with svdq_compile.load. Where offloading has taken the weights away, "
            "quantize before it is enabled."
        )


class SendsAlone(SvdqError):
    """A graph that exchanges tensors with other ranks was not compiled here, and would send what they do not expect."""

    def __init__(self, what: str, cause: BaseException, remedy: str) -> None:
        super().__init__(
            f"{what} failed, and run eagerly it would exchange tensors one by one, which ranks where it is compiled "
            f"send together: {type(cause).__name__}: {cause}. Mend that, or {remedy}."
        )


class WeightsReleased(SvdqError):
    """Something needs 16-bit weights that were given back when the layer was quantized (remedies: released.py)."""

    def __init__(self, layer: str, use: str, remedy: str) -> None:
        super().__init__(
            f"{use} needs the 16-bit weight of {layer}, which was released when the layer was quantized. {remedy}"
        )


class ExportRefused(SvdqError):
    """torch.export or torch.jit.script would write down a weight without its values."""

    def __init__(self, layer: str, use: str) -> None:
        super().__init__(
            f"{use} cannot hold {layer}, which is quantized to 4 bits. "
            "Export the model in 16-bit, after svdq_compile.restore(model, state_dict)."
        )


class NothingToQuantize(SvdqError):
    """The model has no linear layer that can be quantized."""


class OtherModel(SvdqError, ValueError):
    """Statistics are of another model than the one they are given for, or to be merged with those of another."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"these statistics are of another model: {reason}")


class FileRefused(SvdqError):
    """A file is not a quantized model, is damaged, or is too new."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


class RanksDiffer(SvdqError):
    """Ranks that shall hold one model are about to do different things."""

    def __init__(self, kind: str, name: str, value: object, other: object, rank: int, other_rank: int) -> None:
        wrong, what = {
            "version": (f"has {name} {value}, rank {other_rank} {other}", "Install the same on all."),
            "option": (f"has option {name}={value!r}, rank {other_rank} {name}={other!r}", "Give all ranks the same."),
            "layer": (
                f"is at layer {name}: {value or 'none'}, rank {other_rank} at {other or 'none'}",
                "Ranks that hold one model call it alike, as often.",
            ),
            "input": (
                f"finds other layers that share the input of {name} ({value}) than rank {other_rank} ({other})",
                "Ranks that hold one model call it alike.",
            ),
            "split": (
                f"splits {name} by {value or 'nothing'}, rank {other_rank} by {other or 'nothing'}",
                "Give all the same plan.",
            ),
            "file": (f"reads {name} of {value}, rank {other_rank} of {other}", "Give all the same files."),
            "tensor": (f"reads another tensor {name} than rank {other_rank}", "Give all the same file."),
            "format": (
                f"has {name} as {value or 'none'}, rank {other_rank} as {other or 'none'}",
                "Load one file on all.",
            ),
            "weight": (f"has other values in the weight of {name} than rank {other_rank}", "Load one file on all."),
        }[kind]
        super().__init__(f"rank {rank} {wrong}: they cannot work as one model. {what} {OF_THEIR_OWN}")


class RanksApart(SvdqError):
    """A rank that was waited for did not come, or has ended."""

    def __init__(self, members: str, reason: str) -> None:
        super().__init__(
            f"ranks {members} did not all come to quantize, load, split or run one model: a rank has ended, has not "
            f"called the model as often, or has it quantized already. {OF_THEIR_OWN} ({reason})"
        )


class RankFailed(SvdqError):
    """Another rank has raised an error, which ends all."""

    def __init__(self, rank: int, kind: str, text: str) -> None:
        super().__init__(f"rank {rank} failed, so all ranks stop: {kind}: {text}")


class NonFinitePicture(SvdqError):
    """A picture, or the latents on the way to it, hold NaN or Inf."""

    def __init__(self, prompt: str, seed: int, bits: int) -> None:
        remedy = {
            16: "The pipeline is not right as it is: float16 may be too narrow for it, load it in bfloat16.",
            4: "Leave the layers with the largest errors in 16-bit (svdq_compile.report has them, option skip).",
        }[bits]
        super().__init__(f"the {bits}-bit picture of {prompt!r:.80}, seed {seed}, holds NaN or Inf. {remedy}")


class SplitRefused(SvdqError):
    """Something needs a whole model, of which each rank has a part."""


class CannotReproduce(SvdqError):
    """A module cannot be written as a stand-alone reproduction."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"cannot make a reproduction of {what or 'the model'}: {reason}")
