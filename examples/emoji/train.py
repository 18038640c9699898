"""Train the emoji diffusion transformer from scratch on one GPU.

    python train.py --images lobehub-fluent-emoji-3d-1.1.0.tgz --names emoji.json --output emoji

--images is the npm package @lobehub/fluent-emoji-3d (256-pixel WebP files named by code points, MIT), --names is
emoji.json of the npm package emoji-datasource-google (names by code points, MIT). The output folder is a complete
diffusers pipeline folder (pipeline.py reads it). `--init FOLDER` continues from such a folder.

Method: rectified flow in pixel space. x_t = (1 - sigma) * image + sigma * noise, the target is noise - image, the
timestep given to the transformer is sigma (FluxPipeline's timestep / 1000), sigma = sigmoid(normal(mean, std)).
A caption is dropped (all padding) one time in ten for classifier-free guidance. What is saved is the moving average
of the weights, in bfloat16.
"""

import argparse
import copy
import io
import json
import math
import re
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from pipeline import IMAGE_SIZE, MAX_TOKENS, PAD, EmojiPipeline, EmojiTextEncoder, image_ids, pack, words
from torch import Tensor, nn

TEXT_DIM = 256
MODEL: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 48,
    "num_layers": 4,
    "num_single_layers": 7,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 28, 28),
}
MIRRORED = ("Animals & Nature", "Food & Drink")  # categories whose pictures mean the same in a mirror
UNTIMED_STEPS = 20  # the first steps compile


class Emoji(NamedTuple):
    """One picture: its names, the full one first, and its category."""

    captions: list[str]
    category: str


# ---------------------------------------------------------------- data


def decode(data: bytes) -> np.ndarray:
    """A picture with alpha -> 256x256 RGB on white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB").resize((256, 256)))


def read_pictures(images: str, pattern: str = "*.webp") -> dict[str, bytes]:
    """The pictures of the npm package, by code points."""
    files = {}
    with tarfile.open(images) as tar:
        for member in tar.getmembers():
            stream = tar.extractfile(member) if fnmatch(member.name, pattern) else None
            if stream is not None:
                files[PurePath(member.name).stem] = stream.read()
    return files


def picture_key(row: dict[str, Any], files: dict[str, bytes]) -> str | None:
    """The file that shows this row of emoji.json; the two packages differ in variation selectors."""
    code = row["unified"].lower()
    keys = (code, (row["non_qualified"] or code).lower(), code.replace("-fe0f", ""))
    return next((k for k in keys if k in files), None)


def aliases(row: dict[str, Any], taken: set[str]) -> list[str]:
    """Short names that serve as a second caption: not another emoji's name (`taken`, grown here), no country code."""
    found = []
    for short in row["short_names"] if row["category"] != "Flags" else []:
        alias = " ".join(words(re.sub(r"\d+$", "", short)))
        if len(alias) > 2 and alias not in taken:
            taken.add(alias)
            found.append(alias)
    return found


def load_data(
    files: dict[str, bytes], names: str, render: Callable[[bytes], np.ndarray] = decode
) -> tuple[list[Emoji], np.ndarray]:
    """Every base emoji that has a picture, and the pictures as `render` makes them, uint8 (N, 256, 256, 3)."""
    table = json.loads(Path(names).read_text(encoding="utf-8"))
    taken = {" ".join(words(row["name"])) for row in table}
    emoji: list[Emoji] = []
    blobs: list[bytes] = []
    seen: set[str] = set()
    for row in sorted(table, key=lambda row: row["sort_order"]):
        key = picture_key(row, files)
        caption = " ".join(words(row["name"]))
        if key is None or caption in seen:
            continue
        seen.add(caption)
        emoji.append(Emoji([caption, *aliases(row, taken)], row["category"]))
        blobs.append(files[key])
    with ProcessPoolExecutor() as pool:
        pictures = np.stack(list(pool.map(render, blobs, chunksize=32)))
    return emoji, pictures


@torch.no_grad()
def augment(pictures: np.ndarray, emoji: Sequence[Emoji], count: int, device: str) -> Tensor:
    """uint8 (N, count, 3, 64, 64): variant 0 is the plain picture, the others are scaled and shifted a little;
    animals, food and plants are mirrored half the time. Downsampling is antialiased bicubic."""
    n, gen = len(pictures), torch.Generator().manual_seed(1)
    mirror_ok = torch.tensor([e.category in MIRRORED for e in emoji])
    out = torch.empty(n, count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    for start in range(0, n, 128):
        batch = torch.from_numpy(pictures[start : start + 128]).to(device).permute(0, 3, 1, 2).float() / 255
        b = len(batch)
        for v in range(count):
            zoom, shift, flip = torch.ones(b), torch.zeros(b, 2), torch.ones(b)
            if v:
                zoom = 0.95 + 0.09 * torch.rand(b, generator=gen)
                shift = (torch.rand(b, 2, generator=gen) - 0.5) * 2 * (1.5 / 32)  # up to 1.5 output pixels
                flip = torch.where((torch.rand(b, generator=gen) < 0.5) & mirror_ok[start : start + b], -1.0, 1.0)
            theta = torch.zeros(b, 2, 3)
            theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flip / zoom, 1 / zoom, shift
            grid = F.affine_grid(theta.to(device), list(batch.shape), align_corners=False)
            moved = 1 - F.grid_sample(1 - batch, grid, align_corners=False)  # outside is white
            small = F.interpolate(moved, size=IMAGE_SIZE, mode="bicubic", antialias=True, align_corners=False)
            out[start : start + b, v] = (small.clamp(0, 1) * 255).round().byte().cpu()
    return out.to(device)


def caption_table(emoji: Sequence[Emoji], text: EmojiTextEncoder, slots: int = 8) -> Tensor:
    """(N, 8, 12) token ids: the name in six slots, other names (if any) in the last two."""
    rows = []
    for captions, _ in emoji:
        others = (captions[1:] or captions)[:2]
        rows.append(text.tokenize([captions[0]] * (slots - 2) + (others * 2)[:2]))
    return torch.stack(rows)


# ---------------------------------------------------------------- model


def init_weights(model: FluxTransformer2DModel) -> None:
    """Xavier for linear layers; zero for every modulation layer and the output layer, as in DiT."""
    modulation = ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(modulation) or name == "proj_out":
                nn.init.zeros_(module.weight)
    for layer in (model.time_text_embed.timestep_embedder, model.time_text_embed.text_embedder):
        nn.init.normal_(layer.linear_1.weight, std=0.02)
        nn.init.normal_(layer.linear_2.weight, std=0.02)


def build(emoji: Sequence[Emoji], init: str | None) -> tuple[EmojiTextEncoder, FluxTransformer2DModel]:
    """The text encoder and the transformer in float32: new ones, or those of the folder `init`."""
    if init:
        model = FluxTransformer2DModel.from_pretrained(init, subfolder="transformer")
        return EmojiTextEncoder.from_folder(init).float().requires_grad_(True), model.float()
    vocab = sorted({w for captions, _ in emoji for c in captions for w in words(c)})
    text = EmojiTextEncoder(["<pad>", "<unk>", *vocab], TEXT_DIM)
    nn.init.normal_(text.token.weight, std=0.2)
    nn.init.normal_(text.position.weight, std=0.1)
    model = FluxTransformer2DModel(**MODEL)
    init_weights(model)
    return text, model


def save(folder: str, model: FluxTransformer2DModel, text: EmojiTextEncoder, shift: float) -> None:
    """Write the pipeline's folder in bfloat16."""
    stored = copy.deepcopy(model).to("cpu", torch.bfloat16)
    pipe = EmojiPipeline(stored, FlowMatchEulerDiscreteScheduler(shift=shift))
    pipe.text = copy.deepcopy(text).to("cpu", torch.bfloat16)
    pipe.save_pretrained(folder)


# ---------------------------------------------------------------- training


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Train the emoji diffusion transformer from scratch on one GPU.")
    p.add_argument("--images", required=True)
    p.add_argument("--names", required=True)
    p.add_argument("--output", required=True)
    p.add_argument("--init", help="continue from this folder")
    p.add_argument("--seconds", type=float, default=425, help="length of the training loop, compilation left out")
    p.add_argument("--max-steps", type=int, default=10**9)
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--warmup", type=int, default=400, help="steps")
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument("--ema", type=float, default=0.999)
    p.add_argument("--sigma-mean", type=float, default=0.4)
    p.add_argument("--sigma-std", type=float, default=1.1)
    p.add_argument("--drop", type=float, default=0.1, help="share of captions dropped")
    p.add_argument("--variants", type=int, default=16)
    p.add_argument("--shift", type=float, default=2.0, help="the saved scheduler's shift")
    p.add_argument("--compile", default="full", choices=["full", "off"])
    p.add_argument("--log-every", type=int, default=250, help="steps")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def trained(*modules: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [p for module in modules for p in module.parameters() if p.requires_grad]


class Trainer:
    """The model in training, its moving average, and the optimizer; `step` is one update.

    Of the model and the text encoder, what requires gradients is trained.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: FluxTransformer2DModel,
        text: EmojiTextEncoder,
        data: Tensor,
        captions: Tensor,
    ) -> None:
        self.args, self.data, self.captions = args, data, captions
        self.device = data.device.type
        self.text, self.model = text, model.train()
        self.averaged, self.averaged_text = copy.deepcopy(model).eval(), copy.deepcopy(text).eval()
        self.params, self.averages = trained(model, text), trained(self.averaged, self.averaged_text)
        for average in self.averages:
            average.requires_grad_(False)
        decay = [x for x in trained(model) if x.ndim > 1]
        rest = [x for x in trained(model) if x.ndim <= 1] + trained(text)
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.98),
            eps=1e-8,
            fused=self.device == "cuda",
        )
        self.img_ids, self.txt_ids = image_ids(self.device), torch.zeros(MAX_TOKENS, 3, device=self.device)

    def loss(self) -> Tensor:
        """The velocity error of one random batch."""
        args, b, device = self.args, self.args.batch, self.device
        pick = torch.randint(len(self.data), (b,), device=device)
        x0 = self.data[pick, torch.randint(args.variants, (b,), device=device)].float() / 127.5 - 1
        ids = self.captions[pick, torch.randint(self.captions.shape[1], (b,), device=device)]
        ids = torch.where(torch.rand(b, 1, device=device) < args.drop, PAD, ids)
        x0 = pack(x0)
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(b, device=device) * args.sigma_std + args.sigma_mean)
        s = sigma[:, None, None]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            embeds, pooled = self.text(ids)
            velocity = self.model(
                hidden_states=(1 - s) * x0 + s * noise,
                timestep=sigma,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                img_ids=self.img_ids,
                txt_ids=self.txt_ids,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - x0)

    def step(self, number: int, lr: float) -> Tensor:
        """One update with this learning rate; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.params, 1 - min(self.args.ema, (1 + number) / (10 + number)))
        return loss.detach()

    def run(self) -> tuple[int, list[dict[str, float]]]:
        """Train until the time or the steps are used up; the number of steps and the log of the loss."""
        args = self.args
        log: list[dict[str, float]] = []
        step, count, total, start = 0, 0, torch.zeros((), device=self.device), time.time()
        while True:
            if step == UNTIMED_STEPS:
                if self.device == "cuda":
                    torch.cuda.synchronize()
                print(f"compiled, {time.time() - start:.1f} s", flush=True)
                start = time.time()
            timed = step >= UNTIMED_STEPS
            done = max((time.time() - start) / args.seconds if timed else 0.0, step / args.max_steps)
            if done >= 1:
                return step, log
            lr = args.lr * min(1, (step + 1) / args.warmup) * max(0.5 * (1 + math.cos(math.pi * done)), 0.005)
            total += self.step(step, lr)
            step, count = step + 1, count + 1
            if step % args.log_every == 0:
                loss = total.item() / count  # also keeps the host from running far ahead
                total.zero_()
                count = 0
                took = time.time() - start
                log.append({"step": step, "seconds": round(took, 1), "loss": round(loss, 5), "lr": lr})
                rate = (step - UNTIMED_STEPS) * args.batch / took
                print(f"step {step}  {took:.0f} s  loss {loss:.5f}  lr {lr:.2e}  {rate:.3g} images/s", flush=True)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # flash attention: its backward is the safer one here
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.time()
    emoji, pictures = load_data(read_pictures(args.images), args.names)
    print(f"{len(emoji)} emoji decoded, {time.time() - begin:.1f} s", flush=True)
    data = augment(pictures, emoji, args.variants, device)
    print(f"{tuple(data.shape)} variants, {time.time() - begin:.1f} s", flush=True)

    text, model = build(emoji, args.init)
    captions = caption_table(emoji, text).to(device)
    trainer = Trainer(args, model.to(device), text.to(device), data, captions)
    size = sum(x.numel() for x in model.parameters())
    print(f"transformer {size / 1e6:.2f} M parameters, vocabulary {len(text.vocab)}", flush=True)
    if args.compile == "full":
        # The whole model: compiling block by block (compile_repeated_blocks) failed in the backward pass with an
        # illegal memory access on PyTorch 2.11 and an H200.
        model.compile()

    steps, log = trainer.run()
    save(args.output, trainer.averaged, trainer.averaged_text, args.shift)
    summary = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("images", "names", "output", "init")},
        "continued": bool(args.init),
        "steps": steps,
        "images": steps * args.batch,
        "emoji": len(emoji),
        "log": log,
    }
    Path(args.output, "training_log.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    names = "".join(e.captions[0] + "\n" for e in emoji)
    Path(args.output, "captions.txt").write_text(names, encoding="utf-8")
    print(f"saved, {time.time() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
